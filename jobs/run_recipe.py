"""Runs any recipe as a Ray job; the arguments are those of `modelyard run`.

ray job submit --working-dir . -- python jobs/run_recipe.py pipelines/quickstart.yaml --set base.steps=100
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from modelyard.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])

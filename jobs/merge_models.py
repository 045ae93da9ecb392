"""Runs the merge stages of a recipe, and what they need, as a Ray job.

ray job submit --working-dir . -- python jobs/merge_models.py my/merge.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from modelyard.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:], "--to-kind", "merge"])

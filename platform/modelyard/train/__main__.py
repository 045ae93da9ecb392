"""Trains without Ray: `torchrun --nproc-per-node 2 -m modelyard.train job.json` (or plain `python -m`).

`job.json` holds the fields of a `PretrainJob` or `FinetuneJob` under the key `pretrain` or `finetune`. Metrics are
printed as JSON lines, messages go to standard error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from modelyard.errors import ModelyardError, RecipeError
from modelyard.train.metrics import StepMetrics


def main(arguments: list[str]) -> None:
    """Runs the job described by the one file in `arguments`.

    Raises:
        RecipeError: there is not exactly one argument, or the file holds no known job.
    """
    from modelyard.train.programs import FinetuneJob, PretrainJob, finetune, pretrain
    from modelyard.train.world import joined

    if len(arguments) != 1:
        raise RecipeError("usage: python -m modelyard.train job.json")
    spec = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    with joined() as world:
        if "pretrain" in spec:
            pretrain(PretrainJob.model_validate(spec["pretrain"]), world, _print, _say)
        elif "finetune" in spec:
            finetune(FinetuneJob.model_validate(spec["finetune"]), world, _print, _say)
        elif "range_test" in spec:
            from modelyard.train.range_test import RangeTest, range_test

            result = range_test(RangeTest.model_validate(spec["range_test"]), world)
            print(json.dumps({"suggestion": result.suggestion, "lowest_at": result.lowest_at}), flush=True)
        else:
            raise RecipeError("the job has neither pretrain nor finetune nor range_test", place=arguments[0])


def _print(metrics: StepMetrics) -> None:
    print(json.dumps(metrics.dump()), flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ModelyardError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None

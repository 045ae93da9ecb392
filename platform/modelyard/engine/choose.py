"""From options to the engine that implements them: the one place that knows which there are."""

from __future__ import annotations

from pathlib import Path

from modelyard.engine import vllm_options
from modelyard.engine.options import Backend, EngineOptions
from modelyard.engine.protocol import Engine, Stepper
from modelyard.errors import RecipeError, ResourceError


def start(folder: str | Path, options: EngineOptions) -> Engine:
    """The engine that `options.backend` means, with this model.

    Raises:
        DataError: the folder is incomplete, unsafe or of another architecture.
        ResourceError: what is asked for is not installed, does not fit in memory, or is not there.
    """
    if backend(options) == "vllm":
        from modelyard.engine.vllm_engine import VllmEngine

        return VllmEngine(folder, options)
    from modelyard.engine.native import NativeEngine

    return NativeEngine(folder, options)


def stepper(folder: str | Path, options: EngineOptions) -> Stepper:
    """The same for a caller that steps it in a thread of its own. Raises as :func:`start`."""
    if backend(options) == "vllm":
        from modelyard.engine.stepped import Stepped

        return Stepped(start(folder, options), folder, options)
    from modelyard.engine.core import EngineCore

    return EngineCore(folder, options)


def backend(options: EngineOptions) -> Backend:
    """What `auto` means in this process: vLLM where it is installed, has what is asked for, and there are several GPUs
    (`EngineOptions.placed` has ruled it out for those that were given one)."""
    if options.backend != "auto":
        return options.backend
    import torch  # late: `check` is also called where nothing is to be computed

    several = options.device != "cpu" and torch.cuda.device_count() > 1
    if not several or not vllm_options.installed():
        return "native"
    try:
        vllm_options.check_options(options)
    except ResourceError:
        return "native"
    return "vllm"


def check(options: EngineOptions, gpus: float, *, here: bool = True) -> None:
    """What can be refused before anything starts.

    Args:
        options: as they stand in a recipe.
        gpus: that the engine's process will be given.
        here: it will run in this environment.

    Raises:
        RecipeError: a model that is cut over more GPUs, or options that contradict each other.
        ResourceError: vLLM is asked for and is not installed or does not have one of the options.
    """
    placed = options.placed(gpus)
    if placed.backend == "vllm":
        if 0 < gpus < 1:
            raise RecipeError("vLLM takes whole GPUs", place="engine.backend",
                              mend="give it whole ones, or use backend: native")  # fmt: skip
        vllm_options.check_options(placed)
        if here:
            vllm_options.check_installed()
    elif options.vllm and options.backend != "auto":
        raise RecipeError(f"these arguments are vLLM's, and the engine is {options.backend}", place="engine.vllm",
                          mend="leave them out, or use backend: vllm")  # fmt: skip

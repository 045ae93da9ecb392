"""GGUF files as Hugging Face folders: `python -m modelyard.engine.gguf model.gguf FOLDER` (the `gguf` extra).

transformers reads and dequantizes the file; the folder it becomes is what every other part of modelyard takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from modelyard.engine.checkpoint import FAMILIES
from modelyard.errors import DataError, ModelyardError, ResourceError


def convert(file: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Writes the model, tokenizer and chat template of a GGUF file as a new Hugging Face folder.

    Args:
        file: the GGUF file.
        folder: a folder that does not exist yet.
        dtype: of the saved tensors.

    Raises:
        DataError: the file cannot be read, or holds an architecture the engine does not run.
        ResourceError: the gguf package is not installed.
    """
    if not file.is_file():
        raise DataError("there is no such file", place=str(file), mend="give a .gguf file")
    if folder.exists():
        raise DataError("the folder exists", place=str(folder), mend="name a new one")
    model, tokenizer = _read(file)
    config = model.config
    if type(model).__name__ not in FAMILIES:
        raise DataError(
            f"architecture {type(model).__name__} is not supported", place=str(file), mend="use " + ", ".join(FAMILIES)
        )
    # The loaded model remembers that it was quantized and refuses to be saved: a plain one takes its tensors.
    plain = {k: v for k, v in config.to_dict().items() if k not in ("quantization_config", "_name_or_path", "dtype")}
    fresh = type(model)(type(config)(**plain)).to(dtype=_dtype(dtype))
    fresh.load_state_dict(model.state_dict())
    fresh.config.eos_token_id = tokenizer.eos_token_id
    fresh.config.bos_token_id = tokenizer.bos_token_id
    fresh.generation_config.eos_token_id = tokenizer.eos_token_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        fresh.save_pretrained(part)
        tokenizer.save_pretrained(part)
        _without_limits(part / "tokenizer_config.json")
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _read(file: Path) -> tuple[Any, Any]:
    try:
        import gguf  # noqa: F401 - transformers asks for it late and less clearly
    except ImportError as error:
        raise ResourceError(
            "reading GGUF needs the gguf package", place=str(file), mend="pip install 'modelyard[gguf]'"
        ) from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = str(file.parent)
    try:
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file.name, local_files_only=True)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        raise DataError(f"cannot read {file.name}: {error}", place=str(file), mend="use another GGUF file") from error
    return model, tokenizer


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _without_limits(file: Path) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command line: converts, and prints what went wrong if anything did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args(arguments)
    try:
        convert(args.file, args.folder, args.dtype)
    except ModelyardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Option models: the one description of a recipe that YAML, `--set`, JSON Schema and docs share."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

NAME = re.compile(r"^[a-z][a-z0-9_-]{0,47}$")
_SIZE = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)


class Options(BaseModel):
    """Base of every option model: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def runtime(default: Any, description: str, **kwargs: Any) -> Any:
    """A field that says where or how work runs, not what comes out: it never enters a fingerprint."""
    return Field(default, description=description, json_schema_extra={"fingerprint": False}, **kwargs)


def parse_bytes(value: Any) -> Any:
    """Turns `30MB`, `2GiB` or a plain number into bytes; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value)
    if match is None:
        raise ValueError(f"{value!r} is not a size: write bytes, or 30MB, 2GiB")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** " kmgt".index(unit.lower() or " "))


Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    Field(ge=0),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "examples": ["30MB", "2GiB"]}]}),
]


_WORKERS = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2},
    ]
}


class Resources(Options):
    """What a stage may use. Never part of a fingerprint: the result does not depend on it."""

    workers: Annotated[int, WithJsonSchema(_WORKERS)] = Field(
        1, ge=1, description="worker processes (Ray Train workers, Ray Data parallelism); [1, 4] sets min_workers too"
    )
    min_workers: int | None = Field(
        None, ge=1, description="training goes on with as few workers as this, and grows again; null = all or none"
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPU cores a worker holds")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs a worker holds")
    memory_per_worker: Bytes | None = Field(None, description="bytes of RAM a worker may use; null = the node's")
    hardware: str | None = Field(
        None, description="hardware name for predictions (`modelyard plan`); null = this machine"
    )
    region: str = Field("world", description="electricity grid for emissions, such as france; world = the mean")

    @model_validator(mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        """Reads `workers: [fewest, most]`."""
        given = value.get("workers") if isinstance(value, dict) else None
        if not isinstance(given, list | tuple):
            return value
        if len(given) != 2 or "min_workers" in value:
            raise ValueError("write workers: [fewest, most], or workers and min_workers")
        return {**value, "min_workers": given[0], "workers": given[1]}

    @model_validator(mode="after")
    def _in_order(self) -> Resources:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is above workers {self.workers}")
        return self

    @property
    def fewest(self) -> int:
        """The fewest workers the stage runs on."""
        return self.workers if self.min_workers is None else self.min_workers


class FileInput(Options):
    """Raw files as input, with a reproducible cap."""

    paths: tuple[str, ...] = Field(min_length=1, description="files, globs (** allowed), or s3:// URIs")
    exclude: tuple[str, ...] = Field((), description="globs to leave out")
    max_bytes: Bytes | None = Field(
        None, description="keep files, ordered by a hash of their name, until this many bytes; null = all"
    )


InputValue = str | tuple[str, ...] | FileInput


class StageOptions(Options):
    """What every stage has. A stage kind subclasses it, narrows `kind` and adds its own fields."""

    kind: str = Field(description="stage kind")
    inputs: dict[str, InputValue] = Field(
        default_factory=dict, description="input name -> name of another stage, or path, glob or URI"
    )
    resources: Resources = runtime(Resources(), "processes, cores and memory; never decides the result")
    retries: int = runtime(0, "how often to try the stage again after a failure", ge=0)


class Recipe(Options):
    """A whole recipe, validated: name, root and stages in the order they were written."""

    name: str = Field(description="name of the recipe: the MLflow experiment and the default model name")
    root: str = runtime(".modelyard", "where artifacts, work and the default MLflow store live: a folder or s3://")
    endpoint: str | dict[str, str] | None = runtime(
        None,
        "URL of the S3 service (MinIO, Ceph, ...): one for all buckets, or bucket -> URL; null = AWS_ENDPOINT_URL, "
        "else AWS; credentials come from the environment alone",
    )
    stages: dict[str, StageOptions] = Field(min_length=1, description="stage name -> stage")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not NAME.match(value):
            raise ValueError(f"{value!r}: use lower-case letters, digits, - and _, at most 48")
        return value

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        for url in value.values() if isinstance(value, dict) else [value] if value else []:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/"):
                raise ValueError("write an endpoint as http://host:port or https://host")
            if "@" in parts.netloc:
                raise ValueError(
                    "credentials do not belong in a recipe: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                )
        return value

    @field_validator("stages")
    @classmethod
    def _stage_names(cls, value: dict[str, StageOptions]) -> dict[str, StageOptions]:
        for name in value:
            if not NAME.match(name):
                raise ValueError(f"stage name {name!r}: use lower-case letters, digits, - and _, at most 48")
        return value

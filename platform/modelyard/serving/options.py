"""What a served model may be told: where to listen, how many replicas, limits, keys."""

from __future__ import annotations

from pydantic import Field, model_validator

from modelyard.engine.options import EngineOptions
from modelyard.recipe.schema import Bytes, Options

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Autoscaling(Options):
    """How many engine replicas run."""

    min_replicas: int = Field(1, ge=0, description="replicas kept when idle; 0 = none, the first request waits")
    max_replicas: int = Field(1, ge=1, description="replicas at most")
    target_requests: float | None = Field(
        None, gt=0, description="requests in flight a replica aims at; null = three quarters of engine.max_sequences"
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="seconds of overload before a replica is added")
    downscale_delay_s: float = Field(300.0, ge=0, description="seconds of idleness before a replica is removed")

    @model_validator(mode="after")
    def _order(self) -> Autoscaling:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})")
        return self


class ServeOptions(Options):
    """Everything `launch` needs besides the model."""

    host: str = Field("127.0.0.1", description="address to listen on; other than loopback only with api_keys")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 = any free one")
    autoscaling: Autoscaling = Field(Autoscaling(), description="number of engine replicas")
    engine: EngineOptions = Field(EngineOptions(), description="engine of each replica")
    cpus_per_replica: float = Field(1.0, gt=0, description="CPU cores Ray reserves for an engine replica")
    gpus_per_replica: float = Field(0.0, ge=0, description="GPUs Ray reserves for an engine replica")
    api_keys: str | None = Field(None, description="file of hashed API keys (modelyard.serving.keys); null = open")
    max_body: Bytes = Field(2_000_000, description="largest request body in bytes; larger ones get 413")
    max_queued: int = Field(256, ge=1, description="requests that wait for a replica; more get 429")
    request_timeout_s: float = Field(600.0, gt=0, description="seconds until a request is given up with 504")
    max_choices: int = Field(16, ge=1, description="answers one request may ask for (n times prompts)")
    haproxy: bool | None = Field(
        None,
        description="HAProxy in front instead of Serve's Python proxy: half the time to first token under load, but "
        "replicas listen on all interfaces and stopping takes longer; null = on when host is not loopback",
    )
    ready_timeout_s: float = Field(180.0, gt=0, description="seconds until a server that does not answer is given up")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK

    @property
    def use_haproxy(self) -> bool:
        """Whether HAProxy mode is on after defaults."""
        return (not self.loopback) if self.haproxy is None else self.haproxy

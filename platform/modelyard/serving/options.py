"""What a served model may be told: where to listen, how many replicas, limits, keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from modelyard.engine.options import EngineOptions
from modelyard.recipe.schema import Bytes, Options
from modelyard.serving.tls import Tls

AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
MAX_PRIORITY = 1000
"""Priorities of requests go from minus this to this; smaller runs first, as in vLLM."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Autoscaling(Options):
    """How many engine replicas run."""

    min_replicas: int = Field(1, ge=0, description="replicas kept when idle; 0 = none, the first request waits")
    max_replicas: int = Field(1, ge=1, description="replicas at most")
    target_kv: float = Field(
        0.75, gt=0, le=1, description="share of a replica's key/value memory that requests should hold; above, more run"
    )
    target_waiting_tokens: int = Field(
        4096, ge=1, description="prompt tokens waiting to be computed that are one more replica's worth"
    )
    target_requests: float | None = Field(
        None, gt=0, description="requests in flight a replica aims at, instead of the engine's load; null = its load"
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="seconds of overload before a replica is added")
    downscale_delay_s: float = Field(300.0, ge=0, description="seconds of idleness before a replica is removed")

    @model_validator(mode="after")
    def _order(self) -> Autoscaling:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})")
        return self


class CacheOptions(Options):
    """Answers that are given again without computing: exact matches of greedy or seeded requests."""

    ttl_s: float = Field(3600.0, gt=0, description="seconds an answer is kept")
    max_bytes: Bytes = Field(64_000_000, description="bytes of answers kept in this process")
    redis_url: str | None = Field(
        None, description="keep them in Redis instead (redis://host:6379/0), shared by all ingress processes"
    )
    share: bool = Field(False, description="give an answer to other API keys than the one that asked first")


class AsyncOptions(Options):
    """Requests that are answered later, through Redis."""

    redis_url: str = Field(description="Redis that keeps tasks and results (redis://host:6379/0)")
    keep_s: float = Field(86_400.0, gt=0, description="seconds a result is kept")
    concurrency: int = Field(16, ge=1, description="tasks a worker has in the engines at a time")
    max_pending: int = Field(10_000, ge=1, description="tasks that wait or run; more get 429")
    lease_s: float = Field(15.0, gt=0, description="seconds without a sign of life until another worker takes over")
    webhooks: tuple[str, ...] = Field(
        (),
        description="beginnings of addresses that may be told of an end (https://host/path); none = no webhooks",
    )
    webhook_secret: str | None = Field(None, description="file with the key webhooks are signed with (whsec_...)")


class Limit(Options):
    """What one API key may use; full at the start, filling steadily."""

    requests_per_minute: float | None = Field(None, gt=0, description="requests a minute; null = no limit")
    tokens_per_minute: float | None = Field(
        None, gt=0, description="tokens of prompts and answers a minute; null = no limit"
    )
    priority: int = Field(
        0, ge=-MAX_PRIORITY, le=MAX_PRIORITY,
        description="the smallest, most urgent priority a request may ask for; requests that name none have 0 or this",
    )  # fmt: skip


class Limits(Limit):
    """The limit of every key, and others by the holder's name. Without keys all callers share one."""

    keys: dict[str, Limit] = Field({}, description="holder's name -> its own limit")

    def of(self, holder: str) -> Limit:
        """The limit of one key's holder."""
        return self.keys.get(holder, self)


class Canary(Options):
    """Another version that answers some of the requests; at 50 percent, an A/B test."""

    model: str = Field(description="models:/name@candidate, models:/name/3, an artifact folder, or a model folder")
    percent: float = Field(10.0, gt=0, lt=100, description="percent of the requests it answers")


class Shadow(Options):
    """Another version that is asked the same and answers nobody; both answers are compared."""

    model: str = Field(description="models:/name@candidate, models:/name/3, an artifact folder, or a model folder")
    percent: float = Field(100.0, gt=0, le=100, description="percent of the requests that are copied to it")
    log: str | None = Field(None, description="folder or s3:// URI for a row a comparison; null = counted only")
    texts: bool = Field(False, description="whether rows hold prompts and answers; else only lengths and times")


class Traffic(Options):
    """Which versions answer, and how one takes another's place."""

    canary: Canary | None = Field(None, description="another version for some of the requests; null = none")
    shadow: Shadow | None = Field(None, description="another version for copies of requests; null = none")
    sticky: bool = Field(
        True, description="one caller (x-session-id header, else API key) is answered by the same version every time"
    )
    watch_s: float = Field(10.0, gt=0, description="seconds between two looks at the aliases in MLflow")
    drain_s: float = Field(
        120.0, ge=0, description="seconds a version that was replaced may take to end the answers it has begun"
    )


class ServeOptions(Options):
    """Everything `launch` needs besides the model."""

    host: str = Field("127.0.0.1", description="address to listen on; other than loopback only with api_keys")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 = any free one")
    autoscaling: Autoscaling = Field(Autoscaling(), description="number of engine replicas")
    engine: EngineOptions = Field(EngineOptions(), description="engine of each replica")
    adapters: dict[AdapterName, str] = Field(
        {}, description="LoRA adapters by their model name in the API: folder or URI, loaded when first asked for"
    )
    max_adapters: int = Field(8, ge=1, description="adapters a replica keeps in memory; the least recently used go")
    affinity: bool = Field(
        True,
        description="prefer the replica that holds a prompt's beginning or its adapter; false = shortest queue only",
    )
    cpus_per_replica: float = Field(1.0, gt=0, description="CPU cores Ray reserves for an engine replica")
    gpus_per_replica: float = Field(0.0, ge=0, description="GPUs Ray reserves for an engine replica")
    api_keys: str | None = Field(None, description="file of hashed API keys (modelyard.serving.keys); null = open")
    tls: Tls | None = Field(None, description="certificate and key for HTTPS; null = plain HTTP")
    max_body: Bytes = Field(2_000_000, description="largest request body in bytes; larger ones get 413")
    max_queued: int = Field(256, ge=1, description="requests that wait besides those a replica takes; more get 429")
    request_timeout_s: float = Field(600.0, gt=0, description="seconds until a request is given up with 504")
    max_choices: int = Field(16, ge=1, description="answers one request may ask for (n times prompts)")
    cache: CacheOptions | None = Field(None, description="response cache; null = every request is computed")
    limits: Limits = Field(Limits(), description="requests and tokens a minute and key")
    asynchronous: AsyncOptions | None = Field(None, description="requests answered later; null = off")
    feedback: str | None = Field(None, description="folder or s3:// URI for what people say of answers; null = off")
    traffic: Traffic = Field(Traffic(), description="other versions beside the model: canary, shadow; and how to roll")
    warm_up: bool = Field(True, description="compile and run every kind of step before a replica takes requests")
    haproxy: bool | None = Field(
        None,
        description="HAProxy in front instead of Serve's Python proxy: half the time to first token under load, but "
        "replicas listen on all interfaces and stopping takes longer; null = on beyond loopback without tls",
    )
    ready_timeout_s: float = Field(180.0, gt=0, description="seconds until a server that does not answer is given up")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK

    @property
    def use_haproxy(self) -> bool:
        """Whether HAProxy mode is on after defaults."""
        return (not self.loopback and self.tls is None) if self.haproxy is None else self.haproxy

    @property
    def listens(self) -> bool:
        """Whether the ingress itself takes connections, on this machine only: no proxy in front."""
        return self.loopback and not self.use_haproxy

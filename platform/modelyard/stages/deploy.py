"""Deploys a model on Ray Serve and asks it one question over HTTP, as its users will."""

from __future__ import annotations

import json
import posixpath
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from modelyard.engine.options import EngineOptions
from modelyard.errors import DataError, RecipeError, StageError
from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import Options, StageOptions, runtime
from modelyard.serving.options import (
    AdapterName,
    AsyncOptions,
    Autoscaling,
    CacheOptions,
    Limits,
    ServeOptions,
    Traffic,
)
from modelyard.serving.tls import Tls
from modelyard.serving.traffic import Variant
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.stages.serve import find_model
from modelyard.stages.served import Reference, Served, references, variants
from modelyard.storage import Artifact, Files, is_remote, join, write_bytes

if TYPE_CHECKING:
    from modelyard.serving import ServerHandle

# Engine replica with torch 420 MB, ingress 220, Serve's proxy and controller 210 each: measured resident sizes.
REPLICA_BYTES = 500_000_000


class Smoke(Options):
    """The question every deployment has to answer before it counts as deployed."""

    prompt: str = Field("def read_lines(path):", min_length=1, description="what to ask")
    max_tokens: int = Field(48, ge=1, le=4096, description="length of the answer in tokens")


class DeployOptions(StageOptions):
    """Options of the deploy stage."""

    kind: Literal["deploy"] = Field("deploy", description="stage kind")
    reference: str | None = Field(
        None, description="models:/name@alias to serve instead of an input; an alias that moves is followed"
    )
    name: str | None = Field(None, description="the model's name in the API; null = the registered or recipe's name")
    autoscaling: Autoscaling = Field(Autoscaling(), description="number of engine replicas")
    engine: EngineOptions = Field(EngineOptions(), description="engine of each replica")
    smoke: Smoke = Field(Smoke(), description="the question asked once it runs")
    host: str = runtime("127.0.0.1", "address to listen on; other than loopback only with api_keys")
    port: int = runtime(8000, "TCP port; 0 = any free one", ge=0, le=65535)
    api_keys: str | None = runtime(None, "file of hashed API keys; null = open (loopback only)")
    tls: Tls | None = runtime(None, "certificate and key for HTTPS; null = plain HTTP")
    cache: CacheOptions | None = runtime(None, "response cache; null = every request is computed")
    limits: Limits = runtime(Limits(), "requests and tokens a minute and key")
    feedback: str | None = runtime(None, "folder or s3:// URI for what people say of answers; null = off")
    asynchronous: AsyncOptions | None = runtime(None, "requests answered later, through Redis; null = off")
    adapters: dict[AdapterName, str] = runtime({}, "LoRA adapters by model name in the API: folder or URI")
    traffic: Traffic = runtime(Traffic(), "other versions beside the model: canary, shadow; and how to roll")
    haproxy: bool | None = runtime(None, "HAProxy in front (needs api_keys); null = on beyond loopback without tls")
    ready_timeout_s: float = runtime(180.0, "seconds until a server that does not answer is given up", gt=0)

    def serve_options(self) -> ServeOptions:
        """The same for `modelyard.serving.launch`."""
        return ServeOptions(
            host=self.host,
            port=self.port,
            autoscaling=self.autoscaling,
            engine=self.engine,
            cpus_per_replica=self.resources.cpus_per_worker,
            gpus_per_replica=self.resources.gpus_per_worker,
            api_keys=self.api_keys,
            tls=self.tls,
            cache=self.cache,
            limits=self.limits,
            feedback=self.feedback,
            asynchronous=self.asynchronous,
            adapters=self.adapters,
            traffic=self.traffic,
            haproxy=self.haproxy,
            ready_timeout_s=self.ready_timeout_s,
        )


@dataclass(frozen=True)
class _Answer:
    text: str
    seconds: float
    tokens: int
    path: str
    body: Mapping[str, Any]


class DeployStage(Stage[DeployOptions]):
    """Starts the server, waits for it, asks one question, and stops it unless it is to be kept."""

    kind = "deploy"
    version = 2
    Options = DeployOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {
        "model": InputSpec(kinds=("finetune", "pretrain", "align", "merge", "register"), files=True, required=False)
    }

    def check(self, ctx: PlanContext[DeployOptions]) -> None:
        """Refuses a used port, an address without keys, and a folder that cannot be served."""
        from modelyard.serving.server import check

        if (ctx.options.reference is None) == ("model" not in ctx.options.inputs):
            raise RecipeError(
                "give either the input `model` or `reference`",
                place=ctx.name,
                mend="write inputs: {model: <stage or folder>}, or reference: models:/name@champion",
            )
        check(ctx.options.serve_options(), here=ctx.here)
        if (given := ctx.inputs.get("model")) is not None:
            self._check_model(given)

    def _check_model(self, given: Artifact | Files) -> None:
        from pathlib import Path

        from modelyard.engine.checkpoint import check_folder, read_config

        uri = model_uri(given)
        if not is_remote(uri):
            check_folder(Path(uri))
            read_config(Path(uri))

    def estimate(self, ctx: PlanContext[DeployOptions]) -> Estimate:
        """About half a gigabyte a replica and twice the weights while they load."""
        given = ctx.inputs.get("model")
        weights = sum(r.bytes for r in given.refs) if isinstance(given, Files) else 0
        return Estimate(memory_bytes=REPLICA_BYTES + 2 * weights, seconds=25.0)

    def demand(self, options: DeployOptions) -> dict[str, float]:
        """The replicas kept when idle, of every version."""
        versions = 1 + (options.traffic.canary is not None) + (options.traffic.shadow is not None)
        replicas = max(1, options.autoscaling.min_replicas) * versions
        r = options.resources
        demand = {"CPU": r.cpus_per_worker * replicas}
        return demand | ({"GPU": r.gpus_per_worker * replicas} if r.gpus_per_worker else {})

    def run(self, ctx: StageContext[DeployOptions]) -> StageResult:
        """Deploys, asks, writes `deployment.json`."""
        from modelyard.serving import launch

        options = ctx.options.serve_options()
        model, found, wanted = _models(ctx, options)
        name = ctx.options.name or found or ctx.recipe
        ctx.progress.say(f"starting {name}")
        handle = launch(model.model, name, options, model.version, variants(wanted[1:], ctx.root, [model])[1:])
        kept = False
        try:
            ctx.progress.say(f"{handle.url} answers after {handle.seconds:.1f} s")
            answer = ask(handle, ctx.options.smoke)
            ctx.progress.say(f"asked:    {ctx.options.smoke.prompt!r}")
            ctx.progress.say(f"answered: {answer.text!r} ({answer.tokens} tokens in {answer.seconds:.2f} s)")
            result = self._record(ctx, handle, model.model, answer)
            if ctx.keep:
                Served(handle, wanted, ctx.root, options, ctx.progress.say, {"stage_run": ctx.run.id or ""})
            kept = ctx.keep
        finally:
            if not kept:
                handle.shutdown()
        return result

    def _record(self, ctx: StageContext[DeployOptions], handle: ServerHandle, uri: str, answer: _Answer) -> StageResult:
        a = ctx.options.autoscaling
        record = {
            "name": handle.name,
            "model": uri,
            "url": handle.url,
            "kept": ctx.keep,
            "options": ctx.options.serve_options().model_dump(
                mode="json", exclude={"api_keys", "tls", "cache", "asynchronous"}
            ),
            "question": ctx.options.smoke.prompt,
            "answer": answer.text,
            "start_seconds": round(handle.seconds, 3),
            "latency_seconds": round(answer.seconds, 4),
            "curl": curl(handle.url, answer.path, answer.body, key=handle.key is not None, tls=ctx.options.tls),
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_bytes(join(ctx.output, "deployment.json"), text.encode())
        ctx.run.log_text("deployment.json", text)
        metrics = {
            "start_seconds": handle.seconds,
            "latency_seconds": answer.seconds,
            "tokens_per_second": answer.tokens / answer.seconds,
        }
        ctx.run.log_metrics(metrics)
        state = f"runs at {handle.url}" if ctx.keep else "answered and stopped"
        summary = f"{handle.name} {state}; {a.min_replicas}-{a.max_replicas} replicas, {answer.seconds:.2f} s an answer"
        return StageResult(summary, metrics=metrics, extra={"name": handle.name, "url": handle.url, "model": uri})


def _models(ctx: StageContext[DeployOptions], options: ServeOptions) -> tuple[Variant, str | None, list[Reference]]:
    """The model to serve, its registered name, and what to follow from then on."""
    if ctx.options.reference is not None:
        uri, name, version = find_model(ctx.options.reference, ctx.root)
        return Variant(version, uri), name, references(ctx.options.reference, options)
    given = ctx.inputs["model"]
    uri = follow = model_uri(given)
    if isinstance(given, Artifact) and given.manifest.kind == "register":
        follow = "models:/{name}@{alias}".format(**given.manifest.extra)
    return Variant(_version(given), uri), _name(given), references(follow, options)


def model_uri(given: Artifact | Files) -> str:
    """URI of the Hugging Face folder an input stands for. Raises DataError when it holds none."""
    if isinstance(given, Artifact):
        return str(given.manifest.extra["uri"]) if given.manifest.kind == "register" else given.join("model")
    folders = {posixpath.dirname(r.uri) for r in given.refs if posixpath.basename(r.uri) == "config.json"}
    if len(folders) != 1:
        raise DataError(
            f"the input holds {len(folders)} model folders (config.json)",
            place="inputs.model",
            mend="give the path of one Hugging Face folder",
        )
    return folders.pop()


def _version(given: Artifact | Files) -> str:
    """The registered version, or the start of the fingerprint; files have neither."""
    if isinstance(given, Files):
        return ""
    if given.manifest.kind == "register":
        return str(given.manifest.extra.get("version", ""))
    return given.manifest.fingerprint[:12]


def _name(given: Artifact | Files) -> str | None:
    if isinstance(given, Artifact) and given.manifest.kind == "register":
        return str(given.manifest.extra["name"])
    return None


def ask(handle: ServerHandle, smoke: Smoke) -> _Answer:
    """Asks one question: as a chat, or as a text completion when the model has no chat template.

    Raises StageError when the server does not answer it.
    """
    common = {"model": handle.name, "max_tokens": smoke.max_tokens, "temperature": 0}
    chat = common | {"messages": [{"role": "user", "content": smoke.prompt}]}
    found = _post(handle, "/v1/chat/completions", chat)
    if isinstance(found, str) and "no chat template" in found:
        found = _post(handle, "/v1/completions", common | {"prompt": smoke.prompt})
    if isinstance(found, str):
        raise StageError(f"the server runs but does not answer: {found}", place=handle.url, mend="see Ray's serve logs")
    return found


def _post(handle: ServerHandle, path: str, body: dict[str, Any]) -> _Answer | str:
    """The answer, or the server's error message."""
    import httpx

    started = time.perf_counter()
    response = httpx.post(handle.url + path, json=body, headers=handle.headers, timeout=300, verify=handle.verify)
    seconds = time.perf_counter() - started
    value = response.json()
    if response.status_code != 200:
        return str(value["error"]["message"])
    choice = value["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return _Answer(text, seconds, value["usage"]["completion_tokens"], path, body)


def curl(url: str, path: str, body: Mapping[str, Any], *, key: bool, tls: Tls | None = None) -> str:
    """A command that asks the same question."""
    auth = ' -H "authorization: Bearer $KEY"' if key else ""
    auth += f" --cacert {shlex.quote(tls.certificate)}" if tls is not None else ""
    return f"curl {url}{path} -H 'content-type: application/json'{auth} -d {shlex.quote(json.dumps(dict(body)))}"

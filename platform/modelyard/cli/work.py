"""Commands that do something: run, submit, serve."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from modelyard.errors import RecipeError, ResourceError

if TYPE_CHECKING:
    from modelyard.recipe import Recipe

RecipePath = Annotated[Path, typer.Argument(help="recipe file, such as pipelines/quickstart.yaml")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="override one option; may be repeated")
]
Targets = Annotated[list[str] | None, typer.Option("--to", metavar="STAGE", help="only this stage and what it needs")]
TargetKinds = Annotated[
    list[str] | None, typer.Option("--to-kind", metavar="KIND", help="only stages of this kind and what they need")
]
Force = Annotated[list[str] | None, typer.Option("--force", metavar="STAGE", help="run this stage although it is done")]
Root = Annotated[str | None, typer.Option("--root", help="where artifacts go, instead of the recipe's root")]


def add(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    for command in (run, submit, serve, range_test):
        app.command()(command)


def load(
    recipe: Path,
    assignments: list[str] | None,
    root: str | None,
    to: list[str] | None = None,
    kinds: list[str] | None = None,
) -> Recipe:
    """The recipe with overrides applied, cut to the wanted stages."""
    from modelyard.stages import api
    from modelyard.stages.graph import select

    extra = [f"root={root}"] if root else []
    return select(api.load(recipe, [*(assignments or []), *extra]), to or (), kinds or ())


def run(
    recipe: RecipePath,
    assignments: Assignments = None,
    root: Root = None,
    to: Targets = None,
    to_kind: TargetKinds = None,
    force: Force = None,
    keep: Annotated[bool, typer.Option("--keep", help="leave the deployed endpoint up until Ctrl-C")] = False,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster (host:port); default: RAY_ADDRESS, else a local Ray")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="steps=10..12", help="profile these steps of the stages that train")
    ] = None,
) -> None:
    """Runs a recipe. What is done is skipped; interrupt it anywhere, the same command goes on."""
    from modelyard.cli import tables
    from modelyard.stages import api

    loaded = _durable(load(recipe, assignments, root, to, to_kind))
    if profile is not None:
        loaded = profiled(loaded, profile)
    outcome = api.run(loaded, force=force or (), keep=keep, address=address)
    console = Console()
    console.print(tables.summary_table(outcome))
    console.print(tables.next_steps(outcome, recipe))
    if keep and any(options.kind == "deploy" for options in loaded.stages.values()):
        _wait(console)


def profiled(recipe: Recipe, steps: str) -> Recipe:
    """The recipe with the steps written as `steps=10..12` profiled in every stage that trains.

    Raises:
        RecipeError: the text is no range of steps, or nothing is trained.
    """
    from pydantic import ValidationError

    from modelyard.train.run_options import ProfileOptions

    try:
        options = ProfileOptions.model_validate(steps)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(problem, place="--profile", mend="write --profile steps=10..12") from error
    training = {name: stage for name, stage in recipe.stages.items() if "profile" in type(stage).model_fields}
    if not training:
        raise RecipeError("no stage of the recipe trains", place="--profile", mend="leave it out")
    changed = {name: stage.model_copy(update={"profile": options}) for name, stage in training.items()}
    return recipe.model_copy(update={"stages": {**recipe.stages, **changed}})


def _durable(recipe: Recipe) -> Recipe:
    """A relative root inside a Ray job would lie in the job's upload, which Ray deletes: use the home."""
    from modelyard.storage import is_remote

    if (
        "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        and not is_remote(recipe.root)
        and not Path(recipe.root).is_absolute()
    ):
        return recipe.model_copy(
            update={"root": str(Path.home() / "modelyard" / recipe.root.removeprefix("./").lstrip("."))}
        )
    return recipe


def _wait(console: Console) -> None:
    from modelyard.serving import shutdown
    from modelyard.stages import session
    from modelyard.stages.served import stop_watching

    console.print("[bold]serving[/] until Ctrl-C")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("shutting down")
        stop_watching()
        shutdown()
        session.stop()


def submit(
    recipe: RecipePath,
    address: Annotated[
        str, typer.Option(help="the cluster's dashboard, http://host:8265", envvar="RAY_API_SERVER_ADDRESS")
    ],
    assignments: Assignments = None,
    follow: Annotated[bool, typer.Option(help="print the job's log until it ends")] = True,
) -> None:
    """Runs a recipe on a Ray cluster as a job; the same as `ray job submit` with jobs/run_recipe.py.

    The current folder is uploaded as the job's working directory (what .gitignore names stays here).
    """
    from modelyard.stages import api
    from modelyard.stages.jobs import follow_job, submit_job

    api.load(recipe, assignments or [])
    if not Path("jobs/run_recipe.py").exists():
        raise RecipeError(
            "jobs/run_recipe.py is not here", place=str(Path.cwd()), mend="run this from the checkout's root"
        )
    words = ["python", "jobs/run_recipe.py", str(recipe)]
    for assignment in assignments or []:
        words += ["--set", assignment]
    job = submit_job(address, shlex.join(words), Path.cwd())
    console = Console()
    console.print(f"job [bold]{job}[/] on {address}; stop it: ray job stop --address {address} {job}")
    if follow:
        status = follow_job(address, job, lambda text: console.print(text, end="", markup=False, highlight=False))
        if status != "SUCCEEDED":
            raise ResourceError(f"the job ended as {status}", place=job, mend=f"ray job logs --address {address} {job}")


def _adapters(pairs: list[str]) -> dict[str, str]:
    """Name -> folder from NAME=FOLDER."""
    found = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(found.values()):
        raise typer.BadParameter("write NAME=FOLDER", param_hint="--adapter")
    return found


def _tls(certificate: Path | None, key: Path | None) -> dict[str, str] | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        missing = "--tls-certificate" if certificate is None else "--tls-key"
        raise RecipeError("HTTPS takes a certificate and its key", place=missing, mend=f"give {missing}, too")
    return {"certificate": str(certificate), "key": str(key)}


def serve(
    model: Annotated[str, typer.Argument(help="models:/name@champion, an artifact folder, or a Hugging Face folder")],
    port: Annotated[int, typer.Option(help="0 = any free port")] = 8000,
    host: Annotated[str, typer.Option(help="bind elsewhere than loopback only with --api-keys")] = "127.0.0.1",
    name: Annotated[str | None, typer.Option(help="model name in the API")] = None,
    min_replicas: Annotated[int, typer.Option(min=0)] = 1,
    max_replicas: Annotated[int, typer.Option(min=1)] = 2,
    api_keys: Annotated[
        Path | None, typer.Option(help="file of hashed API keys (python -m modelyard.serving.keys add FILE NAME)")
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file: serve HTTPS with it")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file: the certificate's private key")] = None,
    root: Annotated[str, typer.Option(help="root whose MLflow store resolves models:/")] = ".modelyard",
    cache: Annotated[
        bool, typer.Option("--cache", help="give equal greedy or seeded requests the same answer")
    ] = False,
    redis_url: Annotated[str | None, typer.Option(help="keep the response cache in this Redis")] = None,
    requests_per_minute: Annotated[float | None, typer.Option(help="requests a minute and API key")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(help="tokens a minute and API key")] = None,
    feedback: Annotated[
        str | None, typer.Option(help="folder or s3:// URI where thumbs and corrections are kept")
    ] = None,
    async_redis: Annotated[
        str | None, typer.Option(help="take requests that are answered later (/v1/async/...), through this Redis")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of a LoRA adapter, asked for by that model name; repeatable")
    ] = None,
    canary: Annotated[str | None, typer.Option(help="another model that answers some of the requests")] = None,
    percent: Annotated[float, typer.Option(help="percent of the requests that --canary answers")] = 10.0,
    shadow: Annotated[str | None, typer.Option(help="another model that is asked the same and answers nobody")] = None,
    shadow_log: Annotated[
        str | None, typer.Option(help="folder or s3:// URI for how the shadow's answers compare")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="any option of a server, such as engine.max_sequences=8"),
    ] = None,
) -> None:
    """Serves a model behind an OpenAI-compatible API until Ctrl-C. An alias that moves is followed."""
    from modelyard.recipe import build_options
    from modelyard.serving import ServeOptions
    from modelyard.stages.serve import serve_model

    console = Console()
    flags = {
        "host": host,
        "port": port,
        "autoscaling": {"min_replicas": min_replicas, "max_replicas": max(min_replicas, max_replicas)},
        "api_keys": str(api_keys) if api_keys else None,
        "tls": _tls(tls_certificate, tls_key),
        "cache": {"redis_url": redis_url} if cache or redis_url else None,
        "limits": {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute},
        "feedback": feedback,
        "adapters": _adapters(adapter or []),
        "asynchronous": {"redis_url": async_redis} if async_redis else None,
        "traffic": {
            "canary": {"model": canary, "percent": percent} if canary else None,
            "shadow": {"model": shadow, "log": shadow_log} if shadow else None,
        },
    }
    options = build_options(ServeOptions, flags, assignments or ())
    handle = serve_model(model, root, options, name, lambda text: console.print(text, markup=False, highlight=False))
    console.print(f"[bold]{handle.name}[/] at {handle.url}/v1  (chat page {handle.url}/, metrics {handle.url}/metrics)")
    _wait(console)


def range_test(
    recipe: RecipePath,
    stage: Annotated[
        str | None, typer.Option(help="the pre-training stage; may be left out where there is one")
    ] = None,
    assignments: Assignments = None,
    root: Root = None,
    lowest: Annotated[float, typer.Option(min=0, help="learning rate of the first step")] = 1e-6,
    highest: Annotated[float, typer.Option(min=0, help="learning rate of the last step")] = 1.0,
    steps: Annotated[int, typer.Option(min=10, help="optimizer steps between the two")] = 100,
) -> None:
    """Finds a learning rate: raises it step by step on a stage's own model and tokens until the loss rises.

    In this process and without Ray; the stage's inputs must have been made. Writes a page with the curve.
    """
    from modelyard.stages.rate import range_test_of

    result, page = range_test_of(load(recipe, assignments, root), stage, lowest, highest, steps)
    console = Console()
    console.print(f"suggested learning_rate {result.suggestion:.2g} (lowest loss at {result.lowest_at:.2g})")
    console.print(f"curve: {page}", soft_wrap=True)

"""The graph of a recipe: order, inputs, fingerprints, and what would run again and why.

All fingerprints follow from options and inputs alone, so the whole plan is known before any work.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelyard.errors import DataError, ModelyardError, RecipeError
from modelyard.recipe import FileInput, Recipe, StageOptions, decisive, differences, fingerprint
from modelyard.recipe.schema import NAME, InputValue
from modelyard.stages import registry
from modelyard.stages.base import InputSpec, PlanContext, Stage
from modelyard.storage import Artifact, ArtifactStore, Files, InputEntry, absolute, exists, find_files, is_remote


@dataclass(frozen=True)
class Node:
    """One stage with its place in the graph. `after` maps input names to stage names."""

    name: str
    stage: Stage[StageOptions]
    options: StageOptions
    after: Mapping[str, str]


@dataclass
class Planned:
    """One stage as the plan sees it."""

    node: Node
    fingerprint: str
    artifact: Artifact | None
    files: dict[str, Files | Artifact] = field(default_factory=dict)
    """Inputs that are not stages of this recipe: raw files, or a published artifact by URI."""
    why: list[str] = field(default_factory=list)
    before: Mapping[str, Planned] = field(default_factory=dict)
    """The stages it reads from, by input name."""


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with an absolute root: workers and MLflow's server have other working directories."""
    return recipe.model_copy(update={"root": absolute(recipe.root)})


def build(recipe: Recipe) -> list[Node]:
    """Nodes in an order in which each stands after what it reads from; ties keep the recipe's order.

    Raises:
        RecipeError: an input that the kind does not have or does not accept, a missing one, a
            reference to nothing, or a cycle.
    """
    nodes = {name: _node(recipe, name) for name in recipe.stages}
    ordered: list[Node] = []
    done: set[str] = set()
    while len(ordered) < len(nodes):
        ready = [n for n in nodes.values() if n.name not in done and set(n.after.values()) <= done]
        if not ready:
            raise RecipeError(
                f"the stages form a cycle: {_cycle(nodes, done)}", place="stages", mend="remove one of its inputs"
            )
        ordered.append(ready[0])
        done.add(ready[0].name)
    return ordered


def _cycle(nodes: Mapping[str, Node], done: set[str]) -> str:
    walk = [next(name for name in nodes if name not in done)]
    while walk.count(walk[-1]) == 1:
        walk.append(next(before for before in nodes[walk[-1]].after.values() if before not in done))
    return " -> ".join(reversed(walk[walk.index(walk[-1]) :]))


def _node(recipe: Recipe, name: str) -> Node:
    options = recipe.stages[name]
    stage = registry.stage(options.kind)
    specs = stage.input_specs(options.inputs)
    for given in options.inputs:
        if given not in specs:
            raise RecipeError(
                f"{options.kind} has no input {given!r}",
                place=f"stages.{name}.inputs.{given}",
                mend=f"its inputs: {', '.join(stage.inputs)}",
            )
    if stage.more is not None and not specs:
        mend = f"add `<name>: <stage>`; stages of the kinds {', '.join(stage.more.kinds)} are taken"
        raise RecipeError(f"{options.kind} needs an input", place=f"stages.{name}.inputs", mend=mend)
    after: dict[str, str] = {}
    for key, spec in specs.items():
        value = options.inputs.get(key)
        if value is None and spec.required:
            raise RecipeError(
                f"{options.kind} needs the input {key!r}", place=f"stages.{name}.inputs", mend=f"add `{key}: ...`"
            )
        if value is not None and (before := _reference(recipe, name, key, value, spec)):
            after[key] = before
    return Node(name, stage, options, after)


def _reference(recipe: Recipe, name: str, key: str, value: InputValue, spec: InputSpec) -> str | None:
    """The stage an input names, or None when it names files or an artifact's URI."""
    place = f"stages.{name}.inputs.{key}"
    if isinstance(value, str) and value in recipe.stages:
        kind = recipe.stages[value].kind
        if kind not in spec.kinds:
            wanted = ", ".join(spec.kinds) or "files"
            raise RecipeError(f"{key} is a {kind} stage ({value})", place=place, mend=f"give one of: {wanted}")
        return value
    if isinstance(value, str) and NAME.match(value) and not Path(value).exists():
        close = difflib.get_close_matches(value, list(recipe.stages), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"stages: {', '.join(recipe.stages)}"
        raise RecipeError(f"{value!r} is neither a stage of this recipe nor an existing path", place=place, mend=hint)
    return None


def select(recipe: Recipe, stages: Iterable[str] = (), kinds: Iterable[str] = ()) -> Recipe:
    """The part of a recipe that the named stages, or all stages of the named kinds, need.

    Raises RecipeError when a name or kind does not occur in the recipe.
    """
    targets = set(stages)
    for name in targets - set(recipe.stages):
        raise RecipeError(f"there is no stage {name!r}", mend=f"stages: {', '.join(recipe.stages)}")
    for kind in kinds:
        found = {name for name, options in recipe.stages.items() if options.kind == kind}
        if not found:
            raise RecipeError(f"the recipe has no stage of kind {kind!r}", place=recipe.name)
        targets |= found
    if not targets:
        return recipe
    nodes = build(recipe)
    for node in reversed(nodes):
        if node.name in targets:
            targets |= set(node.after.values())
    return recipe.model_copy(update={"stages": {n: o for n, o in recipe.stages.items() if n in targets}})


def plan_graph(recipe: Recipe, force: frozenset[str] = frozenset()) -> list[Planned]:
    """Fingerprints every stage, finds what is published, and says why the rest would run.

    Reads raw inputs to fingerprint them (digests are remembered); runs nothing.
    """
    store = ArtifactStore(recipe.root)
    planned: dict[str, Planned] = {}
    for node in build(recipe):
        outside = {
            key: _outside(store, node, key, value)
            for key, value in node.options.inputs.items()
            if key not in node.after
        }
        inputs = {key: planned[before].fingerprint for key, before in node.after.items()}
        inputs |= {
            key: value.digest if isinstance(value, Files) else value.manifest.fingerprint
            for key, value in outside.items()
        }
        digest = fingerprint(node.options.kind, node.stage.version, decisive(node.options), inputs)
        artifact = None if node.name in force else store.find(node.name, digest)
        before = {key: planned[name] for key, name in node.after.items()}
        entry = Planned(node, digest, artifact, outside, before=before)
        if artifact is None:
            entry.why = ["asked for by --force"] if node.name in force else _why(store, entry, inputs)
        planned[node.name] = entry
    return list(planned.values())


def _outside(store: ArtifactStore, node: Node, key: str, value: InputValue) -> Files | Artifact:
    spec = node.stage.input_specs([key])[key]
    place = f"stages.{node.name}.inputs.{key}"
    if isinstance(value, str) and exists(f"{value.rstrip('/')}/manifest.json"):
        artifact = store.open(value)
        if artifact.manifest.kind not in spec.kinds:
            raise RecipeError(
                f"{value} is a {artifact.manifest.kind} artifact",
                place=place,
                mend=f"give one of: {', '.join(spec.kinds)}",
            )
        return artifact
    if not spec.files:
        raise RecipeError(f"{key} takes the artifact of a stage ({', '.join(spec.kinds)})", place=place)
    given = (
        value if isinstance(value, FileInput) else FileInput(paths=(value,) if isinstance(value, str) else tuple(value))
    )
    cache = None if is_remote(store.root) else Path(store.root) / "cache" / "digests.json"
    try:
        return find_files(given.paths, given.exclude, given.max_bytes, cache)
    except DataError as error:
        raise DataError(error.what, place=f"{place}: {error.place}", mend=error.mend) from error


def _why(store: ArtifactStore, entry: Planned, inputs: Mapping[str, str]) -> list[str]:
    history = store.history(entry.node.name)
    if not history:
        return ["has not run yet"]
    last = history[0].manifest
    reasons = differences(last.options, recorded(entry.node.options))
    if last.kind_version != entry.node.stage.version:
        reasons.append(f"{last.kind} version {last.kind_version} -> {entry.node.stage.version}")
    for key, digest in inputs.items():
        old = last.inputs.get(key)
        if old is None or old.fingerprint != digest:
            reasons.append(f"input {key} changed ({entry.node.after.get(key, 'files')})")
    return reasons or ["its artifact was removed"]


def plan_context(
    recipe: Recipe, entry: Planned, artifacts: Mapping[str, Artifact], *, here: bool = True
) -> PlanContext[StageOptions]:
    """What a stage's `check` and `estimate` may look at."""
    known: dict[str, Artifact | Files] = dict(entry.files)
    known |= {key: artifacts[before] for key, before in entry.node.after.items() if before in artifacts}
    upstream = {key: recipe.stages[before] for key, before in entry.node.after.items()}
    models = {key: _foreseen(recipe, before, artifacts) for key, before in entry.before.items() if key not in known}
    told = {key: config for key, config in models.items() if config is not None}
    return PlanContext(entry.node.name, entry.node.options, recipe.name, recipe.root, known, upstream, told, here)


def _foreseen(recipe: Recipe, entry: Planned, artifacts: Mapping[str, Artifact]) -> Mapping[str, Any] | None:
    """The configuration of the model a stage will leave; None too where its inputs are bad, which its check says."""
    try:
        return entry.node.stage.leaves(plan_context(recipe, entry, artifacts))
    except ModelyardError:
        return None


def input_entries(entry: Planned, inputs: Mapping[str, Artifact | Files]) -> dict[str, InputEntry]:
    """Inputs as the manifest records them."""
    result = {}
    for key, value in inputs.items():
        if isinstance(value, Files):
            result[key] = InputEntry(fingerprint=value.digest, files=len(value.refs), bytes=value.bytes)
        else:
            result[key] = InputEntry(fingerprint=value.manifest.fingerprint, stage=value.stage, uri=value.uri)
    return result


_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|credential|api_key)$", re.IGNORECASE)


def recorded(options: StageOptions) -> dict[str, Any]:
    """The decisive options as a manifest records them: values of secret-looking keys are replaced."""
    result: dict[str, Any] = _redact(decisive(options))
    return result


def _redact(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: "<redacted>" if _SECRET.search(k) and isinstance(v, str) else _redact(v) for k, v in value.items()}
    return [_redact(v) for v in value] if isinstance(value, list) else value

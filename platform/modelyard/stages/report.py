"""One HTML page over a whole recipe: figures of every stage and links to the stages' own reports."""

from __future__ import annotations

import html
import os
from pathlib import Path

from modelyard.errors import DataError, ModelyardError
from modelyard.planner.estimate import Estimate
from modelyard.recipe import Recipe
from modelyard.stages.graph import Planned, anchored, plan_context, plan_graph
from modelyard.stages.whatif import differences
from modelyard.storage import Artifact, exists, is_remote, join, write_bytes

_STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%}td,th{padding:.4rem .7rem;border-bottom:1px solid #8884;text-align:left;
vertical-align:top}th{font-weight:600}code{font-size:.85em;overflow-wrap:anywhere}.n{text-align:right}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:0}dt{opacity:.7}dd{margin:0}
"""


def write_report(recipe: Recipe) -> Path | str:
    """Writes `{root}/reports/{recipe}.html` from what is published now and returns where it is.

    Raises DataError when nothing of the recipe is published.
    """
    recipe = anchored(recipe)
    planned = plan_graph(recipe)
    artifacts = {entry.node.name: entry.artifact for entry in planned if entry.artifact}
    found = [(artifacts[e.node.name], _estimate(recipe, e, artifacts)) for e in planned if e.artifact]
    if not found:
        raise DataError("nothing of this recipe is done yet", place=recipe.root, mend="run it first")
    target = join(recipe.root, "reports", f"{recipe.name}.html")
    write_bytes(target, _page(recipe, found, target).encode())
    return target if is_remote(target) else Path(target)


def _estimate(recipe: Recipe, entry: Planned, artifacts: dict[str, Artifact]) -> Estimate:
    """What would be predicted for a published stage now."""
    try:
        return entry.node.stage.estimate(plan_context(recipe, entry, artifacts))
    except ModelyardError:
        return Estimate()  # made elsewhere: it would not fit here


def _page(recipe: Recipe, found: list[tuple[Artifact, Estimate]], target: str) -> str:
    rows = "".join(_row(artifact, target) for artifact, _ in found)
    seconds = sum(artifact.manifest.seconds for artifact, _ in found)
    title = html.escape(recipe.name)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{len(found)} of {len(recipe.stages)} stages done, {seconds:.0f} s of work, "
        f"root <code>{html.escape(recipe.root)}</code></p>"
        "<table><tr><th>stage<th>what came out<th class=n>seconds<th>figures<th>where</tr>"
        f"{rows}</table>{_predictions(found)}</html>"
    )


def _predictions(found: list[tuple[Artifact, Estimate]]) -> str:
    """Predicted against measured of every stage that predicts something."""
    rows = [(artifact.stage, *row.row()) for artifact, e in found for row in differences(artifact, e)]
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) + "</tr>" for row in rows)
    head = "<tr><th>stage<th>quantity<th>predicted<th>measured<th>difference</tr>"
    return f"<h2>Predicted against measured</h2><table>{head}{body}</table>" if rows else ""


def _figure(value: float) -> str:
    """Whole where the figure is large, else to six digits: 10,548,600 and 0.51906 rather than 1.05486e+07."""
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:,.6g}"


def _row(artifact: Artifact, target: str) -> str:
    manifest = artifact.manifest
    figures: dict[str, float] = {**manifest.counts, **manifest.metrics}
    terms = "".join(f"<dt>{html.escape(k)}<dd>{_figure(v)}" for k, v in figures.items())
    page = artifact.join("report.html")
    link = f'<a href="{html.escape(_relative(page, target))}">report</a><br>' if exists(page) else ""
    return (
        f"<tr><td><b>{html.escape(manifest.stage)}</b><br>{manifest.kind}<td>{html.escape(manifest.summary)}"
        f"<td class=n>{manifest.seconds:.1f}<td><dl>{terms}</dl><td>{link}<code>{html.escape(artifact.uri)}</code></tr>"
    )


def _relative(page: str, target: str) -> str:
    return page if is_remote(page) else os.path.relpath(page, Path(target).parent)

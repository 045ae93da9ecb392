"""The recipe for Common Crawl as its header says to run it: two local WARC files to token shards."""

from __future__ import annotations

import gzip
import json
import random
import re
import shlex
from collections import Counter
from pathlib import Path

import pyarrow.dataset as pads
import pytest

from modelyard import load, plan, run

RECIPE = Path(__file__).parents[2] / "pipelines" / "web_corpus.yaml"
SUBJECTS = ("river", "village", "bridge", "market", "forest", "engine", "garden", "letter", "teacher", "harbour")
VERBS = ("holds", "moves", "finds", "keeps", "carries", "follows", "answers", "remembers", "builds", "repairs")
PLACES = ("beyond the hills", "near the station", "with great patience", "before winter", "that nobody expected")


def prose(rng: random.Random) -> str:
    """Paragraphs of sentences that the published quality rules take for prose."""

    def sentence() -> str:
        one, two = rng.sample(SUBJECTS, 2)
        first, then = rng.sample(VERBS, 2)
        years = rng.sample(range(1000, 2000), 2)
        return f"The {one} of {years[0]} {first} the {two} {rng.choice(PLACES)} and {then} {years[1]}."

    return "".join(f"<p>{' '.join(sentence() for _ in range(5))}</p>" for _ in range(4))


def warc(path: Path, pages: list[str]) -> None:
    members = []
    for number, body in enumerate(pages):
        html = f"<html><head><title>Page</title></head><body><nav>Home</nav><main>{body}</main></body></html>"
        block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + html.encode()
        head = (
            f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://site/{path.stem}/{number}\r\n"
            f"Content-Type: application/http\r\nContent-Length: {len(block)}\r\n\r\n"
        )
        members.append(gzip.compress(head.encode() + block + b"\r\n\r\n"))
    path.write_bytes(b"".join(members)[:-50])


def header_overrides(files: list[str]) -> list[str]:
    """The `--set` values of the command in the recipe's header, for these files and a small tokenizer."""
    (line,) = re.findall(r"^#\s+modelyard run (.*)$", RECIPE.read_text(), re.MULTILINE)
    words = shlex.split(line)
    values = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
    values = [f"web.inputs.files={json.dumps(files)}" if v.startswith("web.inputs.files=") else v for v in values]
    assert len(values) == 4
    return [*values, "tokens.tokenizer.train.vocab_size=400", "tokens.sequence_length=128", "tokens.heldout=0.1"]


@pytest.mark.timeout(900)
def test_two_warc_files_become_token_shards(ray_session: None, tmp_path: Path) -> None:
    rng = random.Random(5)
    pages = [prose(rng) for _ in range(40)]
    french = "<p>Le comité a décidé que la vieille bibliothèque resterait ouverte à tous les habitants.</p>" * 3
    cut = "<p>The last member of the file, which is cut short.</p>"
    one, two = tmp_path / "one.warc.gz", tmp_path / "two.warc.gz"
    warc(one, [*pages[:20], french, cut])
    mail = f"{prose(rng)}<p>Whoever wants to know more may write to me@some-host.net at any time.</p>"
    warc(two, [*pages[20:], pages[0], mail, cut])
    recipe = load(RECIPE, [*header_overrides([str(one), str(two)]), f"root={tmp_path / 'root'}"])
    assert [stage.name for stage in plan(recipe)] == ["web", "tokens"]
    outcome = run(recipe)
    web, tokens = outcome.artifacts["web"], outcome.artifacts["tokens"]
    reasons = Counter(pads.dataset(web.join("audit")).to_table()["reason"].to_pylist())
    # The last member of each file is cut short.
    assert reasons == {"truncated": 2, "exact_duplicate": 1, "language_fr": 1}
    assert web.manifest.counts["documents"] == 41
    kept = pads.dataset(web.join("data")).to_table()
    assert set(kept["language"].to_pylist()) == {"en"}
    assert not any("some-host" in text or "Home" in text for text in kept["text"].to_pylist())
    assert json.loads(kept["meta"][0].as_py())["url"].startswith("http://site/")
    assert "Common Crawl terms of use" in web.local("data_card.md").read_text()
    assert tokens.manifest.counts["train_tokens"] > 5000


@pytest.mark.parametrize("name", ["clean_jsonl", "decontaminate"])
def test_the_other_corpus_recipes_plan_on_files_of_ones_own(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n')
    inputs = {"files": str(tmp_path / "a.jsonl")} | ({"tests": str(tmp_path)} if name == "decontaminate" else {})
    values = [f"corpus.inputs.{key}={json.dumps([path])}" for key, path in inputs.items()]
    recipe = load(RECIPE.with_name(f"{name}.yaml"), [*values, f"root={tmp_path / 'root'}"])
    (stage,) = plan(recipe)
    assert stage.kind == "curate" and not stage.cached

"""The whole curation chain end to end on Ray, with one worker and with two, and what each part takes.

    python tests/benchmarks/corpus_chain.py

Read JSONL, language, normalize, the rules of Gopher, C4 and FineWeb, exact and MinHash deduplication, scrub,
write: CPU seconds of the whole process tree, without Ray's start. `in_process` is the same work on the same
files without Ray; what the tree takes beyond it is `ray_share`. `shares` are parts of the in-process time. The
peer does the steps it can do offline (ftfy, the four filters, MinHash signatures, its PII formatter; no language,
reading or writing) on a sample. On both sides every document goes through every step: rules and language only tag.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contract import clock, in_turns, peak_memory, report, run_peer, say
from corpus_dedup import _NoTracking, write_input
from corpus_minhash import documents

from modelyard.corpus import unit as unit_module
from modelyard.corpus.read.units import units
from modelyard.stages import curate_ray, curate_run, session
from modelyard.stages.base import StageContext
from modelyard.stages.curate import CurateOptions, CurateStage, file_refs
from modelyard.stages.progress import Display, Progress
from modelyard.storage import Files, join, list_files, remove, write_bytes

BYTES = 64_000_000
STEPS: list[dict[str, Any]] = [
    {"language": {"mode": "annotate"}},
    {"normalize": {}},
    {"quality": {"mode": "annotate"}},
    {"dedup": {"method": "exact"}},
    {"dedup": {"method": "minhash", "jaccard": 0.8}},
    {"scrub": {}},
]
DATATROVE = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import (C4QualityFilter, FineWebQualityFilter, GopherQualityFilter,
    GopherRepetitionFilter)
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
texts = json.load(open(sys.argv[1]))
ftfy, pii = FTFYFormatter(), PIIFormatter()
filters = [GopherQualityFilter(), GopherRepetitionFilter(), C4QualityFilter(), FineWebQualityFilter()]
signatures = MinhashDedupSignature("/tmp/unused", config=MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8))
def once(some):
    kept = 0
    for text in some:
        document = Document(text=ftfy.format(text), id="0")
        cleaned = document.text
        for filter in filters:
            try:
                kept += filter.filter(document) is True
            except ZeroDivisionError:
                pass
        # C4 cuts lines out of the text it judges.
        document.text = cleaned
        shingles = signatures.get_shingles(document.text)
        if shingles.size:
            signatures.get_signature(shingles)
        pii.format(document.text)
    return kept
once(texts[:3])
start = time.process_time()
kept = once(texts)
print(json.dumps({"cpu": time.process_time() - start, "kept": kept}))
"""


@contextmanager
def context(files: Files, folder: Path, workers: int) -> Iterator[Any]:
    """A context of the stage on an empty folder."""
    remove(str(folder))
    options = CurateOptions.model_validate({"kind": "curate", "steps": STEPS, "resources": {"workers": workers}})
    with Display(interval=600) as display:
        yield StageContext(
            name="corpus", recipe="bench", options=options, fingerprint="0" * 64, root=str(folder),
            inputs={"files": files}, output=f"{folder}/out", work=f"{folder}/work",
            run=_NoTracking(), progress=Progress(display, "corpus"),  # type: ignore[arg-type]
        )  # fmt: skip


def on_ray(files: Files, folder: Path, workers: int) -> Any:
    """Runs the stage afresh."""
    with context(files, folder, workers) as ctx:
        return CurateStage().run(ctx)


def in_process(files: Files, folder: Path) -> None:
    """The stage's units, deduplications and leak check one after the other in this process."""
    with context(files, folder, 1) as ctx:
        refs, _ = file_refs(files)
        work = units(refs, ctx.options.read)
        tallies = []
        for segment, after in curate_run._segments(ctx):
            tallies.append([unit_module.run_unit(unit, segment) for unit in work])
            if after is not None:
                keys = json.dumps([name for name, _ in list_files(segment.keys)])
                (record,) = curate_ray._local({"files": keys}, segment, after, 2**40)
                place = join(segment.keys.rsplit("/", 1)[0], "decisions", "done.json")
                write_bytes(place, record["record"][0].as_py().encode())
        for name, _ in list_files(join(ctx.output, "data")):
            list(curate_ray._leaks({"file": join(ctx.output, "data", name)}, ctx.options.scrub))


class Parts:
    """CPU seconds by part of the in-process run."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its CPU seconds added up under `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds[name] += time.process_time() - start

        return call

    def shares(self, files: Files, folder: Path) -> dict[str, float]:
        """Shares of one run; what no part claims is `rest`."""
        plain = {
            "build": unit_module.build, "read_unit": unit_module.read_unit, "_local": curate_ray._local,
            "_leaks": curate_ray._leaks,
        }  # fmt: skip
        file, keys = unit_module.ParquetFile, unit_module.dedup.keys

        def build(options: Any, *inputs: Any) -> Any:
            step = plain["build"](options, *inputs)
            kind = type(step)
            timed = type(kind.__name__, (kind,), {"__call__": self.timed(options.name, kind.__call__)})
            step.__class__ = timed
            return step

        def read(*args: Any) -> Iterator[Any]:
            source = plain["read_unit"](*args)
            following = self.timed("read", lambda: next(source, None))
            while (item := following()) is not None:
                yield item

        class Written(file):  # type: ignore[misc, valid-type]
            write = self.timed("write", file.write)
            close = self.timed("write", file.close)

        def whole(name: str, part: str) -> Callable[..., Any]:
            return self.timed(part, lambda *args: list(plain[name](*args)))

        unit_module.build, unit_module.read_unit, unit_module.ParquetFile = build, read, Written  # type: ignore[assignment, misc]
        unit_module.dedup.keys = self.timed("dedup keys", keys)
        curate_ray._local, curate_ray._leaks = whole("_local", "dedup decisions"), whole("_leaks", "leak check")
        try:
            with clock() as spent:
                in_process(files, folder)
        finally:
            unit_module.build, unit_module.read_unit = plain["build"], plain["read_unit"]
            unit_module.ParquetFile, unit_module.dedup.keys = file, keys
            curate_ray._local, curate_ray._leaks = plain["_local"], plain["_leaks"]
        found = {name: seconds / spent.cpu for name, seconds in self.seconds.most_common()}
        return {**found, "rest": 1 - sum(found.values())}


def peer_rate(texts: list[str]) -> float:
    """MB a CPU second of the peer."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as handle:
        json.dump(texts, handle)
        handle.flush()
        result = run_peer(DATATROVE, handle.name)
    return sum(len(text.encode()) for text in texts) / 1e6 / float(result["cpu"])


def main() -> None:
    """Measures and prints the result line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_input(folder, documents(8_000_000), BYTES)
        texts = [json.loads(line)["text"] for ref in files.refs for line in Path(ref.uri).read_text().split("\n")]
        size = sum(len(text.encode()) for text in texts) / 1e6
        session.start(2)
        try:
            sides = {
                "one": lambda: on_ray(files, folder / "one", 1),
                "two": lambda: on_ray(files, folder / "two", 2),
                "in_process": lambda: in_process(files, folder / "here"),
            }
            runs = in_turns(sides, repeats=3)
            # On its own: looking at the memory of every process twenty times a second takes a third of a CPU.
            with peak_memory() as peak:
                sides["two"]()
        finally:
            session.stop()
        shares = Parts().shares(files, folder / "parts")
    one, two, here = runs["one"], runs["two"], runs["in_process"]
    say(f"{size:.1f} MB: {one.last.summary}; {shares}")
    rate = size / one.cpu_median
    peer = peer_rate([t for t in texts if 200 < len(t) < 20_000][:: max(len(texts) // 80, 1)][:80])
    report(
        "corpus_chain", unit="MB/CPU s", ours=rate, peer=peer,
        peer_name="datatrove 0.10.1, ftfy, filters, signatures, PII", target=20.0,
        two_workers=size / two.cpu_median, wall_one_s=one.wall_median, wall_two_s=two.wall_median,
        in_process=size / here.cpu_median, ray_share=1 - here.cpu_median / one.cpu_median,
        ray_share_two=1 - here.cpu_median / two.cpu_median, shares=shares, peak_mib=peak.mib,
        documents=one.last.counts["documents_in"], kept=one.last.counts["documents"], mb=size,
    )  # fmt: skip


if __name__ == "__main__":
    main()

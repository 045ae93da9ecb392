"""The terminal's chat and the open-loop load, against the application under uvicorn."""

from __future__ import annotations

import asyncio
import io
import math
from pathlib import Path

import pytest
from local import LocalServer

from modelyard.cli import main
from modelyard.errors import DataError, RecipeError, ResourceError
from modelyard.serving.client import Client, Refused, base
from modelyard.serving.load import Load, Result, Seen, offer, plot, quantile
from modelyard.serving.server import free_port


def test_a_load_is_offered_and_everything_counted(local: LocalServer) -> None:
    async def run() -> Result:
        async with Client(local.url + "/v1") as client:
            return await offer(client, await client.model(), Load(rate=20, seconds=1, prompt=5, tokens=4))

    result = asyncio.run(run())
    assert len(result.seen) > 5 and set(result.errors()) <= {"429"}
    assert result.answered and all(1 <= s.tokens <= 4 and s.first <= s.total for s in result.answered)
    assert result.tokens_per_second > 0 and result.first(0.5) <= result.first(0.99)
    page = plot([result, Result(Load(2, 1), 1.0, [Seen(error="503")])], "t <1>")
    assert "<svg" in page and "t &lt;1&gt;" in page and "1 x 503" in page and "nan" not in page
    assert local.idle()


def test_chat_in_the_terminal(
    local: LocalServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/new\nagain\n\n"))
    with pytest.raises(SystemExit) as end:
        main(["chat", local.url, "--max-tokens", "4", "--system", "be brief"])
    out = capsys.readouterr().out
    assert not end.value.code and "tiny" in out and out.count("tokens/s") == 2


def test_bench_serve_writes_a_page(local: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "latency.html"
    arguments = ["bench-serve", local.url, "--rates", "5", "--seconds", "1", "--tokens", "3", "--prompt", "4"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--html", str(page)])
    out = capsys.readouterr().out
    assert not end.value.code and "first token p50" in page.read_text()
    assert out.count("p99") == 2 and "answer" in out and "\u2026" not in out
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--html", str(tmp_path)])
    assert end.value.code == 2 and "cannot be written" in capsys.readouterr().err


def test_mistakes_are_named(local: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    async def model(url: str) -> str:
        async with Client(url) as client:
            return await client.model()

    async def long(url: str) -> None:
        async with Client(url) as client:
            [piece async for piece in client.complete("tiny", "word " * 2000)]

    with pytest.raises(ResourceError, match="no server answers"):
        asyncio.run(model(f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(Refused) as refused:
        asyncio.run(long(local.url))
    assert refused.value.status == 400 and not refused.value.mend
    with pytest.raises(DataError, match="HTTP address"):
        base("ftp://x")
    assert base("localhost:8000/v1/") == "http://localhost:8000"
    with pytest.raises(RecipeError, match="rate"):
        Load(0, 1).check()
    for rates in ("0", "a,b", "", "-1"):
        with pytest.raises(SystemExit) as end:
            main(["bench-serve", local.url, "--rates", rates])
        assert end.value.code == 2 and "list of rates" in capsys.readouterr().err


def test_quantiles() -> None:
    assert quantile([3, 1, 2], 0.5) == 2 and quantile([1, 2, 3, 4], 0.99) == 4 and math.isnan(quantile([], 0.5))


def test_options_of_a_server_are_checked_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, said in (
        (["--canary", "x", "--percent", "200"], "traffic.canary.percent: Input should be less than 100 (got 200.0)"),
        (["--set", "engine.precision=int9"], "engine.precision: Input should be 'auto' (got 'int9')"),
        (["--set", "engine.max_sequence=9"], "unknown key 'max_sequence'; did you mean 'max_sequences'?"),
        (["--set", "cache.ttl_s=-1", "--cache"], "cache.ttl_s: "),
    ):
        with pytest.raises(SystemExit) as end:
            main(["serve", "nowhere", *flags])
        assert end.value.code == 2 and said in capsys.readouterr().err

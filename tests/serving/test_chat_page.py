"""The chat page in a browser: it streams what the API answers, says who answered, and sends thumbs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, opened
from local import LocalServer

from modelyard.serving.feedback import FeedbackStore

TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
FILL = """
  $("system").value = "be brief"; $("temperature").value = 0; $("tokens").value = 8;
  $("text").value = "hello"; $("form").requestSubmit(); true
"""
OPINIONS = "document.querySelectorAll('.opinion button').length"


@pytest.fixture
def server(tiny_model: Path, tmp_path: Path) -> Iterator[LocalServer]:
    found = LocalServer(tiny_model, feedback=FeedbackStore(str(tmp_path / "feedback")), version="7")
    yield found
    found.stop()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_a_person_talks_and_says_what_they_think(server: LocalServer, tmp_path: Path) -> None:
    picture = Path(os.environ.get("MODELYARD_SCREENSHOTS", str(tmp_path))) / "chat.png"
    picture.parent.mkdir(parents=True, exist_ok=True)

    async def talk() -> str:
        async with opened(server.url + "/") as page:
            await page.until("document.readyState == 'complete' && document.getElementById('model')"
                             "?.textContent == 'tiny'")  # fmt: skip
            await page.run(FILL)
            await page.until(f"{OPINIONS} == 3")
            answer = await page.run("document.querySelector('.turn.assistant span').textContent")
            assert "version 7" in await page.run("document.querySelector('.opinion').textContent")
            assert (await page.run("$('rate').textContent")).startswith("8 tokens")
            await page.screenshot(picture)
            await page.run("document.querySelector('.opinion button').click()")
            await page.until("document.querySelector('.opinion').textContent == 'thank you'")
            await page.run("$('system').value = 'word '.repeat(3000); $('text').value = 'again';"
                           "$('form').requestSubmit(); true")  # fmt: skip
            assert "tokens" in await page.until("document.querySelector('.turn.error span')?.textContent")
            # What was refused is no part of the conversation, and can be sent again.
            assert await page.run("[turns.length, $('talk').querySelectorAll('.user').length, $('text').value]") == [
                2, 1, "again",
            ]  # fmt: skip
            await page.run("$('system').value = ''; $('tokens').value = 1500; $('form').requestSubmit(); true")
            await page.until("document.querySelectorAll('.turn.assistant span')[1]?.textContent")
            await page.run("$('clear').click(); true")  # in the midst of an answer, unless it was a short one
            await page.until("!$('send').disabled && $('stop').disabled")
            await asyncio.sleep(0.3)
            assert await page.run("[turns.length, $('talk').childElementCount]") == [0, 0]
            await page.run("write(show('assistant', ''), 'so:\\n```python\\nx = 1\\n```'); true")
            assert await page.run("document.querySelector('.assistant code').textContent") == "x = 1"
        return str(answer)

    shown = asyncio.run(talk())
    body = {"model": "tiny", "messages": TURNS, "max_tokens": 8, "temperature": 0}
    said = httpx.post(server.url + "/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert shown == said
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5_000, "the screenshot is blank"
    assert server.feedback is not None
    server.feedback.close()
    (file,) = (tmp_path / "feedback" / "opinions").iterdir()
    (row,) = pq.read_table(file).to_pylist()
    assert row["label"] is True and row["completion"] == said and row["prompt"] == TURNS

"""Feedback: what was answered for is on disk whatever happens to the server, and training reads it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from asking import HTTP, MINUTES
from local import LocalServer

from modelyard.align import records
from modelyard.serving import feedback
from modelyard.serving.feedback import FeedbackStore, recover
from modelyard.serving.keys import digest
from modelyard.serving.schema import FeedbackRequest
from modelyard.stages.examples import read_examples
from modelyard.storage import find_files, join

TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
CORRECTED = {"id": "c", "rating": "down", "messages": TURNS, "answer": "no", "correction": "yes"}
LIKED = {"id": "l", "rating": "up", "messages": TURNS, "answer": "hi", "comment": "naïve 世界"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "feedback"


@pytest.fixture
def served(tiny_model: Path, place: Path) -> Iterator[LocalServer]:
    store = FeedbackStore(str(place), roll_s=3600)
    server = LocalServer(tiny_model, keys={digest("alice-key"): "alice"}, feedback=store, version="7")
    yield server
    server.stop()


def say(server: LocalServer, body: dict[str, Any]) -> httpx.Response:
    return HTTP.post(server.url + "/v1/feedback", json=body, headers={"authorization": "Bearer alice-key"})


def opinion(**fields: Any) -> FeedbackRequest:
    return FeedbackRequest.model_validate(fields)


def table(place: Path, kind: str) -> list[dict[str, Any]]:
    return [row for file in sorted((place / kind).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def logs(place: Path) -> list[Path]:
    return sorted((place / "log").glob("*"))


def test_what_people_say_becomes_what_training_reads(served: LocalServer, place: Path) -> None:
    answers = [say(served, body) for body in (CORRECTED, LIKED, {"id": "x", "rating": "up"})]
    assert {a.status_code for a in answers} == {200} and {a.json()["object"] for a in answers} == {"feedback"}
    (log,) = logs(place)
    assert [json.loads(line)["id"] for line in log.read_text().splitlines()] == [a.json()["id"] for a in answers]
    assert log.stat().st_mode & 0o077 == 0
    assert served.feedback is not None
    served.feedback.close()
    assert not logs(place)
    (corrected,), (liked,), (rated,) = (table(place, kind) for kind in ("preferences", "opinions", "ratings"))
    assert (corrected["chosen"], corrected["rejected"], corrected["label"]) == ("yes", "no", False)
    assert corrected["key"] == "alice" and corrected["version"] == "7" and corrected["prompt"] == TURNS
    assert liked["comment"] == LIKED["comment"] and rated["response"] == "x" and rated["prompt"] is None
    assert (place / "opinions").stat().st_mode & 0o077 == 0
    # The readers of the alignment stages, no record turned away.
    pairs = read_examples(find_files([str(place / "preferences/*.parquet")]), records.preference, 0.0).good
    assert [(p.prompt, p.chosen[0]["content"], p.rejected[0]["content"]) for p in pairs] == [
        (tuple(TURNS), "yes", "no")
    ]
    both = find_files([str(place / "opinions/*.parquet"), str(place / "preferences/*.parquet")])
    opinions = read_examples(both, records.feedback, 0.0).good
    assert [(o.completion, o.label) for o in opinions] == [("hi", True), ("no", False)]


def test_bad_bodies_are_refused_and_the_route_can_be_off(served: LocalServer, local: LocalServer, place: Path) -> None:
    for bad in ({"id": "x", "rating": "meh"}, {"rating": "up"}, {"id": "x", "rating": "up", "correction": "y"},
                {"id": "x", "rating": "up", "extra": 1}):  # fmt: skip
        assert say(served, bad).status_code == 400, bad
    assert not logs(place)
    card = HTTP.get(served.url + "/v1/models", headers={"authorization": "Bearer alice-key"}).json()["data"][0]
    assert card["feedback"] is True
    answer = HTTP.post(local.url + "/v1/feedback", json={"id": "x", "rating": "up"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "feedback_off"


TALK = """
import asyncio, sys
from modelyard.serving.feedback import FeedbackStore
from modelyard.serving.schema import FeedbackRequest

async def talk():
    store = FeedbackStore(sys.argv[1], roll_s=0.05)
    body = {"rating": "up", "messages": [{"role": "user", "content": "hello"}], "answer": "hi"}
    for n in range(1_000_000):
        print(await store.add(FeedbackRequest.model_validate(body | {"id": str(n)}), "alice", "1"), flush=True)

asyncio.run(talk())
"""


def test_servers_that_are_killed_lose_and_double_nothing(place: Path) -> None:
    """Two at a time, killed anywhere between the first line of a log and the removal of a rolled one."""
    answered = list[str]()
    for _ in range(2):
        command = [sys.executable, "-c", TALK, str(place)]
        servers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for server in servers:
            assert server.stdout is not None
            answered += [server.stdout.readline().strip() for _ in range(100)]
            server.kill()
            answered += [line.strip() for line in server.stdout if line.endswith("\n")]
            server.wait()
    recover(place)
    found = Counter(row["id"] for row in table(place, "opinions"))
    assert {path.suffix for path in logs(place)} <= {".tmp"}, "killed before it had its name: nothing was in it"
    assert set(found.values()) == {1} and set(answered) <= set(found)
    assert len(set(found) - set(answered)) <= 4, "one row for each kill may be on disk and not answered for"


def test_a_crash_between_parquet_and_the_logs_end_doubles_nothing(place: Path) -> None:
    store = FeedbackStore(str(place))
    asyncio.run(store.add(opinion(**LIKED), "", "1"))
    (log,) = logs(place)
    content = log.read_bytes()
    assert recover(place) == 0 and log.exists(), "its process lives"
    store.close()
    log.write_bytes(content + b'{"id": "half a li')
    assert recover(place) == 1 and not log.exists()
    assert [row["response"] for row in table(place, "opinions")] == ["l"]


def test_a_log_that_cannot_be_rolled_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeedbackStore(str(place))
    asyncio.run(store.add(opinion(**LIKED), "", "1"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feedback, "write_bytes", full)
        store.close()
    assert len(logs(place)) == 1
    asyncio.run(store.add(opinion(**CORRECTED), "", "1"))
    store.close()
    assert not logs(place) and len(table(place, "opinions")) == len(table(place, "preferences")) == 1


def test_a_log_is_rolled_by_its_age_although_nobody_says_more(place: Path) -> None:
    async def use() -> None:
        await FeedbackStore(str(place), roll_s=0.05).add(opinion(**LIKED), "", "1")
        async with asyncio.timeout(MINUTES):
            while logs(place):
                await asyncio.sleep(0.02)

    asyncio.run(use())
    assert [row["response"] for row in table(place, "opinions")] == ["l"]


def test_many_rows_roll_before_their_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "ROWS", 3)
    store = FeedbackStore(str(place))

    async def add() -> None:
        for _ in range(7):
            await store.add(opinion(**LIKED), "", "1")

    asyncio.run(add())
    assert len(table(place, "opinions")) == 6
    assert feedback.main([str(place)]) == 0 and feedback.main([]) == 2
    store.close()
    assert len(table(place, "opinions")) == 7


def test_turns_with_tools_keep_all_their_fields(place: Path) -> None:
    turns = [*TURNS, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    store = FeedbackStore(str(place))
    asyncio.run(store.add(opinion(**LIKED | {"messages": turns}), "", "1"))
    store.close()
    (row,) = table(place, "ratings")
    assert json.loads(row["messages_json"])[2]["tool_calls"] == [{"id": "1"}]


def test_s3_takes_an_object_a_row(moto_server: str) -> None:
    store = FeedbackStore("s3://yard/feedback")
    for body in (CORRECTED, LIKED):
        asyncio.run(store.add(opinion(**body), "", "1"))
    pairs = read_examples(find_files([join("s3://yard/feedback", "preferences/*.parquet")]), records.preference, 0.0)
    assert [p.chosen[0]["content"] for p in pairs.good] == ["yes"]

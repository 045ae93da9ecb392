"""The mailbox between workers and driver: in order, without waiting, remembering what no restart mends."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from modelyard.errors import DataError
from modelyard.stages.workers import Mailbox, Outbox, load_program


class Local:
    """Stands for the actor's handle: `push.remote(items)`."""

    def __init__(self) -> None:
        self.box, self.pushes = Mailbox(), 0

    @property
    def push(self) -> Local:
        return self

    def remote(self, items: list[Any]) -> None:
        self.pushes += 1
        self.box.push(items)


def test_messages_keep_their_order_and_are_drained_once() -> None:
    box = Mailbox()
    box.push([("say", 1), ("say", 2)])
    box.push([("say", 3)])
    assert [value for _, value in box.drain()] == [1, 2, 3]
    assert box.drain() == []
    assert not box.fatal()
    box.push([("error", DataError("x"))])
    box.drain()
    assert box.fatal(), "remembered after it was read"


def test_the_outbox_gathers_what_comes_quickly() -> None:
    local = Local()
    outbox = Outbox(local)
    for i in range(100):
        outbox.send("say", i)
    assert local.pushes == 1
    outbox._last -= 10
    outbox.send("say", 100)
    assert [value for _, value in local.box.drain()] == list(range(101))


def test_errors_cross_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(DataError("what", place="where", mend="how")))
    assert (error.what, error.place, error.mend) == ("what", "where", "how")


def test_programs_are_found_by_path() -> None:
    from modelyard.train.programs import pretrain

    assert load_program("modelyard.train.programs:pretrain") is pretrain
    with pytest.raises(AttributeError):
        load_program("modelyard.train.programs:nothing")

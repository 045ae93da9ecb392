from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator

import pytest

from modelyard.errors import ResourceError
from modelyard.monitor.exporter import PORT, Exporter, from_environment


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    made = Exporter(0)
    yield made
    made.close()


def scrape(exporter: Exporter) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_what_a_training_stage_logs_is_shown(exporter: Exporter) -> None:
    exporter.observe("demo", "base", "pretrain", {"loss": 3.5, "tokens_per_second": 900.0, "other": 1.0}, 12)
    text = scrape(exporter)
    assert 'modelyard_train_loss{recipe="demo",stage="base"} 3.5' in text
    assert 'modelyard_train_tokens_per_second{recipe="demo",stage="base"} 900.0' in text
    assert 'modelyard_train_step{recipe="demo",stage="base"} 12.0' in text
    assert "other" not in text


def test_curation_counts_are_shown_and_have_no_step(exporter: Exporter) -> None:
    exporter.observe("demo", "corpus", "curate", {"documents_in": 100.0, "documents": 60.0}, None)
    text = scrape(exporter)
    assert 'modelyard_curate_documents_read{recipe="demo",stage="corpus"} 100.0' in text
    assert 'modelyard_curate_documents_kept{recipe="demo",stage="corpus"} 60.0' in text
    assert "modelyard_train_step{" not in text


def test_a_stage_that_ended_is_forgotten_so_that_it_does_not_look_stalled(exporter: Exporter) -> None:
    for stage in ("base", "chat"):
        exporter.observe("demo", stage, "pretrain", {"loss": 1.0}, 1)
    exporter.forget("demo", "base")
    text = scrape(exporter)
    assert 'stage="base"' not in text
    assert 'modelyard_train_loss{recipe="demo",stage="chat"}' in text


def test_nothing_listens_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PORT, raising=False)
    assert from_environment() is None


def test_a_port_in_use_or_no_port_at_all_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv(PORT, str(taken.getsockname()[1]))
        with pytest.raises(ResourceError, match="cannot be used"):
            from_environment()
    monkeypatch.setenv(PORT, "many")
    with pytest.raises(ResourceError, match="is not a port"):
        from_environment()

"""`plan`, `capacity` and `scaling` as a person types them, in process."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.cli import main


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("words " * 500)
    path = tmp_path / "r.yaml"
    path.write_text(
        f"name: sizing\nroot: {tmp_path}/root\nstages:\n"
        f"  corpus: {{kind: curate, inputs: {{files: {tmp_path}/a.txt}}, steps: [{{normalize: {{}}}}]}}\n"
        "  tokens: {kind: tokenize, inputs: {corpus: corpus}, tokenizer: {train: {vocab_size: 32000}}, "
        "sequence_length: 2048}\n"
        "  base: {kind: pretrain, inputs: {tokens: tokens}, model: {preset: llama-1b}, tokens: 1000000000, "
        "global_batch: 256, micro_batch: 2, resources: {workers: 8, gpus_per_worker: 1, hardware: h100}}\n"
    )
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), " ".join((out + err).split())


def test_the_page_holds_every_plot(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = call(capsys, "plan", recipe, "--html", tmp_path / "plan.html", "--region", "france")
    assert code == 0 and "base" in text
    page = (tmp_path / "plan.html").read_text()
    for title in ("base (pretrain)", "Memory", "Layouts", "Parameters", "Cost against time", "Loss against compute"):
        assert title in page
    assert page.count("<svg") == 4 and "nan" not in page and "<script" not in page


def test_what_if_on_other_hardware(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "layouts.html"
    code, text = call(capsys, "plan", recipe, "--hardware", "a100", "--devices", "64", "--html", page)
    assert code == 0 and "layouts tried" in text and "the fastest" in text and "slower" in text
    assert "<h3>Layouts</h3>" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", "500USD", "--hardware", "h100", "--devices", "8"), ["$500", "nats a token", "tokens:"]),
        (("--hours", "24", "--hardware", "l4"), ["24 h", "parameters"]),
    ],
)
def test_a_budget_chooses(arguments: tuple[str, ...], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, text = call(capsys, "plan", *arguments)
    assert code == 0
    for word in words:
        assert word in text


def test_a_budget_takes_the_recipes_stage(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = call(capsys, "plan", recipe, "--hours", "2", "--keep-model")
    assert code == 0 and "base: model" in text and "num_hidden_layers: 16" in text and "on 8 x h100" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["no recipe", "--budget"]),
        (("--budget", "0USD"), ["more than 0"]),
        (("--budget", "-5"), ["not an amount"]),
        (("--budget", "500EUR"), ["US dollars"]),
        (("--hours", "0"), ["hours is 0"]),
        (("--hours", "-1"), ["hours is -1"]),
        (("--hours", "1", "--hardware", "h10"), ["unknown hardware", "did you mean h100"]),
        (("--hours", "1", "--region", "frence"), ["unknown grid region", "france"]),
        (("--hours", "1e-9"), ["give at least"]),
        (("--hours", "1", "--devices", "0"), ["devices"]),
    ],
)
def test_bad_budgets_are_one_screen(
    arguments: tuple[str, ...], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = call(capsys, "plan", *arguments)
    assert code == 2 and "Traceback" not in text
    for word in words:
        assert word in text


def test_an_impossible_layout_names_what_would_do(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = call(capsys, "plan", recipe, "--set", "base.global_batch=6", "--devices", "512")
    assert code == 2 and "cannot be spread over 512" in text and "multiple of 512" in text


def test_capacity_compares_the_ways_to_serve(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = call(capsys, "capacity", "llama-8b", "--load", "20")
    assert code == 0
    for word in ("replicas", "real-time", "serverless", "batch", "asynchronous", "break even"):
        assert word in text
    code, text = call(capsys, "capacity", "llama-71b")
    assert code == 2 and "did you mean llama-7" in text


def test_scaling_without_runs_shows_the_published_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = call(capsys, "scaling", tmp_path)
    assert code == 0 and "published coefficients" in text and "next doubling buys" in text

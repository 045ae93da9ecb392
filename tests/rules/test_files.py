"""Rules on the checkout's files: what must not be there, job scripts, and commands in the documentation."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
JOBS = sorted((CHECKOUT / "jobs").glob("*.py"))
PAGES = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").glob("**/*.md")])
LONGEST_JOB = 25


def files() -> list[Path]:
    """Files git knows or would add: nothing that .gitignore names."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("this is not a git checkout")
    return [CHECKOUT / name for name in listed.stdout.split("\0") if name and (CHECKOUT / name).is_file()]


def test_the_source_root_is_not_a_package() -> None:
    # With platform/__init__.py Ray's workers would import it instead of the standard library's platform.
    assert not (CHECKOUT / "platform" / "__init__.py").exists()


def test_nothing_importable_from_a_root_shadows_the_standard_library() -> None:
    names = {path.stem for folder in ("platform", "jobs") for path in (CHECKOUT / folder).glob("*.py")}
    names |= {path.parent.name for path in (CHECKOUT / "platform").glob("*/__init__.py")}
    assert not names & sys.stdlib_module_names


def test_there_is_a_job_for_every_stage_kind() -> None:
    from modelyard.stages import registry

    kinds = {kind for path in JOBS for kind in re.findall(r'"--to-kind", "(\w+)"', path.read_text())}
    assert kinds == set(registry.BUILT_IN)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_short_and_only_passes_arguments_on(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= LONGEST_JOB
    code = [line for line in lines if line and not line.startswith("#")]
    first_import = next(i for i, line in enumerate(code) if line.startswith("from modelyard"))
    assert any("sys.path.insert" in line for line in code[:first_import]), "platform/ must be on the path first"
    assert code[-1].strip().startswith('main(["run", *sys.argv[1:]')


def test_no_file_names_a_package_index_or_a_path_of_one_machine() -> None:
    # In pieces, so that this file is not among the found. A path of one machine starts at its root.
    index = "|".join(
        ["pypi" + r"\.org", "pytorch" + r"\.org/whl", "python" + "hosted", "index" + "-url", "find" + "-links"]
    )
    place = r"(?<![\w.}~$/-])/(?:" + "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers"]) + ")/"
    pattern = re.compile(f"{index}|{place}")
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(CHECKOUT)}: {match.group()}" for match in pattern.finditer(text)]
    assert not found


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks, continued lines joined, without comments and prompts."""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def words_after(line: str, program: str) -> list[str] | None:
    """The arguments of `program` in a shell line, or None when it does not run it."""
    words = shlex.split(line, comments=True)
    while words and (re.match(r"^\w+=", words[0]) or words[0] in ("time", "exec")):
        words = words[1:]
    if not words or Path(words[0]).name != program:
        return None
    arguments = words[1:]
    for i, word in enumerate(arguments):
        if word in ("&", "&&", "|", ";", ">", ">>"):
            return arguments[:i]
    return arguments


def parse(command: Any, words: list[str], info: str) -> None:
    """Parses arguments as the command line would, through groups, without running anything. Raises for a mistake."""
    if "--help" in words:
        return
    if hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"{info} has no command {words[:1]}"
        parse(command.commands[words[0]], words[1:], f"{info} {words[0]}")
        return
    command.make_context(info, list(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_documentation_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer
    from ray.scripts.scripts import cli as ray

    from modelyard.cli import app

    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    modelyard = typer.main.get_command(app)
    targets = set(re.findall(r"^([\w-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        if (arguments := words_after(line, "make")) is not None:
            assert {word for word in arguments if "=" not in word} <= targets, line
        if (arguments := words_after(line, "modelyard")) is not None:
            parse(modelyard, arguments, "modelyard")
        if (arguments := words_after(line, "ray")) is not None:
            parse(ray, arguments, "ray")
        if job := re.search(r"python jobs/\w+\.py (.*)", line):
            parse(modelyard, ["run", *shlex.split(job.group(1), comments=True)], "modelyard")
        for path in re.findall(r"\b((?:jobs|tests|pipelines|docs)/[\w/.-]+\.(?:py|yaml|md))", line):
            assert (CHECKOUT / path).exists(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_the_documentation_are_valid(page: Path) -> None:
    """A YAML block is a whole recipe, or stages of one, unless it is of another program."""
    import yaml

    from modelyard.stages import registry

    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        data = yaml.safe_load(block)
        stages = data.get("stages", data) if isinstance(data, dict) else {}
        if not all(isinstance(options, dict) and "kind" in options for options in stages.values()):
            continue
        for name, options in stages.items():
            assert registry.option_models()[options["kind"]].model_validate(options), name

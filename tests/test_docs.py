"""The documentation names what is there: links, files, commands with their options, targets, functions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

import zeroskip
from zeroskip.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SUFFIXES = (".py", ".md", ".h", ".cpp", ".cmake", "/")
ROOMS = ("src", "csrc", "cmake", "docs", "tests", "benchmarks", "examples", "tools")
PLACES = {
    "/" + path.relative_to(ROOT).as_posix() for room in ROOMS for path in [ROOT / room, *(ROOT / room).rglob("*")]
}


def _text(page: Path) -> str:
    return re.sub(r"<!-- (\w+) begin -->.*?<!-- \1 end -->", "", page.read_text(), flags=re.S)  # tables of a command


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _code(page: Path) -> Iterator[str]:
    """Yield what stands in code: each line of a block, continued lines joined, and each span."""
    text = _text(page)
    for block in re.findall(r"```\n(.*?)```", text, flags=re.S):
        yield from re.sub(r"\\\n", " ", block).splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    return list(lexer)


def _commands(page: Path, program: str) -> Iterator[list[str]]:
    """Yield the words behind `program` of every command that starts with it."""
    for line in _code(page):
        if re.match(rf"{program}( |$)", line) and "..." not in line:
            yield _words(line)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        place, _, anchor = link.partition("#")
        if re.match(r"https?:", place):
            continue
        target = page.parent / place if place else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in _anchors(target), f"{link} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in (word.rstrip(",;") for code in _code(page) for word in code.split()):
        if not name.endswith(SUFFIXES) or not re.fullmatch(r"[\w./-]*\w/?", name) or name.startswith(("/", ".")):
            continue
        if re.search(r"(^|/)([A-Z]+\b|x\b|x_|build\b)", name):  # a placeholder, what a build makes
            continue
        assert any(place.endswith("/" + name.rstrip("/")) for place in PLACES), f"there is no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_served_with_these_options(page: Path) -> None:
    for words in _commands(page, "zeroskip"):
        command = typer.main.get_command(app)
        context = command.make_context("zeroskip", [], resilient_parsing=True)
        rest = words
        while hasattr(command, "commands") and rest:
            assert rest[0] in command.commands, f"zeroskip {' '.join(words)}: no such command"
            command, rest = command.commands[rest[0]], rest[1:]
            context = type(context)(command, info_name=command.name, parent=context)
        options = {each for parameter in command.params for each in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [
            each for each in rest if each.startswith("--") and each.partition("=")[0] not in {*options, "--help"}
        ]
        assert not unknown, f"zeroskip {' '.join(words)}: no {unknown[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_targets_are_there(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for words in _commands(page, "make"):
        assert not words or words[0] in targets, f"make {words[0]}: no such target"
    for words in _commands(page, "python"):
        source = (ROOT / words[0]).read_text()
        for option in (each.strip("[]") for each in words[1:] if each.lstrip("[").startswith("--")):
            assert f'"{option}"' in source, f"{words[0]} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_exist_and_examples_are_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", _text(page), flags=re.S):
        compile(block, page.name, "exec")
    for code in _code(page):
        for name in re.findall(r"^(?:zeroskip|zs)\.([a-z_]+)\b(?:\(|$)", code):
            assert hasattr(zeroskip, name), f"zeroskip.{name} is not there"

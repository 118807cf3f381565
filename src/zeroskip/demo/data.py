"""Sentences for the demo: the docstrings of the Python standard library that runs it.

They are on every machine, they are real technical English, and they carry a task with known answers: the first
paragraph of a docstring is a summary of the rest (`zeroskip.demo.task`). Modules are split, not docstrings, so nothing
that calibrates the pruning comes from a module that is tested.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zeroskip.errors import ZeroskipError

SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
QUERY_CHARS = (25, 200)
DOCUMENT_CHARS = (80, 600)


@dataclass(frozen=True)
class Docstring:
    """One docstring: the top-level module it comes from and its text with its paragraphs."""

    module: str
    text: str


@dataclass(frozen=True)
class Pair:
    """A query (first paragraph) and the document it must find (the rest of the same docstring)."""

    module: str
    query: str
    document: str


@dataclass(frozen=True)
class Split:
    """Texts that calibrate and pairs that test, from modules that do not overlap."""

    calibration: list[str]
    pairs: list[Pair]
    calibration_modules: list[str]
    test_modules: list[str]


def docstrings(root: Path | None = None) -> list[Docstring]:
    """Collect every docstring under `root` (default: the standard library of this Python), in a fixed order.

    Test packages and site-packages are left out, files that do not parse are passed over, and of equal texts only the
    first is kept.

    Raises
    ------
    ZeroskipError
        When `root` holds no docstring at all, as in a Python stripped of its sources.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    found: dict[str, Docstring] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in SKIP or part.startswith("config-") for part in parts):
            continue
        module = parts[0].removesuffix(".py")
        for text in _texts(path):
            found.setdefault(" ".join(text.split()), Docstring(module, text))
    if not found:
        raise ZeroskipError(f"no docstrings under {root}: the demo reads the sources of the standard library")
    return list(found.values())


def _texts(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and files of another Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def pairs(docs: list[Docstring]) -> list[Pair]:
    """Make the retrieval pairs: first paragraph of 25-200 characters, the rest over 80 characters, cut at 600.

    A query or a document that occurs twice would have two right answers; the first one stays.
    """
    out: list[Pair] = []
    queries: set[str] = set()
    documents: set[str] = set()
    for doc in docs:
        first, _, rest = re.sub(r"\n\s*\n", "\0", doc.text).partition("\0")
        query = " ".join(first.split())
        document = " ".join(rest.split())
        if not QUERY_CHARS[0] <= len(query) <= QUERY_CHARS[1] or len(document) <= DOCUMENT_CHARS[0]:
            continue
        document = document[: DOCUMENT_CHARS[1]]
        if query in queries or document in documents:
            continue
        queries.add(query)
        documents.add(document)
        out.append(Pair(doc.module, query, document))
    return out


def split(seed: int = 0, *, test_pairs: int = 1000, texts: int = 2700, docs: list[Docstring] | None = None) -> Split:
    """Draw calibration modules until they hold half of all docstrings; the others, which keep `test_pairs`, test.

    Parameters
    ----------
    seed
        Decides which modules test and which calibrate, and which of their docstrings are taken.
    test_pairs, texts
        How many pairs to search among, and how many docstrings to calibrate on (all there are, if fewer).

    Raises
    ------
    ZeroskipError
        When the test modules do not hold `test_pairs` pairs.
    """
    docs = docstrings() if docs is None else docs
    every = pairs(docs)
    texts_in, pairs_in = Counter(doc.module for doc in docs), Counter(pair.module for pair in every)
    rng = random.Random(seed)
    modules = sorted(texts_in)
    rng.shuffle(modules)
    calibrating: set[str] = set()
    held, left = 0, len(every)
    for module in modules:
        if held < len(docs) / 2 and left - pairs_in[module] >= test_pairs:
            calibrating.add(module)
            held, left = held + texts_in[module], left - pairs_in[module]
    test = [pair for pair in every if pair.module not in calibrating]
    if len(test) < test_pairs:
        raise ZeroskipError(f"{len(test)} held-out docstring pairs, {test_pairs} asked for: ask for fewer")
    drawn = rng.sample(test, test_pairs)  # before the texts, whose number then does not change the task
    return Split(
        calibration=_in_turns([doc for doc in docs if doc.module in calibrating], texts, rng),
        pairs=drawn,
        calibration_modules=sorted(calibrating),
        test_modules=sorted(set(modules) - calibrating),
    )


def _in_turns(docs: list[Docstring], texts: int, rng: random.Random) -> list[str]:
    """Draw from one module after the other: a few large packages would else decide which words are seen."""
    left: dict[str, list[str]] = {}
    for doc in docs:
        left.setdefault(doc.module, []).append(doc.text[: DOCUMENT_CHARS[1]])
    for module in left.values():
        rng.shuffle(module)
    drawn: list[str] = []
    while len(drawn) < min(texts, len(docs)):
        drawn += [module.pop() for _, module in sorted(left.items()) if module]
    rng.shuffle(drawn)
    return drawn[:texts]

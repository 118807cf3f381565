"""The files that belong to a model beside its config and its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["COMPANIONS", "TOKENIZERS", "copy_companions"]

TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
# Tokenizers, processors, sentence-transformers' modules.
COMPANIONS: tuple[str, ...] = (
    *TOKENIZERS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
)
COMPANIONS += ("modules.json", "*sentence*.json", "[0-9]_*")


def copy_companions(source: Path, target: Path, more: tuple[str, ...] = ()) -> None:
    """Copy them unchanged, and what else the globs in `more` name; what `target` has already is left."""
    for path in sorted({path for pattern in (*COMPANIONS, *more) for path in source.glob(pattern)}):
        if (target / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)

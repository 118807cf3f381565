"""MODEL on the command line: a directory, or the id of a model on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from zeroskip.errors import ZeroskipError, first_line
from zeroskip.io.companions import TOKENIZERS, copy_companions

__all__ = ["Companions", "is_causal_lm", "load", "load_tokenizer"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load(name: str) -> nn.Module:
    """Load a model in evaluation mode, as the architecture its config names.

    Raises
    ------
    ZeroskipError
        If there is no such model, or it cannot be read.
    """
    path = Path(name)
    if path.is_dir():
        from zeroskip.io import load as load_directory

        return load_directory(path)
    _check_hub_id(name)
    import transformers

    def fetch() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
        model: nn.Module = kind.from_pretrained(name, use_safetensors=True)
        return model.eval()

    model: nn.Module = _fetched(name, fetch)
    return model


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer that belongs to a model."""
    path = Path(name)
    if not path.is_dir():
        _check_hub_id(name)
    elif not any(found for pattern in TOKENIZERS for found in path.glob(pattern)):
        # transformers would make one without words from config.json alone
        raise ZeroskipError(f"{name}: has no tokenizer: copy its files (tokenizer.json and the like) there")
    from transformers import AutoTokenizer

    return _fetched(f"{name} (its tokenizer)", lambda: AutoTokenizer.from_pretrained(name))


def _check_hub_id(name: str) -> None:
    if Path(name).exists():
        raise ZeroskipError(f"{name}: is a file; MODEL is a Hugging Face directory or a hub id")
    if not HUB_ID.fullmatch(name):
        raise ZeroskipError(f"{name}: no such directory, and not a hub id either")


def _fetched(what: str, fetch: Any) -> Any:
    """Run transformers' loading code; whatever it raises becomes one line."""
    try:
        return fetch()
    except KeyboardInterrupt:
        raise
    except Exception as error:  # hub, file system, JSON, safetensors and missing optional packages raise what they like
        raise ZeroskipError(f"{what}: cannot be loaded: {first_line(error)}") from error


def is_causal_lm(model: nn.Module) -> bool:
    """Return whether the model generates text, rather than embeds it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


class Companions:
    """The files beside a model's weights; `zeroskip.save` takes it where it takes a tokenizer.

    `texts` are further files, by name.
    """

    def __init__(self, model: str, texts: Mapping[str, str] | None = None) -> None:
        self.model, self.texts = model, texts or {}

    def save_pretrained(self, directory: Path) -> None:
        """Copy them unchanged; from the hub, the tokenizer as transformers stores it."""
        for name, text in self.texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        source = Path(self.model)
        if not source.is_dir():
            load_tokenizer(self.model).save_pretrained(directory)
            return
        copy_companions(source, directory)

"""From a conversation to the tokens that a model continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zeroskip.errors import ZeroskipError, first_line

__all__ = ["chat_tokens"]


def chat_tokens(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the tokens of a conversation, up to where the model answers.

    By the tokenizer's chat template. A model that has none was not taught to converse: it continues the contents of the
    messages, one after the other on lines of their own.

    Raises
    ------
    ZeroskipError
        If the template refuses the conversation.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        plain: list[int] = tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
        return plain
    try:
        made = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # templates are programs of the model's maker and raise what they like
        raise ZeroskipError(f"the model's chat template refuses these messages: {first_line(error)}") from error
    tokens: list[int] = made["input_ids"]
    return tokens

"""Requests and answers in OpenAI's form. What would change the answer and is not served is refused, never ignored."""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from zeroskip.serve.errors import ApiError
from zeroskip.serve.sampling import Sampling

__all__ = [
    "FORMS", "ChatRequest", "CompletionRequest", "EmbeddingRequest", "Generates", "ModelCard", "ModelList",
    "Usage", "now", "refuse_unserved",
]  # fmt: skip

# Fields that ask for something else than text drawn as `Generates` says, and the values that ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "modalities": (["text"], []), "audio": (), "prediction": (), "web_search_options": (), "suffix": ("",),
    "echo": (False,), "best_of": (1,), "min_p": (0, 0.0), "repetition_penalty": (1, 1.0),
}  # fmt: skip

# Of fields that may be one thing or another, what they may be: each kind would complain in its own way.
FORMS = {
    "prompt": "a text, a list of texts, a list of token numbers, or a list of such lists",
    "input": "a text, a list of texts, a list of token numbers, or a list of such lists",
    "content": "a text, or a list of parts",
    "stop": "a text, or a list of at most 4",
}
Text = Annotated[str, Field(max_length=10_000_000)]
Token = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Generates(BaseModel):
    """What both ways to generate text take; `FIELD` is the one that holds what is continued."""

    FIELD: ClassVar[str]
    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, description="0 is all. Not one of OpenAI's.")
    n: int | None = Field(None, ge=1, le=16, description="Answers to each prompt.")
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, answer: int) -> Sampling:
        """Return how the answer of this number is drawn; each has a seed of its own."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            seed=None if self.seed is None else self.seed + answer,
        )


class Part(BaseModel):
    """A piece of a message; text is the only kind that is served."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[Part] | None = None

    def plain(self) -> dict[str, str]:
        """Return it as chat templates take it.

        Raises
        ------
        ApiError
            If a part is not text.
        """
        parts = self.content if isinstance(self.content, list) else [Part(type="text", text=self.content or "")]
        for part in parts:
            if part.type != "text" or part.text is None:
                raise ApiError(
                    400, f"messages: a part of type {part.type!r} is not served, only text", param="messages"
                )
        return {"role": self.role, "content": "".join(part.text or "" for part in parts)}


class ChatRequest(Generates):
    """POST /v1/chat/completions."""

    FIELD = "messages"
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionRequest(Generates):
    """POST /v1/completions."""

    FIELD = "prompt"
    prompt: Text | list[Token] | list[Text] | list[list[Token]] = Field(description="One prompt or several.")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each text or tokens."""
        given: Any = self.prompt
        single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        prompts: list[str] | list[list[int]] = [given] if single else given
        return prompts


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: Text | list[Token] | list[Text] | list[list[Token]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)

    @property
    def texts(self) -> list[str] | list[list[int]]:
        """The inputs, each text or tokens."""
        given: Any = self.input
        single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
        texts: list[str] | list[list[int]] = [given] if single else given
        return texts


class Usage(BaseModel):
    """Tokens counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0

    @classmethod
    def of(cls, prompt: int, completion: int = 0) -> Usage:
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "zeroskip"


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def refuse_unserved(request: BaseModel) -> None:
    """Raise ApiError if the request asks for something that is not served."""
    for name, value in (request.model_extra or {}).items():
        idle = value is None or any(type(value) is type(one) and value == one for one in UNSERVED.get(name, ()))
        if name in UNSERVED and not idle:  # by type too: True is no 1
            raise ApiError(400, f"{name} is not served here: leave it out", "unsupported_parameter", name)


def now() -> int:
    """Return the time as OpenAI's answers state it."""
    return int(time.time())

"""Each request draws its tokens in its own way: temperature, top-p, top-k, penalties, and a seed of its own.

transformers' continuous batching samples all requests alike and has one random stream for them. `Sampler` is a logits
processor of the kind it takes: it draws the token of every request that samples, and leaves only that one possible, so
that the argmax which follows takes it. A greedy request is left alone and gets the argmax of its logits, as it does
from `model.generate`; and a seed gives the same text whoever else is being served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

__all__ = ["LEAST_TEMPERATURE", "Sampler", "Sampling"]

LEAST_TEMPERATURE = 1e-6  # of those that are not 0: closer to it, fp32 has no room for what is divided by it


@dataclass
class Sampling:
    """How one request draws its tokens.

    Attributes
    ----------
    temperature : float
        0 is greedy.
    top_p : float
        Only the likeliest tokens that together have this probability.
    top_k : int
        Only this many; 0 is all.
    frequency_penalty, presence_penalty : float
        Taken from the logit of a token for each time, or once if, it was generated before.
    seed : int or None
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    generator: torch.Generator | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.temperature > 0:
            self.generator = torch.Generator()
            if self.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.seed % 2**63)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sampling:
        return self  # transformers copies a request that begins anew; its random stream goes on

    @property
    def is_plain(self) -> bool:
        """Whether the argmax of the logits is what is wanted."""
        return self.temperature <= 0 and not self.frequency_penalty and not self.presence_penalty

    def draw(self, logits: Tensor, generated: Sequence[int]) -> int:
        """Return the next token for logits [vocabulary], fp32, which are not modified."""
        if (self.frequency_penalty or self.presence_penalty) and generated:
            tokens, counts = torch.unique(torch.tensor(generated), return_counts=True)
            logits = logits.clone()
            logits[tokens] -= self.frequency_penalty * counts + self.presence_penalty
        if self.temperature <= 0 or not logits.max().isfinite():  # what a broken model gives must not end the others
            return int(logits.nan_to_num(-torch.inf, posinf=torch.inf).argmax())
        if 0 < self.top_k < logits.numel():
            logits, places = logits.topk(self.top_k)
        else:
            places = None
        # Shifted first: a tiny temperature would make the largest logit infinite.
        chances = torch.softmax((logits - logits.max()) / max(self.temperature, LEAST_TEMPERATURE), dim=-1)
        if self.top_p < 1:
            ordered, order = chances.sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            beyond[0] = False  # the likeliest always stays
            ordered[beyond] = 0
            chances = torch.zeros_like(chances).scatter(-1, order, ordered)
        drawn = int(torch.multinomial(chances, 1, generator=self.generator))
        return drawn if places is None else int(places[drawn])


class Sampler(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Serves the `sampling` that each request was added with."""

    supported_kwargs: dict[str, type] = {"sampling": Sampling}  # noqa: RUF012  # the base class has it so
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._states: list[Any] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        # Called just before the step whose logits these requests get, row for row.
        self._states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for row, state in enumerate(self._states):
            sampling: Sampling | None = state.logit_processor_kwargs.get("sampling")
            if sampling is None or sampling.is_plain:
                continue
            token = sampling.draw(scores[row], _generated(state))
            scores[row] = float("-inf")
            scores[row, token] = 0.0
        return scores


def _generated(state: Any) -> list[int]:
    """Return what a request has generated, also before the cache was too full for it and it had to begin anew."""
    before = state.initial_tokens[state._true_initial_tokens :] if state._true_initial_tokens else []
    tokens: list[int] = before + state.generated_tokens
    return tokens

"""The whole model against its dense self.

Small models (most of them): the dense layers are kept beside the packed ones and both versions of the model run
interleaved, layers swapped between the samples and outside the clock. Where memory does not allow both, the dense
model is timed before packing and the compiled one after, each interleaved with the same control work; the ratio is
then one of ratios to the control, so that a machine that slows down in between does not count.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.bench.timer import Race, Ratio, interval, race
from zeroskip.errors import ZeroskipError

__all__ = ["CONTROL", "Call", "interleaved", "model_calls", "ratio_by_control", "with_control"]

log = logging.getLogger(__name__)

Call = Callable[[], object]
CONTROL = "control"
LONGEST_SEQUENCE = 128  # more tokens than this come as a batch of sequences


def model_calls(
    model: nn.Module, called: nn.Module, counts: tuple[int, ...], example_inputs: Any
) -> dict[int, Call] | str:
    """Return one call of `called` (the model or its torch.compile wrapper) for each token count, or why there is none.

    `example_inputs` (a tensor, a tuple of arguments, a dict of keyword arguments) gives a single call under the key 0.
    Without it, transformers models get synthetic ids: T tokens are one sequence, or sequences of 128.

    Raises
    ------
    ZeroskipError
        If the model cannot run on the example inputs.
    """
    if example_inputs is not None:
        arguments, keywords = _arguments(example_inputs)
        try:
            _forward(called, arguments, keywords)()
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ZeroskipError(f"the model does not run on example_inputs: {_line(error)}") from error
        return {0: _forward(called, arguments, keywords)}
    if not _is_transformers(model):
        return "not a transformers model; give example_inputs to have the whole model measured"
    calls: dict[int, Call] = {}
    for count in counts:
        call = _forward(called, (), synthetic_inputs(model, count))
        try:
            call()
        except Exception as error:  # some models want other inputs than ids; they say so in many ways
            log.warning("the model does not run on %d synthetic tokens: %s", count, error)
            return f"does not run on synthetic ids ({_line(error)}); give example_inputs to have it measured"
        calls[count] = call
    return calls


def synthetic_inputs(model: nn.Module, tokens: int) -> dict[str, Any]:
    """Return keyword arguments that feed `tokens` random ids to a transformers model."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = min(LONGEST_SEQUENCE, int(getattr(text, "max_position_embeddings", None) or LONGEST_SEQUENCE))
    batch = -(-tokens // longest)
    while tokens % batch:  # exactly `tokens` of them
        batch += 1
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, max(int(text.vocab_size), 1), (batch, tokens // batch), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if hasattr(text, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def interleaved(
    calls: Mapping[int, Call], dense: Callable[[], None], compiled: Callable[[], None], budget_s: float
) -> dict[int, Ratio]:
    """Return time(dense) / time(compiled) at each token count; `dense` and `compiled` put those layers in place."""
    ratios: dict[int, Ratio] = {}
    for count, call in calls.items():
        seen = race(
            {"dense": [call], "compiled": [call]},
            prepare={"dense": dense, "compiled": compiled},
            budget_s=budget_s,
            min_rounds=7,
            settled=_settled,
            retire=False,
        )
        ratios[count] = seen.ratio("dense", "compiled")
    compiled()
    return ratios


def with_control(calls: Mapping[int, Call], budget_s: float) -> dict[int, Race]:
    """Time each call interleaved with the control work."""
    return {
        count: race({"model": [call], CONTROL: [_control()]}, budget_s=budget_s, min_rounds=7, retire=False)
        for count, call in calls.items()
    }


def ratio_by_control(before: Race, after: Race) -> Ratio:
    """Return time(before) / time(after) of the model, each relative to its own control."""
    values = [seen.median("model") / seen.median(CONTROL) for seen in (before, after)]
    drawn = [seen.draws("model", seed) / seen.draws(CONTROL, seed) for seed, seen in enumerate((before, after))]
    return interval(values[0] / values[1], drawn[0] / drawn[1])


def _settled(seen: Race) -> bool:
    ratio = seen.ratio("dense", "compiled")
    return ratio.low > 1.0 or ratio.high < 0.95 or ratio.noise < 0.01


def _control() -> Call:
    """Work that has a part for the multiply units and one for memory, as a model has."""
    a, b = torch.randn(256, 1024), torch.randn(1024, 1024)
    stream = torch.ones(4 << 20)

    def call() -> None:
        torch.mm(a, b)
        stream.sum()

    return call


def _forward(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return model(*arguments, **keywords)

    return call


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise ZeroskipError(
        f"example_inputs is a {type(example).__name__}: give a tensor, a tuple of arguments or a dict of keywords"
    )


def _is_transformers(model: nn.Module) -> bool:
    # A model of transformers can exist only if transformers was imported.
    module = sys.modules.get("transformers")
    kind = getattr(module, "PreTrainedModel", None) if module is not None else None
    return kind is not None and isinstance(model, kind)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:160]

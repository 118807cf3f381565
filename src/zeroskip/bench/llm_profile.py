"""Where a decode step goes: the products, attention, and the rest; the profile of `zeroskip bench llm --profile`.

Two kinds of steps take turns. One runs as it is. In the other the products (our kernel, torch's linear) and attention
are timed, each from its call to its return; the rest is the whole step without them: what transformers and torch do
around them in Python, norms, rotary positions, the cache, the dispatch of our own op.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zeroskip import decode_ops, decoder_step, ops
from zeroskip.bench.llm_models import cache_name, generate
from zeroskip.bench.llm_steps import StepProfile

__all__ = ["profile_step"]

STEPS = 24
WARM = 4
PRODUCTS = 7  # of a decoder layer that is one call


class _Clock:
    def __init__(self) -> None:
        self.kernels = self.attention = 0.0
        self.calls = 0

    def around(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                setattr(self, what, getattr(self, what) + time.perf_counter() - started)
                self.calls += what == "kernels"

        return timed

    def inside(self, function: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
        """Of whole layers: it tells the nanoseconds of its products and of its attention."""

        def told(*args: Any) -> tuple[int, int]:
            found = function(*args)
            self.kernels, self.attention = (
                self.kernels + found[0] / 1e9,
                self.attention + found[1] / 1e9,
            )
            self.calls += PRODUCTS * len(args[0])
            return found

        return told


@contextmanager
def _watched(clock: _Clock) -> Iterator[None]:
    """Time the products and attention inside."""
    ours: Any = (ops, decode_ops, decoder_step)
    core, functional = ours[0]._core, torch.nn.functional
    linear, attention = functional.linear, functional.scaled_dot_product_attention
    names = {name: getattr(core, name) for name in dir(core) if not name.startswith("__")}
    names["decode"] = clock.inside(core.decode)
    names |= {
        "linear": clock.around(core.linear, "kernels"),
        "attend": clock.around(core.attend, "attention"),
    }
    timed: Any = SimpleNamespace(**names)
    changed: Any = functional
    try:
        for module in ours:
            module._core = timed
        changed.linear = clock.around(linear, "kernels")
        changed.scaled_dot_product_attention = clock.around(attention, "attention")
        yield
    finally:
        for module in ours:
            module._core = core
        changed.linear, changed.scaled_dot_product_attention = linear, attention


def profile_step(name: str, model: Any, ids: Tensor, compiled: bool = False) -> StepProfile:
    """Profile a decode step after a prompt.

    Parameters
    ----------
    name : str
        Of the model, for the table.
    model : transformers.PreTrainedModel
        A causal one.
    ids : Tensor
        [1, tokens] int64, the prompt.
    compiled : bool
        Also time the step under torch.compile with a static cache, which takes a minute to compile.
    """
    steps: list[float] = []
    watched: list[tuple[float, float, int]] = []
    with torch.inference_mode():
        cache, last = model(ids, use_cache=True).past_key_values, ids[:, -1:]
        given = {cache_name(model): cache, "use_cache": True}
        for place in range(2 * STEPS + WARM):
            clock = _Clock()
            started = time.perf_counter()
            if place % 2:
                with _watched(clock):
                    model(last, **given)
            else:
                model(last, **given)
            spent = time.perf_counter() - started
            if place < WARM:
                continue
            if place % 2:
                watched.append((clock.kernels, clock.attention, clock.calls))
            else:
                steps.append(spent)
        generated = _generated(model, ids)
        found: tuple[float | None, str | None] = _compiled(model, ids) if compiled else (None, None)
    kernels, attention, calls = np.median(np.array(watched), axis=0)
    step = float(np.median(steps))
    times = (step * 1e3, float(kernels) * 1e3, float(attention) * 1e3)
    return StepProfile(
        name,
        ids.shape[1],
        torch.get_num_threads(),
        *times,
        int(calls),
        generated * 1e3,
        *found,
    )


class _Moments:
    """What `generate` tells its tokens: notes when each came."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generated(model: Any, ids: Tensor) -> float:
    """Return the seconds from one token of `generate` to the next, the median of three runs."""
    gaps: list[float] = []
    for _ in range(3):
        moments = _Moments()
        generate(model, ids, STEPS + WARM, moments)
        gaps += np.diff(moments.at[WARM:]).tolist()
    return float(np.median(gaps))


def _compiled(model: Any, ids: Tensor) -> tuple[float | None, str | None]:
    """Return the milliseconds of a step under torch.compile with a static cache, or why there are none."""
    from transformers import StaticCache

    try:
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 3 * STEPS)
        model(ids, use_cache=True, **{cache_name(model): cache})
        forward = torch.compile(_forward(model), dynamic=False)
        steps = []
        for place in range(STEPS + WARM):
            positions = torch.tensor([[ids.shape[1] + place]])
            started = time.perf_counter()
            forward(ids[:, -1:], cache, positions)
            if place >= WARM:
                steps.append(time.perf_counter() - started)
        return float(np.median(steps)) * 1e3, None
    except Exception as error:  # whatever the compiler or its C++ compiler raises
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0]
    finally:
        torch.compiler.reset()


def _forward(model: nn.Module) -> Callable[..., Any]:
    name = cache_name(model)

    def forward(ids: Tensor, cache: Any, positions: Tensor) -> Any:
        return model(ids, position_ids=positions, use_cache=True, **{name: cache}).logits

    return forward

"""One language model under transformers' continuous batching: requests come and go, each step serves all of them.

transformers' `ContinuousBatchingManager` schedules, keeps the paged cache of keys and values, shares common beginnings
of prompts and runs the steps in a thread of its own; it works on a CPU and with packed layers, which see one row of
tokens. What is set here: a cache of a size we choose (its own takes 60 % of the memory), attention request by request
(attention.py), one sampler for all ways to draw (sampling.py), and how many may wait.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from zeroskip.errors import ZeroskipError, first_line
from zeroskip.planning.invariant import make_invariant
from zeroskip.serve import attention
from zeroskip.serve.sampling import Sampler, Sampling
from zeroskip.serve.settings import Settings
from zeroskip.serve.sizes import Sizes

__all__ = ["Busy", "Engine", "Failed", "Generation"]

log = logging.getLogger(__name__)


class Busy(Exception):
    """As many requests wait as may."""


class Failed(Exception):
    """A request could not be finished; the text says why."""


class Engine:
    """A causal language model that serves many requests at once.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Causal, on the CPU. Its attention is switched, and with `batch_invariant` its linear layers are held.
    settings : Settings

    Raises
    ------
    ZeroskipError
        If the memory does not suffice, or the architecture cannot be served.
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model: Any = model
        self.limit = settings.max_concurrency + settings.max_queue
        self.concurrency = settings.max_concurrency
        self.sizes = Sizes.of(model.config.get_text_config(), model.dtype, settings)
        self.invariance = make_invariant(model, settings.max_concurrency) if settings.batch_invariant else None
        self._expected = self._plain_logits()
        self._manager = self._make_manager(settings)
        self._names = (f"request-{number}" for number in itertools.count(1))
        self._live: dict[str, Generation] = {}

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self.sizes.context

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def end_tokens(self) -> set[int]:
        """The tokens that end an answer."""
        given = self._manager.generation_config.eos_token_id
        return set(given if isinstance(given, list) else [given])

    @property
    def running(self) -> int:
        """Requests that generate."""
        return min(len(self._live), self.concurrency)

    @property
    def waiting(self) -> int:
        """Requests that wait for one of those to end."""
        return len(self._live) - self.running

    @property
    def alive(self) -> bool:
        """Whether requests can be taken."""
        return self._manager.is_running() and self._manager.background_thread_status.can_accept_new_requests() is None

    def start(self) -> None:
        """Start the thread that generates, and check that the model gives there what it gives alone."""
        self._manager.start()
        probe = self._probe()
        self._manager.add_request(probe, request_id="probe", max_new_tokens=1)
        result = self._manager.get_result(timeout=600)
        problem = "no answer" if result is None else result.error
        if problem is None:
            # Sums in another order may swap tokens that are level; a wrong position or mask does not stay this close.
            logits = self._expected
            behind = float(logits.max() - logits[result.generated_tokens[0]])
            if behind > 0.05 * float(logits.max() - logits.mean()):
                problem = "in a batch it gives other logits than alone"
        if problem is not None:
            self.stop()
            raise ZeroskipError(
                f"a {type(self.model).__name__} cannot be served ({problem.splitlines()[0]}); `zeroskip run` may do"
            )

    def stop(self, hard: bool = False) -> None:
        """End the thread, once the requests that are being served are finished or, if `hard`, at once."""
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=hard)
            self._manager.destroy()

    def open(self, prompt: list[int], max_tokens: int, sampling: Sampling) -> Generation:
        """Take a request, from within an event loop.

        Raises
        ------
        Busy
            If too many wait already.
        Failed
            If the engine has stopped.
        """
        if len(self._live) >= self.limit:
            raise Busy(f"{self.running} requests are running and {self.waiting} are waiting")
        if not self.alive:
            raise Failed(f"the engine has stopped: {self._manager.background_thread_status.fatal_error}")
        while self._manager.get_result(timeout=0) is not None:  # last tokens of requests that were cancelled
            pass
        made = Generation(self, next(self._names), prompt)
        self._live[made.name] = made
        self._manager.register_result_handler(made.name, made.take)
        self._manager.add_request(
            prompt, request_id=made.name, max_new_tokens=max_tokens, streaming=True, sampling=sampling
        )
        return made

    def close(self, generation: Generation) -> None:
        """Forget a request; one that is not finished is cancelled and its place is free at the next step."""
        if self._live.pop(generation.name, None) is None:
            return
        if not generation.finished:
            self._manager.cancel_request(generation.name)
            self._manager.output_router.result_handlers.pop(generation.name, None)

    def _make_manager(self, settings: Settings) -> Any:
        attention.register()
        model = self.model
        given = model.generation_config.eos_token_id if model.generation_config is not None else None
        if given is None:
            given = model.config.get_text_config().eos_token_id
        generation: Any = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=-1 if given is None else given
        )
        options = ContinuousBatchingConfig(
            page_size=self.sizes.page,
            num_blocks=self.sizes.pages,
            max_batch_tokens=self.sizes.batch_tokens,
            max_requests_per_batch=settings.max_concurrency,
            use_async_batching=False,
            per_request_processors=True,
        )
        plain = attention.supports(model)
        if not plain and model.config._attn_implementation != "eager":
            model.set_attn_implementation("eager")
        try:
            manager = model.init_continuous_batching(generation, options)
        except (ValueError, MemoryError, AttributeError) as error:
            raise ZeroskipError(f"a {type(model).__name__} cannot be served: {first_line(error)}") from error
        if plain:
            model.set_attn_implementation(attention.RAGGED_ROWS if settings.batch_invariant else attention.RAGGED)
        elif settings.batch_invariant:
            raise ZeroskipError("batch_invariant needs plain attention; this model caps it or has sinks: leave it out")
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(
            LogitsProcessorList([Sampler()]), per_request_processors=False
        )
        manager.logit_processor.tensors_required = 1
        return manager

    def _probe(self) -> list[int]:
        count = max(1, min(12, self.context - 2))
        return [(7 + 13 * place) % self.vocabulary for place in range(count)]

    def _plain_logits(self) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self.model(input_ids=torch.tensor([self._probe()]), use_cache=False).logits
        return logits[0, -1].float()


class Generation:
    """One request: iterate over it for lists of new tokens, and `close` it in any case."""

    def __init__(self, engine: Engine, name: str, prompt: list[int]) -> None:
        self.name, self.prompt = name, prompt
        self.tokens: list[int] = []
        self.finished = False
        self._engine = engine
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()

    def take(self, output: Any) -> None:
        """Called in the event loop with what a step gave."""
        self.finished = self.finished or output.is_finished()
        self._outputs.put_nowait(output)

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        done = False
        while not done:
            output = await self._outputs.get()
            if output.error is not None:
                raise Failed(str(output.error).splitlines()[0])
            new = output.generated_tokens[len(self.tokens) :]
            self.tokens += new
            done = output.is_finished()
            if new:
                yield new

    @property
    def ended(self) -> bool:
        """Whether the model ended its answer itself."""
        return bool(self.tokens) and self.tokens[-1] in self._engine.end_tokens

    def close(self) -> None:
        self._engine.close(self)

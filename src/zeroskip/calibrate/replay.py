"""Run a model block by block without knowing its architecture.

The model's own forward does all the work between the blocks. To reach block k, it runs with the blocks before k
replaced by what they returned last time; so embeddings, masks, position tables, glue between blocks and each block's
own arguments are always the model's, and nothing but the blocks' outputs is stored. As soon as the call that was
wanted is done, an exception leaves the forward.

On the CPU, where half precision is slow or missing, blocks stored in it run in fp32, one at a time; what they return
is rounded to the type of their numbers, so that the glue sees what it expects.

Of outputs that later blocks do not read, only the shape is kept (filled with NaN). Whether that holds is checked:
`Replay` runs the first batch plainly and through the replay, and compares every block's inputs bit by bit; where they
differ (skip connections across blocks) all outputs are kept.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zeroskip.calibrate.data import Batch
from zeroskip.calibrate.digest import digest
from zeroskip.calibrate.fp32 import Wide
from zeroskip.calibrate.record import Block, Record, Trace, copied
from zeroskip.errors import ZeroskipError, first_line

__all__ = ["Block", "Record", "Replay"]

log = logging.getLogger(__name__)


class _Stop(BaseException):
    """Leaves a forward once it has done what it was run for."""


class Replay:
    """The blocks of a model over a set of batches, advanced one block at a time.

    Parameters
    ----------
    model : nn.Module
        In eval mode; its blocks' forward is replaced only while a method here runs.
    blocks : list of Block
        Candidates; those never called are dropped. `order` holds the rest by first call.
    batches : list of Batch
    seed : int
        Set before every forward, so that a model that draws random numbers draws the same ones each time.

    Raises
    ------
    ZeroskipError
        If two forwards of the same batch differ.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], batches: list[Batch], seed: int = 0) -> None:
        self.model, self.batches, self.seed = model, batches, seed
        self.keep_all = False
        self.candidates = blocks
        self.done: set[Block] = set()
        self.records = [Record() for _ in batches]
        self.arguments: dict[str, Any] = {}
        self.wide = Wide()
        try:
            self.trace = self._plain(batches[0])
        except ZeroskipError:  # perhaps a block whose code names the type it is stored in
            self.wide = Wide(on=False)
            self.trace = self._plain(batches[0])
        self.order = list(dict.fromkeys(self.trace.blocks))
        if self.order and not self._replays(batches[0]):
            log.info("a block reads the output of a far earlier one: all outputs are kept")
            self.keep_all = True
            if not self._replays(batches[0]):
                raise ZeroskipError(
                    "two forward passes over the first calibration batch differ: the model is not deterministic; "
                    "switch off what makes it draw numbers or keep state between calls"
                )

    @property
    def two_towers(self) -> bool:
        """Whether the model has an encoder and a decoder."""
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    # What a caller does ---------------------------------------------------------------------------------------------

    def collect(self, block: Block, index: int) -> None:
        """Run batch `index` up to and including the block's last call, for the hooks that are set in it."""
        batch, record = self.batches[index], self.records[index]
        left = self.trace.blocks.count(block)

        def after(_: int, which: Block, output: Any) -> None:
            nonlocal left
            left -= which is block
            if left == 0:
                raise _Stop

        self._forward(batch, record, after=after)

    def advance(self, block: Block) -> None:
        """Mark a block as final and take every batch to the first call of a block that is not."""
        self.done.add(block)
        if all(each in self.done for each in self.order):
            self.records = [Record() for _ in self.batches]
            return
        with self.wide.hold(block.module):
            for index, batch in enumerate(self.batches):
                self.records[index] = self._advanced(batch, self.records[index])

    def passed(self, batch: Batch, record: Record, block: Block) -> Record:
        """Return a record of one's own, started where `record` ends, taken through `block` as it is now."""
        self.done.add(block)
        try:
            return self._advanced(batch, record)
        finally:
            self.done.discard(block)

    def finished(self, batch: Batch, record: Record) -> Any:
        """Return what the model returns where `record` answers its blocks."""
        return self._forward(batch, record)

    def call_of(self, block: Block, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) of the block's next call on batch `index`."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def before(_: int, which: Block, args: Any, kwargs: Any) -> None:
            if which is block:
                seen.append((args, kwargs))
                raise _Stop

        self._forward(self.batches[index], self.records[index], before=before)
        return seen[0]

    def logits(self, batch: Batch) -> Any:
        """Return the model's output through the replay of one batch (for tests)."""
        record = Record()
        for block in self.order:
            self.done.add(block)
            record = self._advanced(batch, record)
        self.done.clear()
        return self.finished(batch, record)

    # How ------------------------------------------------------------------------------------------------------------

    def _advanced(self, batch: Batch, record: Record) -> Record:
        new = Record(list(record.blocks), list(record.outputs))

        def before(_: int, which: Block, args: Any, kwargs: Any) -> None:
            if which not in self.done:
                raise _Stop

        def after(_: int, which: Block, output: Any) -> None:
            new.blocks.append(which)
            new.outputs.append(pytree.tree_map(copied, output))

        self._forward(batch, record, before=before, after=after)
        if not self.keep_all:
            if new.blocks != self.trace.blocks[: len(new.blocks)]:
                # This batch takes another way through the model than the first; its calls are run again each time.
                return Record()
            for call in range(len(new.outputs)):
                new.outputs[call] = self._thin(new, call)
        return new

    def _thin(self, record: Record, call: int) -> Any:
        group = record.blocks[call].group
        rest = (each.group for each in record.blocks[call + 1 :])
        if call == len(record.outputs) - 1 or group not in rest:  # the newest, and the last of every list
            return record.outputs[call]
        leaves, shape = pytree.tree_flatten(record.outputs[call])
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and (call, index) not in self.trace.read:
                leaves[index] = leaf.new_full((1,) * leaf.dim(), torch.nan).expand(leaf.shape)
        return pytree.tree_unflatten(leaves, shape)

    def _plain(self, batch: Batch) -> Trace:
        trace = Trace()
        alive: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}

        def before(call: int, which: Block, args: Any, kwargs: Any) -> None:
            trace.blocks.append(which)
            trace.digests.append(digest((args, kwargs)))
            for leaf in pytree.tree_leaves((args, kwargs)):
                found = alive.get(id(leaf))
                if found is not None and found[0]() is leaf and found[1] < call - 1:
                    trace.read.add(found[1:])

        def after(call: int, which: Block, output: Any) -> None:
            for index, leaf in enumerate(pytree.tree_leaves(output)):
                if isinstance(leaf, Tensor):
                    alive[id(leaf)] = (weakref.ref(leaf), call, index)

        self._forward(batch, Record(), before=before, after=after)
        return trace

    def _replays(self, batch: Batch) -> bool:
        """Whether the unpruned model, replayed, shows every block the arguments of the plain forward."""
        record, same = Record(), False
        for block in self.order:
            shown: list[bool] = []

            def before(call: int, which: Block, args: Any, kwargs: Any, shown: list[bool] = shown) -> None:
                shown.append(call < len(self.trace.digests) and digest((args, kwargs)) == self.trace.digests[call])

            self._forward(batch, record, before=before, after=_stop)
            same = bool(shown) and all(shown)
            if not same or block is self.order[-1]:
                break
            self.done.add(block)
            record = self._advanced(batch, record)
        self.done.clear()
        return same

    def _forward(
        self,
        batch: Batch,
        record: Record,
        before: Callable[[int, Block, Any, Any], None] | None = None,
        after: Callable[[int, Block, Any], None] | None = None,
    ) -> Any:
        """Run the model on a batch; calls in `record` are answered from it, `before` and `after` see the rest."""
        calls = 0

        def wrap(block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
            names = inspect.signature(forward)

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                call, calls = calls, calls + 1
                if call < len(record.outputs):
                    return pytree.tree_map(copied, record.outputs[call])
                if before is not None:
                    before(call, block, args, kwargs)
                with contextlib.suppress(TypeError):
                    self.arguments = dict(names.bind_partial(*args, **kwargs).arguments)
                output = self.wide.call(block.module, forward, args, kwargs)
                if after is not None:
                    after(call, block, output)
                return output

            run.__signature__ = names  # type: ignore[attr-defined]
            return run

        device = next((p.device for p in self.model.parameters() if p.is_cuda), None)
        with (
            self._replaced(wrap),
            _called_as_modules(),
            torch.no_grad(),
            torch.random.fork_rng([] if device is None else [device]),
        ):
            (torch.default_generator if device is None else torch).manual_seed(self.seed)
            try:
                return batch.call(self.model)
            except _Stop:
                return None
            except ZeroskipError:
                raise
            except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
                index = next(i for i, one in enumerate(self.batches) if one.named is batch.named)
                both = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
                hint = f" (a {type(self.model).__name__} takes inputs of its decoder too: decoder_input_ids)"
                raise ZeroskipError(
                    f"the model does not run on calibration batch {index}: {first_line(error)}{hint if both else ''}"
                ) from error
            finally:
                self.arguments = {}

    @contextlib.contextmanager
    def _replaced(self, wrap: Callable[[Block, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        """Set `forward` on the blocks themselves, above the one of their class (or of another library's wrapper)."""
        old = {block: block.module.__dict__.get("forward") for block in self.candidates}
        try:
            for block in self.candidates:
                block.module.__dict__["forward"] = wrap(block, block.module.forward)
            yield
        finally:
            for block, forward in old.items():
                block.module.__dict__.pop("forward")
                if forward is not None:
                    block.module.__dict__["forward"] = forward


@contextlib.contextmanager
def _called_as_modules() -> Iterator[None]:
    """Keep nn.TransformerEncoderLayer from taking all of its parts through one fused call, which no hook would see."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _stop(*_: Any) -> None:
    raise _Stop

"""Run one block with the outputs of some layers changed, and see what that does to the inputs of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zeroskip.calibrate import first_tensor
from zeroskip.sites import Conv1DAdapter, LinearAdapter, Site

__all__ = ["Probe", "matrices"]

Change = Callable[[Tensor], Tensor]


def matrices(module: nn.Module) -> list[Site]:
    """Return the layers of a block that are one matrix each, under their names in the block, and share no parameter."""
    owners: dict[int, int] = {}
    for each in module.modules():
        for parameter in each._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = []
    for name, each in module.named_modules():
        if LinearAdapter.matches(each) or Conv1DAdapter.matches(each):
            own = [parameter for parameter in each._parameters.values() if parameter is not None]
            if name and all(owners[id(parameter)] == 1 for parameter in own):
                found.append(Site(name, each))
    return found


class Probe:
    """One call of a block, to be made again and again.

    Parameters
    ----------
    module : nn.Module
        Its parameters are fp32 while this is used.
    args, kwargs
        Of the call; tensors that have the batch as their first dimension are cut to its first row.

    Attributes
    ----------
    sites : dict
        Those layers of the block that the call reaches exactly once, by their names in the block, in that order.
    """

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.module = module
        leaves, shape = pytree.tree_flatten((tuple(args), dict(kwargs)))
        rows = next((len(leaf) for leaf in leaves if _is_hidden(leaf)), 0)
        self.args, self.kwargs = pytree.tree_unflatten([_first_row(leaf, rows) for leaf in leaves], shape)
        self.sites = {site.name: site for site in matrices(module)}
        calls: list[str] = []
        with self._hooks(lambda name, _: calls.append(name), lambda _, output: output):
            self._call()
        self.sites = {name: self.sites[name] for name in calls if calls.count(name) == 1}

    def run(self, changes: Mapping[str, Change]) -> dict[str, Tensor]:
        """Return the input [tokens, in] of every layer while `changes` are made to the outputs of some."""
        seen: dict[str, Tensor] = {}

        def see(name: str, x: Tensor) -> None:
            seen[name] = x.reshape(-1, x.shape[-1]).clone()

        with self._hooks(see, lambda name, output: changes[name](output) if name in changes else output):
            self._call()
        return seen

    def outputs(self, names: Sequence[str]) -> list[Tensor]:
        """Return the outputs of some layers, and of the block as the last."""
        seen: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor) -> Tensor:
            seen[name] = output.clone()
            return output

        with self._hooks(lambda *_: None, keep):
            last = self._call()
        return [*(seen[name] for name in names), *([] if last is None else [last])]

    def _call(self) -> Tensor | None:
        return first_tensor(self.module(*self.args, **self.kwargs))

    @contextmanager
    def _hooks(self, see: Callable[[str, Tensor], None], change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        handles = []
        for name, site in self.sites.items():

            def before(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                if args:
                    see(name, args[0])

            def after(_: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> Tensor:
                return change(name, output)

            handles += [site.module.register_forward_pre_hook(before), site.module.register_forward_hook(after)]
        try:
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()


def _is_hidden(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 3


def _first_row(leaf: Any, rows: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.float() if leaf.is_floating_point() else leaf
    return leaf[:1] if rows > 1 and leaf.dim() > 1 and len(leaf) == rows else leaf

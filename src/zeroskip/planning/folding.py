"""Activations that a kernel computes: found by tracing one forward, folded into the packed layer before them.

The GELU after the first layer of an MLP, the SiLU after a gate: an activation that alone reads what a packed layer
returns needs no pass of its own over it. The layer then applies it to its fp32 sums, and a module that returns what it
is given stands in the activation's place. On disk nothing is different: weights stay ordinary weights, the plan names
the pairs.

MiniLM, 64 texts of 128 tokens, AVX2, two threads: the GELUs took 157 of 1,300 ms, mostly for pages of their outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zeroskip.nn import PackedLinear
from zeroskip.planning.plan import Folded

__all__ = ["Done", "find_foldable", "fold", "known_as", "unfold"]

log = logging.getLogger(__name__)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "relu2": lambda x: functional.relu(x).square(),
}
ALIKE = 2e-6  # of max(1, |y|): forms of one function differ by rounding, functions by much more


class Done(nn.Identity):
    """In the place of an activation that the packed layer before it computes."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.__dict__["activation"] = activation  # no child: nothing that walks over the model is to see it
        self.training = activation.training


def known_as(module: nn.Module) -> str | None:
    """Return the name in `zeroskip.ops.ACTIVATIONS` of the function that a module computes, None for any other.

    Asked by values, not by class: every number of a probe from -1e4 to 1e4, in two orders.
    """
    if any(True for _ in module.children()) or module._parameters or module._buffers:
        return None
    fine = torch.linspace(-12, 12, 4801, dtype=torch.float32, device="cpu")
    probe = torch.cat([fine, torch.tensor([-1e4, -300.0, -30.0, 30.0, 300.0, 1e4], device="cpu")])
    try:
        with torch.no_grad():
            y, turned = module(probe), module(probe.flip(0).view(1, -1))
    except Exception:  # whatever it wants, it is not what a kernel can do
        return None
    if not isinstance(y, Tensor) or not isinstance(turned, Tensor) or y.shape != probe.shape:
        return None
    if turned.shape != (1, len(probe)):
        return None
    for name, function in FUNCTIONS.items():
        want = function(probe.double())
        limit = ALIKE * want.abs().clamp(min=1)
        if all(bool(((each.double() - want).abs() <= limit).all()) for each in (y, turned[0].flip(0))):
            return name
    return None


def find_foldable(model: nn.Module, call: Callable[[], object]) -> list[Folded]:
    """Return the packed layers whose output one activation reads and nothing else, as one forward shows.

    Both belong to one parent, run once in a forward, and have one name in the model. Whatever else reads the output,
    also as part of the model's own result, leaves the pair alone.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. Not modified.
    call : function
        Runs the model once, eagerly.
    """
    trace = _Trace()
    hooks = []
    for name, module in model.named_modules():
        if type(module) is PackedLinear:
            hooks.append(module.register_forward_hook(partial(trace.returned, name)))
        elif not any(True for _ in module.children()) and not _has_hooks(module):
            hooks.append(module.register_forward_pre_hook(partial(trace.entered, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(trace.left, always_call=True))
    try:
        with torch.inference_mode(False), torch.no_grad(), trace:
            result = call()
        trace.read(result)
    finally:
        for hook in hooks:
            hook.remove()
    times: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        times[id(module)] = times.get(id(module), 0) + 1
    found: list[Folded] = []
    for name, reader in trace.pairs():
        layer, activation = model.get_submodule(name), model.get_submodule(reader)
        near = name.rpartition(".")[0] == reader.rpartition(".")[0]
        if near and times[id(layer)] == times[id(activation)] == 1 and (function := known_as(activation)):
            found.append(Folded(name, reader, function))
    return found


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the outputs of packed layers: which module was given one, and whether anything else read it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner: dict[int, str] = {}  # storage -> layer
        self.held: list[Tensor] = []  # so that no address comes again
        self.reader: dict[str, str] = {}  # layer -> module
        self.runs: dict[str, int] = {}
        self.spoiled: set[str] = set()
        self.inside: list[str | None] = []  # the layers whose readers run now

    def returned(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.runs[name] = self.runs.get(name, 0) + 1
        self.owner[output.untyped_storage()._cdata] = name
        self.held.append(output)

    def entered(self, name: str, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.runs[name] = self.runs.get(name, 0) + 1
        alone = len(args) == 1 and not keywords and any(args[0] is output for output in self.held)
        layer = self.owner[args[0].untyped_storage()._cdata] if alone else None
        if layer is not None:
            self.reader[layer] = name
        self.inside.append(layer)

    def left(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.inside.pop()

    def read(self, *values: object) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                layer = self.owner.get(value.untyped_storage()._cdata)
                if layer is not None and layer not in self.inside:
                    self.spoiled.add(layer)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.read(args, kwargs)
        return func(*args, **(kwargs or {}))

    def pairs(self) -> list[tuple[str, str]]:
        once = {name for name, count in self.runs.items() if count == 1}
        return [(a, b) for a, b in self.reader.items() if a in once and b in once and a not in self.spoiled]


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def fold(model: nn.Module, pairs: Iterable[Folded]) -> list[tuple[str, nn.Module, Done]]:
    """Fold each activation into its layer, in place, where both are still what they were.

    Returns
    -------
    list of (name, activation, what stands in its place)
    """
    folded: list[tuple[str, nn.Module, Done]] = []
    for pair in pairs:
        owner, _, child = pair.activation.rpartition(".")
        try:
            layer, parent = model.get_submodule(pair.layer), model.get_submodule(owner)
        except AttributeError:
            continue
        activation = parent._modules.get(child)
        if type(layer) is not PackedLinear or activation is None or layer.then is not None:
            continue
        if known_as(activation) != pair.function:
            log.warning("%s is no %s: it stays apart from %s", pair.activation, pair.function, pair.layer)
            continue
        done = Done(activation)
        layer.fold(pair.function, done)
        parent._modules[child] = done
        folded.append((pair.activation, activation, done))
    return folded


def unfold(model: nn.Module, layer: PackedLinear) -> None:
    """Put the activation back that a packed layer computes, if it does."""
    done = layer.then
    layer.fold(None, None)
    for parent in model.modules() if isinstance(done, Done) else ():
        for name, child in parent._modules.items():
            if child is done:
                parent._modules[name] = done.__dict__["activation"]

"""What a site is: one prunable weight, seen as a stack of matrices. One kind of module is one subclass of `Adapter`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from zeroskip.errors import ZeroskipError

__all__ = ["Adapter", "Call", "Inputs", "Site", "adapter_of", "is_weight", "sites_in"]

Inputs: TypeAlias = "Tensor | list[Tensor]"
"""[groups, tokens, in]; or [1, tokens, in] where all groups have the same; or a list of [tokens, in], one a group."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module, as its forward pre-hook sees it.

    Attributes
    ----------
    args, kwargs
        Of the call.
    visible : callable
        (tensor [..., in]) -> bool mask over its leading dimensions, True where a token is no padding, or None for all.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    visible: Callable[[Tensor], Tensor | None] = lambda _: None

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    def named(self, forward: Callable[..., Any]) -> dict[str, Any]:
        """Return the arguments by the names that `forward` gives them, its `self` left out."""
        return dict(inspect.signature(forward).bind_partial(None, *self.args, **self.kwargs).arguments)

    def tokens(self, x: Tensor) -> Tensor:
        """Return x [..., in] as [tokens, in], without padding."""
        keep, flat = self.visible(x), x.detach().reshape(-1, x.shape[-1])
        return flat if keep is None else flat[keep.reshape(-1).to(flat.device)]


class Adapter:
    """How one kind of module is seen as matrices [groups, out, in], with y = x @ W^T in each group.

    Attributes
    ----------
    asked : str
        What it is in words where its weights are pruned only if the user names them, else "".
    statistics : tuple of str or None
        The statistics that mean something for its inputs; None for all.
    """

    kinds: ClassVar[list[type[Adapter]]] = []
    asked: ClassVar[str] = ""
    statistics: ClassVar[tuple[str, ...] | None] = None

    def __init_subclass__(cls) -> None:
        Adapter.kinds.append(cls)

    @staticmethod
    def matches(module: nn.Module) -> bool:
        raise NotImplementedError

    @staticmethod
    def parameters(module: nn.Module) -> tuple[str, ...]:
        """Return the names of the parameters that are sites, dotted where a child holds them."""
        return ("weight",)

    @staticmethod
    def view(module: nn.Module, parameter: str, value: Tensor) -> Tensor:
        """See a tensor shaped like the parameter as [groups, out, in], as a view where the layout allows it."""
        return value.unsqueeze(0)

    @staticmethod
    def back(module: nn.Module, parameter: str, matrices: Tensor) -> Tensor:
        """Undo `view`."""
        return matrices[0]

    @staticmethod
    def whole(module: nn.Module, parameter: str, matrices: Tensor) -> Tensor:
        """Return [groups, out, in] as the one matrix that the module's input meets, its rows in order."""
        return matrices[0]

    @staticmethod
    def run(module: nn.Module, parameter: str, columns: int) -> int:
        """Return how many consecutive inputs are of one kind; a pattern's groups may not cross them."""
        return columns

    @staticmethod
    def bias(module: nn.Module, parameter: str) -> Tensor | None:
        bias = getattr(module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @staticmethod
    def source(module: nn.Module, call: Call) -> Tensor | None:
        """Return the tensor whose rows are the inputs: modules called with the same one share their statistics."""
        return None

    @staticmethod
    def inputs(module: nn.Module, call: Call, wanted: Sequence[str]) -> Iterator[tuple[str, Inputs]]:
        """Yield (parameter, what its matrices multiply in this call); a parameter may come in several pieces."""
        raise NotImplementedError


def adapter_of(module: nn.Module) -> type[Adapter] | None:
    """Return the kind that a module is; the youngest that matches."""
    return next((kind for kind in reversed(Adapter.kinds) if kind.matches(module)), None)


def sites_in(name: str, module: nn.Module) -> list[Site]:
    """Return the sites of one module, `name` being its path in the model."""
    kind = adapter_of(module)
    parameters = () if kind is None else kind.parameters(module)
    return [Site(".".join(filter(None, (name, _short(each)))), module, each) for each in parameters]


def is_weight(module: nn.Module, name: str = "weight", dims: int = 2) -> bool:
    """Whether the module owns a floating-point parameter of this name: what is computed anew at each call is none."""
    value = module._parameters.get(name)
    lazy = isinstance(value, nn.parameter.UninitializedParameter)
    return value is not None and not lazy and value.dim() == dims and value.is_floating_point()


def _short(parameter: str) -> str:
    return "" if parameter == "weight" else parameter.removesuffix(".weight")


@dataclass(frozen=True, eq=False)
class Site:
    """One prunable weight of a model.

    Attributes
    ----------
    name : str
        Dotted path of the parameter in the model, without a ".weight" at its end.
    module : nn.Module
        The module whose calls show the inputs.
    parameter : str
        The weight's name in it, dotted where a child holds it.
    """

    name: str
    module: nn.Module
    parameter: str = "weight"

    @property
    def adapter(self) -> type[Adapter]:
        kind = adapter_of(self.module)
        if kind is None:
            raise ZeroskipError(f"{self.label}: a {type(self.module).__name__} is not a site")
        return kind

    @property
    def label(self) -> str:
        """What messages call it: a model that is one layer has no name."""
        return self.name or "the model"

    @property
    def child(self) -> str:
        """What the site is called in its module, "" where it is the module's own weight."""
        return _short(self.parameter)

    @property
    def owner(self) -> str:
        """Dotted path of the module."""
        return self.name if self.parameter == "weight" else self.name[: -len(_short(self.parameter))].rstrip(".")

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter itself."""
        return self.module.get_parameter(self.parameter)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, out, in) of the matrix view."""
        groups, rows, columns = self.weight().shape
        return groups, rows, columns

    @property
    def grid(self) -> tuple[int, int, int]:
        """`shape` with the inputs cut down to a run that groups of a pattern may not cross."""
        groups, rows, columns = self.shape
        return groups, rows, self.adapter.run(self.module, self.parameter, columns)

    def whole(self) -> Tensor:
        """Return the weight as the one matrix [out, in] that the module's input meets; a view where possible."""
        return self.adapter.whole(self.module, self.parameter, self.weight())

    @property
    def extent(self) -> tuple[int, int]:
        """(out, in) of `whole`."""
        groups, rows, columns = self.shape
        blank = torch.empty(groups, rows, columns, device="meta")
        rows, columns = self.adapter.whole(self.module, self.parameter, blank).shape
        return rows, columns

    @property
    def bias(self) -> Tensor | None:
        return self.adapter.bias(self.module, self.parameter)

    @property
    def _scales(self) -> str:
        return "zeroskip_scales" + ("" if self.parameter == "weight" else "_" + self.parameter.replace(".", "_"))

    @property
    def scales(self) -> Tensor | None:
        """[groups, out, ceil(in / group)] where a solver has rounded the weight to integers times these, or None.

        They are kept on the module, as `zeroskip_scales`, and no cast of the model touches them.
        """
        scales = getattr(self.module, self._scales, None)
        return scales if isinstance(scales, Tensor) else None

    @property
    def whole_scales(self) -> Tensor | None:
        """`scales` where they are those of `whole`."""
        return self.scales if self.shape[0] == 1 else None

    def keep_scales(self, scales: Tensor | None) -> None:
        """Set or, with None, forget the scales of a weight that was just written."""
        self.module.__dict__.pop(self._scales, None)
        if scales is not None:
            self.module.__dict__[self._scales] = scales

    def weight(self) -> Tensor:
        """Return the weight [groups, out, in] in the model's dtype, a view where possible; do not write to it."""
        return self.adapter.view(self.module, self.parameter, self.tensor.detach())

    def write(self, weight: Tensor) -> None:
        """Write [groups, out, in] into the parameter in place, in the parameter's dtype; zeros become +0.0.

        Raises
        ------
        ZeroskipError
            If a value does not fit the model's dtype; the parameter is then as it was.
        """
        old = self.tensor
        new = weight.to(old.dtype) + 0.0  # -0.0 + 0.0 is +0.0: sparse kernels elsewhere read -0.0 as a value
        if not bool(torch.isfinite(new).all()):
            raise ZeroskipError(
                f"{self.label}: a new weight overflows {old.dtype}; load the model in float32 or bfloat16"
            )
        with torch.no_grad():
            old.copy_(self.adapter.back(self.module, self.parameter, new))

    def inputs(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return what each matrix multiplies when the module is called so: [tokens, in], one a group."""
        call, groups = Call(args, kwargs), self.shape[0]
        found = [x for name, x in self.adapter.inputs(self.module, call, (self.parameter,)) if name == self.parameter]
        pieces = [x if isinstance(x, list) else list(x.expand(groups, -1, -1)) for x in found]
        return [torch.cat(each) for each in zip(*pieces, strict=True)]

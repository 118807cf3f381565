"""Linear layers: torch's, and those that transformers stores transposed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from zeroskip.sites.base import Adapter, Call, Inputs, is_weight

__all__ = ["Conv1DAdapter", "LinearAdapter"]


class LinearAdapter(Adapter):
    """nn.Linear: the weight is [out, in] as it stands."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and is_weight(module)

    @staticmethod
    def source(module: nn.Module, call: Call) -> Tensor | None:
        x: Tensor = call.x
        return x

    @staticmethod
    def inputs(module: nn.Module, call: Call, wanted: Sequence[str]) -> Iterator[tuple[str, Inputs]]:
        yield "weight", call.tokens(call.x).unsqueeze(0)


class Conv1DAdapter(LinearAdapter):
    """Conv1D of transformers (GPT-2 and its kin): a linear layer stored as [in, out]."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        # By name, so that transformers need not be imported.
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") and is_weight(module)

    @staticmethod
    def view(module: nn.Module, parameter: str, value: Tensor) -> Tensor:
        return value.t().unsqueeze(0)

    @staticmethod
    def back(module: nn.Module, parameter: str, matrices: Tensor) -> Tensor:
        return matrices[0].t()

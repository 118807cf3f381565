"""What a plan says of one site."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from zeroskip.formats import names

__all__ = ["SitePlan", "by_tokens"]

Buckets = list[tuple[int | None, str]]


@dataclass
class SitePlan:
    """One site of a plan.

    Attributes
    ----------
    name : str
        The module's path in the model.
    shape : (m, k)
        Outputs and inputs.
    dtype : str
        Of the dense weight: ``'fp32'``.
    pattern : str
        Of the zeros as found: ``'8:16@64'``, ``'unstructured'``, ``'dense'``.
    sparsity : float
        Fraction of zeros.
    format, values : str
        What is installed: a registered format, or ``'linear'`` / ``'onednn'`` (torch computes).
    kernels : list of (most tokens or None, kernel)
        One kernel a token bucket; the last is open.
    reason : str
        In words.
    bytes_before, bytes_after : int
        Of the weight.
    times_ms : {layout: {kernel: {tokens: ms}}}
        Medians of every candidate that was measured.
    speedups : {layout: {tokens: ratio}}
        Against the fastest dense candidate at that count.
    layout_bytes : {layout: bytes}
        What the weight takes in every layout that could compete.
    excluded : {layout or runner: reason}
        What could not compete: formats that refused the weight, kernels that failed the oracle.
    measured_at : str
        The site where these times were taken (sites that share a key are measured once).
    pinned, passed_over : bool, {layout: ratio}
        In a batch-invariant plan: the layer keeps its kernel for every token count; what could not be taken for that,
        and how many times as fast it would have been.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    pattern: str
    sparsity: float
    format: str
    values: str
    kernels: Buckets
    reason: str
    bytes_before: int
    bytes_after: int
    times_ms: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    speedups: dict[str, dict[int, float]] = field(default_factory=dict)
    layout_bytes: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    measured_at: str = ""
    pinned: bool = False
    passed_over: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.format} {self.values}"

    @property
    def is_packed(self) -> bool:
        """Whether the site is served by a format of ours; torch computes it otherwise."""
        return self.format in names()

    def time_ms(self, layout: str, tokens: int) -> float:
        """Return the median time of a layout's fastest kernel at this count, in milliseconds."""
        return min(times[tokens] for times in self.times_ms[layout].values() if tokens in times)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SitePlan:
        taken: dict[str, Any] = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        taken["shape"] = (int(data["shape"][0]), int(data["shape"][1]))
        taken["kernels"] = [(None if most is None else int(most), str(kernel)) for most, kernel in data["kernels"]]
        taken["times_ms"] = {
            layout: {kernel: by_tokens(times) for kernel, times in kernels.items()}
            for layout, kernels in data.get("times_ms", {}).items()
        }
        taken["speedups"] = {layout: by_tokens(each) for layout, each in data.get("speedups", {}).items()}
        return cls(**taken)


def by_tokens(times: dict[Any, Any]) -> dict[int, float]:
    """Return numbers by token count, as JSON has them, with counts for keys."""
    return {int(tokens): float(value) for tokens, value in times.items()}

"""What a benchmark of kernels found, as data: rows, the machine's limits, who took part; to JSON and back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from zeroskip.bench.roofline import Roofline
from zeroskip.errors import ZeroskipError

__all__ = ["SCHEMA", "KernelTable", "Row", "Spread"]

SCHEMA = 2
Role = Literal["ours", "rival", "peer"]


@dataclass(frozen=True)
class Spread:
    """The median of paired ratios, one a round, with the quarters between which the middle half of them lies."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One way to compute one case at one token count and one thread count.

    Attributes
    ----------
    case : str
        Model, shape, pattern and zeros, in words; rows with the same case, tokens and threads were timed together.
    role : "ours", "rival" (torch, in this process) or "peer" (another library, in its own)
    layout : str
        Format, rival or peer, and its values: ``'bitmask bf16'``, ``'onnxruntime int4'``.
    kernel : str
        The kernel chosen, the fastest of those that can serve the layout; empty for others' code.
    nbytes : int
        Of the stored weight.
    ms : float or None
        Median time. None where the output failed the oracle or nothing came; `problem` says what.
    gflops, dense_gflops : float or None
        2 x non-zeros x tokens, and 2 x m x k x tokens, by that time.
    peak_percent : float or None
        `gflops` of a layout that skips zeros, `dense_gflops` of one that does not, by the measured peak.
    bandwidth_percent : float or None
        Stored bytes by that time, by the measured read bandwidth of memory.
    faster_than : {layout: Spread}
        How many times faster than each dense layout, each peer, and ``'best dense'``; of our own rows only. The
        best dense is the fastest dense layout whose values are as wide or wider.
    problem : str or None
    """

    case: str
    model: str
    m: int
    k: int
    pattern: str
    sparsity: float
    tokens: int
    threads: int
    role: Role
    layout: str
    format: str
    values: str
    dense: bool
    kernel: str
    nbytes: int
    ms: float | None = None
    gflops: float | None = None
    dense_gflops: float | None = None
    peak_percent: float | None = None
    bandwidth_percent: float | None = None
    faster_than: dict[str, Spread] = field(default_factory=dict)
    problem: str | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        spreads = {name: Spread(**spread) for name, spread in data["faster_than"].items()}
        return cls(**{**data, "faster_than": spreads})


@dataclass
class KernelTable:
    """What `bench_kernels` found; `str` is the table.

    Attributes
    ----------
    suite : str
    machine : str
    settings : {name: value}
        What was asked for.
    rooflines : list of Roofline
        One a thread count, measured in the same run.
    peers : {name: version, or why it did not take part}
    missing : list of str
        The names in `peers` that did not take part.
    rows : list of Row
    left_out : list of str
        Cases for which there was no time.
    """

    suite: str
    machine: str
    settings: dict[str, Any] = field(default_factory=dict)
    rooflines: list[Roofline] = field(default_factory=list)
    peers: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "machine": self.machine,
            "settings": self.settings,
            "rooflines": [one.to_dict() for one in self.rooflines],
            "peers": self.peers,
            "missing": self.missing,
            "rows": [asdict(row) for row in self.rows],
            "left_out": self.left_out,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KernelTable:
        """The inverse of `to_dict`; raises ZeroskipError where the data is of another schema."""
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise ZeroskipError(f"the benchmark's schema is {found!r}, this version reads {SCHEMA}: run it again")
        try:
            return cls(
                data["suite"],
                data["machine"],
                data["settings"],
                [Roofline.from_dict(one) for one in data["rooflines"]],
                data["peers"],
                data["missing"],
                [Row.from_dict(row) for row in data["rows"]],
                data["left_out"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ZeroskipError(f"the benchmark's file is damaged: {type(error).__name__} {error}") from None

    @classmethod
    def read(cls, path: Path) -> KernelTable:
        """Read the JSON that the benchmark wrote."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ZeroskipError as error:
            raise ZeroskipError(f"{path}: {error}") from None
        except ValueError:
            raise ZeroskipError(f"{path} is no JSON of `zeroskip bench kernels --json`") from None

    def roofline(self, threads: int) -> Roofline:
        return next(one for one in self.rooflines if one.threads == threads)

    def __str__(self) -> str:
        from zeroskip.bench.report import text

        return text(self)

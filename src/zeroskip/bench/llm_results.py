"""What a benchmark of whole language models found: who took part, and how long each took; as data and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, Literal

from zeroskip.bench.llm_products import PRODUCTS_LEGEND, Products, products_table
from zeroskip.bench.llm_steps import PROFILE_LEGEND, StepProfile, profile_table
from zeroskip.bench.llm_summary import Line, summary_table
from zeroskip.bench.timer import Ratio
from zeroskip.planning.report import human_bytes, table

__all__ = ["Contender", "Footprint", "LlmTable", "Timing"]

SCHEMA = 3
LEGEND = (
    "first token: a warm model's `generate` of one token after a prompt; decode: one step of all sequences, with the "
    "keys and values of the shortest prompt",
    "weights: bytes of all parameters and buffers in memory, a shared one counted once",
    "x: how many times faster, ratio of the medians of interleaved rounds, in parentheses its 98 % interval",
    "load, first: a new process, after its imports, until the model is there, and from there to the first token "
    "after the shortest prompt",
    "peak: resident memory of that process after the longest prompt and 8 tokens, mapped weights and the imports "
    "(in parentheses) included",
)


@dataclass(frozen=True)
class Footprint:
    """A process that loads the model and generates: seconds of its stages, and its resident memory.

    Attributes
    ----------
    import_s, load_s, first_token_s : float
        From the process's start until everything is imported, then until the model is loaded, then until the first
        token after the shortest prompt.
    import_bytes, peak_bytes : int or None
        The most that was resident after the imports, and at the end; None where the system does not tell.
    """

    import_s: float
    load_s: float
    first_token_s: float
    import_bytes: int | None
    peak_bytes: int | None


@dataclass
class Contender:
    """One model in the races.

    Attributes
    ----------
    name : str
        The recipe, or ``'torch fp32'``.
    role : "ours" or "rival"
    steps : list of dict
        The recipes that were applied, one after the other.
    disk_bytes : int
        Of the weight files.
    memory_bytes : int
        Of all weights in memory.
    layers : {layout: how many}
        What `compile` chose for its sites.
    outcome : str
        What the check of the whole model said: a model that is not faster was put back.
    logits_error : float or None
        Largest difference that compilation made to a logit, by the largest logit.
    perplexity : dict or None
        As `zeroskip.quality.Perplexity.to_dict`.
    problem : str or None
        Why it has no times.
    """

    name: str
    role: Literal["ours", "rival"]
    dtype: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    disk_bytes: int = 0
    memory_bytes: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    outcome: str = ""
    logits_error: float | None = None
    footprint: Footprint | None = None
    perplexity: dict[str, Any] | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Timing:
    """A contender's time in one race.

    Attributes
    ----------
    what : "first token" or "decode"
    tokens, batch, threads : int
        Of the prompt; sequences; of the machine.
    ms : float
        Median of `rounds` rounds.
    tokens_a_second : float
        Of the prompt, or decoded by all sequences.
    faster_than : {contender: Ratio}
        Over every other one in the race.
    """

    what: str
    tokens: int
    batch: int
    threads: int
    contender: str
    ms: float
    rounds: int
    tokens_a_second: float
    faster_than: dict[str, Ratio]


@dataclass
class LlmTable:
    """What `bench_llm` found; `str` is the table.

    Attributes
    ----------
    model, machine : str
    settings : {name: value}
        What was asked for.
    versions : {package: version}
    missing : {peer: why it did not take part}
    profiles : list of StepProfile
        Of a decode step of each model in this process.
    products : Products or None
        The linear layers alone.
    summary : list of Line
        Each of ours against the best of its rivals.
    """

    model: str
    machine: str
    settings: dict[str, Any]
    versions: dict[str, str]
    contenders: list[Contender] = field(default_factory=list)
    times: list[Timing] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    profiles: list[StepProfile] = field(default_factory=list)
    products: Products | None = None
    summary: list[Line] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{self.model} on {self.machine}", versions, "", *self._models(), ""]
        kinds = groupby(self.times, lambda each: (each.what, each.tokens, each.batch, each.threads))
        for (what, tokens, batch, threads), group in kinds:
            lines += [f"{what}, {tokens} tokens, batch {batch}, threads {threads}", *self._race(list(group)), ""]
        if self.profiles:
            lines += ["one decode step", *profile_table(self.profiles), ""]
        if self.products is not None:
            lines += ["linear layers alone", *products_table(self.products), ""]
        if self.summary:
            lines += ["against the best", *summary_table(self.summary), ""]
        lines += [*LEGEND, *(PROFILE_LEGEND if self.profiles else ()), *(PRODUCTS_LEGEND if self.products else ())]
        lines += [f"{each.name} has no times: {each.problem}" for each in self.contenders if each.problem]
        missing = {**self.missing, **(self.products.missing if self.products else {})}
        lines += [f"missing: {name}: {why}" for name, why in missing.items()]
        return "\n".join(lines)

    def _models(self) -> list[str]:
        header = [
            "model",
            "computes in",
            "disk",
            "weights",
            "peak",
            "load s",
            "first s",
            "perplexity",
            "sites",
            "whole model",
        ]
        return table(header, map(_cells, self.contenders))

    def _race(self, group: list[Timing]) -> list[str]:
        others = [each.name for each in self.contenders if each.role == "rival"]
        header = ["model", "ms", "tokens/s", *(f"x {name}" for name in others)]
        return table(header, _lines(group, others))


def _cells(one: Contender) -> list[str]:
    seen = one.footprint
    peak = load = first = "-"
    if seen is not None:
        load, first = f"{seen.load_s:.2f}", f"{seen.first_token_s:.2f}"
        if seen.peak_bytes is not None and seen.import_bytes is not None:
            peak = f"{human_bytes(seen.peak_bytes)} ({human_bytes(seen.import_bytes)})"
    value = (one.perplexity or {}).get("value")
    sites = ", ".join(f"{count} {label}" for label, count in one.layers.items())
    quality = "-" if one.perplexity is None else "inf" if value is None else f"{value:.2f}"
    weights = human_bytes(one.memory_bytes) if one.memory_bytes else "-"
    return [
        one.name,
        one.dtype,
        human_bytes(one.disk_bytes),
        weights,
        peak,
        load,
        first,
        quality,
        sites or "-",
        one.outcome,
    ]


def _lines(group: list[Timing], others: list[str]) -> Iterator[list[str]]:
    for each in group:
        ratios = [each.faster_than.get(name) for name in others]
        versus = ["-" if r is None else f"{r.value:.2f} ({r.low:.2f}-{r.high:.2f})" for r in ratios]
        yield [each.contender, f"{each.ms:.2f}", f"{each.tokens_a_second:.1f}", *versus]

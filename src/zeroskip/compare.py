"""`zs.compare`: which recipe for this model and machine? Bytes, milliseconds and, given text, perplexity of each."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from zeroskip.bench.llm_models import without_data
from zeroskip.errors import ZeroskipError, expect_seconds
from zeroskip.model import unwrapped
from zeroskip.planning.install import compiled_layers
from zeroskip.planning.machine import Machine, this_machine
from zeroskip.planning.plan import plain
from zeroskip.planning.planner import Planner, plannable
from zeroskip.planning.sums import chosen_ms, site_bytes, standing_ms
from zeroskip.planning.tables import build_table, table_plan, tables
from zeroskip.planning.tokens import Tokens
from zeroskip.prune import prune, recipes
from zeroskip.prune.recipe import DEFAULTS, Recipe
from zeroskip.quality import Judge

__all__ = ["Compared", "Comparison", "compare"]

log = logging.getLogger(__name__)

WORSE = 1.12  # times the dense perplexity: what a recommended recipe may lose
LEVEL = 0.98  # of the fastest: recipes nearer than that are as fast, and the smaller one is recommended


@dataclass
class Compared:
    """One recipe.

    Attributes
    ----------
    recipe : str
    nbytes : int
        Of all weights, linear layers in the layouts that `zs.compile` would choose.
    ms : {tokens: ms}
        Of all linear layers in those layouts, one after the other.
    gains : {tokens: ratio}
        How many times as fast that is as the layers as they stand, of the same races.
    layouts : {layout: layers}
    perplexity : float or None
    problem : str or None
        Why the recipe does not fit the model.
    """

    recipe: str
    nbytes: int = 0
    ms: dict[int, float] = field(default_factory=dict)
    gains: dict[int, float] = field(default_factory=dict)
    layouts: dict[str, int] = field(default_factory=dict)
    perplexity: float | None = None
    problem: str | None = None


@dataclass
class Comparison:
    """What recipes would do for a model; `str()` is a table with one sentence of advice.

    Attributes
    ----------
    machine : Machine
    tokens : Tokens
    about : str
        What perplexity was measured on; empty where it was not.
    recipes : list of Compared
    best : str or None
        The recipe to take; None where none gains.
    advice : str
    notes : list of str
    """

    machine: Machine
    tokens: Tokens
    about: str = ""
    recipes: list[Compared] = field(default_factory=list)
    best: str | None = None
    advice: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON holds."""
        return {
            "machine": self.machine.to_dict(),
            "tokens": self.tokens.to_dict(),
            "about": self.about,
            "recipes": [plain(asdict(one)) for one in self.recipes],
            "best": self.best,
            "advice": self.advice,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        from zeroskip.planning.report import comparison_table

        return comparison_table(self)


def compare(
    model: nn.Module,
    names: Iterable[str] | None = None,
    tokens: int | Sequence[int] | Mapping[int, float] = (1, 32, 512),
    *,
    text: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    eval_text: str | os.PathLike[str] | None = None,
    budget_s: float = 0.2,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Apply recipes to copies of a dense model, and measure what each would take; the model is not modified.

    Parameters
    ----------
    model : nn.Module
        On the CPU, dense.
    names : iterable of str, optional
        Recipes, as `prune` takes them; by default all of `zeroskip.recipes()`. "none", the dense model, comes first
        in any case.
    tokens : sequence of int, or mapping from int to weight
        Token counts, as for `zs.compile`.
    text, tokenizer : optional
        Text to calibrate on; pruning and scoring then run in fp32. Without it the zeros are those of magnitude and
        weights are rounded to nearest: as fast and as large as with data, but no perplexity is measured.
    eval_text : optional
        Text to measure perplexity on; by default windows of `text` that do not calibrate.
    budget_s : float
        Seconds of timing for each distinct site at each token count.
    progress : function (done, total, what), optional

    Raises
    ------
    ZeroskipError
        On an unknown recipe, a model that is compiled, text without tokenizer, or `eval_text` without `text`.
    """
    wanted = Tokens.parse(tokens)
    expect_seconds("budget_s", budget_s)
    model = unwrapped(model)
    if next(compiled_layers(model), None) is not None:
        raise ZeroskipError("the model is compiled: compare recipes on the dense one")
    asked = list(dict.fromkeys(["none", *(recipes() if names is None else names)]))
    for name in asked:
        Recipe.read(DEFAULTS, name)
    if eval_text is not None and text is None:
        raise ZeroskipError("eval_text needs text= to calibrate on")
    answer = Comparison(this_machine(), wanted)
    judge = None
    if text is not None:
        if tokenizer is None:
            raise ZeroskipError("text= needs tokenizer=, the model's own")
        if eval_text is None:
            judge = Judge.of_calibration(model, tokenizer, text, 0)
        else:
            judge = Judge.of_text(model, tokenizer, eval_text)
        answer.about = judge.about
    for done, name in enumerate(asked):
        if progress is not None:
            progress(done, len(asked), name)
        answer.recipes.append(_compared(name, model, answer, judge, text, tokenizer, budget_s))
    if progress is not None:
        progress(len(asked), len(asked), "")
    answer.notes = list(dict.fromkeys(answer.notes))
    answer.best, answer.advice = advise(answer)
    return answer


def _compared(
    name: str, model: nn.Module, answer: Comparison, judge: Judge | None, text: Any, tokenizer: Any, budget_s: float
) -> Compared:
    found = Compared(name)
    network = copy.deepcopy(model)
    try:
        if judge is not None:
            dtypes = {each: parameter.dtype for each, parameter in network.named_parameters()}
            network = network.float()  # as `zeroskip eval` scores; and half precision is slow on many CPUs
            prune(network, recipe=name, text=text, tokenizer=tokenizer)
            score = judge.score(network).value
            found.perplexity = score if math.isfinite(score) else None
            for each, parameter in network.named_parameters():
                parameter.data = parameter.data.to(dtypes[each])
        else:
            for step in without_data(name, network):
                prune(network, recipe=step)
        sites, notes = plannable(network, None)
        answer.notes += notes
        planner = Planner(answer.tokens, None, site_bytes(sites), budget_s)
        plans = [planner.plan(site, answer.notes) for site in sites]
        rounded = [
            (site, build_table(table_plan(site, values), site).weight.nbytes) for site, values in tables(network, None)
        ]
    except ZeroskipError as error:
        log.warning("%s: %s", name, error)
        found.problem = str(error)
        return found
    known = {id(site.tensor) for site in (*sites, *(site for site, _ in rounded))}
    others = {id(p): p.numel() * p.element_size() for p in network.parameters() if id(p) not in known}
    found.nbytes = sum(others.values()) + sum(plan.bytes_after for plan in plans) + sum(size for _, size in rounded)
    found.layouts = dict(Counter(plan.label for plan in plans))
    for count in answer.tokens.counts if plans else ():
        found.ms[count] = chosen_ms(plans, count)
        found.gains[count] = standing_ms(plans, count) / found.ms[count]
    return found


def advise(answer: Comparison) -> tuple[str | None, str]:
    """Return the recipe to take, and one sentence that says why."""
    dense, *others = answer.recipes
    fit = [one for one in others if one.problem is None and one.ms]
    if not fit or not dense.ms:
        return None, "No recipe fits this model: nothing in it can be packed."
    measured = dense.perplexity is not None
    limit = WORSE * dense.perplexity if dense.perplexity is not None else math.inf
    good = [one for one in fit if not measured or (one.perplexity is not None and one.perplexity <= limit)]
    if not good:
        nearest = min(fit, key=lambda one: one.perplexity or math.inf)
        return None, (
            f"Keep it dense: every recipe takes the perplexity above {WORSE:.2f}x of the dense model; the nearest is "
            f"{nearest.recipe} with {nearest.perplexity or math.inf:.2f} against {dense.perplexity:.2f}."
        )
    quickest = min(_relative(one, answer) for one in good)
    best = min((one for one in good if LEVEL * _relative(one, answer) <= quickest), key=lambda one: one.nbytes)
    if _relative(best, answer) >= LEVEL and best.nbytes >= dense.nbytes:
        return None, "Keep it dense: no recipe makes the linear layers faster or the weights smaller on this machine."
    gains = ", ".join(f"{gain:.2f}x at {count}" for count, gain in best.gains.items())
    head = f"Take {best.recipe}: {best.nbytes / dense.nbytes:.0%} of the bytes, linear layers {gains}"
    if not measured:
        return best.recipe, f"{head}; give text (--text) to learn what it costs in perplexity."
    return best.recipe, f"{head}, perplexity {best.perplexity:.2f} against {dense.perplexity:.2f}."


def _relative(one: Compared, answer: Comparison) -> float:
    """The time over that of the layers as they stand, weighted as the token counts are."""
    counts = answer.tokens.counts
    weights = answer.tokens.weights or tuple(1.0 / (one.ms[t] * one.gains[t]) for t in counts)
    taken = sum(weight * one.ms[t] for weight, t in zip(weights, counts, strict=True))
    return taken / sum(weight * one.ms[t] * one.gains[t] for weight, t in zip(weights, counts, strict=True))

"""`zs.compile`: measure every way to run each site on this machine, install the best, check the whole model.

The rule of choice is in planning/choose.py. What was measured and chosen is the plan, which the model carries; the last
word has the whole model, which must not be slower than its dense self.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from zeroskip.dense_layers import RowLinear
from zeroskip.errors import ZeroskipError, expect, expect_seconds
from zeroskip.io.meta import attach
from zeroskip.model import Site, unwrapped
from zeroskip.planning.candidates import check_precision
from zeroskip.planning.folding import fold
from zeroskip.planning.install import (
    apply_tuning,
    build,
    build_split,
    fits,
    put_in,
    row_by_row,
    thaw,
    together,
)
from zeroskip.planning.machine import this_machine
from zeroskip.planning.plan import ModelCheck, Plan, SitePlan, check_prefer
from zeroskip.planning.planner import Planner, check_weights, left_to_torch, plannable
from zeroskip.planning.recurrent import settle
from zeroskip.planning.shaped import Example, examples_of
from zeroskip.planning.siblings import join
from zeroskip.planning.sums import site_bytes
from zeroskip.planning.tables import table_plan, tables
from zeroskip.planning.tokens import Tokens
from zeroskip.planning.verdict import Verdict
from zeroskip.planning.zeros import find_zeros
from zeroskip.split_layers import Split, split_of

__all__ = ["Progress", "apply_tuning", "compile"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]


def compile(
    model: nn.Module,
    tokens: int | Sequence[int] | Mapping[int, float] = (1, 32, 512),
    precision: str | None = None,
    example_inputs: Any = None,
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    batch_invariant: bool = False,
    prefer: str = "speed",
    budget_s: float = 0.5,
    progress: Progress | None = None,
) -> nn.Module:
    """Make a model as fast as its zeros allow on this machine, never slower than it was.

    Works in place. At every site the dense layers of torch and all our formats are measured at each token count, with
    cold weights and interleaved; a sparse one is installed only if it is at least 0.98x the fastest dense at every
    count and wins over all. Then the model as a whole is run against its dense self, and put back if it is slower at
    any of the counts (below 0.98x). The weights put back are the original ones; for a model too large to keep both
    they are read again from its files, or else unpacked at the precision chosen.

    Parameters
    ----------
    model : nn.Module
        On the CPU, pruned or not. A model that is compiled already is measured anew. The check of the whole model runs
        both sides eagerly; of what torch.compile returned (or a model after `.compile()`) it runs both sides under
        torch.compile, which takes the time of compiling twice.
    tokens : sequence of int, or mapping from int to weight
        The token counts to be good at, or how often each occurs.
    precision : None, "fp32", "bf16", "int8" or "int4"
        None keeps the precision of the weights. Else storage and compute down to it compete too, dense and sparse
        alike; activations keep their dtype between the layers. fp16 weights stay dense unless one is given.
        Weights that a recipe has rounded to integers are offered as those integers also with None, and are never
        rounded again: an 8-bit head stays at 8 bits under "int4". Integer kernels round the activations of a group to
        127 steps; "fp32" or "bf16" leaves them out.
    example_inputs : tensor, tuple of arguments or dict of keyword arguments, optional
        For the check of the whole model; transformers models get synthetic ids without it, others are not checked.
        Convolutions, recurrent layers, nn.MultiheadAttention and experts are measured at the sizes these inputs give
        them, and stay dense without any.
    plan : Plan, its dictionary or its file, optional
        A plan made on this machine is applied without measuring. One of another machine is measured again.
    batch_invariant : bool
        Give every row of a site's output the same bits whatever else is in the batch. Each site then has one of our
        kernels for every token count; what torch has to compute (tied weights) it computes row by row. The plan says
        what that cost, and the model is kept also where it is slower than its dense self, which has no such property.
        Attention is not a site: it is as invariant as its implementation.
    prefer : "speed" or "bytes"
        With "bytes" each site takes the smallest layout, dense or sparse, that is nowhere slower (below 0.98x) than the
        layer as it stands, though another may be faster; the plan says by how much.
    budget_s : float
        Seconds of timing for each distinct site at each token count; races that are clear end earlier.
    progress : function (done, total, site name), optional
        Called after each site.

    Returns
    -------
    nn.Module
        The same model; `plan_of(model)` is its plan.

    Raises
    ------
    ZeroskipError
        For token counts, a precision, a preference or example inputs that cannot be used, weights that are not finite
        or not on the CPU, a plan that was made for another model or without `batch_invariant` where that is asked for,
        and layers whose rows cannot be held (recurrent ones, `nn.MultiheadAttention`, experts). The model is then as it
        was.
    """
    expect("model", model, nn.Module, "an nn.Module")
    called, model = model, unwrapped(model)
    wanted, precision, prefer = Tokens.parse(tokens), check_precision(precision), check_prefer(prefer)
    expect_seconds("budget_s", budget_s)
    given = _read(plan)
    if given is not None and batch_invariant and not given.batch_invariant:
        raise ZeroskipError("the plan was made without batch_invariant: compile without plan= to have one measured")
    if given is not None:
        batch_invariant, prefer = given.batch_invariant, given.prefer
    for name in thaw(model):
        log.info("%s was compiled before; it is measured anew", name)
    if given is not None:
        fits(given, model)
        changes = given.machine.differences(this_machine())
        if not changes:
            _apply(model, given)
            return called
        log.warning("the plan was made on another machine (%s): measuring again", "; ".join(changes))
    examples = examples_of(model, wanted, example_inputs)
    sites, notes = plannable(model, precision, examples)
    wanted.check_room(site for site in sites if site.name not in examples)
    made = Plan(this_machine(), wanted, precision, notes=notes, batch_invariant=batch_invariant, prefer=prefer)
    rows = left_to_torch(model, sites) if batch_invariant else {}
    if given is not None:
        made.notes.append(f"a plan of another machine was given ({'; '.join(changes)}); everything was measured again")
    _run(model, sites, rows, examples, made, Verdict(model, called, wanted.counts, example_inputs), budget_s, progress)
    object.__setattr__(model, "zeroskip_plan", made)
    attach(model)
    log.info("%s", made)
    return called


def _run(
    model: nn.Module,
    sites: list[Site],
    rows: Mapping[str, nn.Linear],
    examples: Mapping[str, Example],
    plan: Plan,
    verdict: Verdict,
    budget_s: float,
    progress: Progress | None,
) -> None:
    """Measure, choose and install site by site, then let the whole model decide; any failure puts everything back."""
    working_set = site_bytes(sites)
    planner = Planner(plan.tokens, plan.precision, working_set, budget_s, plan.batch_invariant, plan.prefer)
    verdict.before(working_set)
    try:
        done, most = 0, max(plan.tokens.counts)
        for group in together(sites):
            first = group[0]
            choices = [planner.plan(site, plan.notes, examples.get(site.name)) for site in group]
            if split_of(first.module) is not None:
                choices, new = settle(choices, group, examples[first.name], most, budget_s, plan.notes)
            else:
                new = build(choices[0], first, most)
            _note_bytes(choices, group, new)
            plan.sites += choices
            verdict.installed(first.owner, first.module, new)
            put_in(model, first.module, new)
            done += len(group)
            if progress is not None:
                progress(done, len(sites), first.name)
        for site, values in tables(model, plan.precision):
            choice = table_plan(site, values)
            table = build(choice, site, most)
            _note_bytes([choice], [site], table)
            plan.sites.append(choice)
            verdict.installed(site.owner, site.module, table)
            put_in(model, site.module, table)
        _leave_fused(model, plan, verdict)
        for name, layer in rows.items():
            one = RowLinear.of(layer)
            verdict.installed(name, layer, one)
            put_in(model, layer, one)
            plan.rows.append(name)
            plan.notes.append(f"{name}: torch computes it row by row, as batch_invariant needs it")
        if (unrest := planner.unrest()) is not None:
            plan.notes.append(unrest)
            log.warning("%s", unrest)
        plan.folded, plan.fused = verdict.fused()
        check = verdict.after(keep=plan.batch_invariant)
        if plan.batch_invariant and check.outcome == "put back":
            raise ZeroskipError(f"batch_invariant: the model {check.method}; compile without it")
        if any(high < 1.0 for _, _, high in check.ratios.values()) and plan.batch_invariant:
            plan.notes.append("slower than its dense self, and kept all the same: batch_invariant was asked for")
    except BaseException:
        verdict.put_back()
        raise
    plan.checks.append(check)
    if check.outcome == "put back":
        plan.sites = [_stayed(choice, check) for choice in plan.sites]
        plan.fused, plan.folded = [], []
        log.warning("%s", check)


def _leave_fused(model: nn.Module, plan: Plan, verdict: Verdict) -> None:
    """Put the linear layers of those nn.TransformerEncoderLayer back whose attention torch computes.

    For torch then computes the whole layer in one call, with their weights.
    """
    choices = {choice.name: choice for choice in plan.sites}
    for owner, layer in list(model.named_modules()):
        if not isinstance(layer, nn.TransformerEncoderLayer) or isinstance(layer.self_attn, Split):
            continue
        for part in ("linear1", "linear2"):
            choice = choices.get(f"{owner}.{part}" if owner else part)
            if choice is not None and verdict.withdraw(choice.name):
                why = "its nn.TransformerEncoderLayer computes with it itself, since its attention stays dense"
                plan.sites[plan.sites.index(choice)] = _stay(choice, f"{why}; by itself, {choice.reason}")


def _apply(model: nn.Module, given: Plan) -> None:
    """Install what a plan of this machine says, without measuring."""
    plan = copy.deepcopy(given)
    sites = fits(plan, model)
    check_weights(list(sites.values()))
    # Everything is packed before anything is installed, so that a plan that does not fit leaves the model as it was.
    choices, most = {choice.name: choice for choice in plan.sites}, max(plan.tokens.counts)
    groups = together(sites[choice.name] for choice in plan.sites)
    new = [
        build_split([choices[site.name] for site in group], group, most)
        if split_of(group[0].module) is not None
        else build(choices[group[0].name], group[0], most)
        for group in groups
    ]
    for group, module in zip(groups, new, strict=True):
        for site in group:
            choices[site.name].sparsity = find_zeros(site.weight().flatten(0, 1)).sparsity
        _note_bytes([choices[site.name] for site in group], group, module)
        put_in(model, group[0].module, module)
    row_by_row(model, plan.rows)
    fold(model, plan.folded)
    join(model, plan.fused)
    object.__setattr__(model, "zeroskip_plan", plan)
    attach(model)


def _stayed(choice: SitePlan, check: ModelCheck) -> SitePlan:
    reason = choice.reason
    if choice.label != f"linear {choice.dtype}":
        why = "the model as a whole was slower" if check.ratios else check.method
        reason = f"put back: {why}; by itself, {reason}"
    return _stay(choice, reason)


def _stay(choice: SitePlan, reason: str) -> SitePlan:
    """Return the plan of a site that stays as it was."""
    return replace(
        choice,
        format="linear",
        values=choice.dtype,
        kernels=[(None, "torch")],
        bytes_after=choice.bytes_before,
        reason=reason,
    )


def _note_bytes(choices: list[SitePlan], sites: list[Site], new: nn.Module) -> None:
    """Write down what the weights take in what is installed for these sites."""
    for choice, site in zip(choices, sites, strict=True):
        if new is site.module:
            choice.bytes_after = choice.bytes_before
        elif isinstance(new, Split):
            choice.bytes_after = _stored_bytes(new.get_submodule(site.child))
        else:
            choice.bytes_after = _stored_bytes(new)


def _stored_bytes(module: nn.Module) -> int:
    nbytes = getattr(module, "nbytes", None)
    return nbytes if isinstance(nbytes, int) else int(getattr(module, "weight").nbytes)  # noqa: B009


def _read(plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None) -> Plan | None:
    if plan is None or isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        return Plan.from_dict(dict(plan))
    if isinstance(plan, str | os.PathLike):
        return Plan.load(Path(plan))
    raise ZeroskipError(f"plan is a {type(plan).__name__}: give a Plan, its dictionary or the path of its file")

"""`prune`: check everything, then block by block: collect, choose, solve, write, go on."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import nn

from zeroskip.calibrate import Batch, Journal, read_batches, text_batches
from zeroskip.errors import ZeroskipError, expect
from zeroskip.model import tied, unwrapped
from zeroskip.prune.allocate import Allocation, allocate, allocated
from zeroskip.prune.base import Loss
from zeroskip.prune.budgets import Budget, Target
from zeroskip.prune.plan import Plan
from zeroskip.prune.recipe import Recipe
from zeroskip.prune.report import Report
from zeroskip.prune.walk import UNSEEN, Walk

__all__ = ["prune"]

log = logging.getLogger(__name__)


def prune(
    model: nn.Module,
    method: str | None = None,
    *,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    calibration: Iterable[Any] | None = None,
    text: str | os.PathLike[str] | Iterable[str] | None = None,
    tokenizer: Any = None,
    recipe: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    budget: str | Mapping[str, Any] | None = None,
    target: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    values: str | None = None,
    group_size: int | None = None,
    embeddings: str | None = None,
    rotate: bool = False,
    permute: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = ("lm_head",),
    journal: str | os.PathLike[str] | None = None,
    stream: bool = False,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Set weights of a model to zero, in place, so that its outputs change as little as can be.

    Parameters
    ----------
    model : nn.Module
        Modified in place: the weights in its blocks that `zeroskip.model.find_sites` finds, which may be fp32, bf16 or
        fp16; the work is done in fp32. The report is also set as `model.zeroskip_report`.
    method : str, optional
        One of `methods()`. Without one: "obs" in strips, "admm+ls" elsewhere (see docs/pruning.md).
    sparsity : float, optional
        Fraction of zeros in [0, 1); implied by N:M patterns.
    pattern : str
        "unstructured", "N:M", "N:M@V", "N:Mt" (transposable), "block:RxC", "N:M+dense:25%": see docs/pruning.md.
    calibration : iterable of batches, optional
        A batch is a tensor (the one positional argument), a tuple (positional) or a dict (by keyword). Read once.
        Tokens where `attention_mask` is 0 count in no statistic.
    text, tokenizer : optional
        Instead of `calibration`: see `zeroskip.calibrate.text_batches`.
    recipe : dict, path or name, optional
        {"method", "pattern", "sparsity", "include", "exclude", "seed", "values", "group_size", "embeddings", "budget",
        "target", "dense", "rules"}, any of them, instead of the arguments; a YAML file that says so; or one of
        `zeroskip.recipes()`. Of these, `group_size` and `embeddings` give way to an argument. See docs/pruning.md.
    budget : str or dict, optional
        How the zeros are shared among the layers: one of `zeroskip.budgets()`, or {"name": "owl", option: value}.
        Without one every layer gets `sparsity`.
    target : dict, optional
        What the budget has to reach instead of a mean `sparsity`: {"sparsity": 0.6}, {"params": "40%"} (of dense),
        {"flops": ...}, {"bytes": 4e6}, or milliseconds of our kernels on this machine, {"ms": 12.0, "tokens": 32,
        "threads": 1}. See docs/pruning.md.
    loss : callable, optional
        (model's output, `zeroskip.calibrate.Batch`) -> scalar, for methods that need gradients (snip, grasp). A
        causal language model has a default: the next token's cross-entropy.
    values, group_size : optional
        For methods that quantise (gptq, sparsegpt+gptq): "int4" (the default) or "int8", and how many inputs of a row
        share a scale: 32, 64 (the default) or 128. The scales stay with the module as `zeroskip_scales`.
    embeddings : str, optional
        What embeddings and head are rounded to, without data: "int8" (in groups as the blocks have them), "int4" (in
        groups of 64) or "none".
    rotate : bool
        Turn the values of attention heads first, so that pruning their outputs loses less; the function stays the
        same. For patterns shared by rows, such as 8:16@64: see `zeroskip.prune.rotate`.
    permute : bool
        Put channels into an order in which N:M patterns, strips and blocks keep more, where the function stays the
        same: see `zeroskip.permute`.
    include, exclude : patterns, optional
        Globs on site names, "re:..." for regular expressions: see `zeroskip.model.find_sites`. Sites outside the
        blocks are pruned only where `include` names them.
    journal : path, optional
        A directory. The same call, killed and made again on the same model, goes on from it, with the same result.
    stream : bool
        Keep no more than one block in memory: a finished block becomes a mapping of its file in the journal, which
        must be given. With a model whose weights are mapped themselves, as `zeroskip.load` maps them, the rest takes
        no memory of its own either. The parameters of the model get other storage than they had. The files must not be
        changed while the model lives; they may be deleted.
    seed : int
    progress : callable, optional
        Told (blocks done, blocks in all, name of the block that comes) as the work goes on.

    Returns
    -------
    Report

    Raises
    ------
    ZeroskipError
        On anything that does not fit; all of it is checked before the first weight changes, except calibration data
        that makes the model itself produce NaN or Inf, and a new weight that overflows fp16. The blocks before that are
        then pruned already: nothing is put back, which would take the memory of a second model; load it anew.

    Examples
    --------
    >>> report = prune(model, pattern="8:16@64", calibration=batches)
    >>> print(report)

    Source: block by block with the pruned outputs fed on, as in Frantar and Alistarh 2023 (arXiv 2301.00774).
    """
    started = time.perf_counter()
    expect("journal", journal, str | os.PathLike | None, "a path or None")
    expect("stream", stream, bool, "True or False")
    if progress is not None and not callable(progress):
        raise ZeroskipError(f"progress is a {type(progress).__name__}: give a function, or leave it out")
    if stream and journal is None:
        raise ZeroskipError("stream=True keeps finished blocks in a journal: give journal=, a directory")
    given = {
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "include": include,
        "exclude": exclude,
        "seed": seed,
        "values": values,
        "group_size": group_size,
        "rotate": rotate,
        "permute": permute,
        "budget": budget,
        "target": target,
        "embeddings": embeddings,
    }
    asked = Recipe.read(given, recipe)
    model = unwrapped(model)
    plan = Plan.of(asked, model)
    if stream and plan.whole:
        raise ZeroskipError(
            f"stream=True keeps one block in memory, and {plan.names} works on all of them at the end: leave one out"
        )
    twins = tied(model) if stream else {}
    parted = [site.name for site in plan.sites if len(set(twins.get(id(site.tensor), ()))) > 1]
    if parted:
        raise ZeroskipError(
            f"{parted[0]}: stream=True would part it from another Parameter on its memory: give both modules one "
            "Parameter, or leave stream out"
        )
    batched = any(settings.composition.method.batched for settings in plan.settings.values())
    if loss is not None and not batched:
        raise ZeroskipError(f"loss= is for methods that need gradients, which {plan.names} does not: leave it out")
    if calibration is not None and text is not None:
        raise ZeroskipError("give calibration= or text=, not both")
    if text is not None:
        calibration = text_batches(model, text, tokenizer, plan.seed)
    shared = plan.free and "allocation" not in plan.recipe
    curious = shared and any(asked.budget_needs(plan.settings[name].composition.method) for name in plan.free)
    if (plan.needs_data or curious) and calibration is None:
        who = f"method {plan.names}" if plan.needs_data else f"budget {plan.recipe['budget']!r}"
        raise ZeroskipError(f"{who} needs data: give calibration= batches, or text= and tokenizer=")

    batches: list[Batch] = []
    if plan.needs_data or curious or ((plan.surveys or shared) and calibration is not None):
        one_logit = not plan.surveys and not plan.needs_head and not plan.whole
        batches = read_batches(model, calibration, one_logit)
    with _evaluating(model), ExitStack() as ending:
        book = Journal(journal, model, plan.recipe, batches) if journal is not None else None
        if book is not None:
            ending.callback(book.close)
        account = None
        if plan.free:
            plan, account = _shared_out(model, plan, asked, batches, loss, book)
        report = Report(plan.recipe, skipped=plan.skipped, budget=account)
        walk = Walk(model, plan, plan.survey(model, batches, loss), report, book, progress, stream)
        if plan.needs_data:
            walk.calibrated(batches)
        else:
            walk.plainly()
    if not report.rows and plan.sites:
        raise ZeroskipError(f"nothing was pruned: every site {UNSEEN}; give data that reaches the model's blocks")
    order = {site.name: index for index, site in enumerate(plan.sites)}
    report.rows.sort(key=lambda row: order[row.name])
    report.seconds = time.perf_counter() - started
    object.__setattr__(model, "zeroskip_report", report)
    return report


def _shared_out(
    model: nn.Module, plan: Plan, asked: Recipe, batches: list[Batch], loss: Loss | None, book: Journal | None
) -> tuple[Plan, dict[str, Any] | None]:
    """Return the plan with the zeros that its budget gives each layer, and the account of that, where it was decided.

    A resumed run keeps what was decided.
    """
    budget, target = cast(Budget, asked.budget), cast(Target, asked.target)

    def decide() -> tuple[Allocation, dict[str, Any]]:
        found = plan.survey(model, batches, loss) if budget.reads_scores else {}
        return allocate(model, plan, budget, target, batches, found)

    allocation = plan.recipe.get("allocation")
    account = None
    if allocation is None:
        allocation, account = decide() if book is None else book.once("allocation", decide)
    return allocated(plan, allocation), account


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

"""The tasks of lm-eval, where that package and the data of its tasks are installed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from zeroskip.errors import ZeroskipError, first_line, suggest

__all__ = ["check_installed", "run_tasks"]


def check_installed() -> None:
    """Raise unless lm-eval can be imported."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ZeroskipError(
            f"tasks need the package lm-eval ({first_line(error)}): pip install 'zeroskip[eval]'"
        ) from None


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, batch_size: int = 8, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval on a causal language model of transformers.

    Parameters
    ----------
    model : nn.Module
        Not modified.
    tokenizer
        The model's own.
    tasks : sequence of str
        Names or groups that lm-eval knows.
    batch_size : int
    limit : int, optional
        Documents of each task.

    Returns
    -------
    dict
        {task: {metric: value}}, as lm-eval names them; metrics without a number are left out.

    Raises
    ------
    ZeroskipError
        If lm-eval is not installed, knows no such task, or its data cannot be had.
    """
    check_installed()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in tasks:
        if name not in manager.all_tasks:
            raise ZeroskipError(f"lm-eval knows no task {name!r}" + suggest(name, manager.all_tasks))
    try:
        served = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(model=served, tasks=list(tasks), task_manager=manager, limit=limit)
    except Exception as error:  # hub, file system, tasks written in Python: they raise what they like
        raise ZeroskipError(f"lm-eval cannot run {', '.join(tasks)}: {first_line(error)}") from error
    return {
        task: {name.removesuffix(",none"): value for name, value in metrics.items() if _is_number(value)}
        for task, metrics in found["results"].items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

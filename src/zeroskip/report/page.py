"""A report as one HTML page: figures, the map of zeros, errors by block, pictures of masks, every site."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import jinja2
from torch import nn

from zeroskip.errors import ZeroskipError
from zeroskip.prune.report import Report
from zeroskip.report.chart import error_chart
from zeroskip.report.masks import masks
from zeroskip.report.places import grid

__all__ = ["render", "write"]


def render(report: Report, model: nn.Module | None = None) -> str:
    """Return the page. It holds no script and asks for nothing; every name in it is escaped.

    Parameters
    ----------
    report : Report
    model : nn.Module, optional
        The pruned model, for pictures of its zeros; not modified.
    """
    rooms = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rooms.filters |= {"percent": _percent, "error": _error}
    found = grid(report.rows)
    return rooms.get_template("page.html.jinja").render(
        report=report,
        recipe={name: value for name, value in report.recipe.items() if value is not None and name != "allocation"},
        grid=found,
        chart=error_chart(found),
        masks=[] if model is None else masks(model, report.rows),
    )


def write(report: Report, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
    """Write the page: whole, or not at all.

    Raises
    ------
    ZeroskipError
        If it cannot be written.
    """
    page, target = render(report, model), Path(path)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    try:
        beside.write_text(page, encoding="utf-8")
        os.replace(beside, target)
    except OSError as error:
        raise ZeroskipError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _percent(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}%}"


def _error(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"

"""The report of a pruning run as one HTML page."""

from zeroskip.report.page import render, write

__all__ = ["render", "write"]

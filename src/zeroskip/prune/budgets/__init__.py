"""Budgets: which layer gets how many zeros. One budget, one file; the order here is the order of `budgets()`."""

from zeroskip.prune.budgets.uniform import Uniform  # isort: skip
from zeroskip.prune.budgets.arithmetic import Arithmetic  # isort: skip
from zeroskip.prune.budgets.erk import Erk  # isort: skip
from zeroskip.prune.budgets.owl import Owl  # isort: skip
from zeroskip.prune.budgets.alphapruning import AlphaPruning  # isort: skip
from zeroskip.prune.budgets.by_score import ByScore  # isort: skip
from zeroskip.prune.budgets.times import Milliseconds  # isort: skip
from zeroskip.prune.budgets.base import Budget, Item, budgets
from zeroskip.prune.budgets.costs import Bytes, Cost, Flops, Params
from zeroskip.prune.budgets.solve import Outcome, solve
from zeroskip.prune.budgets.target import Target

__all__ = [
    "AlphaPruning",
    "Arithmetic",
    "Budget",
    "ByScore",
    "Bytes",
    "Cost",
    "Erk",
    "Flops",
    "Item",
    "Milliseconds",
    "Outcome",
    "Owl",
    "Params",
    "Target",
    "Uniform",
    "budgets",
    "solve",
]

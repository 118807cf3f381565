"""Pruning: one method, one file. The order here is the order of `methods()`."""

from zeroskip.prune.random import Random  # isort: skip
from zeroskip.prune.magnitude import Magnitude  # isort: skip
from zeroskip.prune.wanda import Wanda  # isort: skip
from zeroskip.prune.sparsegpt import SparseGPT  # isort: skip
from zeroskip.prune.admm import Admm  # isort: skip
from zeroskip.prune.alps import Alps  # isort: skip
from zeroskip.prune.fista import Fista  # isort: skip
from zeroskip.prune.dsnot import DSnoT  # isort: skip
from zeroskip.prune.obs import Obs  # isort: skip
from zeroskip.prune.snip import Snip  # isort: skip
from zeroskip.prune.grasp import Grasp  # isort: skip
from zeroskip.prune.synflow import SynFlow  # isort: skip
from zeroskip.prune.gptq import AdmmGPTQ, AlpsGPTQ, Gptq, SparseGPTQ  # isort: skip
from zeroskip.prune.rtn import Rtn  # isort: skip
from zeroskip.prune.base import Method, Problem, Solution, Solver
from zeroskip.prune.budgets import Budget, budgets
from zeroskip.prune.composition import Composition, methods
from zeroskip.prune.descent import CoordinateDescent
from zeroskip.prune.distill import Distill
from zeroskip.prune.ls import LeastSquares
from zeroskip.prune.patterns import Pattern
from zeroskip.prune.recipe import Recipe
from zeroskip.prune.recipe_file import recipes
from zeroskip.prune.report import Report
from zeroskip.prune.run import prune
from zeroskip.prune.tune import Tune

__all__ = [
    "Admm",
    "AdmmGPTQ",
    "Alps",
    "AlpsGPTQ",
    "Budget",
    "Composition",
    "CoordinateDescent",
    "DSnoT",
    "Distill",
    "Fista",
    "Gptq",
    "Grasp",
    "LeastSquares",
    "Magnitude",
    "Method",
    "Obs",
    "Pattern",
    "Problem",
    "Random",
    "Recipe",
    "Report",
    "Rtn",
    "Snip",
    "Solution",
    "Solver",
    "SparseGPT",
    "SparseGPTQ",
    "SynFlow",
    "Tune",
    "Wanda",
    "budgets",
    "methods",
    "prune",
    "recipes",
]

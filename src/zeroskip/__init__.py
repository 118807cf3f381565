"""zeroskip: sparse deep-learning inference that is never slower than dense."""

# ruff: noqa: I001, E402
from zeroskip.startup import mind_interrupts as _mind_interrupts

_mind_interrupts()

import torch as _torch  # noqa: F401  # first: the extension then shares torch's OpenMP runtime

from zeroskip.isa import isa, limit_to_environment as _limit_to_environment

_limit_to_environment()

from zeroskip import plugin as _plugin
from zeroskip.errors import ZeroskipError
from zeroskip.formats import Packed, names as formats, pack, unpack
from zeroskip.ops import linear
from zeroskip.prune import budgets, methods, prune, recipes
from zeroskip.planning.plan import Plan, plan_of
from zeroskip.compile import compile
from zeroskip.analyze import analyze
from zeroskip.compare import compare
from zeroskip.io import load, save
from zeroskip.quality import perplexity

_plugin.install()

__version__ = "0.1.0"
__all__ = [
    "Packed", "Plan", "ZeroskipError", "analyze", "budgets", "compare", "compile", "formats", "isa", "linear", "load",
    "methods", "pack", "perplexity", "plan_of", "prune", "recipes", "save", "unpack",
]  # fmt: skip

"""RTN: round every weight to the nearest integer times the scale of its group, without data; zeros stay zeros.

For what has no inputs to speak of (embeddings) or is wide and little sensitive (the head of a language model at 8
bits). Of nine scales for a group, the one whose rounding errors have the least sum of squares.
"""

from __future__ import annotations

import torch

from zeroskip.prune.base import Integers, Method, Problem, Solution
from zeroskip.prune.patterns import Pattern
from zeroskip.prune.scales import group_scales, spread
from zeroskip.quantize import codes_of


class Rtn(Method):
    """Quantises what is there. Source: rounding to nearest; scales are sought as in `gptq`, without input norms."""

    name = "rtn"
    chooses = False
    quantizes = True

    def serves(self, pattern: Pattern) -> bool:
        return pattern.name == "unstructured"

    def run(self, problem: Problem) -> Solution:
        integers = problem.integers or Integers("int4", 64)
        weight = problem.weight
        scales = group_scales(weight, torch.ones_like(weight[0]), integers)
        codes = codes_of(weight, scales, integers.values, integers.group_size)
        return Solution(weight != 0, codes * spread(scales, integers, weight.shape[1]), scales=scales)

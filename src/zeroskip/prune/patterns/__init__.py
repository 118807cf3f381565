"""Where the zeros of a matrix may stand; one kind of pattern, one file.

A name is tried by each kind in this order.
"""

from zeroskip.prune.patterns.unstructured import Unstructured  # isort: skip
from zeroskip.prune.patterns.nm import NM  # isort: skip
from zeroskip.prune.patterns.block import Block  # isort: skip
from zeroskip.prune.patterns.transposable import Transposable  # isort: skip
from zeroskip.prune.patterns.split import Split  # isort: skip
from zeroskip.prune.patterns.base import Pattern, Scope

__all__ = ["NM", "Block", "Pattern", "Scope", "Split", "Transposable", "Unstructured"]

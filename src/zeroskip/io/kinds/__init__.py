"""How layers are stored that compiling put into a model; one kind, one file. The order is that of the checks."""

from zeroskip.io.kinds.dense import Dense  # isort: skip
from zeroskip.io.kinds.linear import Linear  # isort: skip
from zeroskip.io.kinds.embedding import Embedding  # isort: skip
from zeroskip.io.kinds.conv import Conv  # isort: skip
from zeroskip.io.kinds.stack import Stack  # isort: skip
from zeroskip.io.kinds.base import Kind, Stored, kind_of, kind_stored, kinds_in

__all__ = ["Conv", "Dense", "Embedding", "Kind", "Linear", "Stack", "Stored", "kind_of", "kind_stored", "kinds_in"]

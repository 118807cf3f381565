"""Store and load: a Hugging Face directory, or a plain one for any other module."""

from zeroskip.io.load import load
from zeroskip.io.meta import attach
from zeroskip.io.save import save

__all__ = ["attach", "load", "save"]

"""How good a model is: perplexity on a text, and the tasks of lm-eval."""

from zeroskip.quality.judge import Judge
from zeroskip.quality.perplexity import Perplexity, perplexity
from zeroskip.quality.tasks import run_tasks

__all__ = ["Judge", "Perplexity", "perplexity", "run_tasks"]

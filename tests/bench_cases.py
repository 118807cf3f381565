"""Two small cases for the tests of the benchmark of kernels."""

from cli_models import shorter

from zeroskip.bench import contest, kernels, suites
from zeroskip.bench.roofline import Level, Roofline
from zeroskip.bench.suites import Case, Suite, Zeros

LIMITS = Roofline(1, "avx2", {"fp32": 100.0}, {"fp32": 80.0, "bf16": 8.0}, (Level("memory", 1 << 20, 10.0),))
TINY = Case("tiny", 64, 64, Zeros("8:16@64", 0.5), 64 * 64 * 3)
FREE = Case("tiny", 48, 70, Zeros("unstructured", 0.7), 48 * 70)


def two_cases(monkeypatch):
    """Make a suite of two small cases, raced for next to no time, on a machine whose limits are known."""
    monkeypatch.setitem(suites.SUITES, "llm", Suite("llm", "two small cases", (TINY, FREE), (1, 4)))
    monkeypatch.setattr(contest, "race", shorter(contest.race))
    monkeypatch.setattr(kernels, "rooflines", lambda threads, budget_s: [LIMITS])

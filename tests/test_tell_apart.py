"""When a race of layouts has seen enough: what is close has to be known well, what is far apart does not."""

import numpy as np
import pytest
from torch import nn

from zeroskip.bench.timer import Race
from zeroskip.planning.candidates import Layout
from zeroskip.planning.measure import Measured, tell_apart


def layout(label, dense):
    name, values = label.split()
    return Layout(label, name, values, ("k",), dense, 1, lambda kernel, count: [], nn.Identity)


FIELD = Measured([layout("dense fp32", True), layout("csr fp32", False), layout("bitmask fp32", False)], {})


def seen(noise, **medians):
    """Thirty rounds around each median, spread evenly over +- noise; every runner has an order of its own."""
    spread = 1 + noise * np.linspace(-1, 1, 31)
    order = np.random.default_rng(0)
    return Race(
        {f"{name} fp32/k": list(median * order.permutation(spread)) for name, median in medians.items()}, rounds=31
    )


@pytest.mark.parametrize(
    ("noise", "medians", "enough"),
    [
        (0.3, {"dense": 1.0, "csr": 3.0, "bitmask": 4.0}, True),  # dense wins clearly
        (0.3, {"dense": 1.0, "csr": 1.05, "bitmask": 4.0}, False),  # a sparse one may be faster
        (0.3, {"dense": 3.0, "csr": 1.0, "bitmask": 2.0}, True),  # one sparse one wins clearly
        (0.3, {"dense": 3.0, "csr": 1.0, "bitmask": 1.05}, False),  # both beat dense: which of them?
        (0.005, {"dense": 3.0, "csr": 1.0, "bitmask": 1.001}, True),  # level, and known to be
    ],
)
def test_a_race_ends_when_no_choice_would_be_luck(noise, medians, enough):
    assert tell_apart(FIELD)(seen(noise, **medians)) is enough


def test_who_has_retired_is_not_waited_for():
    found = seen(0.3, dense=3.0, csr=1.0, bitmask=1.05)
    found.retired.add("bitmask fp32/k")
    assert tell_apart(FIELD)(found)

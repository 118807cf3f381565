"""The layer that tells methods apart: errors relative to Wanda's, mean of three seeds, held to published figures."""

import pytest
from layers import problem

from zeroskip.prune.composition import Composition

CELLS = {"50 %": ("unstructured", 0.5), "70 %": ("unstructured", 0.7), "2:4": ("2:4", 0.5)}
STRIPS = {"2:4@64": ("2:4@64", 0.5), "8:16@64": ("8:16@64", 0.5)}
ALL = CELLS | STRIPS

# With what tolerance, and the bar of each cell: published ones, with the ridge of +ls on diag(G), and below them ours.
BARS = {
    "sparsegpt": (0.25, dict(zip(CELLS, (0.50, 0.56, 0.35), strict=True))),
    "wanda+ls": (0.10, dict(zip(ALL, (0.148, 0.251, 0.147, 0.147, 0.148), strict=True))),
    "admm": (0.10, dict(zip(ALL, (0.121, 0.172, 0.132, 0.155, 0.157), strict=True))),
    "admm+ls": (0.10, dict(zip(ALL, (0.117, 0.163, 0.126, 0.146, 0.148), strict=True))),
    "alps": (0.10, dict(zip(ALL, (0.108, 0.133, 0.111, 0.139, 0.141), strict=True))),
    "obs": (0.10, dict(zip(STRIPS, (0.142, 0.142), strict=True))),
}


@pytest.mark.parametrize(("method", "cell"), [(m, c) for m, (_, bars) in BARS.items() for c in bars])
def test_errors_relative_to_wanda(data, method, cell):
    source = {}
    exec((data("correlated") / "generate.py").read_text(), source)
    tolerance, bars = BARS[method]
    mean = {"wanda": 0.0, method: 0.0}
    for seed in (1, 2, 3):
        w, x = source["generate"](seed)
        for name in mean:
            mean[name] += source["relative_error"](
                w, Composition.parse(name).run(problem(w, x, *ALL[cell]))[1].weight, x
            )
    assert mean[method] / mean["wanda"] <= (1 + tolerance) * bars[cell]

"""One layer with correlated inputs, as the tests of methods and solvers want it."""

import torch

from zeroskip.prune import Pattern, Problem


def layer(seed: int, rows: int = 24, columns: int = 32, tokens: int = 200, dead: int = 0):
    """Return W [rows, columns] and X [tokens, columns]; the first `dead` inputs are zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns // 4, generator=g) @ torch.randn(columns // 4, columns, generator=g)
    x = (x + 0.3 * torch.randn(tokens, columns, generator=g)) * torch.randn(columns, generator=g).exp()
    x[:, :dead] = 0
    return torch.randn(rows, columns, generator=g), x


def problem(w, x, pattern="unstructured", sparsity=0.5, **more):
    """The task as `prune` would state it."""
    chosen = Pattern.parse(pattern)
    stats = {"gram": x.t() @ x, "sumsq": x.square().sum(0), "sum": x.sum(0)}
    implied = chosen.sparsity
    draw = torch.Generator().manual_seed(0)
    return Problem("layer", w, chosen, sparsity if implied is None else implied, stats, draw, **more)


def error(w, v, x):
    """||X (W - V)^T||^2 / ||X W^T||^2 in float64."""
    w, v, x = w.double(), v.double(), x.double()
    return float(((x @ (w - v).t()) ** 2).sum() / ((x @ w.t()) ** 2).sum())


def optimum(w, keep, x, ridge=0.0):
    """The best weights on a support, row by row in float64, straight from the formula."""
    out = torch.zeros_like(w, dtype=torch.float64)
    gram = x.double().t() @ x.double()
    for i, (row, on) in enumerate(zip(w.double(), keep, strict=True)):
        matrix = gram[on][:, on] + ridge * torch.diag(gram.diagonal()[on])
        out[i, on] = row[on] + torch.linalg.solve(matrix, gram[on][:, ~on] @ row[~on])
    return out

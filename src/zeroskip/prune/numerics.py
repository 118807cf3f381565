"""The linear algebra that solvers share.

Every solver works in units where each input has length one: with n_j = sqrt(G_jj) the weights are W_ij n_j and the
Gram matrix G_ij / (n_i n_j), whose diagonal is one. A ridge then means the same for every input, whatever its size.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from zeroskip.errors import ZeroskipError

__all__ = ["cholesky", "in_range", "inverse", "inverse_factor", "precision", "relative_loss", "unit_gram"]

log = logging.getLogger(__name__)

WIDE = 8192  # from here on a k x k matrix in fp64 is half a gigabyte and more


def precision(k: int) -> torch.dtype:
    """The type in which a k x k matrix is factorised: fp64, for wide layers fp32."""
    return torch.float64 if k <= WIDE else torch.float32


def unit_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Scale G to a unit diagonal.

    Parameters
    ----------
    gram : Tensor
        [in, in] X^T X; not modified.

    Returns
    -------
    Tensor, Tensor
        [in, in] the scaled matrix; [in] the scale sqrt(G_jj), one where an input is dead (its row of G stays zero).
    """
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return gram / scale / scale.unsqueeze(1), scale


def cholesky(matrix: Tensor, ridge: float, name: str) -> tuple[Tensor, list[str]]:
    """Factorise `matrix` + ridge I, where that fails with ten times the ridge, up to 1.

    Parameters
    ----------
    matrix : Tensor
        [k, k] with a diagonal of about one, fp64 or fp32; not modified.
    ridge : float
    name : str
        For the log.

    Returns
    -------
    Tensor, list of str
        [k, k] lower factor; a remark for the report where the ridge was raised.
    """
    used = ridge
    while True:
        shifted = matrix.clone()
        shifted.diagonal().add_(used)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed or used >= 1:
            break
        used = min(10 * used, 1.0) if used else 1e-6
    if used == ridge:
        return factor, []
    note = f"ridge raised from {ridge:g} to {used:g}: Cholesky failed"
    log.warning("%s: %s", name, note)
    return factor, [note]


def inverse(matrix: Tensor, ridge: float, name: str) -> tuple[Tensor, list[str]]:
    """Return (`matrix` + ridge I)^-1 in fp32, [k, k], with the remarks of `cholesky`."""
    factor, notes = cholesky(matrix.to(precision(len(matrix))), ridge, name)
    return torch.cholesky_inverse(factor).float(), notes


def inverse_factor(matrix: Tensor, ridge: float, name: str) -> tuple[Tensor, list[str]]:
    """Return the upper triangular U with U^T U = (`matrix` + ridge I)^-1 in fp32, with the remarks of `cholesky`.

    H = R R^T with R upper is a Cholesky factorisation read from the last row to the first, and U = R^-1: one
    factorisation, where inverting first and factorising after would be two that can fail.
    """
    work = matrix.to(precision(len(matrix)))
    factor, notes = cholesky(work.flip(0, 1), ridge, name)
    identity = torch.eye(len(work), dtype=work.dtype, device=work.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False).flip(0, 1).float(), notes


def in_range(result: float | Tensor, gram: Tensor, name: str) -> None:
    """Raise unless a solver's result is finite: with inputs of too different sizes, fp32 overflows on the way.

    Raises
    ------
    ZeroskipError
        It names the layer and how far the sizes of its inputs are apart.
    """
    if math.isfinite(result) if isinstance(result, float) else bool(torch.isfinite(result).all()):
        return
    sizes = gram.diagonal()[gram.diagonal() > 0].double().sqrt()
    apart = float(sizes.max() / sizes.min()) if len(sizes) else 1.0
    raise ZeroskipError(
        f"{name}: the solve leaves the range of fp32, its inputs differ by a factor of {apart:.0e}: leave this layer "
        "out or choose its zeros by 'wanda'"
    )


def relative_loss(change: Tensor, weight: Tensor, gram: Tensor) -> float:
    """Return ||change X||^2 / ||W X||^2 from G = X^T X, in fp64; `change` and `weight` are [out, in]."""
    top, bottom = ((part.double() @ gram.double() * part).sum() for part in (change, weight))
    return float(top / bottom)

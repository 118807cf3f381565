"""Intel MKL's sparse products (inspector-executor), through sparse-dot-mkl: the faster of both dense layouts.

Activations stay as they come: X [tokens, k] Wᵀ is computed as (W Xᵀ)ᵀ, with Xᵀ a column-major view, or with W in CSC
from the left. Which of the two is faster is found when the weight is loaded.
"""

from __future__ import annotations

import time
from importlib import import_module

import numpy as np

from zeroskip.bench.peers.base import Floats, Mode, Peer, Work, nbytes

__all__ = ["Mkl"]


class Mkl(Peer):
    name = "mkl"
    modes = (Mode("fp32", 32),)
    requires = ("mkl", "sparse-dot-mkl", "scipy")
    fixed_tokens = True  # the layout that is faster depends on them

    def version(self) -> str:
        from importlib.metadata import version

        _find_library()
        import_module("sparse_dot_mkl")
        return version("mkl")

    def load(self, mode: str, weight: Floats, copies: int, threads: int, tokens: int) -> Work:
        _find_library()
        library, sparse = import_module("sparse_dot_mkl"), import_module("scipy.sparse")
        library.mkl_set_num_threads(threads)
        rows = [sparse.csr_matrix(weight) for _ in range(copies)]
        columns = [one.T for one in rows]  # CSC [k, m] on the same arrays

        def from_the_right(x: Floats) -> list[Floats]:
            return [library.dot_product_mkl(one, x.T).T for one in rows]

        def from_the_left(x: Floats) -> list[Floats]:
            return [library.dot_product_mkl(x, one) for one in columns]

        x = np.ones((tokens, weight.shape[1]), np.float32)
        run = min((from_the_right, from_the_left), key=lambda run: _seconds(run, x))
        return Work(run, copies, nbytes(rows[0].data, rows[0].indices, rows[0].indptr))


def _seconds(run: object, x: Floats) -> float:
    def once() -> float:
        start = time.perf_counter()
        run(x)  # type: ignore[operator]
        return time.perf_counter() - start

    once()
    return min(once(), once())


def _find_library() -> None:
    """Point sparse-dot-mkl at the library of this environment, which it does not find by itself."""
    import os
    import sys
    from pathlib import Path

    found = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    if found:
        os.environ.setdefault("MKL_RT", str(found[0]))

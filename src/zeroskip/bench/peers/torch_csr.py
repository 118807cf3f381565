"""torch's sparse CSR tensors, in the environment that this package runs in."""

from __future__ import annotations

from importlib import import_module

from zeroskip.bench.peers.base import Floats, Mode, Peer, Work

__all__ = ["TorchCsr"]


class TorchCsr(Peer):
    name = "torch_csr"
    modes = (Mode("fp32", 32),)

    def version(self) -> str:
        return str(import_module("torch").__version__)

    def load(self, mode: str, weight: Floats, copies: int, threads: int, tokens: int) -> Work:
        torch = import_module("torch")
        torch.set_num_threads(threads)
        made = [torch.from_numpy(weight).to_sparse_csr() for _ in range(copies)]
        size = sum(part.nbytes for part in (made[0].values(), made[0].col_indices(), made[0].crow_indices()))

        def run(x: Floats) -> list[Floats]:
            tall = torch.from_numpy(x).t()
            with torch.inference_mode():
                return [(one @ tall).t().numpy() for one in made]

        return Work(run, copies, size)

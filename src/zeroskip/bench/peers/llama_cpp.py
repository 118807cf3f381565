"""llama.cpp: ggml's product of matrices in its two common 4-bit types, plain and repacked, through the C interface.

llama-cpp-python is the package that brings the libraries; its own interface runs whole models only (`llama_model`).
Here one graph multiplies the same activations with every copy of the weight, as a model does with its layers.
"""

from __future__ import annotations

import ctypes
import itertools
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from zeroskip.bench.peers import llama_model
from zeroskip.bench.peers.base import Floats, Mode, Peer, Work

__all__ = ["LlamaCpp"]

F32 = 0
# mode: ggml's number of the type, the function that undoes it, inputs that share a scale of the activations
TYPES = {"q4_0": (2, "dequantize_row_q4_0", 32), "q4_K": (12, "dequantize_row_q4_K", 256)}
REPACKED = " repacked"
MORE_BYTES = 1 << 20  # of a context, beside its tensors' headers


class LlamaCpp(Peer):
    name = "llama_cpp"
    modes = tuple(
        Mode(kind + order, 4, activation_group=group)
        for kind, (_, _, group) in TYPES.items()
        for order in ("", REPACKED)
    )
    model_modes = llama_model.MODES
    requires = ("llama-cpp-python", "gguf", "numpy")
    # GCC drops stores that ggml's tile code needs; its other kernels are not affected.
    build = (
        ("CFLAGS", "-mno-amx-tile"),
        ("CXXFLAGS", "-mno-amx-tile"),
        ("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"),
    )
    fixed_tokens = True

    def version(self) -> str:
        _Ggml()
        from importlib.metadata import version

        return version("llama-cpp-python")

    def load(self, mode: str, weight: Floats, copies: int, threads: int, tokens: int) -> Work:
        (m, k), (kind, undo, group) = weight.shape, TYPES[mode.removesuffix(REPACKED)]
        if k % group:  # ggml would end the process
            raise ValueError(f"{k} inputs are not a multiple of {group}")
        ggml = _Ggml()
        raw = np.empty(ggml.ggml_row_size(kind, k) * m, np.uint8)
        ggml.ggml_quantize_chunk(kind, weight.ctypes.data, raw.ctypes.data, 0, m, k, None)
        stands = np.empty((m, k), np.float32)
        getattr(ggml, undo)(raw.ctypes.data, stands.ctypes.data, m * k)

        stored = ggml.context(copies)
        weights = [ggml.ggml_new_tensor_2d(stored, kind, k, m) for _ in range(copies)]
        where = ggml.repack() if mode.endswith(REPACKED) else ggml.ggml_backend_cpu_buffer_type()
        ggml.allocate(stored, where)
        for one in weights:
            ggml.ggml_backend_tensor_set(one, raw.ctypes.data, 0, raw.nbytes)

        running = ggml.context(copies + 1)
        x_tensor = ggml.ggml_new_tensor_2d(running, F32, k, tokens)
        results = [ggml.ggml_mul_mat(running, one, x_tensor) for one in weights]
        graph = ggml.ggml_new_graph(running)
        for one in results:
            ggml.ggml_build_forward_expand(graph, one)
        ggml.allocate(running, ggml.ggml_backend_cpu_buffer_type())
        backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(backend, threads)
        views = [_view(ggml.ggml_get_data(one), (tokens, m)) for one in results]

        def run(x: Floats) -> list[Floats]:
            ggml.ggml_backend_tensor_set(x_tensor, x.ctypes.data, 0, x.nbytes)
            status = ggml.ggml_backend_graph_compute(backend, graph)
            if status:
                raise RuntimeError(f"ggml's graph ended with status {status}")
            return views

        return Work(run, copies, raw.nbytes, stands, holds=_Held(ggml, backend, (running, stored)))

    def make_models(self, folder: Path, into: Path) -> dict[str, int]:
        sizes = llama_model.make(folder, into)
        return {mode: sizes[mode.removesuffix(llama_model.PLAIN)] for mode in self.model_modes}

    def open_model(self, mode: str, into: Path, threads: int) -> llama_model.LlamaModel:
        file = mode.removesuffix(llama_model.PLAIN)
        return llama_model.LlamaModel(into / f"{file}.gguf", threads, repack=file == mode)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


P = c_void_p
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (P, (_InitParams,)),
    "ggml_free": (None, (P,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_quantize_chunk": (c_size_t, (c_int, P, P, c_int64, c_int64, c_int64, P)),
    "dequantize_row_q4_0": (None, (P, P, c_int64)),
    "dequantize_row_q4_K": (None, (P, P, c_int64)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead": (c_size_t, ()),
    "ggml_new_tensor_2d": (P, (P, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (P, (P, P, P)),
    "ggml_get_data": (P, (P,)),
    "ggml_new_graph": (P, (P,)),
    "ggml_build_forward_expand": (None, (P, P)),
    "ggml_backend_cpu_buffer_type": (P, ()),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, (P, P)),
    "ggml_backend_buffer_free": (None, (P,)),
    "ggml_backend_tensor_set": (None, (P, P, c_size_t, c_size_t)),
    "ggml_backend_cpu_init": (P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (P, c_int)),
    "ggml_backend_free": (None, (P,)),
    "ggml_backend_graph_compute": (c_int, (P, P)),
    "ggml_backend_cpu_reg": (P, ()),
    "ggml_backend_reg_dev_get": (P, (P, c_size_t)),
    "ggml_backend_reg_get_proc_address": (P, (P, c_char_p)),
    "ggml_backend_buft_name": (c_char_p, (P,)),
}


class _Ggml:
    """ggml's libraries as one object; a function's types are declared when it is first used."""

    def __init__(self) -> None:
        spec = find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ImportError("llama-cpp-python is not in this environment")
        folder = Path(spec.origin).parent / "lib"
        self._parts = [
            ctypes.CDLL(str(folder / f"libggml{part}.so"), ctypes.RTLD_GLOBAL) for part in ("-base", "-cpu", "")
        ]
        self.buffers: list[int] = []

    def __getattr__(self, name: str) -> Any:
        result, arguments = SIGNATURES[name]
        function = next(getattr(part, name) for part in self._parts if hasattr(part, name))
        function.restype, function.argtypes = result, arguments
        setattr(self, name, function)
        return function

    def context(self, tensors: int) -> int:
        """Return a context with room for as many tensors and their products, and for a graph; no data in it."""
        room = 2 * (tensors + 1) * self.ggml_tensor_overhead() + self.ggml_graph_overhead() + MORE_BYTES
        made: int = self.ggml_init(_InitParams(room, None, True))
        return made

    def allocate(self, context: int, where: int) -> None:
        buffer = self.ggml_backend_alloc_ctx_tensors_from_buft(context, where)
        if not buffer:
            raise MemoryError("ggml could not allocate its tensors")
        self.buffers.append(buffer)

    def repack(self) -> int:
        """Return the buffer type that reorders 4-bit weights for its fast kernels."""
        registry = self.ggml_backend_cpu_reg()
        found = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if found:
            kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(found)(self.ggml_backend_reg_dev_get(registry, 0))
            for kind in itertools.takewhile(bool, (kinds[index] for index in itertools.count())):
                if b"REPACK" in self.ggml_backend_buft_name(kind):
                    return int(kind)
        raise RuntimeError("this build of ggml repacks nothing")


class _Held:
    """Frees what a graph needs when nobody needs the graph any more."""

    def __init__(self, ggml: _Ggml, backend: int, contexts: tuple[int, ...]) -> None:
        self._ggml, self._backend, self._contexts = ggml, backend, contexts

    def __del__(self) -> None:
        self._ggml.ggml_backend_free(self._backend)
        for buffer in self._ggml.buffers:
            self._ggml.ggml_backend_buffer_free(buffer)
        for context in self._contexts:
            self._ggml.ggml_free(context)


def _view(address: int, shape: tuple[int, int]) -> Floats:
    """Return the array [tokens, m] at an address, without a copy."""
    count = shape[0] * shape[1]
    return np.ctypeslib.as_array(ctypes.cast(address, POINTER(c_float)), (count,)).reshape(shape)

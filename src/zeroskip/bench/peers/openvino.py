"""OpenVINO: weights compressed to u4 with a scale for 128 inputs, and fp32.

One graph multiplies the same activations with every copy of the weight, so that a request's overhead is shared by
them: generous to the peer. The compressed mode may compute in bf16 where the CPU has it, and may round activations.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from zeroskip.bench.peers.base import Floats, Mode, Peer, Work, int4_groups

__all__ = ["OpenVino"]

GROUP = 128


class OpenVino(Peer):
    name = "openvino"
    modes = (Mode("int4", 4, "bf16", activation_group=GROUP), Mode("bf16", 16, "bf16"), Mode("fp32", 32))
    requires = ("openvino",)

    def version(self) -> str:
        return str(import_module("openvino").get_version())

    def load(self, mode: str, weight: Floats, copies: int, threads: int, tokens: int) -> Work:
        openvino, ops = import_module("openvino"), import_module("openvino.opset13")
        core, stands = openvino.Core(), None
        if mode == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError("this CPU has no bf16 arithmetic")
        x = ops.parameter([-1, weight.shape[1]], np.float32, name="x")
        if mode == "int4":
            codes, scales, stands = int4_groups(weight, GROUP)
        outputs, size = [], weight.nbytes if mode == "fp32" else weight.size * 2
        alive: list[Any] = []  # constants read the arrays they were made of
        for _ in range(copies):
            if mode == "int4":
                alive.append((codes[:, :, 0::2] | codes[:, :, 1::2] << 4).copy())
                constant = _compressed(openvino, ops, alive[-1], scales, weight.shape)
                size = alive[-1].nbytes + scales.nbytes // 2
            else:
                constant = ops.constant(weight.copy())
            outputs.append(ops.result(ops.matmul(x, constant, False, True)))
        model = openvino.Model(outputs, [x], "layers")
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32" if mode == "fp32" else "bf16" if mode == "bf16" else "",
        }
        compiled = core.compile_model(model, "CPU", {name: value for name, value in settings.items() if value != ""})
        request = compiled.create_infer_request()

        def run(x: Floats) -> list[Floats]:
            request.infer([x], share_inputs=True)
            return [request.get_output_tensor(copy).data for copy in range(copies)]

        return Work(run, copies, size, stands, holds=alive)


def _compressed(openvino: Any, ops: Any, packed: Any, scales: Floats, shape: tuple[int, int]) -> Any:
    """Return the subgraph that the CPU plugin fuses into a product with compressed weights."""
    m, k = shape
    groups = scales.shape[1]
    if groups * GROUP != k:
        raise ValueError(f"{k} inputs are not a multiple of {GROUP}")
    tensor = openvino.Tensor(packed, [m, groups, GROUP], openvino.Type.u4)
    stored = ops.convert(openvino.op.Constant(tensor), np.float16)
    zero = ops.convert(openvino.op.Constant(openvino.Type.u4, openvino.Shape([1, 1, 1]), [8]), np.float16)
    scale = ops.constant(scales.astype(np.float16)[:, :, None])
    whole = ops.multiply(ops.subtract(stored, zero), scale)
    return ops.convert(ops.reshape(whole, np.array([m, k], np.int64), False), np.float32)

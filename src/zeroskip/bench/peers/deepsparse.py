"""DeepSparse 1.8.0, the last release: it runs ONNX graphs of pruned layers."""

from __future__ import annotations

import os
import tempfile
from importlib import import_module
from pathlib import Path

from zeroskip.bench.peers.base import Floats, Mode, Peer, Work

__all__ = ["DeepSparse"]


class DeepSparse(Peer):
    name = "deepsparse"
    modes = (Mode("fp32", 32),)
    requires = ("deepsparse==1.8.0", "sparsezoo~=1.8.0", "onnx<1.15", "protobuf<4", "numpy<2", "setuptools<81")
    python = "3.11"
    fixed_tokens = True

    def version(self) -> str:
        os.environ["NM_DISABLE_ANALYTICS"] = "True"
        return str(import_module("deepsparse").__version__)

    def load(self, mode: str, weight: Floats, copies: int, threads: int, tokens: int) -> Work:
        self.version()
        engine, onnx = import_module("deepsparse.engine"), import_module("onnx")
        helper, (m, k) = onnx.helper, weight.shape
        kind = onnx.TensorProto.FLOAT
        nodes = [helper.make_node("Gemm", ["x", f"w{copy}"], [f"y{copy}"], transB=1) for copy in range(copies)]
        files = [onnx.numpy_helper.from_array(weight, f"w{copy}") for copy in range(copies)]
        inputs = [helper.make_tensor_value_info("x", kind, [tokens, k])]
        outputs = [helper.make_tensor_value_info(f"y{copy}", kind, [tokens, m]) for copy in range(copies)]
        graph = helper.make_graph(nodes, "layers", inputs, outputs, initializer=files)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "layers.onnx")
            onnx.save(model, str(path))
            compiled = engine.Engine(str(path), batch_size=tokens, num_cores=threads)
        size = int((weight != 0).sum()) * 4
        return Work(lambda x: compiled.run([x]), copies, size)

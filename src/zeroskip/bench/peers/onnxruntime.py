"""ONNX Runtime: MatMulNBits in 4 bits, and MatMul in fp32.

One graph multiplies the same activations with every copy of the weight, so that a session's overhead is shared by
them: generous to the peer. Its threads spin between the products of a run, as they do in a model, but not after it,
for then they would take time from whoever runs next. It keeps packed weights that are equal only once, which would stay
in a cache: so the rows of each copy begin elsewhere, and only the last copy is the weight itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from zeroskip.bench.peers.base import Floats, Mode, Peer, Work, int4_groups, nbytes

__all__ = ["OnnxRuntime"]

GROUP = 128
ACCURACY = 4  # activations rounded to int8, the fastest level


class OnnxRuntime(Peer):
    name = "onnxruntime"
    modes = (Mode("int4", 4, activation_group=GROUP), Mode("fp32", 32))
    requires = ("onnxruntime", "onnx")

    def version(self) -> str:
        return str(import_module("onnxruntime").__version__)

    def load(self, mode: str, weight: Floats, copies: int, threads: int, tokens: int) -> Work:
        onnx, runtime = import_module("onnx"), import_module("onnxruntime")
        helper, (m, k) = onnx.helper, weight.shape
        nodes, size, stands = [], 0, None
        files: dict[str, Any] = {}
        if mode == "int4":
            codes, scales, stands = int4_groups(weight, GROUP)
            packed = codes[:, :, 0::2] | codes[:, :, 1::2] << 4
            size = nbytes(packed, scales)
        for copy in range(copies):
            turned = copies - 1 - copy
            if mode == "int4":
                files |= {f"w{copy}": np.roll(packed, turned, 0), f"s{copy}": np.roll(scales, turned, 0).reshape(-1)}
                nodes.append(
                    helper.make_node(
                        "MatMulNBits", ["x", f"w{copy}", f"s{copy}"], [f"y{copy}"], domain="com.microsoft",
                        K=k, N=m, bits=4, block_size=GROUP, accuracy_level=ACCURACY,
                    )
                )  # fmt: skip
            else:
                files[f"w{copy}"] = np.roll(weight, turned, 0).T.copy()
                size = weight.nbytes
                nodes.append(helper.make_node("MatMul", ["x", f"w{copy}"], [f"y{copy}"]))
        kind = onnx.TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info("x", kind, ["tokens", k])]
        outputs = [helper.make_tensor_value_info(f"y{copy}", kind, ["tokens", m]) for copy in range(copies)]
        named = [_outside(onnx, name, array) for name, array in files.items()]
        graph = helper.make_graph(nodes, "layers", inputs, outputs, initializer=named)
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)

        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_external_initializers(
            list(files), [runtime.OrtValue.ortvalue_from_numpy(a) for a in files.values()]
        )
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return Work(lambda x: session.run(None, {"x": x}), copies, size, stands)


def _outside(onnx: Any, name: str, array: Any) -> Any:
    """Return an initializer whose data the session is given separately: a graph of more than 2 GB cannot be stored."""
    tensor = onnx.TensorProto()
    tensor.name, tensor.data_type = name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.dims.extend(array.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "given"), ("offset", "0"), ("length", str(array.nbytes))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor

"""llama.cpp on whole models: a Llama's weights written as GGUF, quantised by llama.cpp itself, and run.

Read by the worker in the peer's environment: imports at its top only the standard library and numpy.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FILES", "MODES", "PLAIN", "LlamaModel", "make", "permuted", "tensors"]

Ids = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

# file: llama.cpp's name of the type; the first is what the others are made of
FILES = {"bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "q4_k_m": "MOSTLY_Q4_K_M"}
PLAIN = " plain"  # weights as they lie in the file; without it llama.cpp repacks what it has faster kernels for
MODES = ("q4_0", "q4_0" + PLAIN, "q4_k_m", "q4_k_m" + PLAIN, "q8_0", "bf16")
ROOM = 16  # positions kept free after a prompt


def tensors(folder: Path) -> Iterator[tuple[str, Array, bool]]:
    """Yield name, values and whether those are the bits of bf16, of every tensor of a folder's safetensors files.

    Values are mapped: fp32, fp16, or uint16 that hold bf16.
    """
    kinds: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    for file in sorted(folder.glob("*.safetensors")):
        length = int(np.fromfile(file, "<u8", 1)[0])
        with file.open("rb") as stream:
            stream.seek(8)
            header = json.loads(stream.read(length))
        for name, told in header.items():
            if name == "__metadata__":
                continue
            if told["dtype"] not in kinds:
                raise ValueError(f"{name} is {told['dtype']}: only dense weights are converted")
            start, shape = 8 + length + told["data_offsets"][0], tuple(told["shape"])
            yield name, np.memmap(file, kinds[told["dtype"]], "r", start, shape), told["dtype"] == "BF16"


def permuted(weight: Array, heads: int) -> Array:
    """Return the rows of a query or key weight in the order in which llama.cpp rotates: neighbours, not halves."""
    size = weight.shape[0] // heads
    return weight.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def make(folder: Path, into: Path) -> dict[str, int]:
    """Write the model of `folder` (config.json, safetensors) as GGUF files into `into`: {file of FILES: bytes}.

    Raises
    ------
    ValueError
        Not a plain Llama.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    into.mkdir(parents=True, exist_ok=True)
    first, *rest = FILES
    _write(folder, config, into / f"{first}.gguf")
    library = _library()
    for name in rest:
        settings = library.llama_model_quantize_default_params()
        settings.ftype = getattr(library, "LLAMA_FTYPE_" + FILES[name])
        paths = [str(into / f"{each}.gguf").encode() for each in (first, name)]
        if library.llama_model_quantize(*paths, ctypes.byref(settings)):
            raise ValueError(f"llama.cpp could not write {name}")
    return {name: (into / f"{name}.gguf").stat().st_size for name in FILES}


def _write(folder: Path, config: dict[str, Any], path: Path) -> None:
    if config.get("model_type") != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"a {config.get('model_type')} model is not converted here: only plain Llama")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rotary embeddings of type {rope['rope_type']} are not converted here")
    gguf = import_module("gguf")
    heads, size = config["num_attention_heads"], config["hidden_size"]
    keys, head = config.get("num_key_value_heads") or heads, config.get("head_dim") or size // heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(size)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")  # token ids go in and logits come out: no text
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    bf16 = gguf.GGMLQuantizationType.BF16
    for name, values, is_bf16 in tensors(folder):
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None:
            raise ValueError(f"{name} has no place in llama.cpp's Llama")
        for part, count in (("q_proj", heads), ("k_proj", keys)):
            if part in name:
                values = permuted(values, count)
        if values.ndim == 1:
            writer.add_tensor(known, _as_float(values, is_bf16))
        else:
            bits = values if is_bf16 else _to_bf16(values)
            writer.add_tensor(known, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as_float(values: Array, is_bf16: bool) -> Array:
    if is_bf16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _to_bf16(values: Array) -> Array:
    """Return uint16 that hold bf16, rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _library() -> Any:
    library = import_module("llama_cpp")
    library.llama_backend_init()
    return library


class LlamaModel:
    """A GGUF file, loaded. Each context has the prompts that it was made ready for.

    Parameters
    ----------
    file : Path
    threads : int
    repack : bool
        Let llama.cpp store weights as its fastest kernels want them.
    """

    def __init__(self, file: Path, threads: int, repack: bool) -> None:
        self.library, self.threads, self.ids = _library(), threads, np.zeros((0, 0), np.int64)
        self.context: Any = None
        settings = self.library.llama_model_default_params()
        settings.use_extra_bufts = repack
        started = time.perf_counter()
        self.model = self.library.llama_model_load_from_file(str(file).encode(), settings)
        if not self.model:
            raise ValueError(f"llama.cpp could not load {file.name}")
        self.load_s = time.perf_counter() - started
        self.nbytes = int(self.library.llama_model_size(self.model))
        self.words = int(self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.model)))

    def close(self) -> None:
        """Free the model and its context."""
        self._drop()
        self.library.llama_model_free(self.model)

    def ready(self, ids: Ids, decode: bool) -> None:
        """Make a context for prompts `ids` [batch, tokens]; with `decode` read the first, and copy its keys."""
        self._drop()
        self.ids = ids
        batch, tokens = ids.shape
        settings = self.library.llama_context_default_params()
        settings.n_seq_max, settings.n_ctx = batch, batch * -(-(tokens + ROOM) // 256) * 256
        settings.kv_unified = False  # each prompt has keys and values of its own
        settings.n_batch = max(tokens, batch)
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = self.library.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError("llama.cpp could not make a context")
        if decode:
            self._run(ids[0], np.arange(tokens), np.zeros(tokens, np.int64), last_only=True)
            for row in range(1, batch):
                self.library.llama_memory_seq_cp(self.library.llama_get_memory(self.context), 0, row, -1, -1)

    def first(self) -> float:
        """Return the seconds from the prompt, the first of `ids`, to the logits of its next token."""
        memory, tokens = self.library.llama_get_memory(self.context), self.ids.shape[1]
        self.library.llama_memory_clear(memory, False)
        started = time.perf_counter()
        self._run(self.ids[0], np.arange(tokens), np.zeros(tokens, np.int64), last_only=True)
        self.logits(-1).argmax()
        return time.perf_counter() - started

    def step(self) -> float:
        """Return the seconds that one more token of every prompt takes; it is forgotten."""
        batch, tokens = self.ids.shape
        started = time.perf_counter()
        self._run(self.ids[:, -1], np.full(batch, tokens), np.arange(batch), last_only=False)
        self.logits(-1).argmax()
        seconds = time.perf_counter() - started
        memory = self.library.llama_get_memory(self.context)
        for row in range(batch):
            self.library.llama_memory_seq_rm(memory, row, tokens, -1)
        return seconds

    def logits(self, place: int) -> Array:
        """Return fp32 [vocabulary] after a token of the last run; -1 is its last."""
        return np.ctypeslib.as_array(self.library.llama_get_logits_ith(self.context, place), (self.words,))

    def losses(self, windows: Ids) -> tuple[float, int]:
        """Return the sum of the negative log-likelihoods of all tokens but the first of each window, and how many."""
        total, count = 0.0, 0
        self.ready(windows[:1], decode=False)
        for ids in windows:
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)
            self._run(ids, np.arange(len(ids)), np.zeros(len(ids), np.int64), last_only=False)
            for place in range(len(ids) - 1):
                logits = self.logits(place).astype(np.float64)
                most = logits.max()
                total += most + np.log(np.exp(logits - most).sum()) - logits[ids[place + 1]]
            count += len(ids) - 1
        return float(total), count

    def _run(self, ids: Ids, positions: Ids, rows: Ids, last_only: bool) -> None:
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i in range(len(ids)):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(ids[i]), int(positions[i]), 1
                batch.seq_id[i][0] = int(rows[i])
                batch.logits[i] = not last_only or i == len(ids) - 1
            status = self.library.llama_decode(self.context, batch)
        finally:
            self.library.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode ended with status {status}")

    def _drop(self) -> None:
        if self.context is not None:
            self.library.llama_free(self.context)
            self.context = None

"""The transformers plugin: `from_pretrained` reads our directories through transformers' own quantizer registry.

Imported only once transformers' table of quantizers is (see plugin.py). Before the weights are loaded, the quantizer
checks every header and puts an empty `PackedLinear` of the right size in the place of each packed site; transformers
then hands it the mapped bytes as they are, for int8 is never cast; afterwards every blob is validated.

Without this plugin transformers only warns of an unknown method, goes on, and finds a 1-D int8 tensor where the model
has a matrix: it raises. That is why the blob has the weight's own name.

This module is imported in the middle of transformers' own import, when `PreTrainedModel` is not there yet; models are
therefore `Any` here and mean a `transformers.PreTrainedModel`.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from zeroskip.embedding_layers import PackedEmbedding
from zeroskip.errors import ZeroskipError
from zeroskip.hf_attention import attach_attention, detach_attention
from zeroskip.hf_cache import attach_cache
from zeroskip.hf_layers import attach_layers, detach_layers
from zeroskip.io import meta
from zeroskip.io.load import check_sites, read_files
from zeroskip.io.sites import swap
from zeroskip.io.tensors import dtype_name, identity, tensors_of
from zeroskip.io.verify import verify
from zeroskip.norm_layers import attach_norms, detach_norms
from zeroskip.planning.install import compiled_layers

__all__ = ["METHOD", "ZeroskipConfig", "ZeroskipQuantizer", "attach", "is_ignored", "ties_of", "untie"]

METHOD = "zeroskip"


class ZeroskipConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a compiled model: the dictionary of `zeroskip.io.meta.describe`."""

    quant_method: Any

    def __init__(self, **info: Any) -> None:
        info.pop("quant_method", None)
        self.__dict__.update(meta.check(info, "quantization_config"))
        self.quant_method = METHOD


class ZeroskipQuantizer(HfQuantizer):
    """Swap, check and restore around transformers' loading of weights."""

    requires_calibration = True  # a model becomes one of ours by zeroskip.compile, never while it loads

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        info, dtype = self.quantization_config.to_dict(), model.config.dtype  # the one asked for
        if not checkpoint_files:
            raise ZeroskipError("a model compiled by zeroskip is loaded from its files; a state_dict alone does not do")
        found = read_files([Path(file) for file in checkpoint_files])
        where = Path(checkpoint_files[0]).parent / "config.json"
        check_sites(info["sites"], found, where)
        same = type(model).__name__ in (model.config.architectures or [])
        # A site that is not in this class of model (the head, for a headless one) is left alone.
        places = {site: _here(model, site) or (site if same else None) for site in info["sites"]}
        names = {site: here for site, here in places.items() if here is not None}
        stored = {here: _as_loaded(info["sites"][site], info, dtype) for site, here in names.items()}
        swap(model, stored, where)
        _set_dtypes(model, info, dtype)
        if info.get("tied") is not None:
            pairs = ((_here(model, target), _here(model, source)) for target, source in info["tied"].items())
            dense = {n for n, _ in model.named_parameters(remove_duplicate=False) if n.rpartition(".")[0] not in stored}
            model.all_tied_weights_keys = {t: s for t, s in pairs if t in dense and s in dense}
        if same:
            _check_names(model, {name: str(file) for name, (file, _) in found.items()}, where)
        self._files = {f"{here}.weight": found[f"{site}.weight"][0] for site, here in names.items()}
        self._info = {**info, "sites": stored, "plan": _renamed(info["plan"], names)}
        self._where = where

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        verify(model, lambda name: self._files[name])
        meta.restore(model, self._info, self._where)
        model.is_quantized = False  # casts leave an int8 blob alone, so .half() and .float() need not be refused
        attach(model)


if METHOD not in AUTO_QUANTIZER_MAPPING:  # a reloaded module must not register twice
    register_quantization_config(METHOD)(ZeroskipConfig)
    register_quantizer(METHOD)(ZeroskipQuantizer)


def _here(model: Any, name: str) -> str | None:
    """Return the name in `model` of a module or tensor stored under `name`, with or without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        owner, _, leaf = candidate.rpartition(".")
        try:
            if hasattr(model.get_submodule(owner), leaf):
                return candidate
        except AttributeError:
            continue
    return None


def _renamed(plan: Any, names: dict[str, str]) -> Any:
    """Return the plan with its sites under the names they have here."""
    if not isinstance(plan, dict) or not isinstance(plan.get("sites"), list):
        return plan
    rows = [{**row, "name": names.get(row["name"], row["name"])} if _has_name(row) else row for row in plan["sites"]]
    fused = plan.get("fused")
    if isinstance(fused, list):
        groups = [{**group, "names": [names.get(n, n) for n in group["names"]]} for group in fused if _has_names(group)]
        plan = {**plan, "fused": groups}
    if isinstance(listed := plan.get("rows"), list):
        plan = {**plan, "rows": [names.get(name, name) for name in listed if isinstance(name, str)]}
    return {**plan, "sites": rows}


def _has_names(group: Any) -> bool:
    listed = group.get("names") if isinstance(group, dict) else None
    return isinstance(listed, list) and all(isinstance(name, str) for name in listed)


def _has_name(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("name"), str)


def _as_loaded(site: dict[str, Any], info: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """A bias in the model's dtype follows the dtype asked for."""
    follows = site["bias"] is not None and site["bias"] == info.get("dtype") and isinstance(dtype, torch.dtype)
    return {**site, "bias": dtype_name(dtype)} if follows else site


def _set_dtypes(model: Any, info: dict[str, Any], dtype: Any) -> None:
    """Give the parameters that were stored in a dtype of their own that dtype, unless another dtype was asked for."""
    if dtype_name(dtype) != info.get("dtype"):
        return
    for name, stored in info.get("dtypes", {}).items():
        here = _here(model, name)
        if here is None:
            continue
        owner, _, leaf = here.rpartition(".")
        old = model.get_parameter(here)
        new = nn.Parameter(old.detach().to(getattr(torch, stored)), requires_grad=old.requires_grad)
        model.get_submodule(owner)._parameters[leaf] = new


def _check_names(model: Any, found: dict[str, str], where: Path) -> None:
    """Raise if a tensor is missing or unexpected; the class is the one that was stored, so none may be."""
    expected = set(model.state_dict())
    ties = list(model.all_tied_weights_keys.items())
    for _ in ties:  # either end of a tie is enough
        found = found | {a: found[b] for pair in ties for a, b in (pair, pair[::-1]) if b in found and a not in found}
    kind = type(model).__name__
    for name in sorted(found.keys() - expected):
        if not is_ignored(model._keys_to_ignore_on_load_unexpected, name):
            raise ZeroskipError(f"{found[name]}: {name}: a {kind} has no such tensor")
    for name in sorted(expected - found.keys()):
        if not is_ignored(model._keys_to_ignore_on_load_missing, name):
            raise ZeroskipError(f"{where}: {name}: is in none of the weight files, and a {kind} needs it")


def is_ignored(patterns: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def attach(model: Any) -> None:
    """Make a compiled model behave in transformers: `save_pretrained`, `tie_weights`, `resize_token_embeddings`.

    Sets `config.quantization_config`, so that a foreign ``save_pretrained`` writes a directory that loads; unties
    what was packed, so that ``tie_weights()`` cannot put a dense embedding back; refuses to resize a packed table;
    keeps keys and values where a decode step need not copy them, and computes attention, norms and whole layers there
    in calls of the core. A model without compiled layers loses all that, and the section.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Modified in place.
    """
    layers = dict(compiled_layers(model))
    if not layers:
        detach_layers(model)
        detach_attention(model)
        detach_norms(model)
        if isinstance(getattr(model.config, "quantization_config", None), ZeroskipConfig):
            del model.config.quantization_config
        return
    attach_cache(model)
    attach_attention(model)
    attach_norms(model)
    attach_layers(model)
    info = meta.describe(model)
    ties, broken = ties_of(model)
    if broken:
        info["tied"] = ties
        for layer in layers.values():
            bias: Any = layer.bias
            if bias is not None:  # save_pretrained would drop it as a copy of the dense one
                layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        model.all_tied_weights_keys = dict(ties)
        for module in model.modules():
            if meta.is_pretrained(module):
                untie(module.config)
    model.config.quantization_config = ZeroskipConfig(**info)
    model._weight_conversions = []  # save_pretrained would split and merge our blobs as if they were matrices
    head = model.get_output_embeddings()
    for name, layer in layers.items():
        if layer is head or isinstance(layer, PackedEmbedding):
            model.resize_token_embeddings = partial(_refuse_resize, name)


def _refuse_resize(name: str, *args: Any, **kwargs: Any) -> None:
    raise ZeroskipError(f"{name} is packed and cannot be resized; resize the dense model, then prune and compile that")


def ties_of(model: Any) -> tuple[dict[str, str], bool]:
    """Return the ties that hold ({target: source}), and whether transformers claims one that packing broke.

    A bias of a packed site counts as broken too: tying it, transformers would pad it to the length of the blob.
    """
    tensors = tensors_of(model)
    packed = {f"{name}.{part}" for name, _ in compiled_layers(model) for part in ("weight", "bias")}
    claimed = dict(getattr(model, "all_tied_weights_keys", None) or {})
    keys = {name: identity(tensor) for name, tensor in tensors.items()}
    lost = {t: s for t, s in claimed.items() if t in packed or s in packed}
    kept = {t: s for t, s in claimed.items() if t not in lost and t in keys and keys[t] == keys.get(s)}
    already = getattr(getattr(model.config, "quantization_config", None), "tied", None) is not None
    return kept, already or bool(lost)


def untie(config: Any) -> None:
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False

"""The files of a transformers model beside its weights, and the way from such a directory to a model.

Models are `Any` here and mean a `transformers.PreTrainedModel`.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from zeroskip.dense_layers import OneDnnLinear
from zeroskip.errors import ZeroskipError, first_line
from zeroskip.hf import METHOD, ZeroskipConfig, is_ignored, ties_of, untie
from zeroskip.io.container import Later
from zeroskip.sites import Conv1DAdapter

__all__ = ["from_directory", "write_config"]


def write_config(
    model: Any, info: dict[str, Any], tensors: dict[str, Tensor | Later], stage: Path
) -> dict[str, Tensor | Later]:
    """Write config.json and its kin to `stage`; return the tensors to store, under the names to store them by."""
    other = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if other is not None and other.quant_method != METHOD:
        raise ZeroskipError(f"the model is quantized by {other.quant_method}; store it with its own save_pretrained")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    ties, broken = ties_of(model)
    unwanted = model._keys_to_ignore_on_save
    tensors = {name: t for name, t in tensors.items() if name not in ties and not is_ignored(unwanted, name)}
    if info["sites"]:
        if broken:
            untie(config)
            info = {**info, "tied": ties}
        info = copy.deepcopy(info)
        tensors = _as_conv1d(model, info["sites"], tensors)
        config.quantization_config = ZeroskipConfig(**info)
    else:
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        from transformers.core_model_loading import revert_weight_conversion

        tensors = dict(revert_weight_conversion(model, cast(dict[str, Tensor], tensors)))
        tensors = _as_conv1d(model, {}, tensors)
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, stage, config=config)
    config.save_pretrained(stage)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(stage)
    return tensors


def _as_conv1d(
    model: Any, sites: dict[str, dict[str, Any]], tensors: dict[str, Tensor | Later]
) -> dict[str, Tensor | Later]:
    """Store linear layers that stand where the architecture has a Conv1D its way round, and note it in `sites`.

    Plain transformers would else fail to load them, or read a square one transposed.
    """
    if not any(hasattr(sys.modules.get(type(module).__module__), "Conv1D") for module in model.modules()):
        return tensors
    with torch.device("meta"):
        plain = dict(type(model)(copy.deepcopy(model.config)).named_modules())
    tensors = dict(tensors)
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if isinstance(module, nn.Linear | OneDnnLinear) and name in plain and Conv1DAdapter.matches(plain[name]):
            weight = tensors[key]
            tensors[key] = Later(weight.dtype, (weight.shape[1], weight.shape[0]), partial(_turn, weight))
            if name in sites:
                sites[name]["transposed"] = True
    return tensors


def _turn(weight: Tensor | Later) -> Tensor:
    return (weight if isinstance(weight, Tensor) else weight.make()).detach().t().contiguous()


def from_directory(folder: Path, config: dict[str, Any], strict: bool) -> Any:
    """Load a Hugging Face directory as the architecture its config names.

    Parameters
    ----------
    strict : bool
        Whether a missing or unexpected tensor is an error; else transformers logs it.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        what = f"transformers {transformers.__version__} has no architecture {name!r}"
        raise ZeroskipError(f"{folder}: {what}; load it with from_pretrained")
    options: Any = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        loaded: Any = kind.from_pretrained(folder, **options)
        model, report = loaded
    except ZeroskipError:
        raise
    except Exception as error:  # a config or weights that do not fit it raise what they like
        raise ZeroskipError(f"{folder}: transformers cannot load it as {name}: {first_line(error)}") from error
    for what in ("missing", "unexpected") if strict else ():
        keys = sorted(report[f"{what}_keys"])
        if keys:
            more = f" (and {len(keys) - 1} more)" if keys[1:] else ""
            raise ZeroskipError(f"{folder}: {keys[0]}: {what} tensor for a {name}{more}")
    return model

"""Tiny models for the tests of storing and loading, with packed layers in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.dense_layers import DenseLinear, OneDnnLinear, onednn_problem
from zeroskip.formats import pack
from zeroskip.model import find_sites
from zeroskip.nn import PackedLinear
from zeroskip.norm_layers import attach_norms
from zeroskip.planning.install import put_in, weights_of


class Plain(nn.Module):
    """Not from the hub: two layers, a table tied to the head, a buffer of its own, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.table.weight
        self.norm = nn.BatchNorm1d(32)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(self.norm(self.down(torch.relu(self.up(x))) * self.scale + x))


def tiny(kind: str) -> Any:
    """Return a random tiny transformers model in evaluation mode."""
    import transformers as t

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids: dict[str, Any] = {"vocab_size": 80, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        config = t.LlamaConfig(**small, **ids, num_key_value_heads=2, tie_word_embeddings=True)
        model = t.LlamaForCausalLM(config)
    elif kind == "bert":
        model = t.BertForMaskedLM(t.BertConfig(**small, **ids, max_position_embeddings=32))
    elif kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **ids))
    else:
        sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        model = t.T5ForConditionalGeneration(t.T5Config(**sizes, **ids, decoder_start_token_id=0))
    return model.eval()


HEADS = {"llama": "lm_head", "gpt2": "lm_head", "t5": "lm_head", "bert": "cls.predictions.decoder"}


def make_sparse(weight: Tensor) -> Tensor:
    """Zero every second column, the same in every row: 2:4 shared by strips of any height."""
    keep = torch.arange(weight.shape[1]) % 2 == 0
    return torch.where(keep, weight, torch.zeros(()))


def pack_sites(model: nn.Module, head: str | None = None, kinds: tuple[str, ...] = ("strip_nm", "dense")) -> nn.Module:
    """Replace the sites of a model by layers of these kinds in turn, as compiling would."""
    sites = find_sites(model)
    if head is not None:
        sites = [*(site for site in sites if site.name != head), *find_sites(model, include=head, exclude=())]
    for index, site in enumerate(sites):
        weight, bias = weights_of(site)
        kind = kinds[index % len(kinds)]
        layer: nn.Module
        if kind == "linear":
            layer = DenseLinear.pack(weight, bias, "bf16")
        elif kind == "onednn":
            problem = onednn_problem("fp32")
            layer = DenseLinear.pack(weight, bias, "bf16") if problem else OneDnnLinear(weight, bias, "fp32", 8)
        else:
            values = "bf16" if index % 3 == 0 else "fp32"
            layer = PackedLinear.from_packed(pack(make_sparse(weight), kind, values), bias)
        put_in(model, site.module, layer.eval())
    attach_norms(model)  # as loading does: the bits before are then those after
    return model


def answer(model: Any) -> Tensor:
    """Return the first output on fixed ids."""
    ids = torch.arange(3, 13)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        output: Tensor = model(input_ids=ids, **more)[0]
    return output


IDS = torch.arange(12)
KINDS = ("strip_nm", "dense")


def plain(kinds: tuple[str, ...] | None = KINDS) -> Plain:
    """Return the module that is not from the hub, with layers of these kinds, or as it is."""
    torch.manual_seed(0)
    model = Plain().eval()
    if kinds is not None:
        pack_sites(model, kinds=kinds)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two of them give the same bits."""
    with torch.inference_mode():
        return torch.equal(one(IDS), other(IDS))

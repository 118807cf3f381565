"""Small decoders, packed as compiling would, and a line of tokens through them."""

import torch
import transformers
from io_models import pack_sites

from zeroskip.hf_attention import attach_attention
from zeroskip.hf_cache import attach_cache
from zeroskip.hf_layers import attach_layers
from zeroskip.planning.folding import find_foldable, fold

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "Llama": SIZES,
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Mistral": SIZES | {"sliding_window": None},
    "Olmo2": SIZES,
    "Gemma3Text": SIZES | SLIDING,
}
IDS = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(1))


def made(name="Llama", dtype=torch.float32, layers=2):
    """A model packed as compiling would, with all but its layers attached."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name] | {"num_hidden_layers": layers})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    pack_sites(model, kinds=("dense",))
    attach_cache(model)
    attach_attention(model)
    fold(model, find_foldable(model, lambda: model(IDS)))
    return model


def attached(name="Llama", dtype=torch.float32, layers=2):
    model = made(name, dtype, layers)
    for _ in range(2):
        attach_layers(model)
    return model


def steps(model, ids, mask=None, count=9, **more):
    """The logits of a prompt and of the steps after it, along one and the same line of tokens."""
    told, cache = [], None
    mask = torch.ones_like(ids) if mask is None else mask
    for place in range(count):
        out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        cache, ids = out.past_key_values, (ids[:, -1:] * 7 + place) % 90 + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        told.append(out.logits[:, -1])
    return torch.stack(told)


def compiled_steps(model, theirs, ids):
    """Compare three steps of a compiled model with another's; yield the place of each, and both static caches."""
    caches = [transformers.StaticCache(config=m.config, max_cache_len=16) for m in (model, theirs)]
    for each, cache in zip((model, theirs), caches, strict=True):
        each(ids, past_key_values=cache)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for place in range(7, 10):
        where = {"position_ids": torch.full((2, 1), place), "use_cache": True}
        ours = compiled(ids[:, :1], past_key_values=caches[0], **where).logits
        want = theirs(ids[:, :1], past_key_values=caches[1], **where).logits
        torch.testing.assert_close(ours, want, atol=2e-5, rtol=2e-5)
        yield place, caches

"""One small layer or model of every kind of site, with calibration batches that fit it."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence


class Called(nn.Module):
    """A layer under a name, called with what the batch holds."""

    def __init__(self, layer: nn.Module, *rest: object) -> None:
        super().__init__()
        self.layer, self.rest = layer, rest

    def forward(self, *args: torch.Tensor) -> object:
        return self.layer(*args, *self.rest)


def conv(kind: Callable[..., nn.Module], shape: tuple[int, ...], *args: object, **kwargs: object):
    return lambda: (Called(kind(*args, **kwargs)), [(correlated(shape, seed),) for seed in range(3)])


def recurrent(kind: Callable[..., nn.Module], *args: object, **kwargs: object):
    return lambda: (Called(kind(*args, **kwargs)), [(correlated((9, 16, 12), seed),) for seed in range(3)])


def correlated(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Values that share half of their variance along the last but one, and along the second, dimension."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw)
    return x + torch.randn((shape[0], 1, *shape[2:]), generator=draw) + torch.randn((*shape[:-1], 1), generator=draw)


class Packs(Called):
    """Packs its sequences by their lengths first."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> object:
        return self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))


def ragged() -> tuple[nn.Module, list]:
    """Sequences of different lengths, two layers, both directions, a projection."""
    layer = nn.LSTM(12, 8, num_layers=2, bidirectional=True, proj_size=4)
    return Packs(layer), [(correlated((9, 4, 12), seed), torch.tensor([5, 9, 2, 7])) for seed in range(4)]


def attention(**kwargs: object) -> tuple[nn.Module, list]:
    sizes = {"kdim": 8, "vdim": 12} if kwargs.pop("apart", False) else {}
    layer = nn.MultiheadAttention(16, 4, batch_first=True, **sizes, **kwargs)
    given = [
        tuple(correlated((6, length, width), 10 * seed + i) for i, (length, width) in enumerate(shapes))
        for seed in range(4)
        for shapes in [((7, 16), (9, sizes.get("kdim", 16)), (9, sizes.get("vdim", 16)))]
    ]
    return Called(layer), given


def encoder() -> tuple[nn.Module, list]:
    """Two layers that torch would run through one fused call each."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2), [(correlated((6, 9, 16), seed),) for seed in range(3)]


KINDS: dict[str, Callable[[], tuple[nn.Module, list]]] = {
    "conv1d": conv(nn.Conv1d, (4, 8, 41), 8, 10, 3, stride=2, padding=2, dilation=2),
    "conv2d": conv(nn.Conv2d, (4, 8, 9, 11), 8, 12, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(1, 2)),
    "conv2d groups": conv(nn.Conv2d, (4, 12, 9, 8), 12, 9, 3, padding="same", groups=3, padding_mode="circular"),
    "conv2d 1x1": conv(nn.Conv2d, (4, 16, 6, 5), 16, 12, 1),
    "conv3d": conv(nn.Conv3d, (3, 4, 5, 6, 5), 4, 6, 2, stride=(1, 2, 1), padding=1, padding_mode="replicate"),
    "lstm": recurrent(nn.LSTM, 12, 8, num_layers=2, bidirectional=True),
    "lstm packed": ragged,
    "gru": recurrent(nn.GRU, 12, 8, num_layers=2, batch_first=True),
    "rnn": recurrent(nn.RNN, 12, 8, nonlinearity="relu", bias=False),
    "attention": attention,
    "attention apart": lambda: attention(apart=True),
    "encoder": encoder,
}


def make(kind: str) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model, given = KINDS[kind]()
    return model.eval(), given


def mixtral(**kwargs: object) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4, **kwargs,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    return GptOssForCausalLM(config).eval()


def llama4() -> nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_local_experts=4,
        num_experts_per_tok=1, interleave_moe_layer_step=1,
    )  # fmt: skip
    return Llama4ForCausalLM(config).eval()


MIXTURES = {"mixtral": mixtral, "gpt_oss": gpt_oss, "llama4": llama4}

"""The models of a benchmark of language models: made, pruned also where there is no data, and run alone."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.bench.llm_results import Footprint
from zeroskip.bench.suites import LLAMA_1B
from zeroskip.errors import ZeroskipError
from zeroskip.io import load
from zeroskip.prune import Recipe
from zeroskip.prune.plan import Plan
from zeroskip.prune.recipe import DEFAULTS

__all__ = [
    "SHAPES",
    "Step",
    "alone",
    "footprint",
    "generate",
    "held_bytes",
    "prompt",
    "random_model",
    "without_data",
]

SHAPES = {"llama-1b": LLAMA_1B}
HEAD, VOCABULARY, POSITIONS = 64, 32000, 4096
NEW_TOKENS = 8


def random_model(shape: str, layers: int | None) -> Any:
    """Return a Llama of this shape in fp32, with the same random weights each time; `layers` blocks if given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=layers or sizes.blocks,
        num_attention_heads=sizes.queries // HEAD,
        num_key_value_heads=sizes.keys // HEAD,
        head_dim=HEAD,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def without_data(recipe: str, model: nn.Module, given: Mapping[str, Any] = DEFAULTS) -> list[dict[str, Any]]:
    """Return the recipes that, one after the other, leave zeros and integers of the same kind without calibration.

    `given` are the arguments of `prune` beside the recipe. Zeros are chosen by `magnitude` and weights rounded by
    `rtn`: right for speed and size, not for quality.

    Raises
    ------
    ZeroskipError
        Where a budget decides how many zeros a layer gets.
    """
    plan = Plan.of(Recipe.read(given, recipe), model)
    if plan.free:
        raise ZeroskipError(f"{recipe}: a budget shares out its zeros, which needs data: give --calibration FILE")
    zeros: dict[str, list[str]] = {}
    integers: dict[str, list[str]] = {}
    for name, settings in plan.settings.items():
        values = settings.to_dict()
        if settings.composition.method.chooses:
            entry = {"method": "magnitude", "pattern": values["pattern"], "sparsity": values["sparsity"]}
            zeros.setdefault(json.dumps(entry), []).append(name)
        if settings.integers is not None:
            entry = {"method": "rtn", "values": values["values"], "group_size": values["group_size"]}
            integers.setdefault(json.dumps(entry), []).append(name)
    return [
        {"dense": True, "rules": [{"include": names, **json.loads(entry)} for entry, names in group.items()]}
        for group in (zeros, integers)
        if group
    ]


def prompt(model: Any, tokens: int, batch: int) -> Tensor:
    """Return random ids, [batch, tokens] int64, the same for every model of a vocabulary.

    All rows are alike but for their last token: a benchmark reads the prompt once and copies its keys and values.
    """
    draw = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, int(model.config.get_text_config().vocab_size), (tokens - 1 + batch,), generator=draw)
    return torch.cat([ids[: tokens - 1].expand(batch, -1), ids[tokens - 1 :, None]], 1)


def generate(model: Any, ids: Tensor, new_tokens: int, streamer: Any = None) -> object:
    """Continue `ids` [batch, tokens] greedily by exactly so many tokens; a streamer is told each as it comes."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
        streamer=streamer,
    )


class Step:
    """Decodes one token for each row of `ids` [batch, tokens], after the first row; `again` takes it back."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.last = model, ids[:, -1:]
        self.filled = model(ids[:1], use_cache=True, **last_only(model)).past_key_values
        self.filled.batch_repeat_interleave(len(ids))
        self._name = cache_name(model)
        self.again()

    def again(self) -> None:
        """Forget the tokens since the prompt. The copy has room behind them, as a cache in use has."""
        self.cache = copy.deepcopy(self.filled)

    def __call__(self) -> object:
        return self.model(self.last, use_cache=True, **{self._name: self.cache})


def cache_name(model: Any) -> str:
    """Return how a model's forward calls its keys and values: the name changed with transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def last_only(model: Any) -> dict[str, int]:
    """Return what tells a model to compute the logits of the last token only, where it can be told."""
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, a shared one counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def alone(name: str, folder: Path, threads: int, tokens: Sequence[int]) -> Footprint:
    """Load a stored model in a process of its own and generate there."""
    code = "from zeroskip.bench.llm_models import footprint; footprint()"
    counts = (threads, min(tokens), max(tokens))
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *map(str, counts)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or f"code {done.returncode}").splitlines()[-1]
        raise ZeroskipError(f"{name}: the process that loads it alone failed: {last}")
    told = json.loads(done.stdout.splitlines()[-1])
    moments = [started, told["imported"], told["loaded"], told["first"]]
    seconds = [after - before for before, after in pairwise(moments)]
    return Footprint(seconds[0], seconds[1], seconds[2], told["import_bytes"], told["peak_bytes"])


def footprint() -> None:
    """What that process does. Arguments: directory, threads, shortest and longest prompt; its last line is JSON."""
    import transformers
    from transformers.generation.utils import GenerationMixin  # noqa: F401  # transformers imports when first asked

    folder, (threads, short, long) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    getattr(transformers, json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    told: dict[str, Any] = {"imported": time.time(), "import_bytes": _most_resident()}
    model: Any = load(folder)
    told["loaded"] = time.time()
    with torch.inference_mode():
        generate(model, prompt(model, short, 1), 1)
        told["first"] = time.time()
        generate(model, prompt(model, long, 1), NEW_TOKENS)
    sys.stdout.write(json.dumps(told | {"peak_bytes": _most_resident()}) + "\n")


def _most_resident() -> int | None:
    """Return the most bytes that this process has had in memory; getrusage would count its parent's too."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None

"""A loaded model runs on its mapped files: nothing of them is copied, so that processes share them."""

from pathlib import Path

import pytest
import torch
from cli_models import write_endless
from planning import inject, prefer

import zeroskip as zs

IDS = torch.tensor([[5, 9, 33, 30, 12, 8]])


def mapped(folder):
    """kB of the mapped files of a folder in this process: resident, and copied."""
    resident = own = 0
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            ours = bool(rest) and rest[-1].startswith(str(folder))
        elif ours and name == "Rss:":
            resident += int(rest[0])
        elif ours and name == "Anonymous:":
            own += int(rest[0])
    return resident, own


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what is mapped")
@pytest.mark.parametrize("kind", ["dense", "bitmask int4", "dense int8"])
def test_nothing_of_the_weights_is_copied(kind, monkeypatch, tmp_path):
    folder = (tmp_path / "model").resolve()
    write_endless(folder if kind == "dense" else tmp_path / "source")
    if kind != "dense":
        inject(monkeypatch, prefer(kind))
        model = zs.load(tmp_path / "source")
        zs.prune(model, "magnitude", sparsity=0.5)
        zs.save(zs.compile(model, tokens=(1, 8), precision=kind.split()[1]), folder)
        del model
    loaded = zs.load(folder)
    with torch.inference_mode():
        loaded.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    weights = sum(tensor.nbytes for tensor in loaded.state_dict().values()) / 1024
    resident, own = mapped(folder)
    assert resident > 0.9 * weights and own == 0

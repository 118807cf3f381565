"""When transformers learns of us, and what it does with our directories before that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from io_models import pack_sites, tiny

import zeroskip  # noqa: F401
from zeroskip import plugin
from zeroskip.io import save

plugin.install()
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def _python(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


def test_without_us_a_pruned_model_loads_and_a_compiled_one_raises(tmp_path: Path) -> None:
    pruned = tiny("llama")
    with torch.no_grad():
        pruned.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    save(pruned, tmp_path / "pruned")
    for kind in ("llama", "gpt2"):
        save(pack_sites(tiny(kind)), tmp_path / kind)
    code = f"""
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "pruned")!r})
assert bool((model.model.layers[0].mlp.up_proj.weight[:, ::2] == 0).all())
assert model.lm_head.weight is model.model.embed_tokens.weight
for kind in ("llama", "gpt2"):
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            auto.from_pretrained({str(tmp_path)!r} + "/" + kind)
        except RuntimeError as error:
            assert "mismatched" in str(error), error
        else:
            raise SystemExit("it loaded")
assert not any(name.startswith("zeroskip") for name in sys.modules)
"""
    result = _python(code)
    assert result.returncode == 0, result.stdout + result.stderr


def test_transformers_is_not_imported_until_needed_and_then_knows_us(tmp_path: Path) -> None:
    save(pack_sites(tiny("bert")), tmp_path / "out")
    code = f"""
import sys
from zeroskip import plugin
plugin.install(); plugin.install()
assert not any(name.split(".")[0] == "transformers" for name in sys.modules)
import transformers
assert "zeroskip.hf" not in sys.modules
transformers.AutoModelForMaskedLM.from_pretrained({str(tmp_path / "out")!r})
assert "Watch" not in repr(sys.meta_path)
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr


def test_transformers_imported_first_is_told_at_once(monkeypatch: Any) -> None:
    table = sys.modules[plugin.TABLE]
    monkeypatch.delitem(table.AUTO_QUANTIZER_MAPPING, "zeroskip")
    monkeypatch.delitem(table.AUTO_QUANTIZATION_CONFIG_MAPPING, "zeroskip")
    monkeypatch.delitem(sys.modules, "zeroskip.hf")
    plugin.install()
    assert table.AUTO_QUANTIZER_MAPPING["zeroskip"].__name__ == "ZeroskipQuantizer"

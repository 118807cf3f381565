"""Round trips against compressed-tensors 0.14.0.1, the last release with sparse formats, in an environment of its own.

    python benchmarks/compressed_tensors_round_trips.py build/compressed-tensors

makes the environment if it is not there, lets the library write small models that `zeroskip.convert` reads, and reads
with the library what `zeroskip.convert` writes. Every comparison is of bits. Ends with 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("torch", "numpy", "safetensors", "transformers<5", "compressed-tensors==0.14.0.1", "psutil", "accelerate")
SHAPES = {"mlp.up_proj": (128, 512), "mlp.down_proj": (512, 128), "self_attn.q_proj": (64, 256)}


def weights(kind: str):
    """A tiny Llama's state dict in fp16, its matrices half zeros, 2:4 or at random."""
    import torch

    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=draw)
        if kind == "2:4":
            order = torch.rand(shape, generator=draw).view(shape[0], -1, 4).argsort(2)
            weight[order.view(shape) < 2] = 0.0
        else:
            weight[torch.rand(shape, generator=draw) < 0.6] = 0.0
        state[f"{name}.weight"] = weight.half()
    state["model.norm.weight"] = torch.randn(128, generator=draw).half()
    return state


# In the environment of compressed-tensors --------------------------------------------------------------------------


def schemes(bits: int, group: int | None, symmetric: bool, kind: str = "int"):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if group else "channel"
    args = QuantizationArgs(num_bits=bits, type=kind, symmetric=symmetric, strategy=strategy, group_size=group)
    return QuantizationScheme(targets=["Linear"], weights=args)


def quantised(state, scheme):
    """Add scales and zero points as a calibration would have found them; return the dense weights they stand for."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = scheme.weights
    dense = {}
    for name in [name for name in state if name.endswith("_proj.weight")]:
        weight = state[name]
        groups = weight.view(len(weight), -1, args.group_size or weight.shape[1])
        scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
        scale, prefix = scale.half(), name.removesuffix(".weight")
        state[f"{prefix}.weight_scale"] = scale
        state[f"{prefix}.weight_zero_point"] = zero
        codes = quantize(weight, scale, zero, args)
        dense[name] = dequantize(codes, scale, zero, args)
        if not args.symmetric:
            continue
        zeros = weight == 0
        assert bool((dense[name][zeros] == 0).all())
        dense[name] = torch.where(zeros, torch.zeros((), dtype=dense[name].dtype), dense[name])
    return dense


def inside_write(folder: Path) -> None:
    """Let the library write a directory for every format."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from safetensors.torch import save_file

    def store(case: str, tensors, dense, section) -> None:
        (folder / case).mkdir(parents=True)
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / case / "model.safetensors")
        save_file({k: v.contiguous().clone() for k, v in dense.items()}, folder / f"{case}.dense")
        (folder / case / "config.json").write_text(json.dumps({"quantization_config": section}))

    modules = set(SHAPES)
    for kind, config in (("sparse-bitmask", BitmaskConfig()), ("sparse-24-bitmask", Sparse24BitMaskConfig())):
        state = weights("2:4")
        compressor = BaseCompressor.load_from_registry(kind, config=config)
        section = {"quant_method": "compressed-tensors", "sparsity_config": {"format": kind}}
        store(kind, compressor.compress(dict(state), compression_targets=modules), state, section)

    cases = [
        ("pack-quantized", bits, group, sym) for bits in (4, 8) for group in (32, 64, None) for sym in (True, False)
    ]
    cases += [("int-quantized", 8, group, True) for group in (None, 64)]
    cases += [("float-quantized", 8, None, True)]
    cases += [("marlin-24", bits, group, True) for bits in (4, 8) for group in (None, 128)]
    for kind, bits, group, symmetric in cases:
        scheme = schemes(bits, group, symmetric, "float" if kind == "float-quantized" else "int")
        config = QuantizationConfig(config_groups={"group_0": scheme}, format=kind)
        state = weights("2:4")
        dense = quantised(state, scheme) | {"model.norm.weight": state["model.norm.weight"]}
        compressor = BaseCompressor.load_from_registry(kind, config=config)
        tensors = compressor.compress(dict(state), names_to_scheme=dict.fromkeys(modules, scheme))
        case = f"{kind}-{bits}-{group}-{'symmetric' if symmetric else 'asymmetric'}"
        section = config.model_dump(mode="json") | {"quant_method": "compressed-tensors"}
        store(case, tensors, dense, section)
        if kind in ("int-quantized", "float-quantized"):  # and a bitmask over the integers
            over = BaseCompressor.load_from_registry("sparse-24-bitmask", config=Sparse24BitMaskConfig())
            stacked = over.compress(tensors, compression_targets=modules)
            # It takes |-128| for the smallest of four int8 codes and drops it, so what it wrote is what it can read.
            codes = dict(over.decompress_from_state_dict(stacked))
            for name in (f"{module}.weight" for module in modules):
                scale = state[name.replace(".weight", ".weight_scale")]
                dense[name] = dequantize(codes[name], scale, None, scheme.weights) + 0.0
            store(f"{case}-24", stacked, dense, section)


def inside_read(folder: Path) -> None:
    """Read with the library what we wrote, and tell for each directory whether it is the same."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
    from safetensors.torch import load_file

    kinds = {"sparse-bitmask": BitmaskConfig(), "sparse-24-bitmask": Sparse24BitMaskConfig()}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        want = load_file(folder / f"{path.name}.dense")
        kind = path.name.partition("+")[0]
        compressor = BaseCompressor.load_from_registry(kind, config=kinds[kind])
        got = dict(compressor.decompress(str(path)))
        got = {name.replace(".weight.weight", ".weight"): value for name, value in got.items()}
        same = got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
        sys.stdout.write(f"{'same' if same else 'OTHER'} {path.name}" + "\n")


def inside_model(folder: Path) -> None:
    """Load with transformers and the library a whole model that we wrote with its sparsity_config."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        want = load_file(folder / f"{path.name}.dense")
        if "24" in path.name:
            model, how = AutoModelForCausalLM.from_pretrained(path, dtype="auto"), "from_pretrained"
        else:  # which from_pretrained itself cannot load: it compresses on the meta device, and this format does not
            model, how = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).half(), "ModelCompressor"
            ModelCompressor.from_pretrained(path).decompress(str(path), model)
        got = model.state_dict()
        same = all(torch.equal(got[name].cpu(), value) for name, value in want.items())
        sys.stdout.write(f"{'same' if same else 'OTHER'} {path.name} as a whole model by {how}" + "\n")


# In ours -----------------------------------------------------------------------------------------------------------


def ours_read(folder: Path) -> list[str]:
    """Convert what the library wrote to dense, and compare; where there are scales, compare the codes as well."""
    import torch
    from safetensors.torch import load_file

    import zeroskip
    from zeroskip.convert import convert

    lines = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        out = folder / f"{path.name}.out"
        done = convert(path, out)
        want, got = load_file(folder / f"{path.name}.dense"), load_file(out / "model.safetensors")
        same = got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
        config = json.loads((out / "config.json").read_text())
        same = same and "quantization_config" not in config
        more = ""
        if (out / "zeroskip_scales.safetensors").exists():
            values, exact = "int4" if "-4-" in path.name else "int8", 0
            scales = load_file(out / "zeroskip_scales.safetensors")
            for site, scale in scales.items():
                weight = got[f"{site}.weight"]
                size = next(s for s in (128, 64, 32) if -(-weight.shape[1] // s) == scale.shape[2])
                if "asymmetric" in path.name and values == "int4":
                    values = "int8"  # its codes less the zero point need five bits
                packed = zeroskip.pack(weight.float(), "dense", values=values, group_size=size, scales=scale[0])
                exact += torch.equal(zeroskip.unpack(packed).half(), weight)
            more = f", {exact} of {len(scales)} sites pack to the same codes"
        lines.append(f"{'same' if same else 'OTHER'} {path.name} ({', '.join(done.found)}){more}")
    return lines


def ours_write(folder: Path) -> None:
    """Write both bitmask formats with both namings, and beside them what they hold."""
    from safetensors.torch import save_file

    from zeroskip.convert import convert

    plain = folder.with_name("plain")
    for zeros in ("2:4", "random"):
        source = plain / zeros.replace(":", "of")
        source.mkdir(parents=True)
        save_file(weights(zeros), source / "model.safetensors")
        (source / "config.json").write_text("{}")
        for kind in ("sparse-bitmask", "sparse-24-bitmask")[: 2 if zeros == "2:4" else 1]:
            for era in ("new", "old"):
                case = f"{kind}+{source.name}+{era}"
                convert(source, folder / case, kind, old_names=era == "old")
                save_file(weights(zeros), folder / f"{case}.dense")


def ours_model(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from zeroskip import save
    from zeroskip.convert import convert
    from zeroskip.prune import prune

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).half()
    prune(model, "magnitude", pattern="2:4")
    folder.mkdir()
    save(model, folder.with_name("llama"))
    for kind in ("sparse-bitmask", "sparse-24-bitmask"):
        convert(folder.with_name("llama"), folder / kind, kind, sparsity_config=True)
        save_file(
            {name: value.contiguous().clone() for name, value in model.state_dict().items()}, folder / f"{kind}.dense"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--inside", choices=("write", "read", "model"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        {"write": inside_write, "read": inside_read, "model": inside_model}[given.inside](given.environment)
        return 0
    python = given.environment / "bin" / "python"
    if not python.exists():
        constraints = Path(__file__).parent.parent / "constraints.txt"
        subprocess.run([sys.executable, "-m", "venv", given.environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", constraints, *PACKAGES], check=True)

    def inside(what: str, folder: Path) -> list[str]:
        run = [str(python), __file__, "--inside", what, str(folder)]
        done = subprocess.run(run, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
        if done.returncode:
            return [f"OTHER {what}: {done.stderr.strip().splitlines()[-1]}"]
        return done.stdout.splitlines()

    with tempfile.TemporaryDirectory() as temporary:
        folders = {what: Path(temporary) / what / "cases" for what in ("write", "read", "model")}
        for folder in folders.values():
            folder.parent.mkdir()
        lines = ["written by compressed-tensors, read by zeroskip convert:"]
        lines += inside("write", folders["write"]) or ours_read(folders["write"])
        folders["read"].mkdir()
        ours_write(folders["read"])
        lines += ["written by zeroskip convert, read by compressed-tensors:", *inside("read", folders["read"])]
        ours_model(folders["model"])
        lines += inside("model", folders["model"])
    sys.stdout.write("\n".join(lines) + "\n")
    return int(any(line.startswith("OTHER") for line in lines))


if __name__ == "__main__":
    sys.exit(main())

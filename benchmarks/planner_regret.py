"""How much slower is what the planner chooses than the best there is? On random layers, measured twice.

    python benchmarks/planner_regret.py --cases 50 --json regret.json

For each case (a shape, zeros, a token count, all drawn at random) the planner measures and chooses as `zs.compile`
does. Then every candidate is raced again, for longer, on copies of its own and without the planner's rules; the
regret is the time of the choice over the time of the fastest, less one, in that second race. The second race is
noisy too: `noise` is half the 98 % interval of that ratio.

Exit code 1 if a case is worse than --limit by more than its noise.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from zeroskip.bench.suites import Case, Zeros
from zeroskip.bench.timer import race
from zeroskip.planning.candidates import allowed_values, copies_for
from zeroskip.planning.choose import choose
from zeroskip.planning.machine import this_machine
from zeroskip.planning.measure import CACHE_BYTES, Measured, bound, measure, runner_name
from zeroskip.planning.report import table
from zeroskip.planning.tokens import Tokens

SIDES = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PATTERNS = ("8:16@64", "2:4@64", "1:4@64", "4:8@32", "2:8@128")


@dataclass(frozen=True)
class Regret:
    case: str
    tokens: int
    chosen: str
    best: str
    regret: float
    noise: float


def draw(rng: random.Random) -> tuple[Case, int]:
    """A layer and a token count; half of the layers have free zeros, half those of strips."""
    m, k = rng.choice(SIDES), rng.choice(SIDES)
    if rng.random() < 0.5:
        zeros = Zeros("unstructured", round(rng.uniform(0.4, 0.97), 2))
    else:
        pattern = rng.choice(PATTERNS)
        kept, of = map(int, pattern.partition("@")[0].split(":"))
        zeros = Zeros(pattern, 1 - kept / of)
    return Case("random", m, k, zeros, 1 << 26), rng.choice(COUNTS)


def regret(case: Case, tokens: int, precision: str, budget_s: float, second_s: float) -> Regret:
    """Plan one case, then race everything again."""
    weight = case.weight()
    module = nn.Linear(case.k, case.m, bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    values = allowed_values(weight.dtype, precision)
    first = measure(
        module, weight, None, values=values, tokens=(tokens,), working_set_bytes=CACHE_BYTES, budget_s=budget_s
    )
    choice = choose(first, Tokens((tokens,)))
    chosen = f"{choice.label}/{choice.kernels[tokens]}"
    runners = _again(first, case, tokens)
    core = [runner_name(one, kernel) for one in first.layouts if one.dense for kernel in one.kernels]
    seen = race(
        runners, budget_s=second_s, min_rounds=15, settled=lambda seen: False, core=[n for n in core if n in runners]
    )
    best = seen.fastest()
    ratio = seen.ratio(chosen, best)
    return Regret(str(case), tokens, chosen, best, ratio.value - 1, ratio.noise)


def _again(first: Measured, case: Case, tokens: int) -> dict[str, list]:
    """New copies of every candidate whose output was right."""
    x = case.activations(tokens)
    runners = {}
    with torch.inference_mode():
        for layout, kernel, calls in copies_for(first.layouts, CACHE_BYTES):
            name = runner_name(layout, kernel)
            if name not in first.wrong:
                runners[name] = [bound(call, x) for call in calls]
    return runners


def main() -> int:
    parser = argparse.ArgumentParser(description="The regret of the planner's choices on random layers.")
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds that the planner has at a case")
    parser.add_argument("--second", type=float, default=2.0, help="seconds of the second race")
    parser.add_argument("--limit", type=float, default=0.05)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng, found, start = random.Random(options.seed), [], time.monotonic()
    for number in range(options.cases):
        case, tokens = draw(rng)
        sys.stderr.write(f"{time.monotonic() - start:.0f} s, {number} of {options.cases}: {case}, {tokens} tokens\n")
        with torch.inference_mode(False), torch.no_grad():
            found.append(regret(case, tokens, options.precision, options.budget, options.second))
    bad = [one for one in found if one.regret - one.noise > options.limit]
    rows = [
        [one.case, str(one.tokens), one.chosen, one.best, f"{one.regret:.1%}", f"{one.noise:.1%}"]
        for one in sorted(found, key=lambda one: -one.regret)
    ]
    lines = table(["case", "tokens", "chosen", "best", "regret", "noise"], rows)
    within = sum(one.regret <= options.limit for one in found)
    lines += ["", f"{within} of {len(found)} within {options.limit:.0%}; {len(bad)} beyond it by more than the noise"]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.json:
        told = {
            "machine": str(this_machine()),
            "settings": vars(options) | {"json": None},
            "cases": [*map(asdict, found)],
        }
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""How much slower is what the planner chooses than the best there is? On random layers, measured twice.

    python benchmarks/planner_regret.py --cases 50 --minutes 10 --json regret.json

For each case (a shape, zeros, a token count, all drawn at random) the planner measures and chooses as `zs.compile`
does. Then every candidate is raced again, for longer, on copies of its own and without the planner's rules. The rounds
of that second race are split in two: one half names the fastest, the other tells how much slower the choice is than it,
and the other way round; the regret is the mean of both, so that the luck of the fastest is not charged to the planner.
`noise` is half the 98 % interval of the ratio over all rounds.

Cases that take more than --gflop are drawn again. The JSON is written after each case, and a second run with the same
settings goes on where the first stopped: after --minutes, or Ctrl-C. Exit code 1 if a case is worse than --limit by
more than its noise.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from zeroskip.bench.suites import Case, Zeros
from zeroskip.bench.timer import Race, race
from zeroskip.planning.candidates import allowed_values, copies_for
from zeroskip.planning.choose import choose
from zeroskip.planning.machine import cold_bytes, this_machine
from zeroskip.planning.measure import Measured, bound, measure, runner_name
from zeroskip.planning.report import table
from zeroskip.planning.tokens import Tokens
from zeroskip.prune.patterns import Pattern

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


def draw(rng: random.Random, gflop: float) -> tuple[Case, int]:
    """A layer and a token count; half of the layers have free zeros, half those of strips."""
    while True:
        m, k, tokens = rng.choice(SIDES), rng.choice(SIDES), rng.choice(COUNTS)
        if 2e-9 * m * k * tokens <= gflop:
            break
    if rng.random() < 0.5:
        zeros = Zeros("unstructured", round(rng.uniform(0.4, 0.97), 2))
    else:
        pattern = rng.choice(PATTERNS)
        zeros = Zeros(pattern, Pattern.parse(pattern).sparsity or 0.0)
    return Case("random", m, k, zeros, 1 << 26), tokens


def regret(case: Case, tokens: int, precision: str, budget_s: float, second_s: float) -> Regret:
    """Plan one case, then race everything again."""
    weight = case.weight()
    module = nn.Linear(case.k, case.m, bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    values = allowed_values(weight.dtype, precision)
    first = measure(
        module, weight, None, values=values, tokens=(tokens,), working_set_bytes=cold_bytes(), budget_s=budget_s
    )
    choice = choose(first, Tokens((tokens,)))
    chosen = f"{choice.label}/{choice.kernels[tokens]}"
    runners = _again(first, case, tokens)
    core = [runner_name(one, kernel) for one in first.layouts if one.dense for kernel in one.kernels]
    seen = race(
        runners, budget_s=second_s, min_rounds=15, settled=lambda seen: False, core=[n for n in core if n in runners]
    )
    best = seen.fastest()
    return Regret(str(case), tokens, chosen, best, apart(seen, chosen), seen.ratio(chosen, best).noise)


def apart(seen: Race, chosen: str) -> float:
    """Return how much slower `chosen` is than the fastest, less one; the two are never judged by the same rounds."""
    halves = [Race({name: times[half::2] for name, times in seen.samples.items()}) for half in (0, 1)]
    names = [name for name in seen.names if name == chosen or name not in seen.retired]
    ratios = [judge.ratio(chosen, jury.fastest(names)).value for jury, judge in (halves, halves[::-1])]
    return sum(ratios) / len(ratios) - 1


def _again(first: Measured, case: Case, tokens: int) -> dict[str, list]:
    """New copies of every candidate whose output was right."""
    x = case.activations(tokens)
    runners = {}
    with torch.inference_mode():
        for layout, kernel, calls in copies_for(first.layouts, cold_bytes()):
            name = runner_name(layout, kernel)
            if name not in first.wrong:
                runners[name] = [bound(call, x) for call in calls]
    return runners


def quantile(values: list[float], share: float) -> float:
    """Return the least value that `share` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def report(found: list[Regret], limit: float) -> list[str]:
    """Return the cases from the worst on, and what they come to."""
    rows = [
        [one.case, str(one.tokens), one.chosen, one.best, f"{one.regret:.1%}", f"{one.noise:.1%}"]
        for one in sorted(found, key=lambda one: -one.regret)
    ]
    every = [one.regret for one in found]
    within = f"{sum(value <= limit for value in every)} of {len(found)} within {limit:.0%}"
    beyond = sum(one.regret - one.noise > limit for one in found)
    return [
        *table(["case", "tokens", "chosen", "best", "regret", "noise"], rows),
        "",
        f"regret: median {quantile(every, 0.5):.1%}, 95th percentile {quantile(every, 0.95):.1%}, "
        f"worst {max(every):.1%}; {within}, {beyond} beyond it by more than the noise",
    ]


def known(path: Path | None, about: dict[str, object]) -> list[Regret]:
    """Return the cases that an earlier run with the same settings on the same machine has done."""
    if path is None or not path.exists():
        return []
    told = json.loads(path.read_text(encoding="utf-8"))
    if {name: told.get(name) for name in about} != about:
        raise SystemExit(f"{path} is of other settings or another machine: name another file")
    return [Regret(**one) for one in told["cases"]]


def main() -> int:
    parser = argparse.ArgumentParser(description="The regret of the planner's choices on random layers.")
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds that the planner has at a case")
    parser.add_argument("--second", type=float, default=2.0, help="seconds of the second race")
    parser.add_argument("--gflop", type=float, default=4.5, help="the most that one product may take")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after these")
    parser.add_argument("--limit", type=float, default=0.05)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("seed", "threads", "precision", "budget", "second", "gflop")}
    about: dict[str, object] = {"machine": str(this_machine()), "settings": settings}
    found, start = known(options.json, about), time.monotonic()
    for number in range(len(found), options.cases):
        if time.monotonic() - start > 60 * options.minutes:
            break
        case, tokens = draw(random.Random(f"{options.seed} {number}"), options.gflop)
        sys.stderr.write(f"{time.monotonic() - start:.0f} s, {number} of {options.cases}: {case}, {tokens} tokens\n")
        with torch.inference_mode(False), torch.no_grad():
            found.append(regret(case, tokens, options.precision, options.budget, options.second))
        if options.json:
            beside = options.json.with_name(options.json.name + ".new")
            beside.write_text(json.dumps(about | {"cases": [*map(asdict, found)]}, indent=2) + "\n", encoding="utf-8")
            beside.replace(options.json)
    if not found:
        raise SystemExit("no case was measured: give more --minutes")
    sys.stdout.write("\n".join(report(found, options.limit)) + "\n")
    return 1 if any(one.regret - one.noise > options.limit for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())

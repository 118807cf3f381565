"""A server under sixteen streaming clients for minutes: no token may be lost, and its memory may not grow.

    python benchmarks/soak.py --minutes 10 [--model DIR] [--batch-invariant] [--json PATH]

Every client streams answers of random lengths to random prompts, one after the other; every tenth answer it leaves in
the middle. What it must find: each answer it stays for ends with a reason and a count of tokens, "length" means exactly
the tokens asked for, and the server has counted as many as all clients together got. With --batch-invariant the same
prompt must give the same text each time. Memory is the server's resident set: the median of the last quarter of the
time may exceed that of the second quarter by 2 % or 8 MB. Exit code 1 if anything is amiss.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from openai import OpenAI

DATA = Path(os.environ.get("ZEROSKIP_DATA", Path(__file__).parents[2] / "shared" / "data"))
PROMPTS = [
    "def read(path):",
    "import os\n",
    "class Stack:\n",
    "for name in",
    "    return sorted(",
    "def test_",
    "try:\n",
]
LEAVES = 0.1


@dataclass
class Tally:
    """What the clients saw."""

    answers: int = 0
    left: int = 0
    tokens: int = 0
    amiss: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


def client(url: str, name: str, seed: int, until: float, tally: Tally, same: bool) -> None:
    draw = random.Random(seed)
    api = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    while time.monotonic() < until:
        prompt, count, leaves = draw.choice(PROMPTS), draw.randint(8, 96), draw.random() < LEAVES
        asked = {"model": name, "prompt": prompt, "max_tokens": count, "temperature": 0.0, "stream": True}
        try:
            text, reason, usage = "", None, None
            stream = api.completions.create(**asked, stream_options={"include_usage": True})
            for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    text, reason = text + choice.text, choice.finish_reason or reason
                if leaves and len(text) > 10:
                    break
            if leaves and reason is None:
                stream.close()
                with tally.lock:
                    tally.left += 1
                continue
            problem = check(reason, usage, count)
        except Exception as error:  # whatever it is, the soak tells it and goes on
            problem, usage = f"{type(error).__name__}: {error}", None
        with tally.lock:
            tally.answers += 1
            tally.tokens += usage.completion_tokens if usage else 0
            if same and problem is None:
                before = tally.texts.setdefault(prompt, text)
                shorter = min(len(before), len(text))
                if before[:shorter] != text[:shorter]:
                    problem = f"{prompt!r} was answered otherwise before"
                tally.texts[prompt] = max(before, text, key=len)
            if problem is not None:
                tally.amiss.append(problem)


def check(reason: str | None, usage: object, count: int) -> str | None:
    """Return what is wrong with an answer of `count` tokens, or None."""
    got = getattr(usage, "completion_tokens", None)
    if reason not in ("length", "stop") or got is None:
        return f"ended with reason {reason} and usage {usage}"
    return f"{got} tokens instead of {count}" if (reason == "length" and got != count) or got > count else None


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as page:
        return next(float(line.split()[1]) for line in page.read().decode().splitlines() if line.startswith(f"{name} "))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model", type=Path, default=DATA / "pylm15m")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    words = ["serve", str(asked.model), "--port", "0", "--cache-mb", "256"]
    words += ["--batch-invariant"] * asked.batch_invariant
    server = subprocess.Popen([sys.executable, "-m", "zeroskip", *words], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    lines = [server.stdout.readline() for _ in range(2)]
    found = re.search(r"http://[\w.:]+", lines[0])
    if found is None or not lines[1].startswith("ready"):
        sys.stderr.write(f"the server did not start: {lines}\n")
        return 1
    url, memory = found.group().rstrip(","), []
    tally, began = Tally(), time.monotonic()
    until = began + 60 * asked.minutes
    name = asked.model.resolve().name
    clients = [
        threading.Thread(target=client, args=(url, name, seed, until, tally, asked.batch_invariant))
        for seed in range(asked.clients)
    ]
    for each in clients:
        each.start()
    process = psutil.Process(server.pid)
    while any(each.is_alive() for each in clients):
        memory.append((time.monotonic() - began, process.memory_info().rss / 2**20))
        time.sleep(0.5)
    seconds = time.monotonic() - began
    counted, cancelled = (metric(url, f"zeroskip_{name}_total") for name in ("generated_tokens", "cancelled_requests"))
    running, waiting = (metric(url, f"zeroskip_requests_{name}") for name in ("running", "waiting"))
    server.send_signal(signal.SIGTERM)
    code = server.wait(120)

    quarters = [[mb for at, mb in memory if low <= at / seconds < low + 0.25] for low in (0.25, 0.75)]
    early, late = (statistics.median(quarter) for quarter in quarters)
    if late > max(early * 1.02, early + 8):
        tally.amiss.append(f"memory grew from {early:.0f} to {late:.0f} MB")
    if counted < tally.tokens or (tally.left == 0 and counted != tally.tokens):
        tally.amiss.append(f"the server counted {counted:.0f} tokens, the clients {tally.tokens}")
    if running or waiting or code:
        tally.amiss.append(f"{running:.0f} running, {waiting:.0f} waiting and exit code {code} at the end")
    told = {
        "minutes": seconds / 60, "clients": asked.clients, "answers": tally.answers, "left": tally.left,
        "cancelled": cancelled, "tokens": tally.tokens, "tokens_a_second": counted / seconds,
        "memory_mb": [early, late], "amiss": tally.amiss,
    }  # fmt: skip
    sys.stdout.write(json.dumps(told, indent=2) + "\n")
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=2) + "\n")
    return 1 if tally.amiss else 0


if __name__ == "__main__":
    sys.exit(main())

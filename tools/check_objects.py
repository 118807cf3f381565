"""Check that the kernel objects of a build keep the law of the SIMD files (docs/kernels.md).

A kernel unit is compiled for one ISA row. Anything of it that the linker may share with other units (weak symbols:
inline functions, templates of a library) or that runs at load time could reach a CPU without those instructions. So
each object defines one global symbol, its table, no weak one, and nothing that runs at load.

    python tools/check_objects.py BUILD [--nm nm] [--readelf readelf]

BUILD is a build directory, searched for the objects of targets named like a kernel. Exit code 1 and one line per
offence.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

TARGET = re.compile(
    r"((?:spmm|roofline|attention|norm|pointwise|lookup)_\w+)\.dir"
)  # the folder that CMake gives the objects of a kernel on a row
LOAD_TIME = (".init_array", ".preinit_array", ".fini_array", ".ctors", ".dtors", ".text.startup", ".init", ".fini")
WEAK = "WwVvu"


def output(*command: str) -> list[str]:
    """The lines that a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def offences(path: Path, table: str, nm: str, readelf: str) -> list[str]:
    """What is wrong with the object at `path`, which should define `zs::<table>` and nothing else."""
    found, defined = [], []
    expected = f"_ZN2zs{len(table)}{table}E"
    for line in output(nm, "-P", str(path)):
        symbol, kind = line.split()[:2]
        if kind in WEAK:
            found.append(f"weak symbol {symbol}")
        elif kind.isupper() and kind != "U":
            defined.append(symbol)
    found += [f"global symbol {symbol}" for symbol in defined if symbol != expected]
    if expected not in defined:
        found.append(f"its table {expected} is missing")
    for line in output(readelf, "-S", "-W", str(path)):
        match = re.match(r"\s*\[\s*\d+\]\s+(\S+)", line)
        section = match[1] if match else ""
        if any(section == name or section.startswith(name + ".") for name in LOAD_TIME):
            found.append(f"load-time section {section}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the kernel objects of a build.")
    parser.add_argument("build", type=Path)
    parser.add_argument("--nm", default="nm")
    parser.add_argument("--readelf", default="readelf")
    options = parser.parse_args()
    objects = [(path, match[1]) for path in sorted(options.build.rglob("*.o")) if (match := TARGET.search(str(path)))]
    if not objects:
        sys.stderr.write(f"{options.build}: no kernel objects found, is it a build directory?\n")
        return 1
    bad = 0
    for path, table in objects:
        for offence in offences(path, table, options.nm, options.readelf):
            sys.stderr.write(f"{path.relative_to(options.build)}: {offence}\n")
            bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

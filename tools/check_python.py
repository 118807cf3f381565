"""Stop `make` at once under a Python that pyproject.toml rules out; runs under any Python 3.6 or newer."""

import re
import sys
from pathlib import Path

here = sys.version_info[1]
wanted = re.search(r"requires-python.*", (Path(__file__).parents[1] / "pyproject.toml").read_text()).group()
low, high = map(int, re.findall(r"3\.(\d+)", wanted))
if not low <= here < high:
    sys.exit(f"this is Python 3.{here}, and zeroskip needs 3.{low} to 3.{high - 1}: make PYTHON=python3.{high - 1}")

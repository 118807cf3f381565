"""Print what one list of pyproject.toml names: `requirements.py project.optional-dependencies.test`."""

import sys
import tomllib
from functools import reduce
from pathlib import Path

if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    sys.stdout.write(" ".join(reduce(dict.__getitem__, sys.argv[1].split("."), project)))

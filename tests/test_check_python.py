"""`make` stops at once under a Python that the package does not serve."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parents[1] / "tools" / "check_python.py")


def test_this_python_will_do():
    runpy.run_path(SCRIPT)


@pytest.mark.parametrize("minor", [10, 14])
def test_another_is_refused_with_what_to_type(monkeypatch, minor):
    monkeypatch.setattr(sys, "version_info", (3, minor, 0, "final", 0))
    with pytest.raises(SystemExit, match=rf"this is Python 3\.{minor}, .* 3\.11 to 3\.13: make PYTHON=python3\.13"):
        runpy.run_path(SCRIPT)

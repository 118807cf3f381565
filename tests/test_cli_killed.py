"""`zeroskip prune`, killed with -9 while it stores: nothing under the final name, and the same command finishes."""

import os
import signal

import pytest
from cli_models import cli, zeroskip_process

import zeroskip
from zeroskip.io.load import weight_files

# The command line, which kills itself when the module `os` of `save` comes to the call named: while files are linked
# or written, or when all are there and only the final name is missing.
SCRIPT = """
import os, signal, sys
from zeroskip.io import save as _
save = sys.modules["zeroskip.io.save"]
real = save.os

class Deadly:
    def __getattr__(self, name):
        if name == {call!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(real, name)

save.os = Deadly()
sys.argv[1:] = {words!r}
from zeroskip.cli import main
main()
"""


@pytest.mark.parametrize("call", ["link", "rename"])
def test_killed_while_storing_it_is_finished_by_the_same_command(encoder, text, tmp_path, call):
    given = ["--pattern", "2:4", "--text", text, "--no-speed", "--no-quality"]
    words = [str(word) for word in ("prune", encoder, tmp_path / "out", *given)]
    run = zeroskip_process(script=SCRIPT.format(call=call, words=words))
    assert run.wait(120) == -signal.SIGKILL, run.stderr.read()
    names = sorted(os.listdir(tmp_path))
    assert "out" not in names and "out.partial" in names and len(names) == 2  # and what is unfinished

    again = cli(*words)
    assert again.exit_code == 0, again.output
    assert cli("prune", encoder, tmp_path / "whole", *given).exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    one, two = weight_files(tmp_path / "out"), weight_files(tmp_path / "whole")
    assert [path.name for path in one] == [path.name for path in two] and len(one) > 1
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    assert zeroskip.load(tmp_path / "out").zeroskip_report.sparsity == 0.5

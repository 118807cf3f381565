"""The command line as a process: interruptions, progress, the limits of its container."""

import re
import signal
import time
from pathlib import Path

import pytest
import torch
from cli_models import cli, write_encoder, zeroskip_process
from safetensors.torch import load_file

from zeroskip.cli import process
from zeroskip.cli.process import cpu_limit, openmp_runtimes
from zeroskip.cli.terminal import progress

pytestmark = pytest.mark.usefixtures("short_races")


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.002)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_prune_goes_on_to_the_same_bits(how, text, tmp_path):
    source = write_encoder(tmp_path / "source", layers=24)
    words = ("prune", source, tmp_path / "out", "--pattern", "8:16@64", "--text", text, "--no-speed")
    process = zeroskip_process(*words)
    journal = tmp_path / "out.partial"
    wait_for(lambda: len(list(journal.glob("*.safetensors"))) >= 2, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    assert len(list(journal.glob("*.safetensors"))) >= 2 and not (tmp_path / "out").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130, errors
        last = errors.splitlines()[-1]
        assert last.startswith("zeroskip: interrupted") and "out.partial" in last and "Traceback" not in errors
    for out in ("out", "whole"):
        assert cli(*words[:2], tmp_path / out, *words[3:]).exit_code == 0
    assert not journal.exists()
    one, two = (
        {name: value for path in (tmp_path / out).glob("*.safetensors") for name, value in load_file(path).items()}
        for out in ("out", "whole")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_ctrl_c_while_torch_is_imported_is_one_line():
    process = zeroskip_process("info", "--no-roofline")
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text(), process)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, out, errors) == (130, "", "zeroskip: interrupted\n")


def test_ctrl_c_counts_even_where_cleaning_up_fails(monkeypatch, tmp_path):
    from zeroskip.cli import models

    def interrupt(_):
        try:
            raise KeyboardInterrupt
        finally:
            {}.pop("half-made")

    monkeypatch.setattr(models, "load", interrupt)
    result = cli("compile", tmp_path, tmp_path / "out")
    assert result.exit_code == 130 and result.stderr.splitlines()[-1] == "zeroskip: interrupted"


def test_progress_is_plain_lines_without_a_terminal(capsys):
    with progress("working") as advance:
        advance(1, 2, "first")
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"working\nworking: done in \d+\.\d s\n", err)


def test_cpu_limit_of_both_kinds_of_control_groups(tmp_path):
    mine = tmp_path / "cgroup"
    mine.write_text("0::/a/b\n")
    group = tmp_path / "root" / "a" / "b"
    group.mkdir(parents=True)
    assert cpu_limit(tmp_path / "root", mine) is None
    (group / "cpu.max").write_text("max 100000\n")
    assert cpu_limit(tmp_path / "root", mine) is None
    (group.parent / "cpu.max").write_text("150000 100000\n")
    assert cpu_limit(tmp_path / "root", mine) == 1.5

    mine.write_text("4:cpu,cpuacct:/job\n3:memory:/job\n")
    job = tmp_path / "root" / "cpu" / "job"
    job.mkdir(parents=True)
    (job / "cpu.cfs_quota_us").write_text("400000\n")
    (job / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_limit(tmp_path / "root", mine) == 4.0
    (job / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_limit(tmp_path / "root", mine) is None
    assert cpu_limit(tmp_path, tmp_path / "absent") is None


def test_a_container_s_limit_is_honoured(monkeypatch):
    monkeypatch.setattr(process, "cpu_limit", lambda: 2.5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    process.honour_cpu_limit()
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    torch.set_num_threads(4)
    process.honour_cpu_limit()
    assert torch.get_num_threads() == 4


def test_openmp_runtimes_are_counted_by_file(tmp_path):
    maps = tmp_path / "maps"
    rows = ["lib/libgomp-a1b2.so.1", "lib/libgomp-a1b2.so.1", "lib/libc.so.6", "opt/libiomp5.so", "x/libcompute.so"]
    maps.write_text(
        "".join(f"7f00-7f01 r-xp 00000000 08:01 42   /{row}\n" for row in rows) + "7f00-7f01 rw-p 0 00:00 0\n"
    )
    assert openmp_runtimes(maps) == ["/lib/libgomp-a1b2.so.1", "/opt/libiomp5.so"]
    assert Path("/proc/self/maps").exists() is bool(openmp_runtimes())

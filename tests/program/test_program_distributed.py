"""The training program on several processes, over gloo on CPUs."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.program_support import ROOT, checkpoint, differences, environment, small_cifar, start, torchrun
from test_program_resume import wait_for

from resnet_fast import predict, train


@pytest.mark.parametrize("processes", [2, 4])
def test_like_one_process(processes, tmp_path):
    """What ``program_ranks.py`` asserts: batch norm, training, strategies, no_sync."""
    command = [*torchrun(processes)[:-1], str(ROOT / "tests/helpers/program_ranks.py"), str(tmp_path)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(list(tmp_path.glob("*/done"))) == processes


def ranks_of(launcher):
    """Process ids of the workers, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
        except (OSError, ValueError, IndexError):
            continue
        if parent == launcher and "RANK" in variables:
            found[int(variables["RANK"])] = int(entry.name)
    return found


def test_worker_that_dies_ends_the_job_and_resume_goes_on(tmp_path):
    options = [*small_cifar(tmp_path), "--epochs", "2", "--save-every", "2", "--keep", "20"]
    process = start(*options, "--out", tmp_path / "dies", launcher=torchrun(2))
    wait_for(tmp_path / "dies/step-00000002.pt", process)  # of 10 steps, 5 an epoch
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in output
    assert "process 0 stopped" in output or "Sending process" in output, output
    for out, more in (("dies", ["--resume"]), ("whole", [])):
        process = start(*options, "--out", tmp_path / out, *more, launcher=torchrun(2))
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert ("goes on from" in output) == bool(more)
        assert output.count("final:") == 1
    name = "step-00000010.pt"
    assert differences(checkpoint(tmp_path / "whole" / name), checkpoint(tmp_path / "dies" / name)) == []
    # The file is that of any run: whole weights under the network's own names.
    network, _ = predict.load(tmp_path / "whole" / name)
    assert not network.training


def test_fsdp_wants_torchrun(tmp_path, capfd):
    assert train.main([*small_cifar(tmp_path), "--strategy", "fsdp", "--out", str(tmp_path / "run")]) == 2
    assert "start it with torchrun" in capfd.readouterr().err

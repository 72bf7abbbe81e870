"""The tests for machines with a GPU: they fail where there is none; the simulator keeps what they compute in order."""

from pathlib import Path

import pytest
import torch
from helpers.processes import run_pytest

FOLDER = Path(__file__).parents[1] / "gpu"
FILES = sorted(map(str, FOLDER.glob("gpu_*.py")))


def run(*arguments):
    return run_pytest(*FILES, "-q", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make test-gpu runs on it")
def test_without_a_gpu_all_fail_and_none_is_skipped():
    done = run("-k", "blocks or graph")
    assert done.returncode == 1
    assert "these tests need an NVIDIA GPU" in done.stdout
    assert "errors" in done.stdout.splitlines()[-1]
    assert not {"passed", "skipped"} & set(done.stdout.splitlines()[-1].split())


def test_what_they_compute_passes_in_the_simulator():
    done = run("--simulated", "-k", "blocks and float32 or ops and bfloat16 and (test_add or average or 16-16)")
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_the_usual_run_does_not_collect_them():
    assert FILES
    assert not list(FOLDER.glob("test_*.py"))

"""How a run ends: signals, divergence, a folder in use, wrong options, workers that cannot be started."""

import contextlib
import math
import os
import pty
import re
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.program_support import checkpoint, environment, run, small_cifar, start
from test_program_data import photographs
from test_program_resume import wait_for

from resnet_fast import models, train
from resnet_fast.program import data, distributed, loop, run_lock, signals
from resnet_fast.program.options import ProgramError, parse

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setattr(models, "cifar_resnet20", lambda num_classes: models.CifarResNet(1, num_classes))


def trainer_for(*given):
    options = parse([str(option) for option in given])
    return loop.Trainer(options, data.load(options), distributed.Processes(options))


# Signals


def test_terminal_that_closes(tmp_path):
    """SIGHUP, and no output that could be written to: everything is saved."""
    given = [*small_cifar(tmp_path), "--epochs", "50", "--save-every", "3", "--keep", "99", "--workers", "1"]
    given[given.index("--workers") + 1] = "1"
    command = [sys.executable, "-m", "resnet_fast.train", *map(str, given), "--out", str(tmp_path / "run")]
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, command, environment())
    for _ in range(600):
        if (tmp_path / "run/step-00000003.pt").exists():
            break
        time.sleep(0.05)
    os.close(terminal)  # the system sends SIGHUP to all processes of the terminal
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    last = checkpoint(max((tmp_path / "run").glob("step-*.pt")))
    assert last["done"] % 3 or last["step"] > 3
    assert not list((tmp_path / "run").glob(".*"))


def test_second_signal_kills_without_a_traceback(tmp_path):
    given = [*small_cifar(tmp_path), "--epochs", "50", "--save-every", "3", "--out", tmp_path / "run"]
    process = start(*given)
    wait_for(tmp_path / "run/step-00000003.pt", process)
    stopped = """
import signal, sys, time
from resnet_fast.program.signals import Signals
with Signals() as signals:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""
    process.kill()
    process.communicate()
    import subprocess

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    waiting = subprocess.Popen([sys.executable, "-c", stopped], env=environment(), **pipes)
    assert waiting.stdout.readline() == "ready\n"

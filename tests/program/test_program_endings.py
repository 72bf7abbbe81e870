"""How a run ends: signals, divergence, a folder in use, wrong options, workers that cannot be started."""

import contextlib
import math
import os
import pty
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers.program.support import checkpoint, environment, evaluated, run, small_cifar
from test_program_data import photographs

from resnet_fast import models
from resnet_fast.program import checkpoints, data, distributed, loop, report, run_lock
from resnet_fast.program.options import ProgramError, parse

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setattr(models, "cifar_resnet20", lambda num_classes: models.CifarResNet(1, num_classes))


def trainer_for(*given):
    options = parse([str(option) for option in given])
    return loop.Trainer(options, data.load(options), distributed.Processes(options))


def script(text):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", text], env=environment(), **pipes)


def test_terminal_that_closes(tmp_path):
    """SIGHUP, and nowhere to print: everything is saved."""
    given = [*small_cifar(tmp_path), "--epochs", "99", "--save-every", "3", "--workers", "1", "--out", tmp_path / "run"]
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-m", "resnet_fast.train", *map(str, given)], environment())
    while not (tmp_path / "run/step-00000003.pt").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), os.read(terminal, 10000).decode()
        time.sleep(0.02)
    os.close(terminal)  # the system sends SIGHUP to the terminal's processes, loading workers, too
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    assert checkpoint(checkpoints.newest(tmp_path / "run"))["step"] >= 3
    assert not list((tmp_path / "run").glob(".*"))


def test_second_signal_kills_without_a_traceback():
    waiting = script("""
import time
from resnet_fast.program import signals
signals.end_at_once()
with signals.Signals():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
""")
    assert waiting.stdout.readline() == "ready\n"
    waiting.send_signal(signal.SIGINT)
    time.sleep(2.2)
    assert waiting.poll() is None  # the step would end now
    waiting.send_signal(signal.SIGINT)
    assert waiting.communicate(timeout=20)[0] == ""
    assert waiting.returncode == -signal.SIGINT


def test_ignored_signals_stay_ignored():
    """As nohup and a shell's background jobs have it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interrupted_while_loading(tmp_path, capfd, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupted)
    assert run(*small_cifar(tmp_path), "--out", tmp_path / "run") == 130
    assert capfd.readouterr().err == "resnet_fast.train: stopped by SIGINT\n"


def test_two_programs_with_one_folder(tmp_path, capfd):
    given = [*small_cifar(tmp_path, count=16), "--epochs", "1", "--out", tmp_path]
    holder = script(f"""
import os, pathlib, time
from resnet_fast.program import run_lock
with run_lock.hold(pathlib.Path({str(tmp_path)!r})):
    if os.fork() == 0:  # as a loading worker
        time.sleep(60)
    print("ready", flush=True)
    time.sleep(60)
""")
    try:
        assert holder.stdout.readline() == "ready\n"
        assert run(*given) == 2
        wanted = f"--out {tmp_path} is in use by process {holder.pid} on {socket.gethostname()}: want another --out"
        assert wanted in capfd.readouterr().err
        assert not list(tmp_path.glob("step-*"))
    finally:
        children = subprocess.run(["pgrep", "-P", str(holder.pid)], capture_output=True, text=True).stdout.split()
        holder.kill()
        holder.wait()
    try:
        # The lock ended with its holder; its file did not, nor did the worker.
        assert (tmp_path / run_lock.NAME).exists()
        assert run(*given) == 0
        assert not (tmp_path / run_lock.NAME).exists()
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)


def test_waits_for_a_lock_that_ends(tmp_path):
    child = os.fork()
    if child == 0:
        with run_lock.hold(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(0.5)
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(ProgramError, match=f"in use by process {child}"), run_lock.hold(tmp_path):
        pass
    with run_lock.hold(tmp_path, patience=20):
        assert (tmp_path / run_lock.NAME).read_text().startswith(f"{os.getpid()} ")
    os.waitpid(child, 0)


def test_what_killed_programs_left_is_removed(tmp_path):
    (tmp_path / ".best.pt.node-12.writing").touch()
    (tmp_path / ".step-00000005.node-12.writing").mkdir()
    (tmp_path / ".step-00000005.node-12.writing/state.pt").touch()
    assert run(*small_cifar(tmp_path, count=16), "--epochs", "1", "--out", tmp_path) == 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["loss", "gradient", "test loss"])
def test_divergence_ends_the_run(where, tmp_path, capfd, monkeypatch):
    """Of ten steps, the fifth: what was saved before is good, and nothing else is."""
    given = [*small_cifar(tmp_path), "--epochs", "2", "--save-every", "2", "--lr", "0.01", "--out", tmp_path / "run"]
    real = loop.Trainer._pass

    def spoilt(trainer, batch, last):
        real(trainer, batch, last)
        if trainer.step == 4 and where == "loss":
            trainer.sums[0] = math.inf
        if trainer.step == 3 and where == "gradient":  # saved after it, with a loss that is finite
            trainer.network.fc.bias.grad[0] = math.nan

    monkeypatch.setattr(loop.Trainer, "_pass", spoilt)
    if where == "test loss":
        monkeypatch.setattr(loop.Trainer, "_evaluate", lambda trainer, batches: evaluated(math.nan, right=0))
    assert run(*given) == 2
    step, good = {"loss": (5, 4), "gradient": (4, 2), "test loss": (10, 8)}[where]
    error = capfd.readouterr().err
    assert f"the loss is not finite in epoch 1, step {step}: the run diverged" in error
    assert f"the last good checkpoint is {tmp_path}/run/step-{good:08d}.pt; want a smaller --lr than 0.01" in error
    assert "Traceback" not in error
    assert checkpoints.newest(tmp_path / "run").name == f"step-{good:08d}.pt"
    state = checkpoint(tmp_path / "run" / f"step-{good:08d}.pt")
    assert all(t.isfinite().all() for t in state["model"].values())


def test_diverging_run_goes_on_if_asked(tmp_path):
    """A learning rate that no network survives."""
    given = [*small_cifar(tmp_path), "--epochs", "1", "--recipe", "he", "--lr", "1e30", "--out", tmp_path / "run"]
    assert run(*given) == 2
    assert run(*given, "--allow-nan") == 0
    assert not math.isfinite(report.read_log(tmp_path / "run/log.csv")[0]["train_loss"])


def test_no_image_can_be_read(tmp_path, capfd):
    names = [
        f"{part}/{name}/{i}"
        for part, count in (("train", 6), ("test", 3))
        for name in ("cat", "dog")
        for i in range(count)
    ]
    folder = photographs(tmp_path / "photographs", broken=names)
    given = ["--data", folder, "--image-size", "32", "--batch", "3", "--epochs", "1", "--workers", "0"]
    assert run(*given, "--out", tmp_path / "run") == 2
    assert "no training image can be read" in capfd.readouterr().err
    assert not list((tmp_path / "run").glob("step-*"))


def test_nothing_right_has_a_best_checkpoint(tmp_path):
    trainer = trainer_for(*small_cifar(tmp_path, count=16), "--epochs", "2", "--out", tmp_path)
    trainer._end_epoch(evaluated(2.0, right=0))
    trainer._end_epoch(evaluated(1.0, right=0))
    assert checkpoint(tmp_path / "best.pt")["epoch"] == 1


def test_log_and_best_checkpoint_come_back(tmp_path):
    """The program was killed after step-N.pt, before best.pt and log.csv were written."""
    given = [*small_cifar(tmp_path, count=16), "--epochs", "2", "--out", tmp_path]
    assert run(*given) == 0
    wanted, best = (tmp_path / "log.csv").read_text(), (tmp_path / "best.pt").read_bytes()
    (tmp_path / "log.csv").write_text("".join(wanted.splitlines(keepends=True)[:-1]))
    (tmp_path / "best.pt").unlink()
    assert run(*given, "--resume") == 0
    assert (tmp_path / "log.csv").read_text() == wanted
    assert (tmp_path / "best.pt").read_bytes() == best


def test_worker_that_cannot_be_started(tmp_path, capfd, monkeypatch):
    """The second fork fails: the program ends, and the first worker with it."""
    real, forked = os.fork, []

    def failing():
        if forked:
            raise BlockingIOError(11, os.strerror(11))
        forked.append(real())
        return forked[-1]

    monkeypatch.setattr(os, "fork", failing)
    given = [
        *small_cifar(tmp_path),
        "--data-on",
        "workers",
        "--workers",
        "2",
        "--epochs",
        "1",
        "--out",
        tmp_path / "run",
    ]
    before = time.monotonic()
    assert run(*given) == 2
    assert time.monotonic() - before < 20
    error = capfd.readouterr().err
    assert "--workers 2: a loading worker cannot be started: Resource temporarily unavailable; want fewer" in error
    assert "Traceback" not in error
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(forked[0], os.WNOHANG) != (0, 0), "the first worker still runs"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seed", str(2**64)], "--seed is 18446744073709551616, want at most 18446744073709551615"),
        (["--seed", "-1"], "--seed is -1, want at least 0"),
        (["--backend", "cuda"], "--backend cuda: backend 'cuda' cannot run: "),
        (["--backend", "none"], "argument --backend: invalid choice: 'none'"),
        (["--batch", "many"], "argument --batch: invalid int value: 'many'"),
        (["--threads", str(2**40)], "--threads is 1099511627776, want at most 1024"),
        (["--image-size", str(2**40)], "--image-size is 1099511627776, want at most 16384"),
        (["--checkpoints", "sharded"], "--checkpoints sharded is for sharded weights: want --strategy fsdp"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--resume", "none.pt"], "checkpoint none.pt cannot be read: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_option_is_one_line(given, message, tmp_path, capfd):
    assert run(*small_cifar(tmp_path, count=16), "--epochs", "1", "--out", tmp_path / "run", *given) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"resnet_fast.train: {message}")
    assert error.count("\n") == 1


def test_largest_seed(tmp_path):
    given = [*small_cifar(tmp_path, count=16), "--epochs", "1", "--out", tmp_path / "run"]
    assert run(*given, "--seed", 2**64 - 1) == 0


def test_processes_that_cannot_be_joined(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # without torchrun
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert run(*small_cifar(tmp_path, count=16), "--out", tmp_path / "run") == 2
    assert "the processes cannot be joined" in capfd.readouterr().err


def test_internal_error_advises_resuming_only_where_it_can(tmp_path, capfd, monkeypatch):
    given = [*small_cifar(tmp_path, count=32), "--save-every", "2", "--epochs", "1", "--out", tmp_path / "run"]
    real, limit = loop.Trainer._step, [1]

    def failing(trainer):
        if trainer.step >= limit[0]:
            raise RuntimeError("a fault")
        real(trainer)

    monkeypatch.setattr(loop.Trainer, "_step", failing)
    assert run(*given) == 1
    assert "process 0 stopped: a fault\n" in (error := capfd.readouterr().err)
    assert "--resume" not in error
    limit[0] = 3
    assert run(*given) == 1
    assert f"{tmp_path}/run/step-00000002.pt is whole; start it again with --resume" in capfd.readouterr().err


def test_state_is_not_loaded_from_elsewhere_into_a_used_folder(tmp_path, capfd):
    """A step of another way is never the newest of this one."""
    given = [*small_cifar(tmp_path, count=32), "--epochs", "1", "--save-every", "1"]
    for name in ("a", "b"):
        assert run(*given, "--out", tmp_path / name) == 0
    for start in ("a/step-00000002.pt", "b/step-00000004.pt", "b/best.pt"):
        assert run(*given, "--out", tmp_path / "a", "--resume", tmp_path / start) == 2
        assert "holds step-00000004.pt, which is not of the way to --resume" in capfd.readouterr().err
    assert run(*given, "--out", tmp_path / "c", "--resume", tmp_path / "b/step-00000002.pt") == 0
    assert torch.equal(*(checkpoint(tmp_path / n / "best.pt")["model"]["fc.weight"] for n in ("b", "c")))


def test_resume_auto_starts_where_there_is_nothing(tmp_path, capfd):
    given = [*small_cifar(tmp_path, count=16), "--epochs", "1", "--out", tmp_path / "run"]
    assert run(*given, "--resume") == 2
    assert "finds no checkpoint" in capfd.readouterr().err
    for goes_on in (False, True):
        assert run(*given, "--resume", "auto") == 0
        assert ("goes on from" in capfd.readouterr().out) == goes_on

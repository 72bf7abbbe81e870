"""An interrupted run of the training program ends as if it had not been interrupted, bit for bit."""

import os
import re
import signal
import time

import pytest
import torch
from helpers.program.support import checkpoint, differences, run, small_cifar, start

from resnet_fast.program import data, distributed, loop, signals
from resnet_fast.program.options import parse

OPTIONS = ["--epochs", "2", "--save-every", "3", "--keep", "20", "--ema", "0.9", "--lr", "0.05"]


# As in the processes of `start`: sums have another order with more threads.
pytestmark = pytest.mark.usefixtures("one_thread")


def wait_for(path, process):
    for _ in range(2400):
        if path.exists():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


def test_killed_in_the_middle_of_an_epoch(tmp_path, capfd):
    given = [*small_cifar(tmp_path), *OPTIONS, "--data-on", "workers", "--workers", "1"]
    assert run(*given, "--out", tmp_path / "whole") == 0
    killed = start(*given, "--out", tmp_path / "killed")
    wait_for(tmp_path / "killed/step-00000013.pt", killed)  # of 20 steps, 10 an epoch
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    # Whatever it still wrote: the run is taken up in the middle of the second epoch.
    for path in (tmp_path / "killed").glob("step-*.pt"):
        if path.name > "step-00000013.pt":
            path.unlink()
    assert run(*given, "--out", tmp_path / "killed", "--resume") == 0
    assert "goes on from" in capfd.readouterr().out
    for name in ("step-00000016.pt", "step-00000020.pt", "best.pt"):
        whole, resumed = checkpoint(tmp_path / "whole" / name), checkpoint(tmp_path / "killed" / name)
        assert differences(whole, resumed) == []
    start_of_it = checkpoint(tmp_path / "whole/step-00000013.pt")
    assert differences(start_of_it["model"], whole["model"]) != []
    assert (tmp_path / "killed/log.csv").read_text().count("\n") == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_ends(number, tmp_path, capfd):
    given = [*small_cifar(tmp_path, count=48), "--epochs", "2", "--save-every", "3", "--keep", "99"]
    process = start(*given, "--data-on", "workers", "--workers", "1", "--out", tmp_path / "run")
    wait_for(tmp_path / "run/step-00000003.pt", process)
    os.killpg(process.pid, number)  # loading workers, too, as from a terminal
    time.sleep(0.01)
    process.send_signal(number)  # and again, as under torchrun
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    assert f"stopped by {number.name}, all saved" in output
    assert "Traceback" not in output
    epoch, step = map(int, re.search(r"goes on from epoch (\d+), step (\d+)", output).groups())
    last = max((tmp_path / "run").glob("step-*.pt"))
    assert last.name == f"step-{(epoch - 1) * 6 + step - 1:08d}.pt"
    assert run(*given, "--out", tmp_path / "run", "--resume") == 0
    assert run(*given, "--out", tmp_path / "whole") == 0
    last = "step-00000012.pt"
    assert differences(checkpoint(tmp_path / "whole" / last), checkpoint(tmp_path / "run" / last)) == []


def test_stopped_after_the_last_step_of_an_epoch(tmp_path):
    """Before it was evaluated: there is nothing to train any more, and a row of the log to write."""
    given = [*small_cifar(tmp_path), "--epochs", "1"]
    assert run(*given, "--out", tmp_path / "whole") == 0
    options = parse([*given, "--out", str(tmp_path / "stopped")])
    trainer = loop.Trainer(options, data.load(options), distributed.Processes(options))
    trainer._train(data.loader(trainer.data.train, trainer.batches, 0, False), signals.Signals())
    trainer.save(best=False)
    assert run(*given, "--out", tmp_path / "stopped", "--resume") == 0
    whole, stopped = (checkpoint(tmp_path / name / "step-00000010.pt") for name in ("whole", "stopped"))
    assert differences(whole, stopped) == []


def test_random_numbers_go_on(tmp_path):
    options = parse([*small_cifar(tmp_path), "--out", str(tmp_path / "run"), "--epochs", "1"])
    group = distributed.Processes(options)
    trainer = loop.Trainer(options, data.load(options), group)
    torch.rand(5)
    trainer.save(best=False)
    wanted = torch.rand(7)
    other = loop.Trainer(options, data.load(options), group)
    assert not torch.rand(7).equal(wanted)
    other.restore(tmp_path / "run/step-00000000.pt")
    assert torch.rand(7).equal(wanted)


def test_resuming_a_finished_run_evaluates_it_again(tmp_path, capfd):
    given = [*small_cifar(tmp_path), "--epochs", "1", "--out", tmp_path / "run"]
    assert run(*given) == 0
    first = [line for line in capfd.readouterr().out.splitlines() if line.startswith("final")]
    (tmp_path / "run/confusion.png").unlink()
    assert run(*given, "--resume") == 0
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("final")] == first
    assert (tmp_path / "run/confusion.png").exists()


def test_another_run_is_not_taken_up(tmp_path, capfd):
    given = [*small_cifar(tmp_path), "--epochs", "1", "--out", tmp_path / "run"]
    assert run(*given) == 0
    assert run(*given, "--resume", "--lr", "0.3", "--seed", "2") == 2
    assert "was trained with lr None (now 0.3), seed 0 (now 2)" in capfd.readouterr().err
    assert run(*given) == 2
    assert "holds step-00000010.pt of an earlier run: want --resume" in capfd.readouterr().err
    assert run(*given[:-1], tmp_path / "none", "--resume") == 2
    assert "--resume finds no checkpoint" in capfd.readouterr().err
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    other = small_cifar(tmp_path, count=90)
    assert run(*other, "--epochs", "1", "--out", tmp_path / "run", "--resume") == 2
    assert "was trained with images 80 (now 90)" in capfd.readouterr().err
    other = small_cifar(tmp_path, seed=5)
    assert run(*other, "--epochs", "1", "--out", tmp_path / "run", "--resume") == 2
    assert "was trained on other images" in capfd.readouterr().err


def test_bad_path_is_refused_before_training(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert run(*small_cifar(tmp_path), "--out", tmp_path / "file/run") == 2
    assert "cannot be written: Not a directory" in capfd.readouterr().err


def test_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, capfd, monkeypatch):
    real, calls = os.fsync, []

    def full_after_a_while(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_a_while)
    given = [*small_cifar(tmp_path), "--recipe", "he", "--epochs", "1", "--save-every", "2", "--out", tmp_path / "run"]
    assert run(*given) == 2
    error = capfd.readouterr().err
    monkeypatch.undo()
    assert "No space left on device; the last good one is" in error
    last = max((tmp_path / "run").glob("step-*.pt"))
    assert str(last) in error
    assert run(*given, "--resume") == 0
    assert run(*given[:-1], tmp_path / "whole") == 0
    name = "step-00000010.pt"
    assert differences(checkpoint(tmp_path / "whole" / name), checkpoint(tmp_path / "run" / name)) == []

"""Checkpoints: whole or not there; what is kept; what is refused."""

import errno
import os
import resource
import signal

import pytest
import torch

from resnet_fast.program import checkpoints
from resnet_fast.program.options import ProgramError


def state(step, size=10):
    """The least that a run's state holds."""
    lists, tables = ("rng", "sums", "history"), ("optimizer", "schedule", "scaler", "options", "preparation")
    plain = {name: [] for name in lists} | {name: {} for name in tables}
    model = {"weight": torch.full((size,), float(step))}
    return {"step": step, "epoch": 0, "done": step, "lr": 0.1, "model": model, **plain}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_newest_few_and_best_are_kept(tmp_path):
    for step in (5, 50, 100, 7, 200):
        checkpoints.save(tmp_path, state(step), keep=3, best=step == 50)
    assert names(tmp_path) == ["best.pt", "step-00000050.pt", "step-00000100.pt", "step-00000200.pt"]
    assert checkpoints.newest(tmp_path) == tmp_path / "step-00000200.pt"
    assert checkpoints.load(tmp_path / "best.pt")["step"] == 50
    assert checkpoints.load(tmp_path / "step-00000100.pt")["model"]["weight"].equal(torch.full((10,), 100.0))


def fails(call, monkeypatch, error):
    def failing(*args):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, call, failing)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_failing_disk_leaves_the_last_good_one(call, error, tmp_path, monkeypatch):
    checkpoints.save(tmp_path, state(1), keep=1, best=True)
    fails(call, monkeypatch, error)
    with pytest.raises(ProgramError, match=rf"{os.strerror(error)}; the last good one is .*step-00000001\.pt"):
        checkpoints.save(tmp_path, state(2), keep=1, best=True)
    monkeypatch.undo()
    assert names(tmp_path) == ["best.pt", "step-00000001.pt"]
    assert checkpoints.load(tmp_path / "best.pt")["step"] == 1


def test_disk_that_fills_up_while_writing(tmp_path):
    """The kernel refuses after 100,000 bytes, in the middle of the file."""
    checkpoints.save(tmp_path, state(1), keep=1, best=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ProgramError, match=r"cannot be written: File too large; the last good one is .*00001\.pt"):
            checkpoints.save(tmp_path, state(2, 100_000), keep=1, best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["step-00000001.pt"]


def test_killed_while_writing(tmp_path):
    checkpoints.save(tmp_path, state(1), keep=3, best=False)
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(tmp_path, state(2), keep=3, best=False)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert checkpoints.newest(tmp_path) == tmp_path / "step-00000001.pt"
    assert f"-{child}.writing" in names(tmp_path)[0]  # a name of its own
    checkpoints.clean(tmp_path)
    checkpoints.save(tmp_path, state(2), keep=3, best=False)
    assert names(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]


def test_disk_that_is_full_for_the_best_one(tmp_path, monkeypatch):
    """The message names the file that is missing, and the one that is whole."""
    checkpoints.save(tmp_path, state(1), keep=1, best=True)
    real = os.replace

    def full(source, target):
        if target.name == "best.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ProgramError, match=r"best\.pt cannot be written: No space .* last good one is .*00000002\.pt"):
        checkpoints.save(tmp_path, state(2), keep=1, best=True)


def test_failing_sync_of_the_folder(tmp_path, monkeypatch):
    """The file is there, but may not be after a power cut: the one before is the last good one."""
    checkpoints.save(tmp_path, state(1), keep=1, best=False)
    monkeypatch.setattr(checkpoints, "_sync_folder", lambda folder: os.listdir(folder / "none"))
    with pytest.raises(ProgramError, match=r"00000002\.pt cannot be written: .*; the last good one is .*00000001\.pt"):
        checkpoints.save(tmp_path, state(2), keep=1, best=False)


def with_history(step, *accuracies):
    rows = [{"step": 5 * (i + 1), "test_accuracy": accuracy} for i, accuracy in enumerate(accuracies)]
    return {**state(step), "history": rows}


def test_best_one_is_written_again(tmp_path):
    """Where a stop came between step-N.pt and best.pt, it is of the epoch before, or not there."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    before = checkpoints.save(run, with_history(5, 0.5), keep=9, best=True)
    assert checkpoints.restore_best(run, before, with_history(5, 0.5)["history"]) is None
    last = with_history(10, 0.5, 0.7)
    start = checkpoints.save(run, last, keep=9, best=False)
    assert "written again" in checkpoints.restore_best(run, start, last["history"])
    assert checkpoints.load(run / "best.pt")["step"] == 10
    (run / "best.pt").unlink()
    later = with_history(15, 0.5, 0.7, 0.7)  # the first of equals is the best
    start = checkpoints.save(run, later, keep=9, best=False)
    assert "written again" in checkpoints.restore_best(run, start, later["history"])
    assert checkpoints.load(run / "best.pt")["step"] == 10
    assert "written again" in checkpoints.restore_best(elsewhere, start, later["history"])
    assert checkpoints.load(elsewhere / "best.pt")["step"] == 10
    for path in (run / "best.pt", run / "step-00000010.pt", elsewhere / "best.pt"):
        path.unlink()
    assert "no checkpoint of that step is left" in checkpoints.restore_best(elsewhere, start, later["history"])
    assert checkpoints.restore_best(run, start, []) is None


def test_folder_that_was_to_be_replaced_comes_back(tmp_path):
    """A stop between the two renames of a sharded checkpoint that is written again."""
    for step, renamed in ((3, True), (4, False)):
        folder = tmp_path / f".step-0000000{step}.old.writing"
        folder.mkdir()
        (folder / "state.pt").write_text("old")
        if not renamed:
            (tmp_path / f"step-0000000{step}").mkdir()
    (tmp_path / ".step-00000003.host-1.writing").mkdir()
    checkpoints.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert (tmp_path / "step-00000003/state.pt").read_text() == "old"
    assert not (tmp_path / "step-00000004/state.pt").exists()


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProgramError, match="Not a directory; there is none yet"):
        checkpoints.save(tmp_path / "file" / "run", state(1), keep=1, best=False)

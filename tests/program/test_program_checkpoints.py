"""Checkpoints: whole or not there; what is kept; what is refused."""

import errno
import os
import pickle
import resource
import signal

import pytest
import torch

from resnet_fast.program import checkpoints
from resnet_fast.program.options import ProgramError


def state(step, size=10):
    return {"step": step, "model": {"weight": torch.full((size,), float(step))}}


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
    checkpoints.save(tmp_path, state(2), keep=3, best=False)
    assert names(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProgramError, match="Not a directory; there is none yet"):
        checkpoints.save(tmp_path / "file" / "run", state(1), keep=1, best=False)


class Evil:
    def __reduce__(self):
        return os.getcwd, ()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"format": checkpoints.FORMAT, "model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ProgramError, match=r"evil\.pt cannot be loaded: Weights only load failed"):
        checkpoints.load(tmp_path / "evil.pt")
    torch.save({"format": 99}, tmp_path / "format.pt")
    with pytest.raises(ProgramError, match="has format 99, want 1"):
        checkpoints.load(tmp_path / "format.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ProgramError, match="has format None, want 1"):
        checkpoints.load(tmp_path / "list.pt")
    with pytest.raises(ProgramError, match="No such file"):
        checkpoints.load(tmp_path / "missing.pt")
    whole = checkpoints.save(tmp_path, state(1), keep=1, best=False).read_bytes()
    for content in (whole[: len(whole) // 2], b"", pickle.dumps(3)):
        (tmp_path / "damaged.pt").write_bytes(content)
        with pytest.raises(ProgramError, match=r"damaged\.pt cannot be loaded"):
            checkpoints.load(tmp_path / "damaged.pt")

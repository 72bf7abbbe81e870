"""The training program on several processes, over gloo on CPUs."""

import subprocess

import pytest
from helpers.program.support import ROOT, checkpoint, differences, environment, small_cifar, torchrun

from resnet_fast import train
from resnet_fast.program import checkpoints, data, distributed, loop, options


@pytest.mark.parametrize("processes", [2, 4])
def test_like_one_process(processes, tmp_path, monkeypatch):
    """What ``ranks.py`` asserts: batch norm, training, strategies, no_sync."""
    command = [*torchrun(processes)[:-1], str(ROOT / "tests/helpers/program/ranks.py"), str(tmp_path)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(list(tmp_path.glob("*/done"))) == processes
    if processes == 2:
        one_process_takes_up_shards_of_two(tmp_path, monkeypatch)


def one_process_takes_up_shards_of_two(folder, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    given = [*small_cifar(folder / "0"), "--epochs", "1", "--lr", "0.01", "--strategy", "fsdp", "--accumulate", "2"]
    given += ["--sync-bn"]
    chosen = options.parse([*given, "--checkpoints", "sharded", "--allow-world-change", "--out", str(folder / "new")])
    group = distributed.Processes(chosen)
    try:
        trainer = loop.Trainer(chosen, data.load(chosen), group)
        trainer.restore(checkpoints.newest(folder / "sharded"))
        model = trainer.state()["model"]
        # 64 of 80 images are trained on; a step takes 16 now.
        assert (trainer.consumed, trainer.steps, float(trainer.sums[2])) == (64, 5, 64)
    finally:
        group.close()
    wanted = checkpoint(checkpoints.newest(folder / "fsdp"))["model"]
    assert differences(model, wanted) == []


def test_fsdp_wants_torchrun(tmp_path, capfd):
    assert train.main([*small_cifar(tmp_path), "--strategy", "fsdp", "--out", str(tmp_path / "run")]) == 2
    assert "start it with torchrun" in capfd.readouterr().err

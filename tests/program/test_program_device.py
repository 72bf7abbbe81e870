"""Data on the device: the same images and the same training as with workers, bit for bit; who prepares them."""

import numpy as np
import pytest
import torch
from helpers.program.support import checkpoint, differences, random_images, run, small_cifar
from test_program_data import photographs

from resnet_fast import backends, models
from resnet_fast.program import networks, report
from resnet_fast.program.data import Batches, DeviceBatches, Preparation, Samples, device, loader, loaders
from resnet_fast.program.options import Options, ProgramError

pytestmark = pytest.mark.usefixtures("one_thread")

LIKE = torch.empty(0)


def sets(channels):
    images, labels = random_images(37)
    images = np.ascontiguousarray(images[:, :channels, :9, :7])
    shifted, plain = Samples(images, labels, 2, channels == 3, 11), Samples(images, labels, 0, False, None)
    return shifted, plain, Preparation([], 9, channels, [0.3, 0.5, 0.6][:channels], [0.2, 0.3, 0.1][:channels])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_workers_images(channels, dtype):
    """Of two processes, from the second batch on; the test set ends in empty slots."""
    shifted, plain, preparation = sets(channels)
    table = networks.prepared_values(preparation, LIKE).to(dtype)
    for samples, seed in ((shifted, 11), (plain, None)):
        for rank in (0, 1):
            order = Batches(37, 5, rank, 2, seed=seed)
            order.epoch, order.first = 3, 1
            found = list(DeviceBatches(samples, order, table, torch.channels_last))
            wanted = list(loader(samples, order, 0, False))
            assert len(found) == len(wanted) == (2 if seed else 3)
            for mine, theirs in zip(found, wanted, strict=True):
                prepared = networks.prepare(theirs.images, preparation, LIKE, torch.channels_last).to(dtype)
                assert torch.equal(mine.images, prepared)
                assert mine.images.stride() == prepared.stride()
                assert torch.equal(mine.labels, theirs.labels)
    assert mine.labels.tolist()[-3:] == [-1] * 3


@pytest.mark.parametrize(
    "way",
    [
        ["--ema", "0.9", "--accumulate", "2", "--save-every", "1"],
        ["--amp", "bf16", "--mixup", "0.4"],
        ["--no-channels-last", "--limit", "20"],
    ],
    ids=" ".join,
)
def test_trains_as_with_workers(way, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(models, "cifar_resnet20", lambda num_classes: models.CifarResNet(1, num_classes))
    given = [*small_cifar(tmp_path, count=32), "--epochs", "2", "--lr", "0.05", *way]
    for where in ("device", "workers"):
        assert run(*given, "--data-on", where, "--out", tmp_path / where) == 0
    names = sorted(path.name for path in (tmp_path / "device").glob("*.pt"))
    assert names == sorted(path.name for path in (tmp_path / "workers").glob("*.pt"))
    for name in names:
        states = (checkpoint(tmp_path / where / name) for where in ("device", "workers"))
        assert differences(*states) == []
    out = capfd.readouterr().out
    assert "images are prepared by cpu, which holds them (0." in out
    assert "images are prepared by no workers of each process: --data-on workers" in out
    assert out.count("% waiting for data") == 4


def test_goes_on_with_workers(tmp_path, monkeypatch):
    """A run from the middle of an epoch, the other way round."""
    monkeypatch.setattr(models, "cifar_resnet20", lambda num_classes: models.CifarResNet(1, num_classes))
    given = [*small_cifar(tmp_path, count=32), "--epochs", "1", "--save-every", "2", "--out", tmp_path / "run"]
    assert run(*given) == 0
    last = tmp_path / "run/step-00000004.pt"
    whole = checkpoint(last)
    last.unlink()
    assert run(*given, "--resume", "--data-on", "workers") == 0
    assert differences(whole, checkpoint(last)) == []


def test_share_of_waiting(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])

    def batches():
        for number in range(3):
            clock[0] += 3
            yield number

    bar = report.Bar(1, 1, steps=3, first=0, show=False)
    for _ in bar.timed(batches()):
        clock[0] += 1
    assert bar.waiting() == 9 / 12


def test_who_prepares(tmp_path, monkeypatch):
    shifted, plain, preparation = sets(3)
    parts = [(shifted, Batches(37, 5)), (plain, Batches(37, 5))]
    table = networks.prepared_values(preparation, LIKE)

    def line(data_on, parts=parts):
        return loaders(Options("x", data_on=data_on, workers=2), parts, table, torch.channels_last)[1]

    assert (
        line("auto") == line("device") == f"images are prepared by cpu, which holds them ({2 * 37 * 189 / 1e6:.1f} MB)"
    )
    with backends.use("eager"):
        assert line("auto").endswith("2 workers of each process: the device cannot, backends.use('eager')")
        with pytest.raises(ProgramError, match=r"--data-on device cannot be: the device cannot, backends\.use"):
            line("device")
    monkeypatch.setattr(device, "unavailable", lambda kind: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (27_970, 10**9))
    gpu = torch.device("cuda", 0)
    assert device._obstacle(gpu, [shifted, plain]) == "they take 13,986 bytes, and 27,970 are free on cuda:0"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (27_972, 10**9))
    assert device._obstacle(gpu, [shifted, plain]) is None


def test_files_stay_with_workers(tmp_path, capfd):
    given = ["--data", photographs(tmp_path), "--image-size", "32", "--batch", "3", "--epochs", "1", "--workers", "0"]
    assert run(*given, "--data-on", "device", "--out", tmp_path / "run") == 2
    assert capfd.readouterr().err == "resnet_fast.train: --data-on device cannot be: they are files\n"

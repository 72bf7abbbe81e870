"""Runs that lose processes go on: restarts, a lost agent, another number of processes; sharded checkpoints."""

import os
import pickle
import shutil
import signal
import socket
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.program.support import checkpoint, differences, run, small_cifar, start, torchrun
from test_program_resume import wait_for

from resnet_fast import models, predict
from resnet_fast.program import checkpoints, data, distributed, loop, resume
from resnet_fast.program.options import Options, ProgramError, parse

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.long
def test_worker_that_dies_again_and_again(tmp_path, capfd):
    """torchrun starts all again, once, from the newest checkpoint; then the job ends, and --resume goes on."""
    options = [*small_cifar(tmp_path), "--epochs", "3", "--save-every", "2", "--keep", "20"]
    dies, whole = tmp_path / "dies", tmp_path / "whole"
    process = start(*options, "--out", dies, launcher=torchrun(2, "--standalone", "--max-restarts", "1"))
    for step in (2, 7):  # of 15 steps, 5 an epoch
        wait_for(dies / f"step-{step:08d}.pt", process)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0, output
    assert output.count("goes on from") == 1, output
    assert "Signal 9 (SIGKILL)" in output
    assert "process 0 stopped" in output or "Sending process" in output, output
    for out, more in ((dies, ["--resume"]), (whole, [])):
        process = start(*options, "--out", out, *more, launcher=torchrun(2))
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert ("goes on from" in output) == bool(more)
        assert output.count("final:") == 1
        assert not list(out.glob(".*"))
    name = "step-00000015.pt"
    assert differences(checkpoint(whole / name), checkpoint(dies / name)) == []
    # The file is that of any run: whole weights under the network's own names.
    network, _ = predict.load(whole / name)
    assert not network.training
    # One process goes on, with as many images a step and with half: 32 of 80 are trained on.
    early = ["--resume", whole / "step-00000002.pt"]
    assert run(*options, *early, "--out", tmp_path / "none") == 2
    assert "processes 2 (now 1): want the same or --allow-world-change to go on" in capfd.readouterr().err
    for batch, steps in (("16", [5, 10, 15]), ("8", [2 + 6, 8 + 10, 18 + 10])):
        out = tmp_path / batch
        assert run(*options, *early, "--out", out, "--batch", batch, "--allow-world-change") == 0
        assert [row["step"] for row in checkpoint(checkpoints.newest(out))["history"]] == steps


@pytest.mark.long
def test_agent_that_is_lost(tmp_path):
    """Two torchruns, as on two machines; one is killed with its worker: the other goes on alone, on all images."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = "timeout=60,last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=10"
    job = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "1"]
    given = [*small_cifar(tmp_path), "--epochs", "2", "--save-every", "2", "--keep", "99", "--allow-world-change"]
    given += ["--out", tmp_path / "run"]
    agents = []
    try:
        for host in (1, 0):  # the first keeps the store of the rendezvous
            conf = ("--rdzv-conf", f"{limits},is_host={host}")
            launcher = torchrun(1, "--nnodes", "1:2", "--max-restarts", "3", *job, *conf)
            agents.append(start(*given, launcher=launcher))
        wait_for(tmp_path / "run/step-00000002.pt", agents[0])
        workers = ranks_of(agents[1].pid)
        assert len(workers) == 1
        for pid in (agents[1].pid, *workers.values()):
            os.kill(pid, signal.SIGKILL)
        output = agents[0].communicate(timeout=180)[0]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert agents[0].returncode == 0, output
    assert "goes on from" in output
    state = checkpoint(checkpoints.newest(tmp_path / "run"))
    assert state["options"]["processes"] == 1
    assert state["epoch"] == 2
    assert float(state["sums"][0][2]) == 80
    first = checkpoint(tmp_path / "run/step-00000002.pt")
    assert first["options"]["processes"] == 2


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (3, 2), (2, 4)])
def test_rest_of_the_epoch(before, now, accumulate):
    """Two steps of some processes, then the others': no image twice, and none left out but what fills no step."""

    def batches(world, consumed, count=None):
        for rank in range(world):
            part = data.Batches(75, 4, rank, world, seed=5, accumulate=accumulate)
            part.epoch, part.consumed = 3, consumed
            assert len(part) == len(list(part))
            yield [index for _, index in chain(*list(part)[:count])]

    consumed = 2 * 4 * accumulate * before
    first = [*chain(*batches(before, 0, 2 * accumulate))]
    rest = [*chain(*batches(now, consumed))]
    assert len(first) == consumed
    assert len({*rest}) == len(rest) == (75 - consumed) // (4 * accumulate * now) * 4 * accumulate * now
    whole = data.Batches(75, 1, seed=5)
    whole.epoch = 3
    order = [index for _, index in chain(*whole)]
    assert set(first) == set(order[:consumed])
    assert set(rest) == set(order[consumed : consumed + len(rest)])


def test_rate_and_totals_with_other_steps(tmp_path, capfd, monkeypatch):
    """After 24 of 80 images, steps take 20 instead of 8: the learning rate is that of one step of four."""
    monkeypatch.setattr(models, "cifar_resnet20", lambda num_classes: models.CifarResNet(1, num_classes))
    given = [*small_cifar(tmp_path), "--epochs", "2", "--lr", "0.1"]
    out = tmp_path / "run"
    assert run(*given, "--save-every", "3", "--keep", "9", "--out", out) == 0
    for path in out.glob("step-*"):
        if path.name > "step-00000003.pt":
            path.unlink()
    given[given.index("--batch") + 1] = "20"
    assert run(*given, "--out", out, "--resume") == 2
    assert "batch 8 (now 20): want the same or --allow-world-change to go on" in capfd.readouterr().err

    def trainer(*more):
        options = parse([*given, "--out", str(out), "--allow-world-change", *more])
        return loop.Trainer(options, data.load(options), distributed.Processes(options))

    resumed, fresh = trainer(), trainer()
    resumed.restore(out / "step-00000003.pt")
    assert (resumed.step, resumed.epoch, resumed.done, resumed.consumed) == (3, 0, 0, 24)
    fresh.optimizer.step()
    fresh.schedule.step()  # 24 images are one step of 20, and a bit
    assert resumed.optimizer.param_groups[0]["lr"] == fresh.optimizer.param_groups[0]["lr"] > 0
    seen = []
    real = loop.Trainer._pass
    monkeypatch.setattr(
        loop.Trainer, "_pass", lambda t, batch, last: (seen.append(len(batch.labels)), real(t, batch, last))
    )
    assert run(*given, "--out", out, "--resume", "--allow-world-change") == 0
    assert seen == [20] * 2 + [20] * 4
    state = checkpoint(checkpoints.newest(out))
    assert [row["step"] for row in state["history"]] == [5, 9]
    assert (out / "log.csv").read_text().count("\n") == 3
    # Totals of the epoch that both had a part in: 24 + 40 images.
    assert float(state["sums"][0][2]) == 80


def test_attempts_do_not_share_addresses(monkeypatch):
    """torchrun's agent keeps its store: a process that is early must not take what the attempt before left there."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    for attempt in (b"1", b"2"):
        with ThreadPoolExecutor(1) as pool:
            early = pool.submit(distributed._store_of_the_attempt, 1, 2)
            time.sleep(0.2)
            first = distributed._store_of_the_attempt(0, 2)
            second = early.result(timeout=60)
        assert not second.check(["address"])
        first.set("address", attempt)
        assert second.get("address") == attempt
    assert distributed._store_of_the_attempt(0, 1).check(["address"]) is False


def test_restarted_job_knows_its_checkpoints(tmp_path, monkeypatch):
    """Restarts go on by themselves; another job in the same folder is refused, also when torchrun starts it again."""

    def options(resume=None):
        return Options("x", out=str(tmp_path), resume=resume)

    def attempt(job, restarts, given=None):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        return resume.choose(options(given), restarts)

    path = tmp_path / "step-00000003.pt"
    assert attempt("none", 0) is None
    assert attempt("none", 1) is None  # failed before it saved anything
    path.touch()
    assert attempt("none", 2) == path
    assert attempt("none", 2, "elsewhere.pt") == path
    for restarts in (0, 1, 2):
        with pytest.raises(ProgramError, match=r"holds step-00000003\.pt of an earlier run"):
            attempt("none", restarts)
    assert attempt("none", 0, "") == path
    assert attempt("none", 1, "") == path
    with pytest.raises(ProgramError, match="of an earlier run"):
        attempt("7", 0)
    assert attempt("7", 0, "auto") == path
    assert attempt("7", 0, "auto") == path  # an agent joined: torchrun does not count that
    assert attempt("7", 0, "elsewhere.pt") == Path("elsewhere.pt")  # a new start that names a file
    resume.finished(options())
    with pytest.raises(ProgramError, match="of an earlier run"):
        attempt("7", 0)


@pytest.fixture
def sharded_run(tmp_path, monkeypatch):
    """Options of a run in one process under torchrun, with its sharded checkpoints."""
    monkeypatch.setattr(models, "cifar_resnet20", lambda num_classes: models.CifarResNet(1, num_classes))
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    given = [*small_cifar(tmp_path, count=32), "--strategy", "fsdp", "--checkpoints", "sharded", "--epochs", "2"]
    given += ["--save-every", "2", "--keep", "3", "--out", tmp_path / "run"]
    assert run(*given) == 0
    return given, tmp_path / "run"


def test_sharded_checkpoints(sharded_run, capfd, monkeypatch):
    given, out = sharded_run
    assert sorted(p.name for p in out.iterdir() if p.name.startswith("step")) == [
        f"step-0000000{step}" for step in (4, 6, 8)
    ]
    assert not list(out.glob(".*"))
    predict.load(out / "best.pt")
    wanted = (out / "step-00000008/__0_0.distcp").read_bytes()
    for step in (6, 8):
        shutil.rmtree(out / f"step-0000000{step}")
    assert run(*given, "--resume") == 0
    assert "goes on from" in capfd.readouterr().out
    assert (out / "step-00000008/__0_0.distcp").read_bytes() == wanted


def test_damaged_sharded_checkpoint(sharded_run, capfd):
    given, out = sharded_run
    last = out / "step-00000008"
    for name in ("__0_0.distcp", ".metadata", "state.pt"):
        content = (last / name).read_bytes()
        for bad in (content[:-1], b"", content[: len(content) // 2] + b"\1" + content[len(content) // 2 + 1 :], None):
            (last / name).unlink()
            if bad is not None:
                (last / name).write_bytes(bad)
            assert run(*given, "--resume") == 2
            error = capfd.readouterr().err
            assert f"checkpoint {last}" in error
            assert error.count("\n") == 1, error
            (last / name).write_bytes(content)


class Caller:
    def __reduce__(self):
        return print, ("called",)


def test_description_of_shards_calls_nothing(sharded_run, capfd):
    """A folder whose checksums are right, but whose ``.metadata`` is a pickle that calls."""
    given, out = sharded_run
    last = out / "step-00000008"
    state, content = checkpoint(last / "state.pt"), pickle.dumps(Caller())
    state["files"][".metadata"] = zlib.crc32(content)
    torch.save(state, last / "state.pt")
    (last / ".metadata").write_bytes(content)
    assert run(*given, "--resume") == 2
    output = capfd.readouterr()
    assert f"checkpoint {last} is not one of resnet_fast.train: its .metadata, it asks for builtins.print" in output.err
    assert output.err.count("\n") == 1
    assert "called" not in output.out


def test_full_disk_while_shards_are_written(sharded_run, capfd, monkeypatch):
    given, out = sharded_run
    for step in (6, 8):
        shutil.rmtree(out / f"step-0000000{step}")
    real = os.fsync

    def full(descriptor):
        if ".distcp" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert run(*given, "--resume") == 2
    error = capfd.readouterr().err
    assert f"checkpoint {out}/step-00000006 cannot be written: No space left on device" in error
    assert f"the last good one is {out}/step-00000004" in error
    assert not list(out.glob(".*"))

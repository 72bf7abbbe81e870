"""The kit for GPUs, as far as a machine without one can tell: what it holds, its phases, what it reports and when."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import resnet_fast._C
from benchmarks.kit import options, pack, pool, supervise, tools
from benchmarks.kit.phases import sanitize, warm
from benchmarks.kit.workloads import Workload

ROOT = Path(__file__).parents[2]
LIBRARY = Path(resnet_fast._C.__file__).resolve()


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit") / "gpu-kit"
    pack.pack(LIBRARY, folder)
    return folder


def parsed(tmp_path, *arguments):
    return options.parse(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *arguments])


def test_what_the_kit_holds(kit):
    files = {str(path.relative_to(kit)) for path in kit.rglob("*") if path.is_file()}
    wanted = {
        "run.sh",
        "pyproject.toml",
        "resnet_fast/__main__.py",
        "resnet_fast/_triton/tiles.py",
        "benchmarks/cases.py",
    }
    wanted |= {
        f"resnet_fast/{LIBRARY.name}",
        "benchmarks/kit/families.py",
        "tests/conftest.py",
        "tests/helpers/support.py",
    }
    wanted |= {f"tests/gpu/{path.name}" for path in (ROOT / "tests/gpu").glob("*.py")}
    assert wanted <= files
    assert not [name for name in files if "__pycache__" in name or Path(name).name.startswith("test_")]
    assert os.access(kit / "run.sh", os.X_OK)
    assert pack.size(kit) == sum((kit / name).stat().st_size for name in files)
    assert (kit / "resnet_fast" / LIBRARY.name).stat().st_size <= LIBRARY.stat().st_size
    assert not [path for path in kit.rglob("*") if path.is_symlink()]


def test_a_kit_that_is_too_large_or_empty_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"the kit has \d+\.\d MB, want 0 at most"):
        pack.pack(LIBRARY, tmp_path / "kit", most=10_000)
    with pytest.raises(FileNotFoundError, match=r"library is .*none\.so, want the extension"):
        pack.pack(tmp_path / "none.so", tmp_path / "kit")


def test_the_kit_runs_elsewhere(kit, tmp_path):
    """From its own folder alone, with its own copy of the package, and without a GPU it says what it lacks."""
    moved = tmp_path / "moved kit"
    shutil.copytree(kit, moved)
    command = ["bash", str(moved / "run.sh"), "--only", "doctor", "--out", "here", "--work", str(tmp_path / "work")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == (0 if torch.cuda.is_available() else 1), done.stdout + done.stderr
    found = json.loads((tmp_path / "here/results.json").read_text())
    (phase,) = found["phases"]
    assert phase["name"] == "doctor"
    assert found["versions"]["torch"] == torch.__version__
    findings = {row["subject"]: row["finding"] for row in phase["rows"] if "subject" in row}
    assert findings["backend cpu"].startswith("loaded")
    if not torch.cuda.is_available():
        assert "GPU: RuntimeError: no CUDA device is visible to PyTorch" in done.stdout
    for name, what in tools.missing().items():
        assert f"missing: {name} is not installed here: {what}" in done.stdout


def test_run_sh_says_what_is_missing(kit, tmp_path):
    for python, message in (("no-such-python", "there is no no-such-python here"), ("false", "has no PyTorch")):
        environment = {**os.environ, "PYTHON": python}
        done = subprocess.run(["bash", str(kit / "run.sh")], capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


# Phases that stand in for real ones: what they do is told by their items.
STAND_IN = """
import os, sys, time
def items(options):
    return ["good", "raises", "crashes", "good again", *(["slow"] if options.ncu == "slow" else [])]
def run(item, options, emit, deadline):
    print("in", item, flush=True)
    emit({"value": len(item)})
    if item == "raises":
        raise ValueError("on purpose")
    if item == "crashes":
        os.abort()
    if item == "slow":
        time.sleep(60)
"""


@pytest.fixture
def stand_in(kit, tmp_path, monkeypatch):
    """A kit whose phase ``soak`` is the stand-in."""
    folder = tmp_path / "stand-in"
    shutil.copytree(kit, folder)
    (folder / "benchmarks/kit/phases/soak.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHON", sys.executable)
    return ["bash", str(folder / "run.sh"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]


def test_a_crash_ends_an_item_and_nothing_else(stand_in, tmp_path):
    done = subprocess.run([*stand_in, "--only", "soak", "doctor"], capture_output=True, text=True)
    assert done.returncode == 1
    phases = {phase["name"]: phase for phase in json.loads((tmp_path / "out/results.json").read_text())["phases"]}
    assert phases["doctor"]["state"] == phases["soak"]["state"] == "done"
    rows = phases["soak"]["rows"]
    assert [row["item"] for row in rows if "value" in row] == ["good", "raises", "crashes", "good again"]
    errors = {row["item"]: row["error"] for row in rows if "error" in row}
    assert errors.keys() == {"raises", "crashes"}
    assert errors["raises"] == "ValueError: on purpose"
    assert errors["crashes"].startswith("crashed with signal 6 (SIGABRT)")
    text = (tmp_path / "out/results.md").read_text()
    assert "**crashes**: crashed with signal 6" in text
    assert "| good again | 10" in text or "10" in text
    assert "in crashes" in (tmp_path / "out/log.txt").read_text()


def test_a_phase_ends_at_its_limit_with_what_it_has(stand_in, tmp_path):
    begin = time.monotonic()
    command = [*stand_in, "--only", "soak", "--ncu", "slow", "--minutes", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert time.monotonic() - begin < 50
    assert done.returncode == 1
    (phase,) = json.loads((tmp_path / "out/results.json").read_text())["phases"]
    assert phase["state"] == "time limit"
    assert [row["item"] for row in phase["rows"] if "value" in row][-1] == "slow"
    assert phase["rows"][-1]["error"] == "ended at the time limit of 18 s"


def test_what_is_ended_from_outside_leaves_its_results(stand_in, tmp_path):
    process = subprocess.Popen([*stand_in, "--only", "soak", "--ncu", "slow"], stdout=subprocess.DEVNULL)
    log, began = tmp_path / "work/logs/soak.log", time.monotonic()
    while time.monotonic() - began < 50 and not (log.exists() and "in slow" in log.read_text()):
        time.sleep(0.1)
    process.terminate()
    assert process.wait(20) == 128 + 15
    (phase,) = json.loads((tmp_path / "out/results.json").read_text())["phases"]
    assert phase["state"] == "stopped"
    assert [row["item"] for row in phase["rows"] if "value" in row][-1] == "slow"
    assert "in crashes" in (tmp_path / "out/log.txt").read_text()


def test_what_does_not_start_is_reported(tmp_path, monkeypatch):
    found = parsed(tmp_path)
    monkeypatch.setattr(supervise, "ROOT", tmp_path)
    monkeypatch.setattr(options, "ROOT", tmp_path)
    phase = supervise.run("soak", found, 30, lambda phase: None)
    assert phase.state == "failed"
    assert "does not start" in phase.rows[0]["error"]


def test_commands_in_parallel(tmp_path):
    """Some at a time, with their output; what is late is ended, with all that it has started."""
    found = parsed(tmp_path)
    marker = tmp_path / "outlived"
    commands = {
        "quick": ["bash", "-c", "echo out; echo err >&2"],
        "fails": ["bash", "-c", "echo why; exit 4"],
        "slow": ["bash", "-c", f"(sleep 2; touch {marker}) & wait"],
        "waits": ["bash", "-c", "echo never"],
    }
    ended = {e.name: e for e in pool.run(commands, found, 1, time.time() + 1.5, {"WITH": "this"})}
    assert {name: e.code for name, e in ended.items()} == {"quick": 0, "fails": 4, "slow": None, "waits": None}
    assert (ended["quick"].output, ended["fails"].last_line) == ("out\nerr\n", "why")
    assert ended["waits"].output == "was not started"
    time.sleep(3)
    assert not marker.exists()


def rehearse(tmp_path, *arguments):
    """Phases on the simulated device; their rows, and the run's output."""
    command = [sys.executable, "-m", "benchmarks.kit", "--simulated", "--rounds", "5", "--seconds", "0.5"]
    command += ["--minutes", "30", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out/results.json").read_text())
    return {phase["name"]: phase["rows"] for phase in found["phases"]}, done.stdout


@pytest.mark.long
def test_rehearsal_of_the_tables(tmp_path):
    rows, text = rehearse(tmp_path, "--only", "infer", "train", "profile", "--case", "cifar_resnet20", "2", "8")
    variants = {row["variant"]: row for row in rows["infer"]}
    ours = variants["resnet_fast, cast weights"]
    assert set(variants) >= {"cuDNN fused", "CUDA graph of cuDNN fused", "CUDA graph of resnet_fast, cast weights"}
    assert ours["ms low"] <= ours["ms"] <= ours["ms high"]
    assert ours["best peer"] in ("cuDNN fused", "eager channels_last, cast weights")
    assert all(row["error / eager's"] <= 4 for row in variants.values())
    assert rows["train"] == []  # the case that was named is one of inference
    (mine, theirs) = rows["profile"]
    assert mine["launches"] > 0
    assert [kernel[0] for kernel in theirs["kernels"]]
    assert "A rehearsal on the simulated device" in text
    assert (tmp_path / "out/results.png").stat().st_size > 10_000


@pytest.mark.long
def test_rehearsal_of_training(tmp_path):
    rows, _ = rehearse(tmp_path, "--only", "soak", "train", "--steps", "3", "--case", "cifar_resnet20 2 8 training")
    (soak,) = rows["soak"]
    assert (soak["steps"], soak["losses that are not finite"]) == (3, 0)
    assert {row["variant"] for row in rows["train"]} == {"eager", "resnet_fast"}


@pytest.mark.long
def test_rehearsal_of_tests_and_checks(tmp_path):
    rows, _ = rehearse(tmp_path, "--only", "tests", "sanitize", "--jobs", "2")
    (counts,) = rows["tests"]
    assert counts["passed"] == counts["tests"] >= 3
    (checked,) = rows["sanitize"]
    assert checked["check"] == "rehearsal: " + ", ".join(sanitize.REHEARSED)
    assert checked["steps"] == 3


def test_options(tmp_path):
    found = parsed(tmp_path, "--only", "infer", "doctor", "--case", "ResNet32", "64", "--case", "resnet50 8 training")
    assert found.only == ("doctor", "infer")
    assert found.cases == ("ResNet32 64", "resnet50 8 training")
    assert options.Options.load(str(found.file)) == found
    assert found.environment()["RESNET_FAST_CACHE"] == str(tmp_path / "work/choices")
    assert Workload.of("ResNet32 64") == Workload("ResNet32", 64, 224, False)
    assert Workload.of("cifar_resnet32 128 training") == Workload("cifar_resnet32", 128, 32, True)
    assert Workload.of("resnet50 4 160").name == "resnet50, 4x3x160x160"
    for text in ("ResNet32", "NoNet 8", "ResNet32 many", "ResNet32 1 2 3"):
        with pytest.raises(ValueError, match=f"case is '{text}', want MODEL BATCH"):
            Workload.of(text)
    arguments = warm.tune_arguments(Workload.of("ResNet32 64"), "float16")
    assert arguments == ["tune", "ResNet32", "--batch", "64", "--image-size", "224", "--dtype", "float16"]

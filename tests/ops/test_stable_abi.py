"""One build of the extension for a range of releases of torch: what it says of itself, and what it asks of torch."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fast import backends
from resnet_fast.backends.native import extension
from resnet_fast.diagnose import doctor

ROOT = Path(__file__).parents[2]


def version(text):
    return tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", text).groups())


def floor():
    return version(re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1])


def test_the_build_says_what_it_is_for():
    assert divmod(extension.target, 256) == floor() <= version(torch.__version__)
    assert version(extension.built_with) >= floor()


def test_doctor_names_both_releases():
    found = doctor.diagnosis()
    assert found["torch"].startswith(torch.__version__)
    oldest = ".".join(map(str, floor()))
    assert found["extension"] == f"built with torch {extension.built_with}, for torch {oldest} and later"


def test_doctor_without_the_extension(monkeypatch):
    monkeypatch.setattr(backends, "_missing", "resnet_fast._C was not built: build it")
    found = doctor.diagnosis()
    assert found["extension"] == "not loaded: see backend cpu"
    assert found["backend cpu"].endswith("was not built: build it")


def test_this_torch_has_all_that_is_asked_of_it():
    """Functions are bound when they are first called: a missing one would be found by a user."""
    wanted = subprocess.run(
        ["nm", "-D", "--undefined-only", extension.__file__], capture_output=True, text=True, check=True
    ).stdout
    names = re.findall(r"\bU ((?:aoti_)?torch_\w+)$", wanted, re.MULTILINE)
    assert len(names) > 20
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
    assert [name for name in names if not hasattr(library, name)] == []
    # What PyTorch for CPUs lacks must not be bound at all: there the module would not load with immediate binding.
    assert not any("cuda" in name and "device_type" not in name for name in names)


def test_no_stream_without_a_device():
    """PyTorch's function is found where it was built with CUDA, and named where it was not."""
    if torch.cuda.is_available():
        assert torch.ops.resnet_fast.cuda_stream(0) == torch.cuda.current_stream(0).cuda_stream
        return
    reason = "no stream of CUDA device 0" if torch.version.cuda else "it was built without CUDA"
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.resnet_fast.cuda_stream(0)


def test_setup_refuses_an_older_torch(tmp_path):
    """By name, before a compiler fails with pages about missing headers."""
    (tmp_path / "torch/utils").mkdir(parents=True)
    (tmp_path / "torch/__init__.py").write_text("__version__ = '2.9.1'")
    (tmp_path / "torch/utils/__init__.py").touch()
    (tmp_path / "torch/utils/cpp_extension.py").write_text("BuildExtension = object")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    oldest = ".".join(map(str, floor()))
    assert f"setup.py: torch is 2.9.1, want {oldest} or later" in result.stderr

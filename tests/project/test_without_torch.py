"""Where PyTorch is not installed: the import and the programs say what to install, ``doctor`` what it finds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fast.diagnose.without_torch import INSTALL

ROOT = Path(__file__).parents[2]


def python(*arguments):
    """Without site-packages: nothing but the standard library and this folder."""
    command = [sys.executable, "-S", "-E", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_doctor_finds_the_rest():
    done = python("-m", "resnet_fast", "doctor")
    found = dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert found["torch"] == f"not installed: {INSTALL}"
    assert found["Python"] == sys.version.split()[0]
    assert {"resnet_fast", "extension", "CPU", "instruction sets", "C++ compiler", "nvcc", "Triton"} <= set(found)
    assert str(ROOT / "resnet_fast") in found["resnet_fast"]
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert INSTALL in done.stderr


@pytest.mark.parametrize("module", ["resnet_fast", "resnet_fast.train"])
def test_programs_end_with_one_line(module):
    done = python("-m", module, "explain", "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"resnet_fast needs PyTorch, which is not installed: {INSTALL}\n"


def test_an_import_says_what_to_install():
    done = python("-c", "import resnet_fast", "doctor")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: resnet_fast needs PyTorch")
    assert INSTALL in done.stderr
    assert "During handling" not in done.stderr


def test_a_torch_that_lacks_something_is_not_called_missing(tmp_path):
    (tmp_path / "torch.py").write_text("import a_library_of_torch")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import resnet_fast"
    done = python("-c", code)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'a_library_of_torch'"


def test_the_release_is_the_one_that_the_package_asks_for():
    assert re.search(r'"(torch>=[\d.]+)"', (ROOT / "pyproject.toml").read_text())[1] in INSTALL

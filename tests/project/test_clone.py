"""Python run in a clone that was not built: the extension of the installed package, where it fits; Triton's kernels."""

import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from resnet_fast.backends import clone
from resnet_fast.backends.native import extension

ROOT = Path(__file__).parents[2]


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def sources(tmp_path):
    """A clone as far as its digest goes."""
    files = {"setup.py": "setup()", "kernels/csrc/ops.cpp": "int a;", "kernels/csrc/cuda/add.cu": "int b;"}
    return write(tmp_path / "sources", {**files, "resnet_fast/__init__.py": ""})


@pytest.fixture
def installed(tmp_path, sources):
    """An installation of it, whose extension is a name."""
    files = {"__init__.py": "", f"_C{EXTENSION_SUFFIXES[0]}": "", clone.DIGEST: f"{clone.digest(sources)}\n"}
    return write(tmp_path / "site/resnet_fast", files)


def only_path(monkeypatch, *folders):
    monkeypatch.setattr(sys, "path", list(map(str, folders)))
    monkeypatch.setattr(sys, "meta_path", [])


@pytest.mark.parametrize(
    "change",
    [
        lambda c: (c / "kernels/csrc/ops.cpp").write_text("int c;"),
        lambda c: (c / "kernels/csrc/cuda/add.cu").rename(c / "kernels/csrc/cuda/sub.cu"),
        lambda c: (c / "kernels/csrc/cuda/add.cu").unlink(),
        lambda c: (c / "kernels/csrc/new.h").write_text(""),
        lambda c: (c / "setup.py").write_text("setup(1)"),
        # The same text, cut elsewhere.
        lambda c: write(c / "kernels/csrc", {"cuda/add.cu": "", "ops.cpp": "int b;int a;"}),
    ],
)
def test_every_change_of_the_sources_is_a_misfit(sources, installed, change):
    assert clone.misfit(sources, installed) is None
    change(sources)
    assert clone.misfit(sources, installed) == f"was built from other sources than those in {sources}"


def test_what_else_lies_there_does_not_count(sources, installed):
    write(sources, {"kernels/csrc/ops.cpp.orig": "x", "kernels/csrc/.ops.swp": "x", "README.md": "x"})
    assert clone.misfit(sources, installed) is None


def test_what_cannot_be_compared_is_a_misfit(sources, installed):
    (installed / clone.DIGEST).unlink()
    assert "does not say" in clone.misfit(sources, installed)
    shutil.rmtree(sources / "kernels")
    assert "sources, of which there are none" in clone.misfit(sources, installed)


def test_the_hidden_extension_is_the_first_behind_the_clone(monkeypatch, sources, installed, tmp_path):
    package = (sources / "resnet_fast").resolve()
    empty = write(tmp_path / "empty", {"resnet_fast/__init__.py": ""})  # another clone
    only_path(monkeypatch, sources, empty, installed.parent)
    found = clone.hidden_extension(package)
    assert (found.name, Path(found.origin).parent) == ("resnet_fast._C", installed)
    monkeypatch.chdir(sources)  # where Python names the folder by nothing
    only_path(monkeypatch, "", sources, empty)
    assert clone.hidden_extension(package) is None


def test_an_editable_installation_is_found_by_its_finder(monkeypatch, sources, installed):
    only_path(monkeypatch, sources)

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return clone.spec_from_file_location(name, installed / "__init__.py") if name == "resnet_fast" else None

    sys.meta_path.append(Finder)
    assert Path(clone.hidden_extension((sources / "resnet_fast").resolve()).origin).parent == installed


REPORT = """
import importlib.util, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import resnet_fast
from resnet_fast import backends
from resnet_fast.diagnose import doctor
print(resnet_fast.__file__)
print(importlib.util.find_spec("resnet_fast._triton.tiles").origin)
print(doctor._extension())
print(backends.status()["cpu"])
print(*[w.message for w in caught if "resnet_fast" in str(w.message)])
"""


def reported(tmp_path):
    """What Python says that runs in the clone, where nothing but the standard folders tells of an installation."""
    program = 'import sys; sys.meta_path = [f for f in sys.meta_path if "__editable__" not in f.__module__]' + REPORT
    command = [sys.executable, "-W", "ignore", "-c", program]
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path / "clone", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_clone_takes_the_installed_extension_or_says_why_not(tmp_path):
    ours, theirs = tmp_path / "clone", tmp_path / "site/resnet_fast"
    no_build = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("resnet_fast", "kernels"):
        shutil.copytree(ROOT / name, ours / name, ignore=no_build)
    shutil.copy(ROOT / "setup.py", ours)
    shutil.copytree(ROOT / "resnet_fast", theirs, ignore=no_build)
    library = Path(extension.__file__)
    (theirs / library.name).symlink_to(library)
    (theirs / clone.DIGEST).write_text(clone.digest(ROOT))
    package, triton, said, status, warned = reported(tmp_path)
    assert Path(package).parent == ours / "resnet_fast"
    assert Path(triton).parent == ours / "kernels/triton_ops"
    assert said.endswith(f"; that of the package installed in {theirs}")
    assert status.startswith("loaded, ")
    assert warned == ""

    with (ours / "kernels/csrc/ops.cpp").open("a") as file:
        file.write("// changed\n")
    _, _, said, status, warned = reported(tmp_path)
    assert said.startswith("not loaded")
    assert status in warned
    for part in (
        f"not in {ours / 'resnet_fast'},",
        str(theirs),
        "other sources",
        f"than {ours} to",
        "pip install -e .",
    ):
        assert part in status

"""The package as users get it: a wheel in an empty environment, an install without a compiler, a quick import."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import resnet_fast._C

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "resnet_fast", "kernels")


def run(command, **kwargs):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


@pytest.fixture
def sources(tmp_path):
    """A copy without build outputs: what a user unpacks."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def environment(tmp_path):
    """A new environment that sees this one's torch, so that it need not be installed again."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip()
    Path(site, "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def clean_env(**changes):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "CXX", "CC")}
    return {**env, **changes}


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
NO_INDEX = ["--no-index", "--no-deps", "--no-build-isolation"]

CHECK = """
import pathlib, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import resnet_fast
    import resnet_fast.models
import torch
from resnet_fast import backends, reference
assert pathlib.Path(resnet_fast.__file__).is_relative_to(sys.prefix), resnet_fast.__file__
fast, eager = resnet_fast.cifar_resnet20().eval(), reference.cifar_resnet20().eval()
eager.load_state_dict(fast.state_dict())
x = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    y, z = fast(x), eager(x)
    resnet_fast.ops.conv_bn_relu(x, torch.randn(4, 3, 3, 3))
assert torch.allclose(y, z, rtol=1e-3, atol=1e-4)
ours = [str(w.message) for w in caught if "resnet_fast" in str(w.message)]
"""


# Compiling takes minutes, and the extension of these tests was compiled by the same setup.py from the same sources: as
# CXX this reads each source with all its headers, and links nothing but that extension.
COMPILER = f"""#!{sys.executable}
import pathlib, shutil, subprocess, sys
command = sys.argv[1:]
if "-c" in command:
    command[command.index("-c")] = "-E"
    output = pathlib.Path(command[command.index("-o") + 1])
    command[command.index("-o") + 1] = "/dev/null"
    output.touch()
elif "-shared" in command:
    shutil.copy({resnet_fast._C.__file__!r}, command[command.index("-o") + 1])
    sys.exit()
sys.exit(subprocess.run(["c++", *command]).returncode)
"""


@pytest.mark.long
@pytest.mark.packaging
def test_wheel_in_an_empty_environment(sources, environment, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    env = clean_env(USE_CUDA="0", CXX=str(compiler))
    run([*PIP, "wheel", sources, *NO_INDEX, "-w", tmp_path / "wheels"], env=env)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    if sys.implementation.name == "cpython":
        assert "abi3" in wheel.name  # one wheel for every later Python
    run([*PIP, "--python", environment, "install", "--no-index", "--no-deps", wheel], env=clean_env())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    check = CHECK + "assert ours == []\nassert backends.fallbacks() == {}\nprint(backends.status()['cpu'])"
    assert run([environment, "-c", check], cwd=elsewhere, env=clean_env()).stdout.startswith("loaded, ")
    # In the folder of the sources, too, whose package is the one that Python finds there.
    check = "import resnet_fast; print(resnet_fast.__file__, resnet_fast.backends.status()['cpu'])"
    file, status = run([environment, "-c", check], cwd=sources, env=clean_env()).stdout.split(" ", 1)
    assert Path(file).is_relative_to(sources)
    assert status.startswith("loaded, ")
    # Nothing beside the package at the top level: `kernels` is someone else's name.
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"resnet_fast"}


@pytest.mark.packaging
def test_install_without_a_compiler(sources, environment, tmp_path):
    """Nothing on PATH, no CXX: the package installs, warns once, runs on PyTorch's operators and says why."""
    empty = tmp_path / "empty"
    empty.mkdir()
    env = clean_env(PATH=str(empty))
    install = run([*PIP, "--python", environment, "-v", "install", sources, *NO_INDEX], env=env)
    assert "no C++ compiler found" in install.stdout + install.stderr
    check = (
        CHECK
        + """
assert len(ours) == 1, ours
assert torch.equal(y, z)
status = backends.status()["cpu"]
assert not status.startswith("loaded"), status
assert any(status in key or "extension" in key for key in backends.fallbacks()), backends.fallbacks()
try:
    with backends.use("cpu"):
        raise SystemExit("use('cpu') went through")
except RuntimeError as error:
    assert status in str(error)
print(status)
"""
    )
    status = run([environment, "-c", check], cwd=tmp_path, env=env).stdout
    assert "_C" in status
    assert "compiler" in status


def test_import_is_quick(tmp_path):
    """At most a twentieth of the processor time that torch's own import takes, on whatever machine, from cached
    bytecode, as every start but the first.

    The best of five, after one that writes the bytecode: the others measure who else is busy.
    """
    code = "from time import process_time as now; a = now(); import torch; b = now(); import resnet_fast; "
    code += "print(b - a, now() - b)"
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    times = [tuple(map(float, run([sys.executable, "-c", code], env=env).stdout.split())) for _ in range(6)]
    assert min(ours / torchs for torchs, ours in times[1:]) < 0.05, times


def test_import_brings_no_launchers():
    """Launchers of the GPU are imported and registered when a first kernel is looked up."""
    code = "import sys, resnet_fast; from resnet_fast.backends import launch; names = set(sys.modules); "
    code += "launch.has_cuda(''); print(*(m for m in ('conv', 'stem') if f'resnet_fast.gpu.cuda.{m}' in names))"
    assert run([sys.executable, "-c", code]).stdout.split() == []


def test_import_brings_nothing_heavy():
    code = "import sys, torch; before = set(sys.modules); import resnet_fast; print(*(set(sys.modules) - before))"
    added = set(run([sys.executable, "-c", code]).stdout.split())
    heavy = {
        "torchvision",
        "triton",
        "torch._dynamo",
        "torch._inductor",
        "torch.onnx",
        "numpy",
        "matplotlib",
        "sklearn",
    }
    assert not added & heavy


def test_a_missing_extension_fails_these_tests(tmp_path):
    """The suite must not pass on PyTorch's own operators."""
    shutil.copytree(
        ROOT / "resnet_fast", tmp_path / "resnet_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    # An editable install would lend its extension to the copy.
    program = """if True:
        import sys, pytest
        sys.meta_path = [f for f in sys.meta_path if "__editable__" not in str(getattr(f, "__module__", ""))]
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/ops/test_add_relu.py", "-k", "equals_eager"]))
    """
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=clean_env(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stdout[-2000:]
    assert " passed" not in result.stdout.splitlines()[-1]

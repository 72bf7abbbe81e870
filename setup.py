"""Build of resnet_fast._C: one extension on the LibTorch Stable ABI, CPU kernels always, CUDA kernels where nvcc is.

Environment: USE_CUDA=0|1 (default: a CUDA toolkit is found), TORCH_CUDA_ARCH_LIST, DEBUG=1, MAX_JOBS, CXX, CUDA_HOME.
"""

import os
import platform
import re
import runpy
import shlex
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent.resolve()
CSRC = Path("kernels/csrc")
CLONE = runpy.run_path(str(ROOT / "resnet_fast/backends/clone.py"))  # the package itself wants torch
# The stable ABI as of this release is used, whatever torch the build finds: the result loads into it and later ones.
ABI_FLOOR = (2, 11)
CUDA_ARCHS = "8.0;9.0a;10.0+PTX"


def flag(name: str, default: bool) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value not in ("", "0", "1"):
        sys.exit(f"setup.py: {name} is {value!r}, want 0 or 1")
    return default if value == "" else value == "1"


def cuda_home() -> str | None:
    """The toolkit's folder, or None. Whether a GPU is visible is no matter: builds happen elsewhere."""
    nvcc = shutil.which("nvcc")
    on_path = str(Path(nvcc).resolve().parent.parent) if nvcc else None
    candidates = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), on_path, "/usr/local/cuda")
    # A wrapper script on PATH may lie outside the toolkit: the headers tell.
    found = (c for c in candidates if c and Path(c, "bin/nvcc").exists() and Path(c, "include/cuda_runtime.h").exists())
    return next(found, None)


def compiler() -> str | None:
    name = shlex.split(os.environ.get("CXX", "c++"))[0]
    return shutil.which(name) or shutil.which("g++")


def extension():
    from torch import __version__ as torch_version
    from torch.utils import cpp_extension

    if tuple(int(part) for part in torch_version.split(".")[:2]) < ABI_FLOOR:
        sys.exit(f"setup.py: torch is {torch_version}, want {ABI_FLOOR[0]}.{ABI_FLOOR[1]} or later")
    target = f"-DTORCH_TARGET_VERSION=0x{ABI_FLOOR[0]:02x}{ABI_FLOOR[1]:02x}000000000000ull"
    debug = flag("DEBUG", False)
    optimize = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    # Fused multiply-adds wherever the kernels say a * b + c; no other liberty with floating point. Some releases of
    # torch compile as C++17 unless told.
    cxx = [*optimize, "-std=c++20", target, "-Wall", "-ffp-contract=fast", "-fvisibility=hidden", "-fopenmp"]
    nvcc = [*optimize[:1], "-std=c++20", target, "-DUSE_CUDA", "--expt-relaxed-constexpr"]
    nvcc.append("-Xcompiler=-fvisibility=hidden")
    sources = [path for files in ("*.cpp", "chain/*.cpp", "cpu/**/*.cpp") for path in sorted(CSRC.glob(files))]
    link: dict[str, list[str]] = {"extra_link_args": ["-fopenmp"]}

    home = cuda_home()
    if flag("USE_CUDA", home is not None):
        if home is None:
            sys.exit("setup.py: USE_CUDA=1, but there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
        # torch leaves this unset where it was itself built without CUDA.
        cpp_extension.CUDA_HOME = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        archs = os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";").split(";")
        if {"9.0", "9.0a"} <= {arch.removesuffix("+PTX") for arch in archs}:
            sys.exit("setup.py: TORCH_CUDA_ARCH_LIST has 9.0 and 9.0a, want one: kernels by wgmma are in 9.0a alone")
        if "9.0a" in os.environ["TORCH_CUDA_ARCH_LIST"]:
            nvcc.append("-DRESNET_FAST_SM90A")  # wgmma exists there alone
        sources += sorted(CSRC.glob("cuda/**/*.cu"))
        # Static: the module loads on machines without a driver or a toolkit.
        link["libraries"] = ["cudart_static", "dl", "rt", "pthread"]
        link["library_dirs"] = [str(Path(home, part)) for part in ("lib64", "lib") if Path(home, part).exists()]
        cxx.append("-DRESNET_FAST_CUDA")
    return cpp_extension.CppExtension(
        "resnet_fast._C",
        [str(source) for source in sources],
        include_dirs=[str(ROOT / CSRC)] + ([str(Path(home, "include"))] if "libraries" in link else []),
        depends=[str(source) for source in CLONE["sources"](Path())],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        py_limited_api=True,
        **link,
    )


def included(source: Path) -> set[Path]:
    """The file, and the project's headers that it includes, by others too."""
    found, left = set(), [source]
    while left:
        path = left.pop()
        if path.exists() and path not in found:
            found.add(path)
            left += [CSRC / name for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)]
    return found


def build_arguments() -> dict:
    if compiler() is None:
        warnings.warn(
            "resnet_fast: no C++ compiler found (set CXX or install g++): installing without kernels. Everything runs "
            "on PyTorch's own operators; resnet_fast.backends.status() says so.",
            stacklevel=1,
        )
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class StampedBuild(BuildExtension):
        """Says beside an extension that is to be installed from which sources it was built."""

        def build_extensions(self) -> None:
            # A PyTorch without CUDA does not tell ninja which headers a .cu file includes.
            for source in CSRC.glob("cuda/**/*.cu"):
                built = Path(self.build_temp, source).with_suffix(".o")
                if built.exists() and built.stat().st_mtime < max(p.stat().st_mtime for p in included(source)):
                    built.unlink()
            super().build_extensions()

        def run(self) -> None:
            super().run()
            if not self.inplace:
                Path(self.build_lib, "resnet_fast", CLONE["DIGEST"]).write_text(CLONE["digest"](ROOT))

    tag = "cp310" if platform.python_implementation() == "CPython" else None
    return {
        "ext_modules": [extension()],
        "cmdclass": {"build_ext": StampedBuild},
        "options": {"bdist_wheel": {"py_limited_api": tag}} if tag else {},
    }


setup(
    packages=[*find_packages(include=["resnet_fast", "resnet_fast.*"]), "resnet_fast._triton"],
    package_dir={"resnet_fast._triton": "kernels/triton_ops"},
    package_data={"resnet_fast.gpu": ["choices/*.json"]},
    **build_arguments(),
)

"""What a clone of the sources lacks that an installation has, and where it is found.

An installation holds the extension, ``resnet_fast._C``, and Triton's kernels, ``resnet_fast._triton``. A clone has the
latter in ``kernels/triton_ops``, and the former only where it was built in place. Python that runs in a clone imports
the package from there, which hides one that ``pip install .`` has put elsewhere: that one's extension fits if it was
built from the very sources that the clone holds, and is taken then. This module does without PyTorch: setup.py runs it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["DIGEST", "digest", "find_triton_kernels", "hidden_extension", "load_extension", "misfit", "sources"]

# Beside the extension in an installation: the digest of its sources.
DIGEST = "_C.sources.sha256"
_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
_PACKAGE = Path(__file__).resolve().parent
_BUILD = "build it with a C++ compiler, pip install -e ."


def sources(clone: Path) -> list[Path]:
    """All that the extension is built from: C++ and CUDA, headers too, and what says how."""
    csrc = sorted(file for file in (clone / "kernels/csrc").rglob("*") if file.suffix in _SUFFIXES)
    return [file for file in (clone / "setup.py", *csrc) if file.is_file()] if csrc else []


def digest(clone: Path) -> str | None:
    """SHA-256 over names and contents of the extension's sources; None where there are none."""
    total, found = hashlib.sha256(), sources(clone)
    for file in found:
        content = file.read_bytes()
        total.update(f"{file.relative_to(clone).as_posix()} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest() if found else None


def _other_packages(package: Path) -> Iterator[Path]:
    """Folders of packages of this name, in the order in which Python would find them if ``package`` were not there."""
    for entry in sys.path:
        if Path(entry or ".").resolve() != package.parent:
            yield from _folder(PathFinder.find_spec("resnet_fast", [entry]))
    for finder in sys.meta_path:  # an editable installation has one of its own
        if finder is not PathFinder and hasattr(finder, "find_spec"):
            yield from _folder(finder.find_spec("resnet_fast", None))


def _folder(spec: ModuleSpec | None) -> Iterator[Path]:
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).resolve().parent


def hidden_extension(package: Path) -> ModuleSpec | None:
    """The extension of another package of this name that Python would find if ``package`` were not there."""
    for folder in _other_packages(package):
        spec = PathFinder.find_spec("resnet_fast._C", [str(folder)]) if folder != package else None
        if spec is not None and spec.origin is not None:
            return spec
    return None


def misfit(clone: Path, installed: Path) -> str | None:
    """Why the extension in the folder ``installed`` may not fit the Python code of ``clone``, or None."""
    ours, stamp = digest(clone), installed / DIGEST
    if ours is None:
        return f"cannot be compared with sources, of which there are none in {clone}"
    if not stamp.is_file():
        return "does not say from which sources it was built"
    return None if stamp.read_text().strip() == ours else f"was built from other sources than those in {clone}"


def load_extension() -> tuple[Any, str | None]:
    """``resnet_fast._C``, and None; or None, and why there is none and what to type."""
    try:
        return import_module("._C", __package__), None
    except ModuleNotFoundError:
        spec = hidden_extension(_PACKAGE)
    except ImportError as error:
        return None, f"resnet_fast._C does not load ({error}): {_BUILD}"
    if spec is None or spec.origin is None:
        return None, f"resnet_fast._C was not built: {_BUILD}"
    folder = Path(spec.origin).parent
    reason = misfit(_PACKAGE.parent, folder)
    if reason is not None:
        return None, (
            f"resnet_fast._C is not in {_PACKAGE}, which hides the package installed in {folder}, whose extension "
            f"{reason}: start Python in another folder than {_PACKAGE.parent} to use the installed package, or, to use "
            f"this one, {_BUILD}"
        )
    try:
        return _executed(spec), None
    except ImportError as error:
        return None, f"resnet_fast._C of the package installed in {folder} does not load ({error}): {_BUILD}"


def _executed(spec: ModuleSpec) -> ModuleType:
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


class _TritonKernels:
    """Finds ``resnet_fast._triton`` in a clone. A finder, because importing it takes Triton's second: at first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != "resnet_fast._triton":
            return None
        return spec_from_file_location(name, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)])


def find_triton_kernels() -> None:
    """From now on ``resnet_fast._triton`` is found in a clone, too."""
    folder = _PACKAGE.parent / "kernels/triton_ops"
    if folder.is_dir() and not (_PACKAGE / "_triton").exists():
        sys.meta_path.append(_TritonKernels(folder))

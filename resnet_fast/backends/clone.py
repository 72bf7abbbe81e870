"""Finds the extension and the Triton kernels where the package runs from a clone of the sources.

An installation holds the extension, ``resnet_fast._C``, and the Triton kernels, ``resnet_fast._triton``. A clone has
the kernels in ``kernels/triton_ops``, and the extension only if it was built in place. Python started in a clone
imports the package from there, which hides one installed elsewhere by ``pip install .``; the extension of that one is
loaded if it was built from exactly the sources of the clone. This module needs no PyTorch: setup.py runs it.
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

# The file beside an installed extension that holds the digest of its sources.
DIGEST = "_C.sources.sha256"
_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
_PACKAGE = Path(__file__).resolve().parents[1]
_BUILD = "build it with a C++ compiler, pip install -e ."


def sources(clone: Path) -> list[Path]:
    """All files that the extension is built from: C++ and CUDA sources, headers, setup.py."""
    csrc = sorted(file for file in (clone / "kernels/csrc").rglob("*") if file.suffix in _SUFFIXES)
    return [file for file in (clone / "setup.py", *csrc) if file.is_file()] if csrc else []


def digest(clone: Path) -> str | None:
    """SHA-256 of the names and contents of the extension's sources; None without sources."""
    total, found = hashlib.sha256(), sources(clone)
    for file in found:
        content = file.read_bytes()
        total.update(f"{file.relative_to(clone).as_posix()} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest() if found else None


def _other_packages(package: Path) -> Iterator[Path]:
    """Folders of packages of this name, in the order in which Python would find them without ``package``."""
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
    """The extension of the package that Python would find without ``package``, or None."""
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
    """``resnet_fast._C`` and None; or None, and why it cannot be loaded and what to type."""
    try:
        return import_module("resnet_fast._C"), None
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
    """Import finder of ``resnet_fast._triton`` in a clone. Lazy, because importing Triton takes a second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != "resnet_fast._triton":
            return None
        return spec_from_file_location(name, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)])


def find_triton_kernels() -> None:
    """Makes ``resnet_fast._triton`` importable in a clone."""
    folder = _PACKAGE.parent / "kernels/triton_ops"
    if folder.is_dir() and not (_PACKAGE / "_triton").exists():
        sys.meta_path.append(_TritonKernels(folder))

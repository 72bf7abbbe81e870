"""The C++ extension ``resnet_fast._C``, or why it is missing; the package imports it from here alone."""

from __future__ import annotations

from typing import Any

from . import clone

__all__ = ["extension", "missing"]

extension: Any  # resnet_fast._C
missing: str | None
extension, missing = clone.load_extension()
clone.find_triton_kernels()

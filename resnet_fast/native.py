"""The extension, or why there is none: what the rest of the package asks of it goes through here."""

from __future__ import annotations

from typing import Any

from . import clone

__all__ = ["extension", "missing"]

extension: Any  # resnet_fast._C
missing: str | None
extension, missing = clone.load_extension()
clone.find_triton_kernels()

"""What is left to say where PyTorch is not installed: what to type, and what ``doctor`` finds all the same."""

from __future__ import annotations

import sys
from typing import NoReturn

from . import system

__all__ = ["INSTALL", "stop"]

INSTALL = 'pip install "torch>=2.11"'


def stop() -> NoReturn:
    """Ends the import of the package.

    Raises:
        SystemExit: ``python -m resnet_fast...`` asked for it; a line is written, after the table of ``doctor``.
        ModuleNotFoundError: something else did.
    """
    reason = f"resnet_fast needs PyTorch, which is not installed: {INSTALL}"
    # Python puts the program's path there once it has found it, for which it imports the package.
    if sys.argv[0] != "-m":
        raise ModuleNotFoundError(reason, name="torch") from None
    if sys.argv[1:2] == ["doctor"] and "resnet_fast" in sys.orig_argv:
        system.show(
            {
                **system.package(),
                "extension": "not loaded: it needs PyTorch",
                **system.cpu(),
                "torch": f"not installed: {INSTALL}",
                **system.python(),
                **system.compilers(),
            }
        )
    sys.exit(reason)

"""Importing the package without PyTorch: says what to type, and still runs ``doctor`` as far as it goes."""

from __future__ import annotations

import sys
from typing import NoReturn

from . import system

__all__ = ["INSTALL", "stop"]

INSTALL = 'pip install "torch>=2.11"'


def stop() -> NoReturn:
    """Ends the import of the package.

    Raises:
        SystemExit: under ``python -m resnet_fast...``; prints the table of ``doctor`` if asked for, and a line.
        ModuleNotFoundError: otherwise.
    """
    reason = f"resnet_fast needs PyTorch, which is not installed: {INSTALL}"
    # argv[0] is "-m" while Python looks for the module to run, which imports the package.
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

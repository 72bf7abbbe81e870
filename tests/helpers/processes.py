"""pytest in a process of its own, started from a test."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A worker of pytest-xdist tells its children through these that they are one, too; options that were given to this
# run are not meant for theirs.
OF_PYTEST = ("PYTEST_XDIST_", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS")


def pytest_environment(**changes):
    """This process's environment without what pytest put there for itself, and with ``changes``."""
    return {k: v for k, v in os.environ.items() if not k.startswith(OF_PYTEST)} | changes


def run_pytest(*arguments, cwd=ROOT, **changes):
    """``python -m pytest *arguments``, with ``changes`` of the environment; its output is in ``stdout``."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
    environment = pytest_environment(**changes)
    return subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

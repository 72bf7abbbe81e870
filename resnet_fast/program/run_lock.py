"""One program at a time writes into a folder.

The lock is a record lock of the system (``fcntl``), which ends with the process that holds it, whatever ended that: a
file that a killed program left is no lock. Forked workers do not inherit it, so that none that outlives the program
keeps it. On NFS it holds across machines. The file only says who has it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from .options import ProgramError

__all__ = ["NAME", "hold"]

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def _locked(path: Path) -> int | None:
    """The descriptor of ``path``, created if need be and locked, or None if another process has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file after it was opened here: then another one is the lock.
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
            os.close(descriptor)
        except FileNotFoundError:
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return None
            raise


def _holder(path: Path) -> str:
    try:
        pid, host = path.read_text().split()
    except (OSError, ValueError):  # not written yet, or no longer there
        return "another process"
    return f"process {int(pid)} on {host}" if pid.isdigit() else "another process"


@contextlib.contextmanager
def hold(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Context manager: this process alone writes into ``folder``; waits ``patience`` seconds for another to end.

    Raises:
        ProgramError: another process holds the lock; the message names its id and host. Or there can be none: the file
            cannot be made, or the file system has no locks.
    """
    path, until = folder / NAME, time.monotonic() + patience
    try:
        while (descriptor := _locked(path)) is None:
            if time.monotonic() >= until:
                raise ProgramError(f"--out {folder} is in use by {_holder(path)}: want another --out, or its end")
            time.sleep(0.2)
    except OSError as error:
        hint = ": want --out on a file system with locks" if error.errno in _UNSUPPORTED else ""
        raise ProgramError(f"{path} cannot be locked: {error.strerror}{hint}") from error
    try:
        # For the message of who comes later; a full disk is for the checkpoints to report.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)

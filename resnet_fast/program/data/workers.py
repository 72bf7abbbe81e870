"""A DataLoader that says so where its workers cannot be started."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ..options import ProgramError

__all__ = ["Loader"]


class _Iterator(_MultiProcessingDataLoaderIter):
    def __init__(self, loader: DataLoader) -> None:
        try:
            super().__init__(loader)
        # RuntimeError: no thread can be started.
        except (OSError, RuntimeError) as error:
            self._shutdown = True  # `__del__` would look for what was not made
            for worker in getattr(
                self, "_workers", []
            ):  # they ignore SIGTERM for a while, for which the exit would wait
                worker.kill()
                worker.join()
            reason = getattr(error, "strerror", None) or error
            raise ProgramError(
                f"--workers {loader.num_workers}: a loading worker cannot be started: {reason}; want fewer of them"
            ) from error


class Loader(DataLoader):
    """A DataLoader.

    Raises, as it is iterated:
        ProgramError: a worker cannot be started; those that had been are ended.
    """

    def _get_iterator(self) -> Any:
        if self.num_workers == 0:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return _Iterator(self)

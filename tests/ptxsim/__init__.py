"""A PTX simulator: compiled GPU kernels run on the CPU, with memory, race and barrier checks and traffic counters."""

from .sim import Fault, Kernel, PtxError, Report

__all__ = ["Fault", "Kernel", "PtxError", "Report"]

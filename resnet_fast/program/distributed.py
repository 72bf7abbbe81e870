"""The processes that train together, started by torchrun, or a single one: the only user of torch.distributed here."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from .options import Options, ProgramError

__all__ = ["Processes"]


class Processes:
    """The process group. Methods are collective: every process calls them, in the same order."""

    def __init__(self, options: Options) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.launched = "RANK" in os.environ  # by torchrun
        cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise ProgramError("--device cuda, but no CUDA device is visible")
        if options.strategy == "fsdp" and "RANK" not in os.environ:
            raise ProgramError("--strategy fsdp shards over processes: start it with torchrun")
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ:
            # gloo carries signals and totals as CPU tensors, beside the gradients.
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def highest(self, value: int) -> int:
        """The maximum of ``value`` over the processes."""
        if self.world == 1:
            return value
        t = torch.tensor(value)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return int(t)

    def total(self, t: Tensor) -> Tensor:
        """The sum of ``t`` over the processes, on the CPU."""
        t = t.cpu()
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def everyone(self, value: Any) -> list[Any]:
        """``value`` of each process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, network: nn.Module) -> None:
        """Broadcasts buffers of rank 0, as DistributedDataParallel does before each step."""
        if self.world > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def join(self, network: nn.Module, strategy: str) -> nn.Module:
        """``network`` wrapped so that gradients are averaged over the processes: call the result in training."""
        if not dist.is_initialized():
            return network
        if strategy == "fsdp":
            mesh = init_device_mesh(self.device.type, (self.world,))
            for child in network.children():
                if isinstance(child, nn.Sequential):  # a stage: its weights are gathered while it computes
                    fully_shard(child, mesh=mesh)
            fully_shard(network, mesh=mesh)  # in place
            return network
        devices = None if self.device.index is None else [self.device.index]
        return DistributedDataParallel(network, device_ids=devices)

    @staticmethod
    def pass_without_sync(network: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Context manager of a pass: gradients are synchronised only in the ``last`` pass of a step."""
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        elif isinstance(network, DistributedDataParallel) and not last:
            return network.no_sync()
        return nullcontext()

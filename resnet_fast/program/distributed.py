"""The processes that train together, started by torchrun, or a single one: the only user of torch.distributed here."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from .options import Options, ProgramError

__all__ = ["FirstProcessError", "Processes"]

T = TypeVar("T")


class FirstProcessError(ProgramError):
    """An error of rank 0, which reports it, raised on the other processes so that they end with it."""


class Processes:
    """The process group. Methods are collective: every process calls them, in the same order."""

    def __init__(self, options: Options) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.launched = "RANK" in os.environ  # by torchrun
        self.world = int(os.environ.get("WORLD_SIZE", 1)) if self.launched else 1
        self.device = _device(options)
        if options.strategy == "fsdp" and not self.launched and options.evaluate is None:
            raise ProgramError("--strategy fsdp shards over processes: start it with torchrun")
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ:
            try:
                # gloo carries signals and totals as CPU tensors, beside the gradients.
                backend, store = "cpu:gloo,cuda:nccl" if cuda else "gloo", _store_of_the_attempt(self.rank, self.world)
                whom: dict[str, Any] = (
                    {} if store is None else {"store": store, "rank": self.rank, "world_size": self.world}
                )
                dist.init_process_group(backend, **whom)
            except (ValueError, RuntimeError) as error:  # RuntimeError: a store or a peer that does not answer
                reason = str(error).strip().splitlines()[0]
                raise ProgramError(f"the processes cannot be joined: {reason}; start them with torchrun") from error
        # How often torchrun started these processes again: an agent that joined later has counted less.
        self.restarts = self.highest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))

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

    def from_first(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on rank 0, on every process; where it raises ProgramError there, all raise it."""
        if self.world == 1:
            return action()
        answer: list[Any] = [None, None]  # the result, the message of an error
        failure = None
        if self.rank == 0:
            try:
                answer[0] = action()
            except ProgramError as error:
                failure, answer[1] = error, str(error)
        dist.broadcast_object_list(answer, 0, device=torch.device("cpu"))
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise FirstProcessError(answer[1])
        return answer[0]

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


def _store_of_the_attempt(rank: int, world: int) -> dist.Store | None:
    """The store of torchrun's agent, with keys of this attempt's own; None where there is no such store.

    The agent keeps one store over all restarts, and with it the addresses of processes that are gone. Rank 0 names the
    attempt; each other process answers by a name of its own, and goes on once rank 0 has had that very answer: an
    earlier attempt had others.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    mine, until = uuid.uuid4().hex, time.monotonic() + 300
    if rank == 0:
        store.set("attempt", mine)
        answers = [f"{mine}/{other}" for other in range(1, world)]
        if answers:
            store.wait(answers)
        store.set(f"{mine}/go", " ".join(store.get(answer).decode() for answer in answers))
        return dist.PrefixStore(mine, store)
    while time.monotonic() < until:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{rank}", mine)
        if store.check([f"{attempt}/go"]) and mine in store.get(f"{attempt}/go").decode():
            return dist.PrefixStore(attempt, store)
        time.sleep(0.05)
    raise RuntimeError("rank 0 does not answer")


def _device(options: Options) -> torch.device:
    """The device of this process, which ``--device`` and torchrun's ``LOCAL_RANK`` name."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device == "cuda" and not visible:
        raise ProgramError("--device cuda, but no CUDA device is visible")
    if options.device == "cpu" or not visible:
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= visible:
        raise ProgramError(f"{visible} CUDA devices are visible: want at most as many processes (--nproc-per-node)")
    return torch.device("cuda", local)

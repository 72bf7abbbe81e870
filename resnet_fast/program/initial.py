"""Weights to start from: of a checkpoint of this program, or of a ``state_dict`` under the names of torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import checkpoints
from .options import ProgramError

__all__ = ["Taken", "head_of", "take", "weights_of"]


class Taken(NamedTuple):
    """Names of a network's tensors that a file gave, and of those left as they were, each with the reason."""

    taken: list[str]
    left: dict[str, str]

    def __str__(self) -> str:
        text = f"{len(self.taken)} of {len(self.taken) + len(self.left)} tensors taken"
        if self.left:
            text += "; left as they were: " + ", ".join(f"{name} ({why})" for name, why in self.left.items())
        return text


def weights_of(content: Any) -> dict[str, Tensor] | None:
    """The tensors of a loaded file by the network's names: averaged weights of a checkpoint that has them; else its
    model's; else a ``state_dict``, also as ``["state_dict"]`` or ``["model"]``. None if there is none.

    Prefixes of wrappers (DistributedDataParallel, torch.compile) are taken off.
    """
    if not isinstance(content, Mapping):
        return None
    for key in ("ema", "state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for prefix in ("module.", "_orig_mod."):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    weights.pop("n_averaged", None)
    return weights or None


def head_of(network: nn.Module) -> str:
    """The name of the network's last layer, the classifier."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def take(network: nn.Module, path: Path) -> Taken:
    """Copies the weights of file ``path`` into ``network``; the last layer may be missing there or have other classes.

    Raises:
        ProgramError: the file cannot be loaded, or its tensors are not those of the network.
    """
    weights = weights_of(checkpoints.content(path))
    if weights is None:
        raise ProgramError(f"--init {path} holds no weights: want a checkpoint or a state_dict")
    own = network.state_dict()
    head = head_of(network) + "."
    left: dict[str, str] = {}
    for name, tensor in own.items():
        given = weights.get(name)
        if given is not None and given.shape == tensor.shape:
            continue
        found = "not in the file" if given is None else f"{_shape(given)} in the file, want {_shape(tensor)}"
        # Files from before PyTorch 0.4.1 do not count batches.
        if not name.startswith(head) and not name.endswith("num_batches_tracked"):
            raise ProgramError(f"--init {path} is of another network: {name} is {found}")
        left[name] = found
    strange = sorted(name for name in weights.keys() - own.keys() if not name.startswith(head))
    if strange:
        raise ProgramError(f"--init {path} is of another network: it has {strange[0]}, which --model lacks")
    taken = [name for name in own if name not in left]
    network.load_state_dict({name: weights[name] for name in taken}, strict=False)
    return Taken(taken, left)

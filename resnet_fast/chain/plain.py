"""Fused modules as TorchScript can compile them: instances of the plain PyTorch class that share the parameters."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from .. import reference

__all__ = ["as_plain", "plain_class"]


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The plain PyTorch class behind a class of this package. Subclasses from elsewhere are returned as they are."""
    if kind.__module__.partition(".")[0] != "resnet_fast":
        return kind
    return next(c for c in kind.__mro__ if c.__module__ == reference.__name__ or c.__module__.startswith("torch."))


def as_plain(module: nn.Module, kind: type[nn.Module], without: Container[str] = ()) -> nn.Module:
    """An instance of ``kind`` that shares all attributes of ``module`` except those in ``without``."""
    if type(module) is kind:
        return module
    plain = kind.__new__(kind)
    plain.__dict__.update({name: value for name, value in vars(module).items() if name not in without})
    plain.__dict__["_modules"] = dict(module._modules)
    return plain

"""Cuts a matched chain at stages of residual blocks, lest a stage's small filters wait for the next stage's large ones.

``fuse`` sees modules and takes a stage at a time. Dynamo's graph has no modules, but knows whose code each node comes
from; :mod:`.graph` calls :func:`stages` for each chain that it finds.
"""

from __future__ import annotations

from itertools import groupby

from torch import fx

from ..fusion.pattern import MatchedChain, MatchedLayer
from .lift import path_of

__all__ = ["stages"]

Path = tuple[str, ...]


def _path(layer: MatchedLayer) -> Path:
    """The innermost module that all of the layer's code is in."""
    paths = [path_of(n) for n in (layer.conv, layer.bn, layer.add, layer.relu) if n is not None]
    common: list[str] = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return tuple(common)


def _groups(
    layers: list[MatchedLayer], paths: dict[fx.Node, Path], depth: int
) -> list[tuple[Path, list[MatchedLayer]]]:
    """Consecutive layers in one module of this depth; the paths of those outside of such a module are shorter."""
    return [(key, list(of)) for key, of in groupby(layers, lambda layer: paths[layer.value][:depth])]


def _is_stage(key: Path, layers: list[MatchedLayer], paths: dict[fx.Node, Path], depth: int) -> bool:
    """Whether there are residual blocks among the modules in the module ``key`` of this depth."""
    if len(key) < depth:
        return False
    blocks = _groups(layers, paths, depth + 1)
    return any(len(inner) > depth and any(layer.add is not None for layer in block) for inner, block in blocks)


def _cut(layers: list[MatchedLayer], paths: dict[fx.Node, Path], depth: int) -> list[list[MatchedLayer]]:
    groups = _groups(layers, paths, depth)
    if len(groups) == 1:
        return _cut(layers, paths, depth + 1) if len(groups[0][0]) == depth else [layers]
    if not any(_is_stage(key, of, paths, depth) for key, of in groups):
        return [layers]
    pieces: list[list[MatchedLayer]] = []
    apart = True
    for key, of in groups:
        stage = _is_stage(key, of, paths, depth)
        if stage or apart:
            pieces += [of] if not stage else _cut(of, paths, depth + 1)
        else:
            pieces[-1] = pieces[-1] + of
        apart = stage
    return pieces


def stages(chain: MatchedChain) -> list[list[MatchedLayer]]:
    """The layers of ``chain``, cut in front of and behind stages where one value is all that goes on."""
    paths = {layer.value: _path(layer) for layer in chain.layers}
    pieces: list[list[MatchedLayer]] = []
    for piece in _cut(chain.layers, paths, 1):
        while pieces and not _reads_only(piece, pieces[-1][-1].value):
            piece = pieces.pop() + piece
        pieces.append(piece)
    return pieces


def _reads_only(piece: list[MatchedLayer], value: fx.Node) -> bool:
    known = {value, *(layer.value for layer in piece)}
    return all(layer.inputs <= known for layer in piece)

"""Which collective carries which statistics; the rest needs processes: ``tests/helpers/program/synchronized.py``."""

import pytest
from torch import nn

from resnet_fast import blocks
from resnet_fast.chain.record import ChainRecorder
from resnet_fast.chain.training.function import Program
from resnet_fast.chain.training.synchronized import batches


def layers_of(module):
    recorder = ChainRecorder(training=True)
    nn.SyncBatchNorm.convert_sync_batchnorm(module).emit(recorder, 0)
    program = Program(recorder.pairs, recorder.specs)
    return [layer._replace(synced=own) for layer, own in zip(program.layers, program.synced, strict=True)]


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (lambda: blocks.BasicBlock(4, 4), {0: [0], 1: [1]}),
        (lambda: blocks.BasicBlock(4, 8, 2), {0: [0], 2: [1, 2]}),  # 1: the projection
        (lambda: blocks.Bottleneck(4, 4, 2), {0: [0], 1: [1], 3: [2, 3]}),
        (lambda: blocks.Stage(blocks.BasicBlock(4, 8), blocks.BasicBlock(8, 8)), {0: [0], 2: [1, 2], 3: [3], 4: [4]}),
    ],
)
def test_batches(module, wanted):
    assert batches(layers_of(module())) == wanted


def test_projection_before_the_block():
    """Either collective could carry it: the first then need not wait for it."""
    conv1, projection, conv2 = layers_of(blocks.BasicBlock(4, 8, 2))
    assert batches([projection, conv1._replace(source=0), conv2._replace(source=2, residual=1)]) == {1: [1], 2: [0, 2]}


def test_layers_that_are_not_synchronized():
    layers = layers_of(blocks.Bottleneck(4, 4, 2))
    layers[1] = layers[1]._replace(synced=False)
    assert batches(layers) == {0: [0], 3: [2, 3]}
    assert batches([layer._replace(synced=False) for layer in layers]) == {}

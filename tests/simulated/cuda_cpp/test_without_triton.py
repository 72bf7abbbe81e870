"""The kernels in CUDA C++ where Triton is not installed: an environment that has everything else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import ROOT, pytest_environment

PROGRAM = """
import json, importlib.util
import torch
from helpers.cuda_support import find_cuda
from ptxsim.device import simulated
import resnet_fast
from resnet_fast import backends, ops
from resnet_fast.gpu import tune

assert importlib.util.find_spec("triton") is None
x = torch.randint(-2, 3, (1, 16, 6, 6)).half()
weight = torch.randint(-1, 2, (16, 16, 3, 3)).half()
block = resnet_fast.blocks.BasicBlock(16, 16).half()
with simulated(find_cuda=find_cuda) as device:
    status = backends.status()
    with torch.no_grad():
        y = ops.conv_bn_relu(x, weight, padding=1)
        block.eval()(x)
        with tune.use(tune.LIBRARY):
            z = ops.conv_bn_add_relu(x, x, weight, padding=1)
    block.float().train()(x.float())
exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
found = {
    "status": status,
    "launches": [name for name, _ in device.launches],
    "equal": torch.equal(y.double(), exact.relu()),
    "library": torch.equal(z.double(), (exact + x.double()).relu()),
    "fallbacks": backends.fallbacks(),
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a process finds whose packages are this one's but for Triton."""
    packages = tmp_path_factory.mktemp("packages")
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith(("triton", "__editable__", "zz_")) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", packages)))
    ended = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM],
        env=pytest_environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_inference_runs_on_them(found):
    assert found["equal"]
    assert found["library"]  # PyTorch's convolution and what comes behind it
    assert len(found["launches"]) == 3  # the operator, and two convolutions of a block
    assert all(name.startswith("conv_bn_relu_fwd_kernel<") for name in found["launches"])


def test_training_runs_unfused_and_says_why(found):
    assert found["fallbacks"] == {"BasicBlock: no training without Triton: pip install triton": 1}


def test_the_status_says_what_is_missing(found):
    assert found["status"]["cuda"] == "loaded, but training and check_weights need Triton, too: pip install triton"
    assert found["status"]["triton"] == "not installed: pip install triton"

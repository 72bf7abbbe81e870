"""Benchmarks in bfloat16: results are checked before they are timed."""

import pytest
import torch

from benchmarks.cases import Case, ConvBnRelu
from benchmarks.gpu import device as devices
from benchmarks.runner import Bench
from benchmarks.verify import WrongResultError


@pytest.mark.parametrize("name", ["eager channels_last", "resnet_fast"])
def test_benchmarks_check_results_in_bf16(name):
    case = Case("small", (2, 16, 8, 8), lambda: ConvBnRelu(16))
    bench = Bench(case, devices.of("cpu", "bfloat16", False))
    result = bench.call(name, "random")()
    assert result.dtype == torch.bfloat16
    assert 0 < bench.errors[name] < 2
    broken = bench._references["random"]
    with pytest.raises(WrongResultError):
        broken.check(name, result + 0.05)

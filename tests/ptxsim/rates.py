"""How fast the simulator runs, all checks on: `PYTHONPATH=.:tests python -m ptxsim.rates`; best of several launches."""

import time

import torch

from . import triton_kernels as kernels
from .device import SimulatedDevice

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


def cases():
    for name, dtype in DTYPES.items():
        x, f = torch.randn(2, 14, 14, 128).to(dtype), torch.randn(3, 3, 128, 128).to(dtype)
        tile = {"C": 128, "K": 128, "BM": 64, "BN": 64, "BC": 32}
        args = (x, f, torch.zeros(128), torch.empty_like(x), 2, 14, 14)
        yield f"3x3 convolution 2x14x14x128 {name}", kernels.conv3x3, (7, 2), args, tile
        a, b, out = torch.randn(512, 512).to(dtype), torch.randn(512, 512).to(dtype), torch.empty(512, 512)
        tile = {"BM": 64, "BN": 64, "BK": 32, "num_stages": 3}
        yield f"matmul 512x512x512 {name}", kernels.matmul, (8, 8), (a, b, out, 512, 512, 512), tile
    x = torch.randn(64, 1000)
    yield "softmax 64x1000", kernels.softmax, (64,), (x, torch.empty_like(x), 1000), {"B": 1024}


def main() -> None:
    torch.set_num_threads(1)
    for name, kernel, grid, args, meta in cases():
        device, seconds = SimulatedDevice(), []
        for _ in range(9):
            start = time.process_time()
            device.triton(kernel, grid, args, meta)
            seconds.append(time.process_time() - start)
        report, best = device.launches[-1][1], min(seconds)
        lanes, flops = report.lane_instructions / best / 1e6, sum(report.mma_flops.values()) / best / 1e9
        print(f"{name}: {lanes:.0f} M lane-instructions/s, {flops:.1f} GFLOP/s")


if __name__ == "__main__":
    main()

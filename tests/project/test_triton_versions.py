"""The release of Triton that GPU images carry, beside the pinned one: another compiler takes another liberty.

`make test` puts it into a folder beside the environment; `make test-triton-versions` runs more with it and others.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = "3.6.0"
KERNELS = "tests/simulated/triton_kernels"
# What that release was seen to compile wrongly, and one of each of the convolutions with all that they can be given.
TESTS = (
    f"{KERNELS}/test_zero_trips_triton.py",
    "tests/simulated/engine/test_tape.py::test_what_the_driver_is_given",
    "tests/simulated/engine/test_tape.py::test_split_sums_in_triton",
    f"{KERNELS}/test_training_triton.py::test_operators"
    "[(40, 8, (3, 4), 16, (2, 3), (3, 1), (1, 0))-torch.bfloat16-kernels]",
)
PROGRAM = """
import sys, pytest, triton
assert triton.__version__ == sys.argv[1], triton.__file__
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def test_kernels_compiled_by_the_triton_of_gpu_images():
    folder = Path(f"{sys.prefix}-triton", VERSION)
    assert (folder / "triton").is_dir(), f"{folder} has no Triton: `make test` puts it there"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, VERSION, *TESTS], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]

import pytest
from helpers.cuda_support import cuda_device


@pytest.fixture
def device():
    """Runs the operators on the kernels in CUDA C++."""
    with cuda_device() as simulated:
        yield simulated

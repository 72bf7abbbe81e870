"""Threads of Python, threads of PyTorch, forked workers; results that repeat to the bit."""

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers.processes import pytest_environment
from helpers.support import OPS, exact_kernels, random_case, twins
from torch.utils.data import DataLoader, Dataset

import resnet_fast
from resnet_fast import blocks, ops, reference


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model():
    fast, _ = twins(resnet_fast.cifar_resnet20, reference.cifar_resnet20)
    return fast.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("winograd", [True, False])
def test_models_do_not_depend_on_the_number_of_threads(batch, winograd, restore_threads):
    x, results = torch.randn(batch, 3, 20, 20), []
    fast = model()
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        if winograd:
            results.append(fast(x))
        else:
            with exact_kernels():
                results.append(fast(x))
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    # The last filter is large enough to be split over threads by output channels.
    "shape",
    [(1, 16, (30, 31), 17, 3, 1, 1), (3, 17, (9, 9), 64, 3, 2, 1), (1, 256, (7, 7), 256, 3, 1, 1)],
    ids=str,
)
def test_operators_do_not_depend_on_the_number_of_threads(op, shape, restore_threads):
    case, results = random_case(*shape), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(case.fused(op))
    assert all(torch.equal(r, results[0]) for r in results)


def test_add_relu_does_not_depend_on_the_number_of_threads(restore_threads):
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(300_001).to(dtype) for _ in range(2))
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ops.add_relu(a, b), (a + b).relu())


@torch.no_grad()
def test_results_repeat():
    x = torch.randn(3, 3, 20, 20)
    first = model()(x)
    for _ in range(5):
        torch.manual_seed(0)
        assert torch.equal(model_of_seed_zero()(x), model_of_seed_zero()(x))
    fast = model()
    fast.load_state_dict(fast.state_dict())
    assert all(torch.equal(fast(x), fast(x)) for _ in range(10))
    assert first.isfinite().all()


def model_of_seed_zero():
    torch.manual_seed(0)
    return model()


def test_gradients_repeat():
    fast, _ = twins(blocks.Block, reference.Block, 16, 32, 2)
    x = torch.randn(3, 16, 9, 9)
    grads = []
    for _ in range(3):
        fast.zero_grad()
        fast(x).square().sum().backward()
        grads.append([p.grad for p in fast.parameters()])
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


STEPS = """
import hashlib, torch
from resnet_fast import blocks

torch.set_num_threads(3)
digest = hashlib.sha256()
for block in (blocks.Block(16, 8, 2), blocks.Bottleneck(16, 32, 1)):
    torch.manual_seed(0)
    for p in block.parameters():
        torch.nn.init.normal_(p)
    for size, dtype in ((7, torch.float32), (7, torch.bfloat16), (24, torch.float32)):
        x = torch.randn(5, 16, size, size).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = block.train()(x)
        y.float().square().sum().backward()
        for t in (y, x.grad, *(p.grad for p in block.parameters())):
            digest.update(t.detach().float().contiguous().numpy().tobytes())
print(torch.get_num_threads(), digest.hexdigest())
"""


def test_training_repeats_where_threads_do_not_come():
    """A pool with fewer threads than were asked for, as on a busy machine: sums have the same parts all the same."""
    found = []
    for limits in ({}, {"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "2"}):
        environment = pytest_environment(**limits)
        done = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0].startswith("3 ")
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize("threads", [1, 2])
def test_python_threads_share_a_model(threads, restore_threads):
    """The first calls race for the packing, too."""
    torch.set_num_threads(threads)
    fast, failures = model(), []
    inputs = [torch.randn(batch, 3, 16, 16) for batch in (1, 2, 5)]
    with torch.no_grad():
        expected = [twin(x) for twin in [model_with_the_weights_of(fast)] for x in inputs]
    barrier = threading.Barrier(4)

    def work():
        barrier.wait()
        with torch.no_grad():
            for _ in range(10):
                for x, y in zip(inputs, expected, strict=True):
                    if not torch.equal(fast(x), y):
                        failures.append(x.shape)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert not any(worker.is_alive() for worker in workers)
    assert failures == []


def model_with_the_weights_of(fast):
    twin = resnet_fast.cifar_resnet20()
    twin.load_state_dict(fast.state_dict())
    return twin.eval()


class Features(Dataset):
    """A data set that runs a network, as some that embed images do."""

    def __init__(self, fast, images):
        self.fast, self.images = fast, images

    def __len__(self):
        return len(self.images)

    @torch.no_grad()
    def __getitem__(self, i):
        return self.fast(self.images[i : i + 1])[0]


@torch.no_grad()
def test_forked_data_loader_workers():
    """After the parent's own thread pool has started, which does not survive the fork."""
    fast, images = model(), torch.randn(6, 3, 16, 16)
    expected = torch.cat([fast(image[None]) for image in images])
    loader = DataLoader(
        Features(fast, images), batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    assert torch.equal(torch.cat(list(loader)), expected)


def child(fast, images, queue):
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(fast(images).numpy())


@torch.no_grad()
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes(method):
    fast, images = model(), torch.randn(3, 3, 16, 16)
    expected = fast(images)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=child, args=(fast, images, queue))
    process.start()
    result = torch.from_numpy(queue.get(timeout=120))
    process.join(timeout=60)
    assert process.exitcode == 0
    assert torch.equal(result, expected)


@torch.no_grad()
def test_inside_a_parallel_region():
    """As a function of torch.jit's or of an inter-op pool: no thread waits for one that will not come."""
    fast, x = model(), torch.randn(1, 3, 16, 16)
    expected = fast(x)
    futures = [torch.jit.fork(lambda: fast(x)) for _ in range(4)]
    assert all(torch.equal(torch.jit.wait(f), expected) for f in futures)


@torch.no_grad()
def test_more_threads_than_cores(restore_threads):
    fast, x = model(), torch.randn(1, 3, 16, 16)
    expected = fast(x)
    torch.set_num_threads(2 * (os.cpu_count() or 1) + 1)
    for _ in range(20):
        assert torch.equal(fast(x), expected)

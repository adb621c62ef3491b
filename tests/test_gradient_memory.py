"""The memory of large CPU gradients, which is kept for the next one; values against float64."""

import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused_xent
from fused_xent import cross_entropy

pytestmark = pytest.mark.cpu("only gradients on the CPU are kept")

SHAPE = (64, 1 << 15)  # 8 MiB in float32
LEAST = 4 << 20


@pytest.fixture(autouse=True)
def empty():
    fused_xent.empty_cache()
    yield
    fused_xent.empty_cache()


def make(shape=SHAPE, dtype=torch.float32, seed=0):
    """Return logits and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    rows = (shape[0], *shape[2:])
    return logits, torch.randint(shape[1], rows, generator=generator)


def gradient_of(logits, target, **options):
    return torch.autograd.grad(cross_entropy(logits, target), logits, **options)[0]


def expected(logits, target):
    exact = logits.detach().double().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(exact, target), exact)[0]


def check(gradient, logits, target):
    assert gradient.dtype == logits.dtype
    assert gradient.stride() == logits.stride()
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(gradient.dtype, 1e-5)
    exact = expected(logits, target)
    torch.testing.assert_close(gradient.double(), exact, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_training_loop_uses_the_same_memory(dtype):
    addresses = set()
    for seed in range(4):
        logits, target = make(dtype=dtype, seed=seed)
        gradient = gradient_of(logits, target)
        check(gradient, logits, target)
        addresses.add(gradient.data_ptr())
        assert fused_xent.empty_cache() == 0 or seed == 0  # a tensor uses it
        del gradient
    assert len(addresses) == 1
    assert fused_xent.empty_cache() == logits.nbytes
    assert fused_xent.empty_cache() == 0


@pytest.mark.parametrize(
    "logits",
    [
        torch.randn(8, 21, 80, 80).to(memory_format=torch.channels_last),
        torch.randn(300, 4096).mT,
        torch.randn(2, 4096, 3, 5, 9, 1)[..., 0].permute(0, 1, 3, 2, 4),
        torch.randn(64, 40000)[:, :32768],
    ],
    ids=["channels last", "transposed", "permuted", "part"],
)
def test_layouts(logits):
    rows = (logits.shape[0], *logits.shape[2:])
    target, logits = torch.randint(logits.shape[1], rows), logits.requires_grad_()
    like = torch.empty_like(logits)
    for _ in range(2):
        gradient = gradient_of(logits, target)
        assert gradient.stride() == like.stride()
        torch.testing.assert_close(
            gradient.double(), expected(logits, target), rtol=1e-5, atol=1e-7
        )
        del gradient
        assert fused_xent.empty_cache() == logits.numel() * 4


VIEWS = {
    "a row": lambda gradient: gradient[5],
    "detached": lambda gradient: gradient.detach(),
    "numpy": lambda gradient: torch.from_numpy(gradient.numpy()),
    "its storage": lambda gradient: torch.empty(0).set_(gradient.untyped_storage()),
    "dlpack": lambda gradient: torch.from_dlpack(gradient),
}


@pytest.mark.parametrize("name", VIEWS)
def test_memory_that_a_view_uses_is_not_written_to(name):
    logits, target = make()
    view = VIEWS[name](gradient_of(logits, target))
    before = view.clone()
    others = [gradient_of(*make(seed=seed)) for seed in (1, 2)]
    assert torch.equal(view, before)
    assert len({view.untyped_storage().data_ptr(), *(x.data_ptr() for x in others)}) == 3


def test_gradients_in_a_graph():
    """Accumulated in .grad, of a kept graph, and with a graph of their own."""
    logits, target = make()
    loss = cross_entropy(logits, target)
    loss.backward(retain_graph=True)
    address = logits.grad.data_ptr()
    loss.backward()  # adds to .grad
    torch.testing.assert_close(logits.grad.double(), 2 * expected(logits, target))
    assert logits.grad.data_ptr() == address
    logits.grad = None
    gradient = gradient_of(logits, target, create_graph=True)
    assert gradient.data_ptr() == address
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    check(gradient.detach(), logits, target)
    exact = logits.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(F.cross_entropy(exact, target), exact, create_graph=True)
    (expected_second,) = torch.autograd.grad(first.square().sum(), exact)
    torch.testing.assert_close(second.double(), expected_second, rtol=1e-4, atol=1e-12)


def test_at_most_one_gradient_is_kept():
    """The last one that was freed."""
    gradients = [gradient_of(*make((rows, 1 << 15))) for rows in (48, 64, 80)]
    while gradients:
        gradients.pop()
    assert fused_xent.empty_cache() == 48 * 4 << 15
    assert fused_xent.empty_cache() == 0


@pytest.mark.parametrize(
    ("rows", "is_reused"), [(64, True), (40, True), (32, True), (65, False), (31, False)]
)
def test_memory_is_reused_for_gradients_of_at_least_half_its_size(rows, is_reused):
    vocab = 1 << 16
    gradient_of(*make((64, vocab)))  # is freed at once
    logits, target = make((rows, vocab))
    gradient = gradient_of(logits, target)
    check(gradient, logits, target)
    assert gradient.untyped_storage().nbytes() == logits.nbytes
    assert fused_xent.empty_cache() == 0  # what does not fit has been freed
    del gradient
    assert fused_xent.empty_cache() == (64 if is_reused else rows) * vocab * 4


@pytest.mark.parametrize("n_bytes", [LEAST - 4, LEAST])
def test_small_gradients_are_torchs(n_bytes):
    logits = torch.randn(1, n_bytes // 4, requires_grad=True)
    resizable = gradient_of(logits, torch.tensor([3])).untyped_storage().resizable()
    assert resizable == (n_bytes < LEAST)
    assert fused_xent.empty_cache() == (n_bytes if n_bytes >= LEAST else 0)


def test_threads():
    """Each has its own gradient at any time."""
    problems = [make(seed=seed) for seed in range(3)]
    exact = [expected(*problem) for problem in problems]
    wrong = []

    def run(i):
        for _ in range(8):
            gradient = gradient_of(*problems[i])
            if not torch.allclose(gradient.double(), exact[i], rtol=1e-5, atol=1e-7):
                wrong.append(i)
            del gradient

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fused_xent.empty_cache() == problems[0][0].nbytes
    assert fused_xent.empty_cache() == 0


PROGRAM = """
import os, torch, fused_xent
def step():
    logits = torch.ones(64, 1 << 15, requires_grad=True)
    fused_xent.cross_entropy(logits, torch.arange(64)).backward()
    return logits.grad
"""


@pytest.mark.parametrize(("value", "kept"), [("0", 0), ("1", 8 << 20), ("", 8 << 20)])
def test_environment_variable(value, kept, run_python):
    program = f"{PROGRAM}step(); print(fused_xent.empty_cache())"
    result = run_python("-c", program, FUSED_XENT_KEEP_GRADIENT=value)
    assert result.stdout == f"{kept}\n", result.stderr


def test_at_exit(run_python):
    """One gradient is kept, and another one lives until the interpreter has gone."""
    program = f"{PROGRAM}step(); living = step(); torch.living = step(); step()"
    result = run_python("-X", "faulthandler", "-c", program)
    assert (result.returncode, result.stderr) == (0, "")


def test_fork(run_python):
    """Nothing is kept across a fork; both processes keep on computing, with memory of their own."""
    program = f"""{PROGRAM}
torch.set_num_threads(1)
living, expected = step(), step().clone()
child = os.fork()
kept = fused_xent.empty_cache()
right = all(torch.equal(x, expected) for x in (living, step(), step()))
if child == 0:
    os._exit(0 if right and kept == 0 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), right, kept)
"""
    result = run_python("-c", program)
    assert result.stdout == "0 True 0\n", result.stderr


@pytest.mark.parametrize("permuted", [False, True])
def test_nothing_is_allocated_beside_kept_memory(permuted):
    """Deterministic algorithms would fill, and so touch, whatever torch allocates."""
    logits, target = make()
    if permuted:
        logits = logits.detach().T.contiguous().T.requires_grad_()
    loss = cross_entropy(logits, target)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        (gradient,) = torch.autograd.grad(loss, logits)
    check(gradient, logits, target)
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    assert sizes
    assert max(sizes) < LEAST


EMPTYING = """
import os, torch, fused_xent
def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
logits = torch.randn(512, 1 << 15, requires_grad=True)
fused_xent.cross_entropy(logits, torch.zeros(512, dtype=torch.int64)).backward()
logits.grad = None
before = resident()
kept = fused_xent.empty_cache()
print(kept == logits.nbytes, before - resident() > kept // 2)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_emptying_returns_memory_to_the_system(run_python):
    """In a new process: malloc keeps blocks that it takes from a fragmented heap."""
    result = run_python("-c", EMPTYING)
    assert result.stdout == "True True\n", result.stderr

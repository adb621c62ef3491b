"""Kernels access no memory outside the logits: protected pages around them would crash."""

from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.cpu("mprotect guards CPU memory only"),
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs mprotect of Linux"),
]

BETWEEN_GUARDS = """
import ctypes, mmap, sys
import torch, fused_xent

PAGE = mmap.PAGESIZE
mprotect = ctypes.CDLL(None).mprotect
MODES = ({}, {"inplace_backward": True}, {"grad_in_forward": True})


class Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf, memory):
        return memory.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def between_guards(n_bytes, at_end):
    size = -(-n_bytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + PAGE + size):
        assert mprotect(ctypes.c_void_p(guard), PAGE, 0) == 0
    offset = PAGE + (size - n_bytes if at_end else 0)
    return torch.frombuffer(memory, dtype=torch.uint8, count=n_bytes, offset=offset)


def check(dtype, n_classes, at_end, mode, is_ignored):
    row, beyond = (2, n_classes + 100) if at_end else (0, -100)
    target = torch.arange(3)
    target[row] = beyond
    options = {"ignore_index": beyond}
    if not is_ignored:
        options = {"token_weight": torch.ones(3).index_fill(0, torch.tensor(row), 0)}
    logits = between_guards(3 * n_classes * dtype.itemsize, at_end).view(dtype).view(3, n_classes)
    leaf = torch.zeros_like(logits.normal_()).requires_grad_()
    loss = fused_xent.cross_entropy(Computed.apply(leaf, logits), target, **options, **mode)
    loss.backward()
    assert leaf.grad[row].eq(0).all() and leaf.grad.isfinite().all()


dtype = getattr(torch, sys.argv[1])
for n_classes in (9, 300, 20000):
    for at_end in (False, True):
        for mode in MODES[: 2 if dtype == torch.float16 else 3]:
            for is_ignored in (False, True):
                check(dtype, n_classes, at_end, mode, is_ignored)
"""


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_logits_between_guards(dtype, run_python):
    """The row at the edge is dropped, and its target points beyond the edge."""
    result = run_python("-c", BETWEEN_GUARDS, dtype)
    assert result.returncode == 0, result.stderr[-2000:]


CHANGING = """
import threading, time
import torch
from fused_xent import cross_entropy, selective_log_softmax

def sparse(logits, index):
    cross_entropy(logits, torch.ones(index.shape), target_indices=index)

CALLS = (
    (sparse, (256, 16), (256, 64)),
    (selective_log_softmax, (256, 16), (256, 64)),
    (cross_entropy, (16384, 300), (16384,)),
    (cross_entropy, (16384, 16), (16384,)),
)
for call, of_logits, of_index in CALLS:
    logits, index, is_done = torch.zeros(of_logits), torch.zeros(of_index).long(), False

    def change():
        while not is_done:
            index.fill_(2**40)
            index.zero_()

    thread = threading.Thread(target=change)
    thread.start()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        try:
            call(logits, index)
        except IndexError:
            pass
    is_done = True
    thread.join()
"""


def test_classes_that_another_thread_changes(run_python):
    """Kernels check a class where they use it, not only before: it may have been changed since."""
    result = run_python("-c", CHANGING)
    assert result.returncode == 0, result.stderr[-2000:]

"""Tests that need a GPU: graphs, streams, several devices, large tensors, memory, all regimes.

Without a GPU they are skipped, or fail if FUSED_XENT_REQUIRE_CUDA=1. The other test files run on a
GPU with ``--device cuda``; ``make gpu`` runs both.
"""

import contextlib
import os
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import LABELS, Labels, make_logits, make_options, make_target, make_upstream
from compare import assert_gradient, assert_loss, truth
from modes import MODES, loss_and_gradient
from test_kernels import check

import fused_xent
from fused_xent import _ops

MISSING = _ops.CUDA_LOAD_ERROR if torch.cuda.is_available() else "there is no GPU"
REQUIRED = os.environ.get("FUSED_XENT_REQUIRE_CUDA") == "1"
by_mode = pytest.mark.parametrize("mode", MODES)
SHAPES = {  # by the regime that an H100 uses for them
    "columns": (300, 20),
    "image": (2, 21, 64, 64),
    "warp": (300, 1000),
    "block": (3000, 6000),
    "split, few rows": (5, 50257),
    "split, many rows": (300, 50257),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def gpu():
    """Make tensors on the GPU, whatever --device says."""
    if MISSING:
        (pytest.fail if REQUIRED else pytest.skip)(MISSING)
    with torch.device("cuda"):
        yield


def make_problem(shape, dtype=torch.bfloat16):
    """Return logits, targets (some ignored), and an upstream gradient of 1.5, all on the device.

    A Python number would be copied to the device, and the copy would synchronize.
    """
    logits = make_logits(shape, dtype)
    return logits, make_target(logits, Labels(ignored=0.1)), torch.tensor(1.5)


@contextlib.contextmanager
def synchronization_fails():
    """Make every synchronization with the device an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


OPTIONS = ("index", "index, int32", "index, weighted and smoothed", "probabilities, all options")


@by_shape
@by_mode
@pytest.mark.parametrize("labels", OPTIONS)
def test_no_synchronization(labels, mode, shape):
    logits, _, upstream = make_problem(shape)
    target = make_target(logits, LABELS[labels])
    options = make_options(logits, LABELS[labels])
    with synchronization_fails():
        for _ in range(2):
            loss, _ = loss_and_gradient(logits, target, upstream, mode, **options)
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss.item()


@by_shape
@by_mode
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cuda_graph_replay_with_new_inputs(reduction, mode, shape):
    logits, target, upstream = make_problem(shape)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch requires a warm-up on a side stream before a capture
        loss_and_gradient(logits, target, upstream, mode, reduction=reduction)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(logits, target, upstream, mode, reduction=reduction)
    for seed in range(3):
        torch.manual_seed(seed)
        others = make_problem(shape)
        expected = loss_and_gradient(*others, mode, reduction=reduction)
        for static, other in zip((logits, target, upstream), others, strict=True):
            static.copy_(other)
        graph.replay()
        assert all(map(torch.equal, captured, expected))


COLD_CAPTURE = """
import sys, torch, fused_xent
logits = torch.randn([int(size) for size in sys.argv[1:]], device="cuda", dtype=torch.bfloat16)
rows = logits.select(1, 0)
target = torch.randint(logits.shape[1], rows.shape, device="cuda")
in_place, factor = logits.clone(), torch.full((), 2.0, device="cuda")
labels, mean, ops = (target, None, None), 1, torch.ops.fused_xent
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss, total, state = ops.forward(logits, *labels, None, 1, mean, torch.float32)
    gradient = ops.backward(logits, *labels, total, 1, mean, state, None, factor, None, None)
    fused = ops.forward_backward_(in_place, *labels, None, 1, mean, torch.float32)
    ops.scale_gradient_(in_place, factor, target, None, 1, -100)
graph.replay()
torch.cuda.synchronize()
leaf = logits.double().requires_grad_()
exact = torch.nn.functional.cross_entropy(leaf, target)
exact.backward(factor.double())
for actual in (loss, fused):
    torch.testing.assert_close(actual, exact.detach().float())
for actual in (gradient, in_place):
    torch.testing.assert_close(actual, leaf.grad.bfloat16(), rtol=0.02, atol=1e-9)
"""


@by_shape
def test_first_call_inside_a_capture(shape, run_python):
    """Kernels are loaded, and asked what they need, while a stream of a new process is captured."""
    result = run_python("-c", COLD_CAPTURE, *map(str, shape), CUDA_MODULE_LOADING="LAZY")
    assert result.returncode == 0, result.stdout + result.stderr


@by_mode
def test_two_streams_at_once(mode):
    problems = [make_problem((300, 50257)), make_problem((3000, 6000))]
    expected = [loss_and_gradient(*problem, mode) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(loss_and_gradient(*problem, mode))
    torch.cuda.synchronize()
    for actual, right in zip(results, expected * 20, strict=True):
        assert all(map(torch.equal, actual, right))


@by_mode
def test_tensors_on_another_device(mode):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    with torch.device("cuda:1"):
        logits, target, upstream = make_problem((300, 5000))
        exact = truth(logits, target, upstream)
        loss, gradient = loss_and_gradient(logits, target, upstream, mode)
        assert loss.device == gradient.device == logits.device
        assert_loss(loss, exact, torch.float32)
        assert_gradient(gradient, exact, torch.bfloat16, roundings=2)
    assert torch.cuda.current_device() == 0


@by_mode
def test_more_than_2_31_logits(mode):
    n_rows, n_classes = 33000, 65600  # row 32736 passes the 2^31st
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("less than 20 GiB of the GPU's memory are free")
    logits = torch.randn(n_rows, n_classes, dtype=torch.bfloat16).mul_(2)
    target = torch.randint(n_classes, (n_rows,))
    target[1::1000] = -100
    upstream = make_upstream((n_rows,), "none")
    loss, gradient = loss_and_gradient(logits, target, upstream, mode, reduction="none")
    rows = torch.tensor([0, 1, 2, 16368, 32735, 32736, 32737, 32999])
    exact = truth(logits[rows], target[rows], upstream[rows], reduction="none")
    assert_loss(loss[rows], exact, torch.float32)
    assert_gradient(gradient[rows], exact, torch.bfloat16, roundings=2)
    # Check all other rows coarsely: the loss against torch's; a row of the gradient sums to 0.
    for part in torch.arange(n_rows).chunk(20):
        torchs = F.cross_entropy(logits[part].float(), target[part], reduction="none")
        torch.testing.assert_close(loss[part], torchs, rtol=1e-5, atol=1e-5)
        kept = target[part] != -100
        at_target = gradient[part].gather(1, target[part].clamp(min=0)[:, None]).squeeze(1)
        assert torch.equal(at_target != 0, kept)
        row_sum = gradient[part].sum(1, dtype=torch.float32)
        assert (row_sum.abs() <= 2**-6 * upstream[part]).all()


@by_shape
@by_mode
@pytest.mark.parametrize("probabilities", [False, True])
def test_results_are_deterministic_on_gpu(probabilities, mode, shape):
    logits, target, upstream = make_problem(shape)
    target = make_target(logits, Labels(True)) if probabilities else target
    options = {"label_smoothing": 0.1, "weight": torch.rand(shape[1], dtype=logits.dtype)}
    first = loss_and_gradient(logits, target, upstream, mode, **options)
    for _ in range(10):
        again = loss_and_gradient(logits, target, upstream, mode, **options)
        assert all(map(torch.equal, again, first))


class _LastLayer(torch.autograd.Function):
    """Stands for a model: returns logits, and drops their gradient without a copy."""

    @staticmethod
    def forward(ctx, parameter, logits):
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, None


@pytest.mark.parametrize("labels", ["index", "index, smoothed", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@by_mode
def test_allocates_at_most_the_gradient(mode, dtype, labels):
    source = make_logits((512, 32000), dtype)
    target = make_target(source, LABELS[labels])
    options = {**MODES[mode], "label_smoothing": LABELS[labels].label_smoothing}
    logits = _LastLayer.apply(torch.zeros((), requires_grad=True), source)
    factor = torch.tensor(3.0, dtype=dtype)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (factor * fused_xent.cross_entropy(logits, target, **options)).backward()
    allocated = torch.cuda.max_memory_allocated() - before
    gradient = source.nbytes if mode == "default" else 0
    assert gradient <= allocated < gradient + source.nbytes // 50


@by_mode
@by_shape
@pytest.mark.parametrize(
    ("bad", "dtype"),
    [(2**40, torch.int64), (-(2**63), torch.int64), (-(2**31), torch.int32), (255, torch.uint8)],
    ids=str,
)
def test_target_out_of_range_makes_only_its_row_nan(bad, dtype, shape, mode):
    logits = make_logits(shape, torch.float32)
    target = torch.randint(0, 20, logits.select(1, 0).shape).to(dtype)
    if shape[1] > bad > 0:
        pytest.skip(f"{bad} is a class")
    expected, right = loss_and_gradient(logits, target, mode=mode, reduction="none")
    target.view(-1)[2] = bad
    loss, gradient = loss_and_gradient(logits, target, mode=mode, reduction="none")
    torch.cuda.synchronize()  # an illegal access would end the context here
    bad_rows = (target == bad).view(-1)
    assert torch.equal(loss.isnan().view(-1), bad_rows)
    assert torch.equal(loss.view(-1)[~bad_rows], expected.view(-1)[~bad_rows])
    gradient, right = (x.movedim(1, -1).reshape(-1, shape[1]) for x in (gradient, right))
    assert gradient[bad_rows].isnan().all()
    assert torch.equal(gradient[~bad_rows], right[~bad_rows])


class Plan(NamedTuple):
    """The fields of Plan in csrc/cuda/plan.h."""

    regime: int
    threads: int
    team: int = 0
    parts: int = 1
    held: int = 0
    workers: int = 1
    row_vector: int = 1
    max_groups: int = 0


COLUMNS, WARP, BLOCK, SPLIT = range(4)
BOTH = ("forward", "backward")
FUSED = ("forward_backward",)
PLANS = [  # operations, shape, plan
    *(((*BOTH, *FUSED), (65, 40), Plan(COLUMNS, 256, workers=n)) for n in (1, 2, 8)),
    *(((*BOTH, *FUSED), (2, 40, 64), Plan(COLUMNS, 64, workers=2, row_vector=n)) for n in (1, 8)),
    *((BOTH, (37, 1003), Plan(WARP, 128, team=n)) for n in (1, 2, 8, 32)),
    *((FUSED, (37, 1003), Plan(WARP, 128, team=n, held=4)) for n in (4, 32)),
    *((FUSED, (37, 1003), Plan(WARP, 128, team=n, held=4, max_groups=1)) for n in (4, 16)),
    *((BOTH, (37, 5003), Plan(BLOCK, n, team=n)) for n in (32, 64, 256)),
    *((FUSED, (37, 5003), Plan(BLOCK, 64, 64, held=n)) for n in (0, 4, 12)),
    *((FUSED, (37, 5003), Plan(BLOCK, 64, 64, held=n, max_groups=5)) for n in (0, 12, 28)),
    *((FUSED, (37, 5003), Plan(BLOCK, 512, 512, held=4, max_groups=n)) for n in (1, 3)),
    *((BOTH, (37, 50257), Plan(SPLIT, 128, 128, parts=n)) for n in (2, 7, 64)),
    *((FUSED, (37, 50257), Plan(SPLIT, 256, 256, parts=n, held=4)) for n in (2, 4, 8)),
    *((FUSED, (37, 50257), Plan(SPLIT, 512, 512, 8, held=4, max_groups=n)) for n in (1, 3)),
]


@pytest.fixture
def force_plan():
    yield torch.ops.fused_xent.force_cuda_plan
    for operation in (*BOTH, *FUSED):
        torch.ops.fused_xent.force_cuda_plan(operation, [])


@pytest.mark.parametrize("labels", ["index, mostly ignored", "probabilities, all options"])
@pytest.mark.parametrize(("operations", "shape", "plan"), PLANS)
def test_forced_plan(force_plan, operations, shape, plan, labels):
    if operations == FUSED and plan.parts > 1 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no clusters")
    for operation in operations:
        force_plan(operation, list(plan))
    logits = make_logits(shape, torch.bfloat16)
    target = make_target(logits, LABELS[labels])
    check(logits, target, "mean", **make_options(logits, LABELS[labels]))

"""The autograd Functions: derivatives of any order, what is saved and allocated."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import LABELS, make_logits, make_options, make_target
from modes import MODES
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

import fused_xent

SHAPES = ((5,), (4, 3), (2, 3, 2), (2, 3, 2, 2), (3, 130))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape, labels, reduction):
    labels = LABELS[labels]
    logits = make_logits(shape, torch.float64).requires_grad_()
    target = make_target(logits, labels)
    options = make_options(logits.detach(), labels)
    if target.dtype == torch.uint8:
        options["ignore_index"] = 255
    inputs = [logits]
    if target.is_floating_point():
        inputs.append(target.double().requires_grad_())

    def loss(logits, soft=None):
        labels = target if soft is None else soft
        return fused_xent.cross_entropy(logits, labels, reduction=reduction, **options)

    fast = {"fast_mode": logits.numel() > 50}
    assert gradcheck(loss, inputs, **fast)
    assert gradgradcheck(loss, inputs, **fast)


def test_gradient_to_a_weight():
    """torch has this gradient for probabilities; it is computed by torch operations."""
    logits, weight = torch.randn(4, 3).double(), torch.rand(3).double().requires_grad_()
    soft = torch.rand(4, 3).double()
    assert gradcheck(lambda w: fused_xent.cross_entropy(logits, soft, w), [weight])
    assert gradcheck(lambda w: fused_xent.cross_entropy(logits, torch.arange(4) % 3, w), [weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probabilities", [False, True])
def test_second_derivative_of_other_dtypes(probabilities, dtype):
    logits = make_logits((4, 9), dtype).requires_grad_()
    target = torch.rand(4, 9).softmax(1).to(dtype) if probabilities else torch.arange(4)

    def second(loss_function, logits, target):
        loss = loss_function(logits, target)
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad(first.square().sum(), logits)[0]

    actual = second(fused_xent.cross_entropy, logits, target)
    assert actual.dtype == dtype
    double = target.double() if probabilities else target
    leaf = logits.detach().double().requires_grad_()
    expected = second(F.cross_entropy, leaf, double)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * 1e-1)


@pytest.mark.parametrize("probabilities", [False, True])
def test_second_derivative_under_a_normalizer(probabilities):
    """The normalizer replaces the sum of class weights as the divisor."""
    logits, weight = torch.randn(4, 9).double().requires_grad_(), torch.rand(9).double()
    target = torch.rand(4, 9).double() if probabilities else torch.arange(4)
    losses = (
        fused_xent.cross_entropy(logits, target, weight, normalizer=2.5),
        F.cross_entropy(logits, target, weight, reduction="sum") / 2.5,
    )
    results = []
    for loss in losses:
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), logits)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
def test_only_the_gradients_that_are_needed(needs):
    logits, soft = torch.randn(4, 9), torch.rand(4, 9)
    leaves = [x.requires_grad_(needed) for x, needed in zip((logits, soft), needs, strict=True)]
    loss = fused_xent.cross_entropy(*leaves)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    assert [leaf.grad is not None for leaf in leaves] == list(needs)


def test_second_backward_under_retain_graph():
    logits, target = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    loss = fused_xent.cross_entropy(logits, target)
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * first)


def test_logits_changed_between_forward_and_backward():
    leaf = torch.randn(4, 9, requires_grad=True)
    logits = leaf * 1
    loss = fused_xent.cross_entropy(logits, torch.arange(4))
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unused_loss_has_gradient_0():
    logits = torch.randn(4, 9, requires_grad=True)
    loss = fused_xent.cross_entropy(logits, torch.arange(4), reduction="none")
    other = torch.autograd.grad(loss[:0].sum() + logits.sum(), logits)[0]
    assert torch.equal(other, torch.ones(4, 9))


class Unused(torch.autograd.Function):
    """A function whose backward returns no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("mode", MODES)
def test_undefined_upstream_gradient(mode):
    leaf, tokens = torch.randn(4, 9, requires_grad=True), torch.ones(4)
    loss = fused_xent.cross_entropy(leaf * 1, torch.arange(4), token_weight=tokens, **MODES[mode])
    Unused.apply(loss).backward()
    assert leaf.grad is None


def test_gradient_of_a_statistic_alone_beside_probabilities():
    logits, soft = torch.randn(4, 9, requires_grad=True), torch.rand(4, 9, requires_grad=True)
    results = fused_xent.cross_entropy_with_statistics(logits, soft)
    results.lse.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(1))
    assert soft.grad is None


def test_small_calls_take_the_fast_path(monkeypatch):
    """A plain call skips the checks in Python, which take longer than a small loss."""
    leaf, target = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    expected = F.cross_entropy(leaf, target, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(expected, leaf)
    monkeypatch.setattr(fused_xent.functional, "prepare", None)
    monkeypatch.setattr(fused_xent._autograd, "_gradients", None)
    loss = fused_xent.cross_entropy(leaf, target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], gradient)
    loss = fused_xent.cross_entropy(leaf.detach(), target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected.detach())


N_ROWS, N_CLASSES = 64, 4096


def make_large(dtype, labels):
    logits = make_logits((N_ROWS, N_CLASSES), dtype)
    return logits.requires_grad_(), make_target(logits, LABELS[labels])


OPTIONS = {
    "index": {},
    "index, smoothed": {"label_smoothing": 0.1},
    "probabilities": {},
}
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@by_dtype
@pytest.mark.parametrize("cast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("labels", OPTIONS)
def test_saves_only_inputs_and_a_few_numbers_per_row(labels, cast, dtype, device):
    logits, target = make_large(dtype, labels)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast(device, dtype=torch.bfloat16, enabled=cast):
        loss = fused_xent.cross_entropy(logits, target, **OPTIONS[labels])
    inputs = {logits.data_ptr(), target.data_ptr()}
    others = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    assert {tensor.data_ptr() for tensor in saved} > inputs
    assert sum(tensor.numel() for tensor in others) <= 4 * N_ROWS
    loss.backward()
    assert logits.grad.dtype == dtype


def allocations(function):
    """Return the result of function and the sizes in bytes of all memory it allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return result, [size for size in sizes if size > 0]


PROFILED = "the profiler counts CPU memory; test_gpu.py counts GPU memory"


@pytest.mark.cpu(PROFILED)
def test_profiler_counts_allocations():
    assert allocations(lambda: torch.empty(1024))[1] == [4096]


@pytest.mark.cpu(PROFILED)
@by_dtype
@pytest.mark.parametrize("cast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("labels", OPTIONS)
def test_allocates_only_the_gradient(labels, cast, dtype):
    logits, target = make_large(dtype, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        loss, in_forward = allocations(
            lambda: fused_xent.cross_entropy(logits, target, **OPTIONS[labels])
        )
    _, in_backward = allocations(loss.backward)
    per_row = 8 * N_ROWS
    assert sum(in_forward) <= 6 * per_row
    large = [size for size in in_backward if size > 6 * per_row]
    assert large == [logits.numel() * dtype.itemsize]


@pytest.mark.cpu(PROFILED)
@by_dtype
@pytest.mark.parametrize("mode", ["inplace_backward", "grad_in_forward"])
@pytest.mark.parametrize("labels", OPTIONS)
def test_overwriting_modes_allocate_no_gradient(labels, mode, dtype):
    logits, target = make_large(dtype, labels)
    computed = logits * 1
    loss, in_forward = allocations(
        lambda: fused_xent.cross_entropy(computed, target, **OPTIONS[labels], **{mode: True})
    )
    _, in_backward = allocations(lambda: torch.autograd.grad(3 * loss, computed, allow_unused=True))
    assert max(in_forward) <= 16 * N_ROWS
    assert max(in_backward, default=0) <= 8 * N_ROWS


@pytest.mark.parametrize("weighted", [False, True])
def test_tensors_used_after_their_transform(weighted):
    """A tensor that torch.func.grad passed to its function is used after grad returned."""
    left = []

    def keep(logits):
        left.append(logits)
        return logits.sum()

    leaf, target = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    torch.func.grad(keep)(leaf)
    weight = torch.rand(9) if weighted else None
    results = [
        (loss, *torch.autograd.grad(loss, leaf))
        for function in (fused_xent.cross_entropy, F.cross_entropy)
        for loss in [function(left[0], target, weight)]
    ]
    torch.testing.assert_close(*results)

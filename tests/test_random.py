"""Random problems; loss, gradient and fused_xent.reference agree with torch in float64."""

import pytest
import torch
from cases import DTYPES, class_dim
from compare import assert_gradient, assert_loss, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from modes import loss_and_gradient

from fused_xent import reference

pytestmark = pytest.mark.kernels


@st.composite
def layouts(draw, shape):
    """Draw a memory layout: an order of the dimensions, a step along each, and an offset."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    return order, steps, draw(st.integers(0, 17))


def laid_out(values, layout):
    """Return a copy of the values in this memory layout."""
    order, steps, offset = layout
    size = [values.shape[d] * steps[d] for d in order]
    memory = torch.zeros(offset + torch.Size(size).numel() + 1, dtype=values.dtype)
    whole = memory[offset : offset + torch.Size(size).numel()].view(size)
    whole = whole.permute([order.index(d) for d in range(len(order))])
    part = whole[tuple(slice(None, None, step) for step in steps)]
    return part.copy_(values)


@st.composite
def problems(draw):
    n_classes = draw(st.one_of(st.integers(1, 140), st.sampled_from([200, 1000, 2049, 17001])))
    most = max(1, 20000 // n_classes)
    rows = draw(st.lists(st.integers(1, 9), min_size=0, max_size=3))
    rows = rows if torch.Size(rows).numel() <= most else rows[:1]
    shape = [*rows[:1], n_classes, *rows[1:]]
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1.0, 4.0]))
    logits = (torch.randn(shape, generator=generator) * scale).to(dtype)
    options = {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
    }
    if draw(st.booleans()):
        options["weight"] = torch.rand(n_classes, generator=generator).add(0.1).to(dtype)
    if draw(st.booleans()):
        target = torch.rand(shape, generator=generator).to(dtype)
        target = laid_out(target, draw(layouts(shape)))
    else:
        row_shape = logits.select(class_dim(shape), 0).shape
        target = torch.randint(0, n_classes, row_shape, generator=generator)
        options["ignore_index"] = draw(st.sampled_from([-100, 0, n_classes - 1, n_classes]))
        target[torch.rand(row_shape, generator=generator) < 0.2] = options["ignore_index"]
        target = target.to(draw(st.sampled_from([torch.int64, torch.int32])))
    upstream = draw(st.sampled_from([1.0, -0.5, 3.0]))
    return laid_out(logits, draw(layouts(shape))), target, upstream, options


@settings(max_examples=250, deadline=None, derandomize=True)
@given(problems())
def test_any_problem(problem):
    logits, target, upstream, options = problem
    mode_exact = truth(logits, target, upstream, **options)
    double = {k: v.double() if k == "weight" else v for k, v in options.items()}
    labels = target.double() if target.is_floating_point() else target
    by_reference = reference.cross_entropy(logits.double(), labels, **double)
    torch.testing.assert_close(by_reference, mode_exact.loss, rtol=1e-9, atol=1e-9, equal_nan=True)
    loss, gradient = loss_and_gradient(logits, target, upstream, **options)
    assert_loss(loss, mode_exact, torch.promote_types(logits.dtype, torch.float32))
    assert_gradient(gradient, mode_exact, logits.dtype)

"""Results of every kernel: all vocabularies, shapes, labels, dtypes, reductions, modes."""

import pytest
import torch
from cases import (
    DTYPES,
    LABELS,
    REDUCTIONS,
    SHAPES,
    VOCABULARIES,
    Labels,
    class_dim,
    edge_classes,
    make_logits,
    make_options,
    make_target,
    make_upstream,
)
from compare import accumulation_dtype, assert_gradient, assert_loss, truth
from modes import MODES, has_mode, loss_and_gradient, roundings

pytestmark = pytest.mark.kernels
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def check(logits, target, reduction="none", **options):
    """Compare the loss and gradient of every mode with float64."""
    dim = class_dim(logits.shape)
    upstream = make_upstream(logits.shape[:dim] + logits.shape[dim + 1 :], reduction)
    exact = truth(logits, target, upstream, reduction=reduction, **options)
    promoted = torch.promote_types(logits.dtype, accumulation_dtype(logits.dtype))
    for mode in MODES:
        if has_mode(mode, logits.dtype):
            loss, gradient = loss_and_gradient(
                logits, target, upstream, mode, reduction=reduction, **options
            )
            assert_loss(loss, exact, promoted)
            assert_gradient(gradient, exact, logits.dtype, roundings(mode))


@by_dtype
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_vocabulary(vocab_size, dtype):
    target = torch.tensor(edge_classes(vocab_size))
    logits = make_logits((len(target), vocab_size), dtype)
    check(logits, target)
    weight = torch.rand(vocab_size).to(dtype)
    check(logits, target, weight=weight, label_smoothing=0.1)
    check(logits, target, label_smoothing=0.1)
    check(logits, make_target(logits, Labels(True)))
    check(logits, make_target(logits, Labels(True)), weight=weight, label_smoothing=0.1)


@by_dtype
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shape(shape, labels, dtype):
    shape, labels = SHAPES[shape], LABELS[labels]
    if labels.dtype == torch.uint8 and shape[class_dim(shape)] > 255:
        pytest.skip("255 is ignore_index here, and would be a class")
    if labels.probabilities and torch.float64 in (dtype, labels.dtype) and dtype != torch.float64:
        pytest.skip("float64 probabilities promote the loss: see test_functional.py")
    logits = make_logits(shape, dtype)
    target = make_target(logits, labels)
    if dtype == torch.float64 and target.dtype == torch.float32:
        target = target.double()
    for reduction in REDUCTIONS:
        check(logits, target, reduction, **make_options(logits, labels))


@by_dtype
@pytest.mark.parametrize("n_classes", [10, 200, 20000])
def test_one_row_that_is_not_ignored(n_classes, dtype):
    logits = make_logits((7, n_classes), dtype)
    for kept in range(7):
        target = torch.full((7,), -100)
        target[kept] = n_classes - 1
        check(logits, target, "mean")

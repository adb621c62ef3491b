"""fused_xent.reference: equal to torch in float64, and defined where torch gives NaN."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import LABELS, REDUCTIONS, SHAPES, class_dim, make_logits, make_options, make_target

from fused_xent import reference
from fused_xent.reference import cross_entropy, cross_entropy_with_statistics

pytestmark = pytest.mark.cpu("uses torch operations only")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape, labels, reduction):
    shape, labels = SHAPES[shape], LABELS[labels]
    if labels.dtype == torch.uint8 and shape[class_dim(shape)] > 255:
        pytest.skip("255 is ignore_index here, and would be a class")
    logits = make_logits(shape, torch.float64).requires_grad_()
    target = make_target(logits.detach(), labels)
    options = make_options(logits.detach(), labels)
    index = target.double() if target.is_floating_point() else target.long()
    expected = F.cross_entropy(logits, index, reduction=reduction, **options)
    actual = cross_entropy(logits, index, reduction=reduction, **options)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    upstream = torch.rand_like(expected)
    gradients = [torch.autograd.grad(loss, logits, upstream)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_by_hand():
    """p = (1/4, 1/4, 1/2): losses are multiples of log 2."""
    logits = torch.tensor([[0.0, 0.0, math.log(2)]]).double()
    log2 = math.log(2)
    for target, expected in ((0, 2 * log2), (2, log2)):
        assert cross_entropy(logits, torch.tensor([target])).item() == pytest.approx(expected)
    soft = torch.tensor([[0.5, 0.0, 0.5]]).double()
    assert cross_entropy(logits, soft).item() == pytest.approx(1.5 * log2)
    smoothed = cross_entropy(logits, torch.tensor([2]), label_smoothing=0.3)
    assert smoothed.item() == pytest.approx(0.7 * log2 + 0.1 * 5 * log2)
    weight = torch.tensor([3.0, 1.0, 1.0]).double()
    weighted = cross_entropy(logits.repeat(2, 1), torch.tensor([0, 2]), weight)
    assert weighted.item() == pytest.approx((3 * 2 + 1) / 4 * log2)
    kept = cross_entropy(logits.repeat(2, 1), torch.tensor([0, -100]))
    assert kept.item() == pytest.approx(2 * log2)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_probability_or_weight_0_of_a_masked_class_adds_0(label_smoothing):
    logits = make_logits((4, 6), torch.float64)
    soft = torch.rand(4, 6).double()
    logits[:, 2], soft[:, 2] = -math.inf, 0
    weight = torch.ones(6).double()
    weight[2] = 0
    rest = [0, 1, 3, 4, 5]
    expected = F.cross_entropy(logits[:, rest], soft[:, rest])
    torch.testing.assert_close(cross_entropy(logits, soft), expected)
    assert cross_entropy(logits, soft, weight, label_smoothing=label_smoothing).isfinite()
    loss = cross_entropy(logits, torch.zeros(4).long(), weight, label_smoothing=label_smoothing)
    assert loss.isfinite()


@pytest.mark.parametrize("target", [3, -1, 10**9])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_target_out_of_range_is_nan(label_smoothing, target):
    """As with CUDA kernels, the loss and gradient of that row are NaN, and only those."""
    logits = make_logits((3, 3), torch.float64).requires_grad_()
    targets = torch.tensor([0, target, -100])
    loss = cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    assert loss.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]
    assert cross_entropy(logits, targets, reduction="sum").isnan()


def test_no_z_loss_of_an_infinite_square():
    """lse^2 is infinite in float32, and must not make the loss NaN if lse_square_scale is 0."""
    logits = torch.tensor([[1e30, 2e30, 0.0]])
    assert cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(1e30)


def test_entropy_of_masked_classes():
    """Classes with logit minus infinity add 0 and get gradient 0."""
    logits = torch.randn(3, 7, dtype=torch.float64)
    logits[:, [1, 4]] = -torch.inf
    rest = logits[:, [0, 2, 3, 5, 6]].requires_grad_()
    leaf = logits.requires_grad_()
    results = cross_entropy_with_statistics(leaf, torch.tensor([0, 2, 3]))
    exact = torch.distributions.Categorical(logits=rest).entropy()
    torch.testing.assert_close(results.entropy, exact)
    (gradient,) = torch.autograd.grad(results.entropy.sum(), leaf)
    assert (gradient[:, [1, 4]] == 0).all()
    (expected,) = torch.autograd.grad(exact.sum(), rest)
    torch.testing.assert_close(gradient[:, [0, 2, 3, 5, 6]], expected)


@pytest.mark.parametrize("gap", [0.1, 1.0, 10.0, 20.0, 50.0, 80.0])
@pytest.mark.parametrize("n_classes", [1, 2, 300])
def test_digits_of_confident_rows(n_classes, gap):
    """Loss, gradient and second derivative in float32; the float64 truth is by hand."""
    logits = torch.randn(n_classes, dtype=torch.float32)
    at = n_classes // 2
    logits[at] = logits.max() + gap
    others = torch.arange(n_classes) != at
    odds = torch.where(others, (logits.double() - logits[at].double()).exp(), 0)
    p, rest = odds / (1 + odds.sum()), odds.sum() / (1 + odds.sum())
    gradient = torch.where(others, p, -rest)  # of minus log_prob[at]
    slopes = torch.where(others, -p * (1 - rest), rest * (1 - rest))  # of minus gradient[at]

    def minus_log_prob(logits):
        return -reference.log_softmax(logits, 0)[at]

    close = {"rtol": 4e-6, "atol": 1e-38}
    torch.testing.assert_close(minus_log_prob(logits).double(), odds.sum().log1p(), **close)
    found = torch.func.grad(minus_log_prob)
    torch.testing.assert_close(found(logits).double(), gradient, **close)
    second = torch.func.grad(lambda logits: found(logits)[at])(logits).double()
    torch.testing.assert_close(second, slopes, **close)
    hard, soft = torch.tensor(at), (~others).float()
    for labels in (hard, soft):
        torch.testing.assert_close(cross_entropy(logits, labels), minus_log_prob(logits))
    selected = reference.selective_log_softmax(logits, torch.tensor([at])).log_probs
    torch.testing.assert_close(-selected[0], minus_log_prob(logits), rtol=0, atol=0)


def test_smoothing_of_1_where_the_target_is_masked():
    """The target has label 0 besides the smoothing: no NaN of 0 times infinity."""
    logits = torch.tensor([[1.0, -math.inf, 2.0]]).double()
    weight = torch.tensor([1.0, 0.0, 1.0]).double()
    options = {"label_smoothing": 1.0, "reduction": "sum"}
    assert cross_entropy(logits, torch.tensor([1]), **options) == math.inf
    rest = cross_entropy(logits, torch.tensor([0]), weight, **options)
    assert cross_entropy(logits, torch.tensor([1]), weight, **options) == rest
    assert rest.isfinite()


def test_focal_loss_of_a_masked_target():
    """Its slope is 1: the gradient is that of the cross-entropy."""
    logits = torch.tensor([[1.0, -math.inf, 2.0]]).double().requires_grad_()
    loss = cross_entropy(logits, torch.tensor([1]), focal_gamma=2.0)
    assert loss == math.inf
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = logits.detach().softmax(1) - torch.tensor([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(gradient, expected)

"""Token weights of every dtype, layout and value, on every code path of the loss."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from modes import MODES
from torch import Tensor

from fused_xent import (
    CrossEntropyStatistics,
    cross_entropy,
    cross_entropy_with_statistics,
    linear_cross_entropy_with_statistics,
)

# Warnings of torch's forward-mode formulas.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")
DOUBLE = torch.float64
ROWS, C = (2, 4), 7
SCALE = 0.25  # of the z-loss
IGNORED = -1  # also the argmax of a dropped row


def every_other(values: Tensor) -> Tensor:
    """Return the same values with stride 2 in the last dimension."""
    return torch.stack([values, torch.full_like(values, 99)], -1)[..., 0]


def at_the_ignored_row(value: float) -> Tensor:
    weights = THIRDS.float()
    weights[0, 1] = value
    return weights


THIRDS = torch.tensor([[1.0, -2.0, 0.0, 5.0], [1.0, 7.0, 2.0, 4.0]], dtype=DOUBLE) / 3
BY_ROW = torch.tensor([[1.0], [2.0]])
WEIGHTS = {  # row (0, 1) is ignored; row (0, 2) has weight 0, except in the last three
    "float64": THIRDS,
    "float32": THIRDS.float(),
    "bfloat16": THIRDS.bfloat16(),
    "float16": THIRDS.half(),
    "int64": torch.tensor([[1, 2, 0, 3], [1, -1, 2, 4]]),
    "uint8": torch.tensor([[1, 2, 0, 3], [1, 0, 255, 4]], dtype=torch.uint8),
    "bool": torch.tensor([[True, True, False, True], [False, True, True, True]]),
    "every other, float32": every_other(THIRDS.float()),
    "every other, float64": every_other(THIRDS),
    "transposed": THIRDS.float().t().contiguous().t(),
    "float64, transposed": THIRDS.t().contiguous().t(),
    "NaN at an ignored row": at_the_ignored_row(torch.nan),
    "infinity at an ignored row": at_the_ignored_row(torch.inf),
    "expanded along rows": BY_ROW.expand(ROWS),
    "expanded along sequences": BY_ROW.double().reshape(2, 1)[:1].expand(ROWS),
    "one number": torch.tensor(0.75).expand(ROWS),
}


class Problem(NamedTuple):
    """Logits with classes in the last dimension, target and token weights."""

    logits: Tensor
    target: Tensor
    weights: Tensor
    reduction: str

    def options(self) -> dict:
        index = {} if self.target.is_floating_point() else {"ignore_index": IGNORED}
        return {"token_weight": self.weights, "reduction": self.reduction, **index}


TARGETS = {
    "index": torch.tensor([[3, IGNORED, 10**9, 0], [6, 1, 1, 2]]),
    "index, int32": torch.tensor([[3, IGNORED, 5, 0], [6, 1, 1, 2]], dtype=torch.int32),
    "probabilities": torch.float32,
    "float64 probabilities": DOUBLE,
}


def make_problem(target: str, weights: str, dtype, reduction: str) -> Problem:
    """Make a problem; a row of token weight 0 has NaN logits."""
    logits, target, weights = torch.randn(*ROWS, C), TARGETS[target], WEIGHTS[weights]
    if isinstance(target, torch.dtype):
        target = torch.randn(*ROWS, C).softmax(-1).to(torch.promote_types(target, dtype))
    elif weights[0, 2] != 0:
        target = target.clamp(max=C - 1)
    if weights[0, 2] == 0:
        logits[0, 2] = torch.nan
    return Problem(logits.to(dtype), target, weights, reduction)


def exact_results(p: Problem, logits: Tensor, target: Tensor) -> CrossEntropyStatistics:
    """Compute loss and statistics with torch operations in float64."""
    weights, kept = p.weights.double(), p.weights != 0
    labels = target.argmax(-1) if target.is_floating_point() else target
    if not target.is_floating_point():
        kept = kept & (target != IGNORED)
        target = target.long().masked_fill(~kept, 0)
    else:
        target = target.masked_fill(~kept.unsqueeze(-1), 0)
    weights = weights.masked_fill(~kept, 0)
    logits = logits.masked_fill(~kept.unsqueeze(-1), 0)
    log_p, lse = logits.log_softmax(-1), logits.logsumexp(-1) * kept
    z_loss = SCALE * lse.square() * weights
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none")
    loss = loss.view(ROWS) * weights + z_loss
    if p.reduction != "none":
        loss = loss.sum()
    if p.reduction == "mean":
        loss = loss / weights.sum()
    entropy = -(log_p.exp() * log_p).sum(-1) * kept
    argmax = logits.detach().argmax(-1)
    correct = (argmax == labels) & kept
    return CrossEntropyStatistics(
        loss, lse, z_loss, entropy, argmax.masked_fill(~kept, -1), correct
    )


def by_kernels(p: Problem, logits: Tensor, target: Tensor, **options):
    return cross_entropy_with_statistics(
        logits, target, dim=-1, lse_square_scale=SCALE, **p.options(), **options
    )


def by_class_weight_gradient(p, logits, target):
    return by_kernels(
        p, logits, target, weight=torch.ones(C, dtype=p.logits.dtype).requires_grad_()
    )


def by_token_weight_gradient(p, logits, target):
    if p.weights.is_floating_point():
        p = p._replace(weights=p.weights.detach().requires_grad_())
    return by_kernels(p, logits, target)


def by_vmap(p, logits, target):
    """vmap over two equal samples, along a different dimension of each input."""

    def sample(logits, target, weights):
        return tuple(by_kernels(p._replace(weights=weights), logits, target))

    inputs = (torch.stack([logits] * 2), torch.stack([target] * 2, 1), p.weights)
    results = torch.func.vmap(sample, in_dims=(0, 1, None))(*inputs)
    return CrossEntropyStatistics(result[1] for result in results)


def by_jvp(p, logits, target):
    """Under a dual level, torch operations compute the values."""
    with torch.autograd.forward_ad.dual_level():
        return by_kernels(p, logits, target)


def overwriting(mode):
    def way(p, logits, target):
        results = by_kernels(p, logits * 1, target.detach(), **MODES[mode])
        if mode == "fused":  # has no gradients of statistics
            results = CrossEntropyStatistics(results.loss, *(x.detach() for x in results[1:]))
        return results

    return way


def by_linear(p, logits, target, **options):
    """The loss of a linear layer with the identity as weight."""
    eye = torch.eye(C, dtype=logits.dtype)
    return linear_cross_entropy_with_statistics(
        *(logits, eye, target), lse_square_scale=SCALE, **p.options(), **options
    )


def by_linear_in_chunks(p, logits, target):
    """With drop_ignored, in chunks of three rows."""
    return by_linear(p, logits, target, chunk_rows=3, drop_ignored=True)


WAYS = {
    "kernels": by_kernels,
    "inplace": overwriting("inplace"),
    "fused": overwriting("fused"),
    "gradient of class weights": by_class_weight_gradient,
    "gradient of token weights": by_token_weight_gradient,
    "vmap": by_vmap,
    "dual level": by_jvp,
    "linear": by_linear,
    "linear in chunks": by_linear_in_chunks,
}
KINDS = (
    (torch.float32, "none"),
    (torch.float32, "mean"),
    (torch.bfloat16, "sum"),
    (DOUBLE, "mean"),
)


def differentiate(results, leaves, upstream) -> list[Tensor]:
    """Return the gradients of the weighted sum of all differentiable results."""
    values = [x for x in results[:4] if x.requires_grad]
    total = sum((x.double() * up).sum() for x, up in zip(values, upstream, strict=False))
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [None if g is None else g.double() for g in gradients]


@pytest.mark.cpu("only the CPU raises an error for targets out of range")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", WAYS)
def test_token_weights(way, target, weights):
    """Loss, statistics, gradients of logits and probabilities agree with torch in float64."""
    if "probabilities" in target and "ignored row" in weights:
        pytest.skip("probabilities have no ignored rows")
    for dtype, reduction in KINDS:
        check(way, make_problem(target, weights, dtype, reduction))


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def check(way: str, p: Problem) -> None:
    leaves = [p.logits.requires_grad_()]
    if p.target.is_floating_point():
        leaves.append(p.target.requires_grad_())
    exact_leaves = doubles(leaves)
    results = WAYS[way](p, leaves[0], p.target)
    exact = exact_results(p, exact_leaves[0], (*exact_leaves, p.target)[1])
    check_values(p, results, exact)
    if way == "fused":
        exact = CrossEntropyStatistics(exact.loss, *(x.detach() for x in exact[1:]))
    upstream = [torch.rand(x.shape, dtype=DOUBLE) for x in exact[:4]]
    gradients = differentiate(results, leaves, upstream)
    expected = differentiate(exact, exact_leaves, upstream)
    for leaf, one, other in zip(leaves, gradients, expected, strict=True):
        if one is None:  # overwriting modes give no gradient of probabilities
            assert leaf is not leaves[0]
            assert way in MODES
            continue
        eps = torch.finfo(leaf.dtype).eps
        torch.testing.assert_close(one, other, rtol=max(2 * eps, error(p)), atol=4 * eps)


def error(p: Problem) -> float:
    return 1e-11 if DOUBLE in (p.logits.dtype, p.target.dtype) else 2e-5


def check_values(p: Problem, results, exact) -> None:
    eps = torch.finfo(results.loss.dtype).eps
    expected_dtype = torch.promote_types(p.logits.dtype, torch.float32)
    soft = p.target.is_floating_point()
    promoted = torch.promote_types(p.logits.dtype, p.target.dtype) if soft else p.logits.dtype
    assert results.loss.dtype == promoted
    for name in ("loss", "lse", "z_loss", "entropy"):
        one, other = getattr(results, name), getattr(exact, name)
        limit = max(error(p), 2 * eps) if name == "loss" else error(p)
        torch.testing.assert_close(one.double(), other, rtol=limit, atol=limit)
        if name != "loss" and p.target.dtype != DOUBLE:
            assert one.dtype == expected_dtype
    assert torch.equal(results.argmax, exact.argmax)
    assert torch.equal(results.correct, exact.correct)


# ---- the divisor of the mean, and dropped rows -------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_mean_by_weights_that_cancel(way):
    """A mean by 0 is NaN, not infinite; a mean by a small sum of weights is accurate."""
    target = torch.tensor([[1, 2, 3, IGNORED], [4, 5, IGNORED, 0]])
    weights = torch.tensor([[1.0, -1.0, 2.0, 9.0], [-2.0, 0.5, 9.0, -0.5]])
    p = Problem(torch.randn(*ROWS, C, requires_grad=True), target, weights, "mean")
    assert WAYS[way](p, p.logits, target).loss.isnan()
    weights[1, 1] = 0.75
    exact = exact_results(p, p.logits.double(), target).loss
    loss = WAYS[way](p, p.logits, target).loss
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_token_weights_of_the_loss_alone(reduction):
    logits, target = torch.randn(4, C, requires_grad=True), torch.tensor([0, 3, 6, 2])
    tokens = torch.tensor([1.0, 0.5, 0.0, -2.0])
    loss = cross_entropy(logits, target, token_weight=tokens, reduction=reduction)
    rows = F.cross_entropy(logits, target, reduction="none") * tokens
    exact = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / tokens.sum()}[reduction]
    torch.testing.assert_close(loss, exact)
    gradients = [torch.autograd.grad(x.sum(), logits)[0] for x in (loss, exact)]
    torch.testing.assert_close(*gradients)


@pytest.mark.cpu("only the CPU raises an error for targets out of range")
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("vmap", "dual level")])
def test_position_of_a_target_out_of_range(way):
    """The error reports the first one in a row that counts; dropped rows are skipped."""
    target = torch.tensor([[1, 99, IGNORED, 0], [4, C, 98, 0]])
    weights = torch.tensor([[1.0, 0.0, 1.0, 9.0], [-2.0, 0.5, 1.0, 0.5]])
    p = Problem(torch.randn(*ROWS, C, requires_grad=True), target, weights, "mean")
    with pytest.raises(IndexError, match=rf"got {C} at position \(1, 1\)"):
        WAYS[way](p, p.logits, target)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("way", WAYS)
def test_probabilities_of_a_row_of_weight_0_may_be_nan(way, reduction):
    target, weights = torch.randn(*ROWS, C).softmax(-1), THIRDS.float()
    target[0, 2, 3] = torch.nan
    p = Problem(torch.randn(*ROWS, C, requires_grad=True), target, weights, reduction)
    loss = WAYS[way](p, p.logits, target).loss
    exact = exact_results(p, p.logits.double(), target.double()).loss
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(x.sum(), p.logits)[0] for x in (loss, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_of_weights_beside_dropped_rows(reduction, soft):
    """Only rows that count contribute, although a dropped row holds NaN."""
    logits, tokens = torch.randn(5, C, dtype=DOUBLE), torch.tensor([1.0, 0, 2, -0.5, 1])
    logits[1] = torch.nan
    target = torch.randn(5, C, dtype=DOUBLE).softmax(-1) if soft else torch.arange(5)
    target[1] = torch.nan if soft else 10**9
    leaves = [x.double().requires_grad_() for x in (torch.rand(C) + 0.1, tokens)]
    weight, tokens = leaves
    loss = cross_entropy(logits, target, weight, token_weight=tokens, reduction=reduction)
    kept = [0, 2, 3, 4]
    log_p = logits[kept].log_softmax(1) * weight
    labels = target[kept] if soft else F.one_hot(target[kept], C)
    rows = -(labels * log_p).sum(1) * tokens[kept]
    total = tokens[kept] if soft else tokens[kept] * weight[target[kept]]
    expected = rows.sum() if reduction == "none" else rows.sum() / total.sum()
    torch.testing.assert_close(loss.sum(), expected)
    gradients = [torch.autograd.grad(x, leaves) for x in (loss.sum(), expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("way", ["kernels", "inplace", "gradient of class weights"])
def test_gradients_of_a_mean_by_weights_that_cancel(way):
    """Gradients of logits and probabilities are NaN."""
    weights = torch.tensor([[1.0, -1.0, 2.0, -2.0]] * 2)
    leaves = [torch.randn(*ROWS, C), torch.randn(*ROWS, C).softmax(-1)]
    if way == "inplace":  # gives no gradient of probabilities here
        leaves = [leaves[0], leaves[1].detach()]
    logits, target = leaves[0].requires_grad_(), leaves[1]
    wanted = [logits] if way == "inplace" else [logits, target.requires_grad_()]
    p = Problem(logits, target, weights, "mean")
    for gradient in torch.autograd.grad(WAYS[way](p, logits, target).loss, wanted):
        assert gradient.isnan().all()

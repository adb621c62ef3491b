"""Tests of compare.py: right results pass, and likely mistakes of a kernel are found."""

import pytest
import torch
from cases import DTYPES
from compare import accumulation_dtype, assert_gradient, assert_loss, label_weights, truth

pytestmark = pytest.mark.cpu("uses torch operations only")
N_ROWS, N_CLASSES, IGNORED, CONFIDENT = 6, 3001, 4, 1
UPSTREAM = torch.tensor([1.0, 0.5, 0.75, 1.25, 1.5, 0.625])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
half_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def make_problem(dtype):
    """Return logits and targets; one row is ignored, one has p = 0.999 at its target."""
    logits = torch.randn(N_ROWS, N_CLASSES) * 2
    target = torch.randint(0, N_CLASSES, (N_ROWS,))
    logits[CONFIDENT, target[CONFIDENT]] = 17.0
    target[IGNORED] = -100
    return logits.to(dtype), target


def row(index, values):
    """Return zeros with values in one row."""
    return (
        torch.zeros(N_ROWS, N_CLASSES, dtype=torch.float64).index_fill(0, torch.tensor(index), 1)
        * values
    )


def least_number(dtype):
    """Return the smallest positive number; subnormal unless those are flushed to 0."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


# Each takes the right gradient in float64, the logits and the mask of the targets, and returns a
# wrong gradient in float64.
GRADIENT_MUTANTS = {
    "0 at the other classes": lambda right, logits, at: right * at,
    "0 at the target": lambda right, logits, at: right * ~at,
    "without 1/N": lambda right, logits, at: right * N_ROWS,
    "first upstream for all rows": lambda right, logits, at: right / UPSTREAM[:, None],
    "upstream twice": lambda right, logits, at: right * UPSTREAM[:, None],
    "ignored row is softmax": lambda right, logits, at: (
        right + row(IGNORED, logits.double().softmax(1))
    ),
    "ignored row is not quite 0": lambda right, logits, at: right + row(IGNORED, 1e-6),
    "ignored row is the least number": lambda right, logits, at: (
        right + row(IGNORED, least_number(logits.dtype))
    ),
    "tail not written": lambda right, logits, at: (
        right * (torch.arange(N_CLASSES) < N_CLASSES // 8 * 8)
    ),
    "target one too high": lambda right, logits, at: (
        right + (at.double() - at.roll(1, 1).double()) * UPSTREAM[:, None]
    ),
    "one NaN": lambda right, logits, at: right + row(2, float("nan")),
    "one infinity": lambda right, logits, at: right + row(2, float("inf")),
    "another sign": lambda right, logits, at: -right,
    "another row": lambda right, logits, at: right.roll(1, 0),
}

# Errors too small to be seen in 16 bits.
FINE_GRADIENT_MUTANTS = {
    "padding in the sum": lambda right, logits, at: (
        right * (1 - ~at * 7 / logits.double().exp().sum(1, keepdim=True))
    ),
    "p in float16": lambda right, logits, at: (right + at.double()).half().double() - at.double(),
}


@by_dtype
def test_the_rounded_truth_passes(dtype):
    logits, target = make_problem(dtype)
    exact = truth(logits, target, UPSTREAM, reduction="none")
    assert_gradient(exact.gradient.to(dtype), exact, dtype)
    assert_loss(exact.loss.to(dtype), exact, dtype)
    exact = truth(logits, torch.randn(logits.shape).softmax(1).to(dtype), reduction="mean")
    assert_gradient(exact.gradient.to(dtype), exact, dtype)
    assert_loss(exact.loss.to(dtype), exact, dtype)


def assert_found(mutate, dtype, match="wrong, at"):
    logits, target = make_problem(dtype)
    exact = truth(logits, target, UPSTREAM, reduction="none")
    wrong = mutate(exact.gradient, logits, exact.is_target).to(dtype)
    with pytest.raises(AssertionError, match=match):
        assert_gradient(wrong, exact, dtype, roundings=2)


@by_dtype
@pytest.mark.parametrize("mutant", GRADIENT_MUTANTS)
def test_wrong_gradient_is_found(mutant, dtype):
    assert_found(GRADIENT_MUTANTS[mutant], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mutant", FINE_GRADIENT_MUTANTS)
def test_slightly_wrong_gradient_is_found(mutant, dtype):
    assert_found(FINE_GRADIENT_MUTANTS[mutant], dtype)


@half_dtypes
def test_target_patched_after_rounding_is_found(dtype):
    def patch_after_rounding(right, logits, at):
        p = (right / UPSTREAM[:, None] + at.double()).to(dtype)
        patched = (p - at.to(dtype)) * UPSTREAM[:, None].to(dtype)
        return torch.where(at, patched, right)

    assert_found(patch_after_rounding, dtype, match="gradient of target class")


@by_dtype
def test_rounding_to_fewer_bits_is_found(dtype):
    """For example, a 16-bit gradient that passes through a narrower type."""

    def round_coarsely(right, logits, at):
        mantissa, exponent = torch.frexp(right)
        bits = torch.finfo(dtype).eps * (8 if dtype in (torch.bfloat16, torch.float16) else 1e3)
        bits = max(bits, 2e-5) if dtype == torch.float32 else bits
        return torch.ldexp((mantissa / bits).floor() * bits, exponent)

    assert_found(round_coarsely, dtype)


@half_dtypes
def test_truncation_is_found(dtype):
    """Truncation is off by up to one unit in the last place; rounding by half a unit."""
    logits, target = make_problem(dtype)
    exact = truth(logits, target, UPSTREAM, reduction="none")
    mantissa, exponent = torch.frexp(exact.gradient)
    step = torch.finfo(dtype).eps / 2
    truncated = torch.ldexp((mantissa / step).trunc() * step, exponent).to(dtype)
    with pytest.raises(AssertionError, match="wrong, at"):
        assert_gradient(truncated, exact, dtype)


ERROR = {torch.float32: 5e-6, torch.float64: 1e-13 + N_CLASSES * 1e-16}


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("sign", [-1, 1])
def test_twice_the_tolerance_is_found(dtype, sign):
    """Half of the tolerance passes, for loss and gradient."""
    exact = truth(*make_problem(dtype), UPSTREAM, reduction="none")
    for compare, right, terms in (
        (assert_loss, exact.loss, exact.loss_terms),
        (assert_gradient, exact.gradient, exact.gradient_terms),
    ):
        error = sign * ERROR[dtype] * terms
        compare((right + error / 2).to(dtype), exact, dtype)
        with pytest.raises(AssertionError, match="wrong, at"):
            compare((right + 2 * error).to(dtype), exact, dtype)


LABELS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.3},
    "weighted": {"weight": torch.linspace(0.5, 2.0, 7)},
    "weighted and smoothed": {"weight": torch.linspace(0.5, 2.0, 7), "label_smoothing": 0.3},
    "another ignored index": {"ignore_index": 2},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "soft"])
@pytest.mark.parametrize("labels", LABELS)
def test_terms_of_loss_and_gradient(labels, soft, reduction):
    """The terms of the gradient are p times the sum of the label weights, and each weight."""
    options = dict(LABELS[labels])
    logits, target = torch.randn(12, 7, 3), torch.randint(7, (12, 3))
    target[target == 5] = options.get("ignore_index", -100)
    if soft:  # no row is ignored
        target = torch.randn(12, 7, 3).softmax(1)
        options.pop("ignore_index", None)
    upstream = torch.randn(12, 3) if reduction == "none" else torch.tensor(-3.0)
    exact = truth(logits, target, upstream, reduction=reduction, **options)
    q = label_weights(logits, target, **options)
    losses = -(q * logits.double().log_softmax(1)).sum(1)
    options = {k: v.double() if k == "weight" else v for k, v in options.items()}
    expected = torch.nn.functional.cross_entropy(
        *(logits.double(), target.double() if soft else target), reduction="none", **options
    )
    torch.testing.assert_close(losses, expected)
    sign = upstream.sign().unsqueeze(1) if reduction == "none" else -1.0
    to_p, to_label = (exact.gradient_terms + sign * one * exact.gradient for one in (1, -1))
    total = to_p.sum(1, keepdim=True)
    torch.testing.assert_close(to_p, total * logits.double().softmax(1))
    torch.testing.assert_close(to_label, total * q / q.sum(1, keepdim=True).clamp(min=1e-30))
    divisor = total.sum() / (2 * 3 * q.sum()) if reduction != "none" else torch.tensor(1.0)
    terms, losses = q.sum(1) + expected / 10, exact.loss_terms
    if reduction != "none":
        terms = terms.sum() * divisor
    torch.testing.assert_close(losses, terms.double())
    if labels == "plain" and reduction == "mean":
        torch.testing.assert_close(losses, 1 + exact.loss / 10)


def test_nan_and_infinity_may_be_right():
    logits, target = make_problem(torch.float32)
    logits[0, 0] = float("nan")
    exact = truth(logits, target, reduction="none")
    assert exact.loss[0].isnan()
    assert_loss(exact.loss.float(), exact, torch.float32)
    with pytest.raises(AssertionError, match="loss: 1 of"):
        assert_loss(exact.loss.float().nan_to_num(), exact, torch.float32)


LOSS_MUTANTS = {
    "divided by all rows, not the kept ones": lambda exact: exact * (N_ROWS - 1) / N_ROWS,
    "sum": lambda exact: exact * (N_ROWS - 1),
    "1e-5 too high": lambda exact: exact * (1 + 1e-5),
    "NaN": lambda exact: exact * float("nan"),
    "0": lambda exact: exact * 0,
}


@by_dtype
@pytest.mark.parametrize("mutant", LOSS_MUTANTS)
def test_wrong_loss_is_found(mutant, dtype):
    exact = truth(*make_problem(dtype), reduction="mean")
    result_dtype = accumulation_dtype(dtype)
    with pytest.raises(AssertionError, match="loss: 1 of 1 wrong"):
        assert_loss(LOSS_MUTANTS[mutant](exact.loss).to(result_dtype), exact, result_dtype)


def test_loss_by_lse_less_logit_is_found():
    logits, target = make_problem(torch.float32)
    logits, target = logits[:IGNORED] + 3e4, target[:IGNORED]
    exact = truth(logits, target, reduction="none")
    loss = logits.logsumexp(1) - logits.gather(1, target[:, None]).squeeze(1)
    with pytest.raises(AssertionError, match="loss"):
        assert_loss(loss, exact, torch.float32)


def test_wrong_dtype_or_shape_is_found():
    exact = truth(*make_problem(torch.float32), UPSTREAM, reduction="none")
    for wrong in (exact.gradient, exact.gradient.float()[:, 1:], exact.gradient.float().T):
        with pytest.raises(AssertionError):
            assert_gradient(wrong, exact, torch.float32)
    for wrong in (exact.loss, exact.loss.float()[1:], exact.loss.float().mean()):
        with pytest.raises(AssertionError):
            assert_loss(wrong, exact, torch.float32)

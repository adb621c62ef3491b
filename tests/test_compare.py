"""The comparison itself: what is right passes, and what a kernel is likely to do wrong is found."""

import pytest
import torch
from cases import DTYPES
from compare import accumulation_dtype, assert_gradient, assert_loss, truth

pytestmark = pytest.mark.cpu("torch operations alone")
N_ROWS, N_CLASSES, IGNORED, CONFIDENT = 6, 3001, 4, 1
UPSTREAM = torch.tensor([1.0, 0.5, 0.75, 1.25, 1.5, 0.625])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
half_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def make_problem(dtype):
    """Return logits and targets, one row ignored and one of p = 0.999 at its target."""
    logits = torch.randn(N_ROWS, N_CLASSES) * 2
    target = torch.randint(0, N_CLASSES, (N_ROWS,))
    logits[CONFIDENT, target[CONFIDENT]] = 17.0
    target[IGNORED] = -100
    return logits.to(dtype), target


def row(index, values):
    """Return zeros but for one row."""
    return (
        torch.zeros(N_ROWS, N_CLASSES, dtype=torch.float64).index_fill(0, torch.tensor(index), 1)
        * values
    )


# Each takes the right gradient in float64, the logits and where the targets are, and returns a
# wrong gradient before its rounding.
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

# Wrong by less than 16-bit rounding can show.
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
    """As where a 16-bit gradient is truncated, or passes through a narrower type."""

    def round_coarsely(right, logits, at):
        mantissa, exponent = torch.frexp(right)
        bits = torch.finfo(dtype).eps * (8 if dtype in (torch.bfloat16, torch.float16) else 1e3)
        bits = max(bits, 2e-5) if dtype == torch.float32 else bits
        return torch.ldexp((mantissa / bits).floor() * bits, exponent)

    assert_found(round_coarsely, dtype)


LOSS_MUTANTS = {
    "by all rows, not the kept": lambda exact: exact * (N_ROWS - 1) / N_ROWS,
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

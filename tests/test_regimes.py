"""Every option in every regime: kernels for rows, segments and tiles each implement it."""

import math
from typing import NamedTuple

import pytest
import torch
from cases import DTYPES, make_logits
from modes import MODES, has_mode, loss_and_gradient
from problems import Problem, check_problem
from torch import Tensor

from fused_xent import cross_entropy_with_statistics

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """Torch fills new tensors with NaN, so that elements that a kernel misses are noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Regime(NamedTuple):
    """A shape, which decides the kernels that compute it; strided: class stride above 1."""

    shape: tuple[int, int]
    strided: bool = False

    def lay_out(self, values: Tensor) -> Tensor:
        return values.mT.contiguous().mT if self.strided else values


REGIMES = {
    "tile": Regime((7, 9)),
    "tiles": Regime((259, 19)),  # the last tile has few rows, its last group few classes
    "strided tiles": Regime((21, 150), strided=True),
    "rows": Regime((5, 203)),
    "rows of several blocks": Regime((3, 4133)),
    "segments": Regime((3, 16399)),
    "rows of several segments": Regime((17, 16399)),
}


def is_large(regime: str) -> bool:
    return math.prod(REGIMES[regime].shape) > 100_000


def case(again: bool, *values):
    """Return test parameters; again: run them again under each instruction set."""
    name = "-".join(str(value).removeprefix("torch.") for value in values)
    return pytest.param(*values, id=name, marks=[pytest.mark.kernels] if again else [])


def sign(n: int) -> Tensor:
    """Return token weights: positive ones, zero and negative ones."""
    return torch.tensor([1.5, 0.0, -0.5, 1.0, 0.75]).repeat(n // 5 + 1)[:n]


OPTIONS = {
    "none": {},
    "token_weight": {"token_weight": sign},
    "lse_square_scale": {"lse_square_scale": 0.1},
    "focal_gamma": {"focal_gamma": 1.5},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": 1.75},
    "rows": {"token_weight": sign, "lse_square_scale": 0.1, "focal_gamma": 1.5},
    "all": {
        "token_weight": sign,
        "lse_square_scale": 0.1,
        "focal_gamma": 1.5,
        "softcap": 30.0,
        "logit_scale": 0.75,
    },
}
LABELS = {  # probabilities or not, class weights or not, label_smoothing
    "index": (False, False, 0.0),
    "index, weighted": (False, True, 0.0),
    "index, smoothed": (False, False, 0.2),
    "index, weighted and smoothed": (False, True, 0.2),
    "probabilities": (True, False, 0.0),
    "probabilities, weighted and smoothed": (True, True, 0.2),
}


def make_target(logits: Tensor, soft: bool) -> Tensor:
    """Return labels at the first and last classes and in between; some rows are ignored."""
    n_rows, n_classes = logits.shape
    if soft:
        return (2 * torch.randn(n_rows, n_classes)).softmax(1).to(logits.dtype)
    target = torch.arange(n_rows) * 37 % n_classes
    target[0], target[-1] = n_classes - 1, 0
    target[2::5] = -100
    return target


OPTION_CASES = [
    case(option == "all" and dtype == torch.float32, regime, option, dtype)
    for regime in REGIMES
    for option in OPTIONS
    for dtype in ((torch.float32,) if option not in ("none", "all") or is_large(regime) else DTYPES)
    if option in ("none", "all") or not is_large(regime)
]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(("regime", "option", "dtype"), OPTION_CASES)
def test_option_in_regime(regime, labels, option, dtype):
    regime, (soft, weighted, smoothing) = REGIMES[regime], LABELS[labels]
    n_rows, n_classes = regime.shape
    logits = make_logits(regime.shape, dtype)
    # The maximum is neither among the first classes, whose maximum is the guess for the block, nor
    # in the first block.
    top = logits.amax(1) + 2
    logits[1::2, n_classes // 3] = top[1::2]
    logits[::2, n_classes - 2] = top[::2]
    target = make_target(logits, soft)
    options = {"reduction": "none", "label_smoothing": smoothing}
    options |= {
        name: value(n_rows) if callable(value) else value for name, value in OPTIONS[option].items()
    }
    if weighted:
        options["weight"] = (torch.arange(n_classes) % 7 / 4).to(dtype)
    logits, target = regime.lay_out(logits), regime.lay_out(target) if soft else target
    for mode in MODES:
        if has_mode(mode, dtype):
            check_problem(Problem(logits.clone(), target, options, mode, statistics=False))
    check_problem(Problem(logits.clone(), target, options, "default", statistics=True))


# ---- masked classes, and numbers near the largest ----------------------------------------------

MASKS = {  # which classes have logit -inf
    "first half": lambda j, n: j < n // 2,
    "last half": lambda j, n: j >= n - n // 2,
    "every other": lambda j, n: j % 2 == 0,
    "the first blocks": lambda j, n: j < n // 3072 * 2048,
}


def greatest(dtype: torch.dtype) -> float:
    """Return a number near the largest, whose double is out of range."""
    number = {torch.float64: 1e308, torch.float16: 6e4}.get(dtype, 2.5e38)
    return torch.tensor(number, dtype=dtype).item()


BASES = {
    "0": lambda dtype: 0.0,
    "greatest": greatest,
    "least": lambda dtype: -greatest(dtype),
}


def spread_out(values: Tensor, kept: Tensor, fill: float) -> Tensor:
    """Return values at the kept classes, and fill at all others."""
    whole = torch.full((len(values), len(kept)), fill, dtype=values.dtype)
    whole[:, kept] = values
    return whole


MASK_CASES = [
    case(False, regime, base, dtype)
    for regime in REGIMES
    for base in BASES
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if not (is_large(regime) or (dtype == torch.bfloat16 and base == "least"))
]


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("regime", "base", "dtype"), MASK_CASES)
def test_masked_classes(regime, mask, base, soft, dtype):
    """Loss, statistics and gradients equal those of the unmasked classes, in float64."""
    regime = REGIMES[regime]
    n_rows, n_classes = regime.shape
    base = BASES[base](dtype)
    kept = ~MASKS[mask](torch.arange(n_classes), n_classes)
    alone = make_logits((n_rows, int(kept.sum())), dtype) if base == 0 else None
    if alone is None:  # smaller numbers vanish when base is added
        alone = torch.zeros(n_rows, int(kept.sum()), dtype=dtype)
    labels = make_target(alone, soft)
    target = labels
    if soft:
        target = regime.lay_out(spread_out(labels, kept, 0))
    else:
        target = torch.where(labels >= 0, kept.nonzero()[labels.clamp(min=0), 0], labels)
    logits = regime.lay_out(spread_out(alone + base, kept, -math.inf))
    exact = alone.double().requires_grad_()
    exact_log_p = exact.log_softmax(1)
    is_kept = torch.ones(n_rows, dtype=torch.bool) if soft else labels >= 0
    if soft:
        exact_loss = -(labels.double() * exact_log_p).sum(1)
    else:
        exact_loss = -exact_log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0] * is_kept
    exact_entropy = -(exact_log_p.exp() * exact_log_p).sum(1) * is_kept
    exact_lse = (exact.logsumexp(1) + base) * is_kept
    upstream = torch.arange(n_rows) % 3 - 0.5
    (exact_gradient,) = torch.autograd.grad(
        (exact_loss * upstream + exact_entropy * (upstream + 1) + exact_lse * upstream).sum(), exact
    )
    (exact_plain,) = torch.autograd.grad(
        -(labels.double() * exact.log_softmax(1) * upstream[:, None]).sum()
        if soft
        else -(exact.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0] * is_kept)
        @ upstream.double(),
        exact,
    )
    half = dtype in (torch.bfloat16, torch.float16)
    tolerance = {"rtol": 1e-2 if half else 2e-5, "atol": 1e-5 if half else 2e-6}
    fine = {"rtol": 1e-5, "atol": 1e-5 if soft and half else 5e-6}
    loss_dtype = torch.promote_types(dtype, torch.float32)

    leaf = logits.detach().requires_grad_()
    results = cross_entropy_with_statistics(leaf, target, reduction="none", loss_dtype=loss_dtype)
    torch.testing.assert_close(results.loss.double(), exact_loss, **fine)
    torch.testing.assert_close(results.entropy.double(), exact_entropy, **fine)
    torch.testing.assert_close(results.lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    top = kept.nonzero()[alone.argmax(1), 0].where(is_kept, -1)
    assert torch.equal(results.argmax, top)
    total = (results.loss * upstream + results.entropy * (upstream + 1)).sum()
    (total + (results.lse * upstream).sum()).backward()
    torch.testing.assert_close(leaf.grad[:, kept].double(), exact_gradient, **tolerance)
    assert (leaf.grad[:, ~kept] == 0).all()
    for mode in MODES:
        if has_mode(mode, dtype):
            loss, gradient = loss_and_gradient(logits, target, upstream, mode, reduction="none")
            torch.testing.assert_close(loss.double(), exact_loss.detach(), **fine)
            torch.testing.assert_close(gradient[:, kept].double(), exact_plain, **tolerance)
            assert (gradient[:, ~kept] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("regime", [name for name in REGIMES if not is_large(name)])
def test_rows_of_minus_infinity(regime, dtype):
    """Its lse is minus infinity and its argmax 0, as in torch."""
    regime = REGIMES[regime]
    n_rows = len(logits := make_logits(regime.shape, dtype))
    logits[1::2] = -math.inf
    target = torch.zeros(n_rows, dtype=torch.int64)
    results = cross_entropy_with_statistics(regime.lay_out(logits), target, reduction="none")
    torch.testing.assert_close(
        *(results.lse.double(), logits.double().logsumexp(1)), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(results.argmax, logits.argmax(1))
    assert results.entropy[::2].isfinite().all()
    assert results.loss[1::2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("of_entropy", "of_lse"), [(2, 0), (0, 1), (2, -1)])
@pytest.mark.parametrize("regime", [name for name in REGIMES if not is_large(name)])
def test_statistics_with_a_masked_target(regime, of_entropy, of_lse, dtype):
    """A target class at -inf adds nothing to the statistics, and its gradient of each is 0."""
    regime = REGIMES[regime]
    n_rows, n_classes = regime.shape
    logits, target = make_logits(regime.shape, dtype), torch.arange(n_rows) * 5 % n_classes
    impossible = torch.zeros(regime.shape, dtype=torch.bool).scatter(1, target[:, None], True)
    leaf = regime.lay_out(logits.masked_fill(impossible, -math.inf)).requires_grad_()
    results = cross_entropy_with_statistics(leaf, target, reduction="none")
    pairs = ((of_entropy, results.entropy), (of_lse, results.lse))
    sum(factor * rows.sum() for factor, rows in pairs if factor != 0).backward()
    exact = logits[~impossible].view(n_rows, -1).double().requires_grad_()
    p = torch.distributions.Categorical(logits=exact)
    (of_entropy * p.entropy() + of_lse * exact.logsumexp(1)).sum().backward()
    torch.testing.assert_close(
        *(results.entropy.double(), p.entropy().detach()), rtol=1e-5, atol=1e-5
    )
    tolerance = {"rtol": 1e-2, "atol": 1e-5} if dtype in HALF else {"rtol": 1e-4, "atol": 1e-6}
    actual = leaf.grad[~impossible].view(n_rows, -1).double()
    torch.testing.assert_close(actual, exact.grad, **tolerance)
    assert (leaf.grad[impossible] == 0).all()

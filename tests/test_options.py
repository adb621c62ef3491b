"""The options beyond torch's: each against its formula, and combinations of all; statistics."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, make_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from modes import MODES, has_mode
from problems import check_problem, make_problem
from test_random import laid_out, layouts

import fused_xent
from fused_xent import cross_entropy, cross_entropy_with_statistics, reference

TARGET = torch.tensor([2, 0, 6, 6, -100])


def problem(dtype=torch.float64):
    return make_logits((5, 7), dtype), TARGET


@st.composite
def problems(draw):
    def lay_out(values):
        return laid_out(values, draw(layouts(values.shape)))

    return make_problem(lambda choices: draw(st.sampled_from(choices)), lay_out)


@pytest.mark.kernels
@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_any_combination(problem):
    check_problem(problem)


@pytest.mark.parametrize("seed", range(8))
def test_any_combination_of_many_options(seed):
    """Hypothesis tends to leave options out; these problems have many."""
    draw = random.Random(seed)
    for _ in range(25):
        check_problem(make_problem(lambda choices: draw.choice(choices)))


# ---- each option against its formula -----------------------------------------------------------


def by_row(z, target=TARGET, **options):
    return F.cross_entropy(z, target, reduction="none", **options)


def kept(target=TARGET):
    return target != -100


FORMULAS = {
    "token_weight": lambda z, w: by_row(z) * w,
    "lse_square_scale": lambda z, w: by_row(z) + 0.3 * z.logsumexp(1) ** 2 * kept(),
    "softcap": lambda z, w: by_row(2.5 * torch.tanh(z / 2.5)),
    "logit_scale": lambda z, w: by_row(1.7 * z),
    "focal_gamma": lambda z, w: (1 - torch.exp(-by_row(z))) ** 2 * by_row(z),
}
VALUES = {"lse_square_scale": 0.3, "softcap": 2.5, "logit_scale": 1.7, "focal_gamma": 2.0}


@pytest.mark.parametrize("function", [cross_entropy, reference.cross_entropy])
@pytest.mark.parametrize("option", FORMULAS)
def test_formula(option, function):
    logits, target = problem()
    weight = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    value = VALUES.get(option, weight)
    expected = FORMULAS[option](logits, weight)
    loss = function(logits, target, reduction="none", **{option: value})
    torch.testing.assert_close(loss, expected)


def test_focal_loss_of_the_paper():
    """(1 - p)^gamma * -log(p), as in Lin et al., for p = 0.9, gamma = 2 and p = 0.5, gamma = 5."""
    for p, gamma, expected in ((0.9, 2, 0.01 * 0.10536), (0.5, 5, 0.03125 * 0.69315)):
        logits = torch.tensor([[math.log(p), math.log(1 - p)]])
        loss = cross_entropy(logits, torch.tensor([0]), focal_gamma=gamma)
        torch.testing.assert_close(loss.item(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("function", [cross_entropy, reference.cross_entropy])
def test_softcap_of_scaled_logits(function):
    logits, target = problem()
    expected = F.cross_entropy(2.5 * torch.tanh(1.7 * logits / 2.5), target)
    loss = function(logits, target, softcap=2.5, logit_scale=1.7)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("gamma", [1e6, 1e8, 1e19, 1e30])
@pytest.mark.parametrize("n_classes", [5, 300])
def test_focal_loss_of_a_large_gamma(n_classes, gamma, device):
    """It multiplies the target's probability, even where 1 - p is rounded to 1."""
    logits = torch.zeros(2, n_classes, device=device)
    logits[:, 0] = torch.tensor([18.0, 44.0])
    target = torch.ones(2, dtype=torch.int64, device=device)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target, reduction="none", focal_gamma=gamma)
    exact = logits.double().requires_grad_()
    minus_log_p = F.cross_entropy(exact, target, reduction="none")
    expected = (gamma * torch.log1p(-torch.exp(-minus_log_p))).exp() * minus_log_p
    # The exponent gamma * p has the relative error of p.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-30)
    gradients = [
        torch.autograd.grad(x.sum(), y)[0].double() for x, y in ((loss, leaf), (expected, exact))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("n_classes", [5, 300])
def test_token_weight_of_ignored_rows_may_be_anything(n_classes, device):
    target = torch.tensor([-100, 1, -100], device=device)
    weight = torch.tensor([math.nan, 1.0, math.inf], device=device)
    logits = torch.randn(3, n_classes, device=device)
    loss = cross_entropy(logits, target, reduction="none", token_weight=weight, focal_gamma=2.0)
    assert loss[0] == loss[2] == 0 < loss[1]


@pytest.mark.parametrize("n_classes", [5, 300])
def test_focal_loss_of_a_negative_cross_entropy(n_classes, device):
    """1 - p is negative, and so its power is NaN."""
    logits, target = (torch.zeros(3, n_classes, device=device) for _ in range(2))
    logits[:, 1] = torch.tensor([1.0, 30.0, 800.0])
    target[:, :2] = torch.tensor([-10.0, 11.0])
    assert cross_entropy(logits, target, reduction="none", focal_gamma=2.0).isnan().all()


@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("function", [cross_entropy, reference.cross_entropy])
def test_focal_loss_of_certain_rows(function, gamma, soft):
    """Loss and gradients are 0, although x^gamma may have no derivative at 0."""
    logits = torch.tensor([[1e4, 0, -1], [0, 2, 1]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1])
    labels = F.one_hot(target, 3).double() if soft else target
    loss = function(logits, labels, focal_gamma=gamma, reduction="none")
    torch.testing.assert_close(
        loss, (1 - (-by_row(logits, target)).exp()) ** gamma * by_row(logits, target)
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient[0] == 0).all()
    rest = by_row(logits[1:], target[1:])
    (expected,) = torch.autograd.grad(((1 - (-rest).exp()) ** gamma * rest).sum(), logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("of_weight", [False, True], ids=["kernels", "torch operations"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_of_masked_classes(dtype, of_weight):
    """Classes with logit minus infinity add 0 and get gradient 0."""
    logits = make_logits((3, 7), dtype)
    logits[:, [1, 4]] = -torch.inf
    leaf, weight = logits.requires_grad_(), torch.ones(7, dtype=dtype, requires_grad=of_weight)
    results = cross_entropy_with_statistics(leaf, torch.tensor([0, 2, -100]), weight)
    rest = logits.detach().double()[:2, [0, 2, 3, 5, 6]].requires_grad_()
    expected = torch.distributions.Categorical(logits=rest).entropy()
    torch.testing.assert_close(results.entropy[:2].double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(results.entropy.sum(), leaf)
    (exact,) = torch.autograd.grad(expected.sum(), rest)
    assert (gradient[:, [1, 4]] == 0).all()
    eps = torch.finfo(dtype).eps
    actual = gradient[:2, [0, 2, 3, 5, 6]].double()
    torch.testing.assert_close(actual, exact, rtol=max(eps, 1e-5), atol=max(eps, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n_classes", [9, 200, 17000])
def test_focal_loss_of_certain_and_impossible_targets(n_classes, dtype):
    """(1 - e^-c)^gamma c and its derivative, for a cross-entropy c from 0 to infinity."""
    logits = make_logits((4, n_classes), dtype, 0.1)
    logits[torch.arange(4), torch.arange(4)] = torch.tensor([800.0, 30.0, 3.0, -math.inf]).to(dtype)
    target = torch.arange(4)
    plain, focal = (logits.clone().requires_grad_() for _ in range(2))
    c = cross_entropy(plain, target, reduction="none")
    loss = cross_entropy(focal, target, reduction="none", focal_gamma=2.0)
    c.sum().backward()
    loss.sum().backward()
    assert 0 <= c[0] < 1e-8
    assert c[3] == math.inf
    rest = -torch.expm1(-c.detach().double())
    slope = rest.square() + 2 * rest * (1 - rest) * c.detach().double().clamp(max=1e9)
    torch.testing.assert_close(loss.double(), rest.square() * c.double(), rtol=1e-6, atol=0)
    expected = plain.grad.double() * slope[:, None]
    torch.testing.assert_close(focal.grad.double(), expected, rtol=1e-5, atol=1e-30)


def test_mean_divides_by_class_weight_times_token_weight():
    logits, target = problem()
    weight = torch.rand(7, dtype=torch.float64)
    tokens = torch.tensor([1.0, 0.0, 2.0, 0.5, 9.0], dtype=torch.float64)
    rows = by_row(logits, weight=weight) * tokens
    expected = rows.sum() / (weight[target[:4]] * tokens[:4]).sum()
    loss = cross_entropy(logits, target, weight, token_weight=tokens)
    torch.testing.assert_close(loss, expected)
    soft = logits.roll(1, 1).softmax(1)
    expected = (by_row(logits, soft) * tokens).sum() / tokens.sum()
    torch.testing.assert_close(cross_entropy(logits, soft, token_weight=tokens), expected)


@pytest.mark.parametrize("function", [*MODES, reference.cross_entropy])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("cancelled", ["token weights", "class weights", "normalizer"])
def test_mean_by_a_sum_of_0_is_nan(cancelled, soft, function):
    """The mean is NaN even if the sum of the losses is not 0."""
    logits, options = make_logits((4, 7), torch.float64), {}
    target = torch.tensor([0, 1, 0, 1])
    if cancelled == "token weights":
        options["token_weight"] = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    elif cancelled == "class weights":
        options["weight"] = torch.tensor([1.0, -1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    else:
        options["normalizer"] = torch.tensor(0.0)
    if soft:
        target = F.one_hot(target, 7).double()
    by_class = soft and cancelled == "class weights"  # not in the divisor for probabilities
    leaf = logits.requires_grad_()
    if function in MODES:
        loss = cross_entropy(leaf * 1, target, **options, **MODES[function])
    else:
        loss = function(leaf * 1, target, **options)
    loss.backward()
    assert loss.isfinite() if by_class else loss.isnan()
    assert leaf.grad.isfinite().all() if by_class else leaf.grad.isnan().all()


@pytest.mark.parametrize("normalizer", [8, 8.0, torch.tensor(8), torch.tensor(8.0).half()])
def test_normalizer(normalizer):
    """The losses of two half batches, divided by the count of the whole, sum to its mean."""
    logits, target = make_logits((12, 9), torch.float32), torch.arange(12) % 9
    target[::3] = -100
    whole = cross_entropy(logits, target)
    halves = (
        cross_entropy(logits[i : i + 6], target[i : i + 6], normalizer=normalizer) for i in (0, 6)
    )
    torch.testing.assert_close(sum(halves), whole)


@pytest.mark.parametrize("weights", [torch.tensor([1, 0, 1]), torch.tensor([True, False, True])])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
@pytest.mark.parametrize("shape", [(3, 5), (3, 1000)])
def test_rows_of_weight_0_may_hold_anything(shape, soft, dtype, mode, weights):
    if not has_mode(mode, dtype):
        pytest.skip("float16 has no fused mode")
    logits = make_logits(shape, dtype)
    logits[1] = torch.nan
    target = logits.roll(1, 1).softmax(1) if soft else torch.tensor([1, 10**9, 3])
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf * 1, target, token_weight=weights, **MODES[mode])
    loss.backward()
    rows = torch.tensor([0, 2])
    expected = F.cross_entropy(
        logits[rows].double(), target[rows].double() if soft else target[rows]
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    assert torch.equal(leaf.grad[1], torch.zeros_like(leaf.grad[1]))
    assert leaf.grad[rows].isfinite().all()


def test_dim():
    logits = make_logits((2, 3, 4, 5), torch.float64)
    for dim in (-4, 0, 1, 2, -1):
        moved = logits.movedim(dim, 1)
        target = torch.randint(moved.shape[1], moved.select(1, 0).shape)
        assert torch.equal(cross_entropy(logits, target, dim=dim), cross_entropy(moved, target))


# ---- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [7, 300, 5000, 40000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_is_the_first_maximum(dtype, n_classes):
    """Rows with ties, NaN (the largest), infinities, only minus infinity; and dropped rows."""
    logits = make_logits((11, n_classes), dtype).round()
    logits[0] = 1
    logits[1, [n_classes // 2, n_classes - 1]] = 100
    logits[2, [3, n_classes - 2]] = torch.nan
    logits[3, 0] = torch.inf
    logits[4] = -torch.inf
    logits[5], logits[5, -1] = -torch.inf, torch.finfo(dtype).min
    logits[6, -1] = 50
    logits[7, -2] = torch.nan
    logits[8, 0], logits[8, -1] = -5, torch.inf
    weight = torch.ones(11)
    weight[10] = 0
    layouts = (logits, logits.t().contiguous().t())
    for layout, label in itertools.product(layouts, (0, 3, n_classes // 2)):
        target = torch.full((11,), label)
        target[9] = -100
        argmax = cross_entropy_with_statistics(layout, target, token_weight=weight).argmax
        assert argmax.tolist() == [*logits[:9].argmax(1).tolist(), -1, -1]


def test_statistics_of_a_language_model():
    logits, target = make_logits((2, 6, 50), torch.float32), torch.randint(50, (2, 6))
    target[0, :3] = -100
    results = cross_entropy_with_statistics(logits, target, dim=-1, lse_square_scale=1e-2)
    p = torch.distributions.Categorical(logits=logits)
    mask = target != -100
    torch.testing.assert_close(results.entropy, p.entropy() * mask)
    torch.testing.assert_close(results.lse, logits.logsumexp(-1) * mask)
    torch.testing.assert_close(results.z_loss, 1e-2 * logits.logsumexp(-1) ** 2 * mask)
    assert torch.equal(results.correct, (logits.argmax(-1) == target) & mask)
    plain = F.cross_entropy(logits.mT, target) + results.z_loss.sum() / mask.sum()
    torch.testing.assert_close(results.loss, plain)


def test_loss_with_statistics_equals_the_plain_loss():
    logits, target = make_logits((40, 3000), torch.float32), torch.randint(3000, (40,))
    loss = cross_entropy_with_statistics(logits, target).loss
    torch.testing.assert_close(loss, cross_entropy(logits, target), rtol=1e-6, atol=0)


def test_statistics_have_the_signature_of_the_loss():
    import inspect

    from fused_xent._options import DEFAULTS

    loss, both = (inspect.signature(f) for f in (cross_entropy, cross_entropy_with_statistics))
    assert list(loss.parameters) == list(both.parameters)
    assert set(DEFAULTS) < set(loss.parameters)
    for name, default in DEFAULTS.items():
        assert loss.parameters[name].default == default
    assert both.return_annotation is fused_xent.CrossEntropyStatistics
    kinds = [parameter.kind.name for parameter in both.parameters.values()]
    assert kinds == ["POSITIONAL_OR_KEYWORD"] * 3 + ["KEYWORD_ONLY"] * (len(kinds) - 3)
    assert [p.default for p in both.parameters.values()] == [
        p.default for p in loss.parameters.values()
    ]
    loss, both = (
        inspect.signature(f)
        for f in (fused_xent.linear_cross_entropy, fused_xent.linear_cross_entropy_with_statistics)
    )
    assert loss.parameters == both.parameters
    assert both.return_annotation is fused_xent.CrossEntropyStatistics


# ---- precision ---------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(64, 30), (16, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcap_is_as_accurate_as_torch(shape, dtype):
    logits, target = make_logits(shape, dtype, 30.0), torch.randint(shape[1], shape[:1])

    def by_torch(x):
        return F.cross_entropy(30 * torch.tanh(x / 30), target, reduction="none")

    exact = by_torch(logits.double())
    ours = cross_entropy(logits, target, softcap=30.0, reduction="none", loss_dtype=torch.float32)
    theirs = by_torch(logits.float())
    error, torchs = ((x - exact).abs() for x in (ours, theirs))
    assert error.mean() <= 1.5 * torchs.mean() + 1e-6
    assert error.max() <= 2e-5


@pytest.mark.kernels
def test_derivative_of_a_saturated_softcap():
    """In float32, 1 - tanh^2 is 0 from 9 on, and has one digit just below."""
    logits = torch.tensor([[4.0, -4.0, 0.0], [7.0, 6.0, -6.5]])
    options = {"softcap": 0.8, "reduction": "sum"}
    exact = logits.double().requires_grad_()
    reference.cross_entropy(exact, torch.tensor([1, 1]), **options).backward()
    for wide in (logits, F.pad(logits, (0, 400), value=-torch.inf)):
        leaf = wide.clone().requires_grad_()
        cross_entropy(leaf[:, :3], torch.tensor([1, 1]), **options).backward()
        torch.testing.assert_close(leaf.grad[:, :3].double(), exact.grad, rtol=1e-4, atol=1e-12)

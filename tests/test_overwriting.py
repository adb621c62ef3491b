"""inplace_backward and grad_in_forward: the gradient overwrites the logits, or is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import make_logits, make_upstream
from modes import ARGUMENT, MODES, N_CLASSES, N_ROWS, OVERWRITING_MODES, gradient_of, make_problem

import fused_xent

by_mode = pytest.mark.parametrize("mode", OVERWRITING_MODES)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@by_dtype
@by_mode
@pytest.mark.parametrize("n_classes", [7, 150, 20000])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradient_equals_default_mode_and_overwrites_logits(
    reduction, n_classes, mode, dtype, device
):
    leaf, target = make_problem(dtype, n_classes)
    upstream = make_upstream(target.shape, reduction).to(dtype)
    default = fused_xent.cross_entropy(leaf, target, reduction=reduction)
    (expected,) = torch.autograd.grad(default, leaf, upstream)
    logits = leaf * 1
    loss = fused_xent.cross_entropy(logits, target, reduction=reduction, **MODES[mode])
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    if mode == "inplace" or (device == "cpu" and dtype != torch.float64):
        assert torch.equal(loss, default)
    else:  # fused mode sums in another order there; in float64 with other maxima
        torch.testing.assert_close(loss, default, rtol=16 * eps if eps < 1e-3 else eps, atol=tiny)
    received = []
    logits.register_hook(received.append)
    loss.backward(upstream)
    rtol = (16 if device == "cpu" else 64) * eps if eps < 1e-3 else eps
    torch.testing.assert_close(leaf.grad, expected, rtol=rtol, atol=tiny)
    if mode == "inplace":
        assert torch.equal(leaf.grad, expected)
        assert received[0].data_ptr() == logits.data_ptr()
    assert torch.equal(logits.detach(), leaf.grad)


@by_mode
@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0, -0.5, float("nan")])
def test_scalar_upstream_is_applied_once(factor, mode):
    leaf, target = make_problem()
    expected = gradient_of(lambda: factor * F.cross_entropy(leaf, target), leaf)
    actual = gradient_of(
        lambda: factor * fused_xent.cross_entropy(leaf * 1, target, **MODES[mode]), leaf
    )
    torch.testing.assert_close(actual, expected, equal_nan=True)


ONE_PER_ROW = {  # upstream gradients; with 0 or 1, a kernel may skip a row
    "first 1": [1.0, 2, 3, 4, 5, 6],
    "all 1": [1.0] * 6,
    "last other": [1.0, 1, 1, 1, 1, -2],
    "first 0": [0.0, 1, 0, 3, 0, 1],
    "not finite at dropped rows": [1.0, torch.inf, torch.nan, 1, 2, 3],
}


@by_mode
@pytest.mark.parametrize("n_classes", [7, 150])
@pytest.mark.parametrize("upstream", ONE_PER_ROW)
def test_each_row_has_its_own_upstream_gradient(upstream, n_classes, mode):
    """Ignored rows and rows of token weight 0 have gradient 0 for any upstream gradient."""
    leaf, target = make_problem(n_classes=n_classes)
    upstream, tokens = torch.tensor(ONE_PER_ROW[upstream]), torch.ones(N_ROWS)
    tokens[2] = 0
    kept = torch.tensor([0, 3, 4, 5])
    exact = F.cross_entropy(leaf[kept], target[kept], reduction="none")
    expected = torch.autograd.grad(exact, leaf, upstream[kept])[0]
    loss = fused_xent.cross_entropy(
        leaf * 1, target, token_weight=tokens, reduction="none", **MODES[mode]
    )
    loss.backward(upstream)
    torch.testing.assert_close(leaf.grad, expected)


@by_mode
def test_sum_of_several_losses_of_different_logits(mode):
    leaf, target = make_problem()
    other = torch.randn_like(leaf)
    expected = gradient_of(
        lambda: F.cross_entropy(leaf * 2, target) + 3 * F.cross_entropy(leaf * other, target), leaf
    )

    def model():
        first = fused_xent.cross_entropy(leaf * 2, target, **MODES[mode])
        return first + 3 * fused_xent.cross_entropy(leaf * other, target, **MODES[mode])

    torch.testing.assert_close(gradient_of(model, leaf), expected)


@by_mode
def test_leaves_are_refused(mode):
    leaf, target = make_problem()
    leaf3 = torch.randn(2, 3, N_CLASSES, requires_grad=True)
    before = leaf.detach().clone()
    for logits in (
        leaf,
        leaf.view(N_ROWS, N_CLASSES),
        leaf3.view(-1, N_CLASSES),
        leaf[:],
        leaf.T.T,
    ):
        with pytest.raises(RuntimeError, match=f"{ARGUMENT[mode]} must be False .*leaf"):
            fused_xent.cross_entropy(logits, target, **MODES[mode])
    assert torch.equal(leaf, before)


@by_mode
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_overwritten(context, mode):
    leaf, target = make_problem()
    expected = F.cross_entropy(leaf, target)
    before = leaf.detach().clone()
    with context():
        logits = leaf * 1
        for input in (leaf, logits, leaf.detach()):
            torch.testing.assert_close(
                fused_xent.cross_entropy(input, target, **MODES[mode]), expected.detach()
            )
            assert torch.equal(input, before)
    detached = (leaf * 1).detach()
    fused_xent.cross_entropy(detached, target, **MODES[mode])
    assert torch.equal(detached, before)


@by_mode
def test_logits_without_a_gradient_are_not_overwritten(mode):
    """Here only the token weights require a gradient."""
    leaf, target = make_problem()
    logits, tokens = leaf.detach() * 1, torch.ones(N_ROWS, requires_grad=True)
    before = logits.clone()
    loss = fused_xent.cross_entropy(
        logits, target, token_weight=tokens, reduction="sum", **MODES[mode]
    )
    loss.backward()
    assert torch.equal(logits, before)
    torch.testing.assert_close(tokens.grad, F.cross_entropy(before, target, reduction="none"))


@by_mode
def test_second_backward_is_refused(mode):
    leaf, target = make_problem()
    loss = fused_xent.cross_entropy(leaf * 1, target, **MODES[mode])
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert torch.equal(leaf.grad, first)


@by_mode
@pytest.mark.parametrize("through", ["logits", "their base", "a view"])
def test_logits_changed_between_forward_and_backward(through, mode):
    leaf, target = make_problem()
    memory = leaf * 1
    logits = memory.view(N_ROWS, N_CLASSES)
    loss = fused_xent.cross_entropy(logits, target, **MODES[mode])
    with torch.no_grad():
        {"logits": logits, "their base": memory, "a view": logits[1:, ::2]}[through].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert leaf.grad is None


@by_mode
def test_gradient_of_gradient_is_refused(mode):
    leaf, target = make_problem()
    loss = fused_xent.cross_entropy(leaf * 1, target, **MODES[mode])
    with pytest.raises(RuntimeError, match=f"{ARGUMENT[mode]} must be False .*graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


ROWS_OF_SEQUENCES = {
    "view": lambda logits: logits.view(-1, N_CLASSES),
    "flatten": lambda logits: logits.flatten(0, 1),
    "reshape": lambda logits: logits.reshape(6, N_CLASSES),
    "view of a view": lambda logits: logits.view(3, 2, N_CLASSES).view(6, N_CLASSES),
    "transposed": lambda logits: logits.mT,
}


@by_mode
@pytest.mark.parametrize("rows", ROWS_OF_SEQUENCES)
def test_logits_of_three_dimensions(rows, mode):
    rows = ROWS_OF_SEQUENCES[rows]
    leaf = torch.randn(2, 3, N_CLASSES, requires_grad=True)
    target = torch.randint(0, N_CLASSES, rows(leaf).select(1, 0).shape)
    expected = gradient_of(lambda: F.cross_entropy(rows(leaf * 1), target), leaf)
    actual = gradient_of(
        lambda: fused_xent.cross_entropy(rows(leaf * 1), target, **MODES[mode]), leaf
    )
    torch.testing.assert_close(actual, expected)


@by_mode
@pytest.mark.parametrize("n_classes", [9, 300])
def test_probabilities(n_classes, mode):
    leaf = make_logits((5, n_classes), torch.float32).requires_grad_()
    soft = torch.rand(5, n_classes).softmax(1).requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(leaf, soft), [leaf, soft])
    loss = fused_xent.cross_entropy(leaf * 1, soft.detach(), **MODES[mode])
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), expected[:1])


def test_gradient_of_probabilities_inplace():
    leaf, soft = (torch.randn(5, 9).softmax(1).requires_grad_() for _ in range(2))
    expected = torch.autograd.grad(F.cross_entropy(leaf, soft), [leaf, soft])
    loss = fused_xent.cross_entropy(leaf * 1, soft, inplace_backward=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [leaf, soft]), expected)


def test_gradient_of_probabilities_in_fused_mode():
    """Refused: forward saves nothing to compute it from."""
    logits, soft = (torch.randn(5, 9).softmax(1).requires_grad_() for _ in range(2))
    with pytest.raises((RuntimeError, ValueError), match="must"):
        fused_xent.cross_entropy(logits * 1, soft, grad_in_forward=True)


OTHERS = {
    "weight": lambda: torch.rand(9),
    "token_weight": lambda: torch.rand(5),
    "normalizer": lambda: torch.tensor(3.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_gradient_of_other_tensors_in_fused_mode(name):
    """Refused with a gradient of the logits, which are overwritten; computed without one."""
    logits, other = torch.randn(5, 9, requires_grad=True), OTHERS[name]().requires_grad_()
    target = torch.arange(5)
    with pytest.raises(RuntimeError, match=f"where {name} requires a gradient"):
        fused_xent.cross_entropy(logits * 1, target, **{name: other}, grad_in_forward=True)
    losses = [
        fused_xent.cross_entropy(logits.detach(), target, **{name: other}, **options)
        for options in ({"grad_in_forward": True}, {})
    ]
    gradients = [torch.autograd.grad(loss, other)[0] for loss in losses]
    assert torch.equal(*gradients)
    with torch.no_grad():
        loss = fused_xent.cross_entropy(logits * 1, target, **{name: other}, grad_in_forward=True)
    assert torch.equal(loss, losses[0])


@by_mode
def test_training_matches_default_mode(mode):
    """Training with accumulated gradients and clipped norms gives the same weights."""
    features, target = torch.randn(2, 8, 16), torch.randint(0, 50, (2, 8))
    start = torch.nn.Linear(16, 50)
    ends = []
    for kwargs in ({}, MODES[mode]):
        model = copy.deepcopy(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            for x, y in zip(features, target, strict=True):
                (fused_xent.cross_entropy(model(x), y, **kwargs) / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        ends.append(model.weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["lse", "z_loss", "entropy"])
def test_gradient_of_statistics_in_fused_mode(name):
    leaf, target = make_problem()
    results = fused_xent.cross_entropy_with_statistics(
        leaf * 1, target, lse_square_scale=0.1, grad_in_forward=True
    )
    with pytest.raises(RuntimeError, match=r"grad_in_forward must be False where lse, z_loss or"):
        (results.loss - getattr(results, name).mean()).backward()
    assert leaf.grad is None


@pytest.mark.parametrize("mode", OVERWRITING_MODES)
def test_gradients_have_no_graph(mode):
    """The gradient requires no gradient, although it is in the memory of the logits."""
    leaf, target = make_problem()
    logits, seen = leaf * 1, []
    logits.register_hook(seen.append)
    fused_xent.cross_entropy(logits, target, **MODES[mode]).backward()
    assert [gradient.requires_grad for gradient in seen] == [False]


@pytest.mark.parametrize("mode", OVERWRITING_MODES)
def test_promoted_leaves_are_not_overwritten(mode):
    """float64 probabilities promote the logits to a copy, which may be overwritten."""
    leaf, _ = make_problem()
    before, soft = leaf.detach().clone(), torch.rand(leaf.shape, dtype=torch.float64)
    fused_xent.cross_entropy(leaf, soft, **MODES[mode]).backward()
    double = before.double().requires_grad_()
    F.cross_entropy(double, soft).backward()
    assert torch.equal(leaf, before)
    torch.testing.assert_close(leaf.grad.double(), double.grad)

"""Sparse labels (``target_indices``) against dense labels in float64, on every path of the loss."""

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, REDUCTIONS
from compare import half_ulp
from layers import by_classes, in_chunks, make_layer, unfused
from modes import MODES, has_mode
from problems import Problem, check_problem
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

import fused_xent
from fused_xent import cross_entropy, cross_entropy_with_statistics, linear_cross_entropy, reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit"),  # torch's forward mode
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DOUBLE = torch.float64
PADDING = -100
ops = torch.ops.fused_xent


class Labels(NamedTuple):
    """Sparse labels, and the arguments of the loss that they are."""

    target: Tensor
    target_indices: Tensor

    def dense(self, logits: Tensor, dim: int = 1, ignore_index: int = PADDING) -> Tensor:
        """Return the same labels of all classes in float64, by torch."""
        is_padding = self.target_indices == ignore_index
        p = self.target.double().masked_fill(is_padding, 0)
        index = self.target_indices.long().masked_fill(is_padding, 0)
        return torch.zeros(logits.shape, dtype=DOUBLE).scatter_add(dim, index, p)


def make_labels(logits, k, dim=1, dtype=torch.float32, index_dtype=torch.int64) -> Labels:
    """Return labels with repeated classes and padding; the second row is all padding."""
    shape = list(logits.shape)
    n_classes, shape[dim] = shape[dim], k
    index = torch.randint(n_classes, shape)
    if k > 1:
        index.select(dim, k - 1).copy_(index.select(dim, 0))
        index[torch.rand(shape) < 0.2] = PADDING
    if index.shape[0] > 1:
        index[1] = PADDING
    p = torch.rand(shape).pow(2) / k**0.5
    return Labels(p.to(dtype), index.to(index_dtype))


def tokens_of(row_shape) -> Tensor:
    """Return token weights, in which every third row is left out."""
    n_rows = torch.Size(row_shape).numel()
    return (torch.arange(n_rows) % 3 / 2).view(row_shape)


def some_options(logits, dim=1) -> dict:
    return {
        "weight": (torch.arange(logits.shape[dim]) % 4 / 2).to(logits.dtype),
        "label_smoothing": 0.1,
        "token_weight": tokens_of(logits.select(dim, 0).shape),
        "lse_square_scale": 0.01,
        "softcap": 30.0,
        "logit_scale": 0.7,
    }


def make_sparse(logits, labels, options, mode="default", statistics=False) -> Problem:
    options = {"dim": 1, "reduction": "mean"} | options
    dense = labels.dense(logits, options["dim"], options.get("ignore_index", PADDING))
    return Problem(logits, dense, options, mode, statistics, labels._asdict())


# ---- loss and gradient of the logits -------------------------------------------------------------


LAYOUTS = {  # of the logits, and the dimension of the classes
    "rows": lambda v: (torch.randn(7, v) * 2, 1),
    "sequence": lambda v: (torch.randn(2, 3, v) * 2, -1),
    "image": lambda v: (torch.randn(2, v, 3, 2) * 2, 1),
    "channels last": lambda v: (torch.randn(2, 3, 2, v).movedim(-1, 1) * 2, 1),
    "transposed": lambda v: (torch.randn(v, 7).t() * 2, 1),
    "part": lambda v: (torch.randn(4, v + 3)[:, 1 : v + 1] * 2, 1),
}


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    """Each number of classes and labels, plain and with options, in each mode."""
    for v, k in ((5, 1), (5, 3), (100, 2), (100, 64), (1000, 3), (1000, 1000)):
        logits, dim = LAYOUTS[layout](v)
        logits = logits.to(dtype)
        labels = make_labels(logits, k, dim)
        for options, mode in itertools.product(({}, some_options(logits, dim)), MODES):
            if has_mode(mode, dtype):
                check_problem(make_sparse(logits, labels, {"dim": dim, **options}, mode))
        check_problem(make_sparse(logits, labels, {"dim": dim}, statistics=True))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 64, 1024])
def test_long_rows(k, dtype):
    logits = (torch.randn(3, 50257) * 2).to(dtype)
    labels = make_labels(logits, k)
    for mode in MODES:
        if has_mode(mode, dtype):
            check_problem(make_sparse(logits, labels, {"reduction": "sum"}, mode))
    check_problem(make_sparse(logits, labels, some_options(logits), statistics=True))


OPTIONS = {
    "plain": {},
    "weight": {"weight": torch.arange(100) % 4 / 2},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing entirely": {"label_smoothing": 1.0},
    "weight and smoothing": {"weight": torch.arange(100) % 4 / 2, "label_smoothing": 0.2},
    "z-loss": {"lse_square_scale": 0.01},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.3},
    "focal": {"focal_gamma": 2.0},
    "focal, smoothed": {"focal_gamma": 1.5, "label_smoothing": 0.1, "softcap": 5.0},
    "tokens": {"token_weight": tokens_of((6,))},
    "a class is padding": {"ignore_index": 3},
}


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    """Each reduction and mode, with statistics and without, and in rows of strided classes."""
    options = OPTIONS[name]
    logits = (torch.randn(6, 100) * 2).to(dtype)
    labels = make_labels(logits, 4)
    if name == "a class is padding":
        index = labels.target_indices
        index[index == PADDING] = 3
    for reduction, mode, statistics in itertools.product(REDUCTIONS, MODES, (False, True)):
        given = {"reduction": reduction, **options}
        check_problem(make_sparse(logits, labels, given, mode, statistics))
    strided = logits.t().contiguous().t()
    check_problem(make_sparse(strided, labels, options, statistics=True))
    if "token_weight" not in options:
        check_problem(make_sparse(logits, labels, {"normalizer": 2.5, **options}))


def test_against_torch():
    """The mean counts rows of padding alone; nothing is normalized."""
    logits = torch.randn(6, 9, dtype=DOUBLE)
    labels = make_labels(logits, 3, dtype=DOUBLE)
    assert (labels.target_indices[1] == PADDING).all()
    dense = labels.dense(logits)
    assert not torch.allclose(dense.sum(1), torch.ones(6, dtype=DOUBLE))
    for reduction in REDUCTIONS:
        loss = cross_entropy(logits, **labels._asdict(), reduction=reduction)
        torch.testing.assert_close(loss, F.cross_entropy(logits, dense, reduction=reduction))


def test_mixup():
    """The docstring's example: the loss is the mixed loss of both labels."""
    logits, labels, mixed = torch.randn(5, 7), torch.randint(7, (5,)), torch.randperm(5)
    lam = 0.7
    p = torch.tensor([lam, 1 - lam]).expand(5, 2)
    classes = torch.stack([labels, labels[mixed]], 1)
    loss = cross_entropy(logits, p, target_indices=classes)
    expected = [F.cross_entropy(logits, y) for y in (labels, labels[mixed])]
    torch.testing.assert_close(loss, lam * expected[0] + (1 - lam) * expected[1])


def test_one_row_without_a_batch():
    logits, p = torch.randn(9), torch.tensor([0.5, 0.75])
    loss = cross_entropy(logits, p, target_indices=torch.tensor([2, 8]))
    expected = -(p.double() * logits.double().log_softmax(0)[[2, 8]]).sum()
    torch.testing.assert_close(loss.double(), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ignore_index", [PADDING, -1, 2, 10**12, -(10**12)])
def test_padding(ignore_index, mode):
    """Probabilities of padding are not read, nor the rows of token weight 0."""
    logits = torch.randn(4, 7)
    labels = Labels(torch.rand(4, 3), torch.randint(3, 7, (4, 3)))
    whole = abs(ignore_index) >= 2**31
    labels.target_indices[torch.tensor([0, 0, 3]), torch.tensor([1, 2, 0])] = ignore_index
    tokens = torch.tensor([1.0, 2.0, 0.0, 0.5])
    clean = labels.dense(logits, ignore_index=ignore_index)
    labels.target[labels.target_indices == ignore_index] = torch.nan
    labels.target_indices[2] = 99 if not whole else -5
    labels.target[2] = torch.nan
    broken = logits.clone()
    broken[2] = torch.nan
    leaf = broken.requires_grad_()
    loss = cross_entropy(
        *(leaf * 1, labels.target),
        target_indices=labels.target_indices,
        ignore_index=ignore_index,
        token_weight=tokens,
        **MODES[mode],
    )
    loss.backward()
    exact = logits.double().requires_grad_()
    rows = F.cross_entropy(exact, clean, reduction="none") * tokens
    expected = rows.sum() / tokens.sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
    assert not leaf.grad[2].any()


@pytest.mark.parametrize("gap", [0.0, 10.0, 30.0])
@pytest.mark.parametrize("v", [5, 100, 1000, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE], ids=str)
def test_one_label_is_a_class_index(dtype, v, gap):
    """Also where the probability of the class is close to 1: the loss keeps its digits."""
    target = torch.randint(v, (4,))
    target[2:] = torch.tensor([0, v - 1])
    logits = torch.randn(4, v).to(dtype)
    if gap:
        logits[range(4), target] = logits.amax(1) + gap
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    options = {"reduction": "none", "loss_dtype": DOUBLE}
    one = cross_entropy(leaves[0], torch.ones(4, 1), target_indices=target[:, None], **options)
    other = cross_entropy(leaves[1], target, **options)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    exact = logits.double()
    top = exact.gather(1, target[:, None])
    others = (exact - top).exp().scatter(1, target[:, None], 0).sum(1)
    torch.testing.assert_close(one, others.log1p(), rtol=2e-6, atol=0)
    one.sum().backward()
    other.sum().backward()
    one, other = (leaf.grad.double() for leaf in leaves)
    torch.testing.assert_close(one, other, rtol=2e-6 + 2 * half_ulp(dtype), atol=0)


@pytest.mark.parametrize("gap", [10.0, 30.0])
def test_several_labels_near_1(gap):
    """The labels of one class add up: their loss is that of the class, with all digits.

    So is it beside a label of 0.
    """
    logits = torch.randn(3, 200)
    logits[:, 7] = logits.amax(1) + gap
    index, p = torch.tensor([[8, 7, 7, PADDING]] * 3), torch.tensor([[0.0, 0.25, 0.5, 9.0]] * 3)
    loss = cross_entropy(logits, p, target_indices=index, reduction="none", loss_dtype=DOUBLE)
    exact = logits.double()
    others = (exact - exact[:, 7:8]).exp().scatter(1, torch.full((3, 1), 7), 0).sum(1)
    torch.testing.assert_close(loss, 0.75 * others.log1p(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("k", [2, 10, 100, 1000])
def test_gradient_at_a_repeated_class_near_1(k):
    """What labels of other classes add there is a difference of sums: 0, if there are none."""
    logits = torch.zeros(1, 50)
    logits[0, 7] = 20
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, torch.tensor([7])).backward()
    leaf = logits.requires_grad_()
    index, p = torch.full((1, k), 7), torch.full((1, k), 1 / k)
    (cross_entropy(leaf, p, target_indices=index) / p.double().sum()).backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-6, atol=0)


def test_labels_on_classes_of_minus_infinity_alone():
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    p, index = torch.tensor([[0.5, 0.25]]), torch.tensor([[1, 2]])
    assert cross_entropy(logits, p, target_indices=index) == torch.inf


def test_rows_left_out_have_no_gradient_of_statistics():
    logits, index = torch.randn(2, 9).requires_grad_(), torch.tensor([[1, 2], [3, 4]])
    tokens = torch.tensor([0.0, 1.0])
    results = cross_entropy_with_statistics(
        logits, torch.ones(2, 2), target_indices=index, token_weight=tokens
    )
    (results.loss + results.lse.sum() + results.entropy.sum()).backward()
    assert not logits.grad[0].any()
    assert logits.grad[1].all()


def test_smoothing_that_keeps_nothing_of_an_infinite_loss():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    p, index = torch.tensor([[0.5, 0.5]]), torch.tensor([[1, 2]])
    assert cross_entropy(logits, p, target_indices=index, label_smoothing=1.0) == torch.inf


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("of_p", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, of_p, index_dtype):
    """The loss has torch's promoted dtype; float64 probabilities do not copy narrower logits."""
    logits = torch.randn(4, 50).to(dtype)
    labels = make_labels(logits, 3, dtype=of_p, index_dtype=index_dtype)
    leaf, p = logits.clone().requires_grad_(), labels.target.clone().requires_grad_()
    loss = cross_entropy(leaf, p, target_indices=labels.target_indices)
    assert loss.dtype == torch.promote_types(dtype, of_p)
    loss.backward()
    assert (leaf.grad.dtype, p.grad.dtype) == (dtype, of_p)
    exact = (logits.double().requires_grad_(), labels.target.double().requires_grad_())
    expected = F.cross_entropy(exact[0], labels._replace(target=exact[1]).dense(exact[0]))
    expected.backward()
    rtol = 1e-5 + half_ulp(loss.dtype)
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
    for found, right in zip((leaf.grad, p.grad), (x.grad for x in exact), strict=True):
        rtol = 1e-5 + 2 * half_ulp(found.dtype)
        torch.testing.assert_close(found.double(), right, rtol=rtol, atol=1e-7)


def test_float64_class_weights_promote_the_loss_alone():
    logits, weight = torch.randn(4, 9), torch.rand(9, dtype=DOUBLE)
    labels = make_labels(logits, 3)
    loss = cross_entropy(logits, labels.target, weight, target_indices=labels.target_indices)
    assert loss.dtype == DOUBLE
    expected = F.cross_entropy(logits.double(), labels.dense(logits), weight)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_autocast():
    logits = torch.randn(4, 9, dtype=torch.bfloat16)
    labels = make_labels(logits, 3, dtype=torch.bfloat16)
    with torch.autocast(logits.device.type, dtype=torch.bfloat16):
        loss = cross_entropy(logits, **labels._asdict())
        assert cross_entropy(logits, labels.target.double(), **indices(labels)).dtype == DOUBLE
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double(), labels.dense(logits))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def indices(labels) -> dict:
    return {"target_indices": labels.target_indices}


# ---- gradient of the probabilities, and derivatives of any order ---------------------------------


@pytest.mark.parametrize("layout", ["rows", "sequence", "image", "transposed"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", [*OPTIONS, "all"])
def test_gradient_of_probabilities(name, reduction, layout):
    """Padding has gradient 0, and so have rows that are left out."""
    logits, dim = LAYOUTS[layout](100)
    labels = make_labels(logits, 4, dim)
    options = dict(OPTIONS.get(name, {}))
    if name == "all":
        options = some_options(logits, dim)
    if "token_weight" in options:
        options["token_weight"] = tokens_of(logits.select(dim, 0).shape)
    options |= {"reduction": reduction, "dim": dim}
    if name == "a class is padding":
        labels.target_indices[labels.target_indices == PADDING] = 3
    p = labels.target.requires_grad_()
    loss = cross_entropy(logits, p, **indices(labels), **options)
    upstream = torch.rand(loss.shape)
    (gradient,) = torch.autograd.grad(loss, p, upstream)
    exact_p = p.detach().double().requires_grad_()
    ignore_index = options.pop("ignore_index", PADDING)
    dense = labels._replace(target=exact_p).dense(logits, dim, ignore_index)
    double = {n: x.double() if isinstance(x, Tensor) else x for n, x in options.items()}
    expected = reference.cross_entropy(logits.double(), dense, **double)
    (exact,) = torch.autograd.grad(expected, exact_p, upstream.double())
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)
    assert not gradient[labels.target_indices == ignore_index].any()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_gradient_of_probabilities_of_rows_left_out(gamma, order):
    """It is 0 where labels, indices and logits may be anything; so is that of padding."""
    logits = torch.randn(3, 7)
    p, index = torch.rand(3, 2), torch.tensor([[1, 5], [99, -3], [2, PADDING]])
    logits[1], p[1], p[2, 1] = torch.nan, torch.nan, torch.nan
    leaves = [logits.requires_grad_(), p.requires_grad_()]
    loss = cross_entropy(
        *leaves,
        target_indices=index,
        focal_gamma=gamma,
        token_weight=torch.tensor([1.0, 0.0, 2.0]),
    )
    gradients = torch.autograd.grad(loss, leaves, create_graph=order == 2)
    if order == 2:
        total = sum(gradient.square().sum() for gradient in gradients)
        gradients = torch.autograd.grad(total, leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][1].any()
    assert (gradients[1] != 0).tolist() == [[True, True], [False, False], [True, False]]


@pytest.mark.parametrize("mode", MODES)
def test_negative_probabilities(mode):
    """Nothing is asked of the probabilities: differences of losses are losses too."""
    logits = torch.randn(6, 300)
    labels = make_labels(logits, 5)
    labels.target.mul_(torch.randn(6, 5).sign())
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf * 1, **labels._asdict(), label_smoothing=0.1, **MODES[mode])
    loss.backward()
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels.dense(logits), label_smoothing=0.1)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_gradient_of_probabilities_at_infinite_logits():
    """A class of probability 0 and logit -inf adds 0, as with dense labels."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0]] * 2)
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5]], requires_grad=True)
    index = torch.tensor([[1, 2], [0, 2]])
    loss = cross_entropy(logits, p, target_indices=index, reduction="sum")
    loss.backward()
    log_p = logits.log_softmax(1)
    expected = -torch.stack([torch.stack([torch.zeros(()), log_p[0, 2]]), log_p[1, [0, 2]]])
    torch.testing.assert_close(p.grad, expected)
    torch.testing.assert_close(loss.detach(), (p * expected).sum().detach())


SMALL_INDEX = torch.tensor([[1, 4, 1], [0, PADDING, 5], [PADDING] * 3])
SMALL_OPTIONS = {
    "token_weight": torch.tensor([1.0, 2.0, -0.5], dtype=DOUBLE),
    "lse_square_scale": 0.1,
    "softcap": 3.0,
    "logit_scale": 0.7,
    "label_smoothing": 0.1,
}


def small(**options):
    return torch.randn(3, 6, dtype=DOUBLE, **options), torch.rand(3, 3, dtype=DOUBLE, **options)


def outputs(x, p, **options):
    results = cross_entropy_with_statistics(x, p, target_indices=SMALL_INDEX, **options)
    return results.loss, results.lse, results.entropy, results.z_loss


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("of_p", [False, True], ids=["logits", "both"])
def test_first_and_second_derivatives(of_p, reduction, gamma, check):
    options = SMALL_OPTIONS | {"focal_gamma": gamma, "reduction": reduction}
    x, p = small(requires_grad=True)
    p = p if of_p else p.detach()
    assert check(lambda x, p: outputs(x, p, **options), (x, p))


def test_every_mode_of_gradcheck():
    x, p = small(requires_grad=True)
    batched = {"check_batched_grad": True}
    function = by_indices
    assert gradcheck(function, (x, p.detach()), check_forward_ad=True, **batched)
    assert gradgradcheck(function, (x, p), check_fwd_over_rev=True, **batched)


def by_indices(x, p, index=SMALL_INDEX, **options):
    return cross_entropy(x, p, target_indices=index, **options)


def by_dense(x, p, index=SMALL_INDEX, **options):
    """The same by torch operations."""
    is_padding = index == PADDING
    p = p.masked_fill(is_padding, 0)
    dense = torch.zeros_like(x).scatter_add(1, index.masked_fill(is_padding, 0), p)
    return F.cross_entropy(x, dense, **options)


func = torch.func
TRANSFORMS = {
    "grad": lambda f: lambda x, p: func.grad(f, (0, 1))(x, p),
    "grad of grad": lambda f: func.grad(lambda x, p: func.grad(f)(x, p).pow(2).sum(), (0, 1)),
    "hessian": lambda f: func.hessian(f),
    "jvp": lambda f: lambda x, p: func.jvp(f, (x, p), (x.cos(), p.sin())),
    "vmap": lambda f: lambda x, p: func.vmap(f)(torch.stack([x, 2 * x]), torch.stack([p, p.cos()])),
    "vmap of the logits alone": lambda f: (
        lambda x, p: func.vmap(f, (1, None))(torch.stack([x, 2 * x], 1), p)
    ),
    "vmap of grad": lambda f: (
        lambda x, p: func.vmap(func.grad(f, (0, 1)))(
            torch.stack([x, 2 * x]), torch.stack([p, p.cos()])
        )
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name):
    x, p = small()
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(by_indices)(x, p), transform(by_dense)(x, p))


def test_vmap_over_the_indices():
    """Statistics too: a class out of range makes its row NaN, as a target does."""
    x, p = small()
    index = torch.stack([SMALL_INDEX, SMALL_INDEX.flip(1), SMALL_INDEX.roll(1, 0)])

    def rows(index):
        results = cross_entropy_with_statistics(x, p, target_indices=index, reduction="none")
        return tuple(results)

    loss, *_, argmax, correct = func.vmap(rows)(index)
    for i in range(3):
        dense = Labels(p, index[i]).dense(x)
        expected = F.cross_entropy(x, dense, reduction="none")
        torch.testing.assert_close(loss[i], expected)
        assert torch.equal(correct[i], x.argmax(1) == dense.argmax(1))
        assert torch.equal(argmax[i], x.argmax(1))
    index[1, 0, 2] = 6
    loss, *_ = func.vmap(rows)(index)
    assert loss.isnan().nonzero().tolist() == [[1, 0]]


def test_dual_numbers():
    x, p = small()
    with forward_ad.dual_level():
        duals = forward_ad.make_dual(x, x.cos()), forward_ad.make_dual(p, p.sin())
        tangents = [forward_ad.unpack_dual(f(*duals)).tangent for f in (by_indices, by_dense)]
    torch.testing.assert_close(*tangents)


def test_gradients_of_weights_and_normalizer():
    x, p = small(requires_grad=True)
    weight = torch.rand(6, dtype=DOUBLE, requires_grad=True)
    tokens = SMALL_OPTIONS["token_weight"].clone().requires_grad_()
    normalizer = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)

    def loss(x, p, w, t, n):
        return cross_entropy(x, p, w, token_weight=t, normalizer=n, target_indices=SMALL_INDEX)

    assert gradcheck(loss, (x, p, weight, tokens, normalizer))


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 41])
def test_correct(k, v):
    """As the argmax of dense labels says, also with ties, negative labels and padding alone."""
    logits = torch.randn(400, v)
    index = torch.randint(v, (400, k))
    index[torch.rand(400, k) < 0.3] = PADDING
    p = torch.randint(-2, 4, (400, k)) / 4  # sums are exact, so that equal ones tie
    p[1::3] = torch.rand(134, k)[: len(p[1::3])]
    label = Labels(p, index).dense(logits).argmax(1)
    # Without a wrong answer anywhere, each row's argmax is made its label, or another class.
    logits[range(400), label] = 9.0
    if v > 1:
        logits[::2] = logits[::2].roll(1, 1)
    results = cross_entropy_with_statistics(logits, p, target_indices=index)
    assert torch.equal(results.correct, logits.argmax(1) == label)
    assert results.correct.any()
    assert not results.correct.all() or v == 1


def test_correct_where_a_class_is_padding():
    logits, index = torch.eye(3) * 9, torch.tensor([[0, 2], [0, 2], [0, 2]])
    p = torch.tensor([[0.5, 0.25]] * 3)
    results = cross_entropy_with_statistics(logits, p, target_indices=index, ignore_index=0)
    assert results.correct.tolist() == [False, False, True]


@pytest.mark.parametrize("layout", ["sequence", "image", "transposed"])
def test_correct_of_layouts(layout):
    logits, dim = LAYOUTS[layout](5)
    labels = make_labels(logits, 6, dim)
    results = cross_entropy_with_statistics(logits, **labels._asdict(), dim=dim)
    label = labels.dense(logits, dim).argmax(dim)
    assert torch.equal(results.correct, logits.argmax(dim) == label)


def test_rows_left_out_are_not_correct():
    logits = torch.tensor([[0.0, 5.0], [0.0, 5.0]])
    labels = Labels(torch.ones(2, 1), torch.ones(2, 1, dtype=torch.int64))
    tokens = torch.tensor([0.0, 1.0])
    results = cross_entropy_with_statistics(logits, **labels._asdict(), token_weight=tokens)
    assert results.correct.tolist() == [False, True]
    assert results.argmax.tolist() == [-1, 1]


# ---- memory, and equal bits ----------------------------------------------------------------------


def allocations(function):
    """Return the result of function and the sizes in bytes of all memory it allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return result, [size for size in sizes if size > 0]


@pytest.mark.cpu("the profiler counts CPU memory")
@pytest.mark.parametrize("of_p", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_allocates_only_the_gradient(mode, dtype, of_p):
    """With statistics, for gradients of logits and probabilities; also for float64 beside less."""
    if not has_mode(mode, dtype):
        pytest.skip("fused mode refuses float16")
    logits = torch.randn(16, 20000).to(dtype).requires_grad_()
    labels = make_labels(logits, 4, dtype=of_p)
    p = labels.target.requires_grad_(mode != "fused")
    computed = logits * 1
    results, in_forward = allocations(
        lambda: cross_entropy_with_statistics(
            computed, p, **indices(labels), weight=torch.ones(20000), softcap=20.0, **MODES[mode]
        )
    )
    leaves = [computed] if mode == "fused" else [computed, p]
    _, in_backward = allocations(
        lambda: torch.autograd.grad(3 * results.loss, leaves, allow_unused=True)
    )
    of_weights = 20000 * 8  # in float64
    assert max(in_forward) <= of_weights
    large = [size for size in in_backward if size > of_weights]
    assert large == ([logits.nbytes] if mode == "default" else [])


@pytest.mark.parametrize("mode", MODES)
def test_equal_bits(mode):
    logits = torch.randn(64, 3000)
    labels = make_labels(logits, 100)
    runs = []
    for _ in range(3):
        leaf, p = logits.clone().requires_grad_(), labels.target.clone()
        p.requires_grad_(mode != "fused")
        results = cross_entropy_with_statistics(leaf * 1, p, **indices(labels), **MODES[mode])
        results.loss.backward()
        runs.append([*results, leaf.grad, *([p.grad] if p.requires_grad else [])])
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


# ---- operators, compiled and exported ------------------------------------------------------------


def of_operator(k=3, reduction=1, **options) -> dict:
    """Return arguments of the operators of the loss, by name."""
    logits = torch.randn(4, 50)
    labels = make_labels(logits, k)
    named = {"logits": logits, **labels._asdict(), "weight": torch.rand(50), "token_weight": None}
    return named | {"normalizer": None, "dim": 1, "reduction": reduction, **options}


def of_backward(forward, statistics=True) -> dict:
    """Return arguments of ``backward``."""
    name = "forward_with_statistics" if statistics else "forward"
    loss, total, state, *others = getattr(ops, name)(**forward)
    assert state.shape == (2 + ("focal_gamma" in forward), 4)
    rows = torch.rand(4)
    backward = {n: x for n, x in forward.items() if n not in ("normalizer", "loss_dtype")}
    return backward | {
        "total_weight": total,
        "state": state,
        "entropy": others[1] if statistics else None,
        "grad_loss": torch.ones_like(loss),
        "grad_lse": rows if statistics else None,
        "grad_entropy": rows if statistics else None,
    }


def cloned(arguments) -> dict:
    return arguments | {"logits": arguments["logits"].clone()}


@pytest.mark.parametrize(
    "options", [{}, {"focal_gamma": 2.0, "softcap": 3.0, "label_smoothing": 0.1}], ids=["", "focal"]
)
def test_opcheck(options):
    forward = of_operator(**options)
    for name in ("loss", "forward", "forward_with_statistics"):
        opcheck(getattr(ops, name).default, (), forward)
        opcheck(getattr(ops, name).default, (), forward | {"loss_dtype": DOUBLE})
        recorded = {n: forward[n].clone().requires_grad_() for n in ("logits", "target")}
        opcheck(getattr(ops, name).default, (), forward | recorded)
    for statistics in (False, True):
        backward = of_backward(forward, statistics)
        opcheck(ops.backward.default, (), backward)
        opcheck(ops.backward_.default, (), cloned(backward))
    for name in ("forward_backward_", "forward_backward_with_statistics_"):
        opcheck(getattr(ops, name).default, (), cloned(forward))


@pytest.mark.parametrize("name", ["loss", "forward", "forward_with_statistics", "backward"])
def test_meta_and_decompositions(name):
    options = {"softcap": 3.0, "label_smoothing": 0.1, "focal_gamma": 2.0, "logit_scale": 0.7}
    options["ignore_index"] = 3
    arguments = of_operator(**options)
    index = arguments["target_indices"]
    index[index == PADDING] = 3
    if name == "backward":
        arguments = of_backward(arguments)
    operator = getattr(ops, name).default
    exact, decomposed = (
        operator(**arguments),
        fused_xent.decompositions()[operator](*map(arguments.get, positional(operator)), **options),
    )
    on_meta = operator(
        **{n: x.to("meta") if isinstance(x, Tensor) else x for n, x in arguments.items()}
    )
    results = [(x,) if isinstance(x, Tensor) else x for x in (exact, decomposed, on_meta)]
    for one, other, meta in zip(*results, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype) == (meta.shape, meta.dtype)
        if not other.isnan().all():  # the state, which only the kernels read
            torch.testing.assert_close(one, other)


def positional(operator) -> list[str]:
    return [x.name for x in operator._schema.arguments if not x.kwarg_only]


@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_one_graph(mode, backend):
    torch.compiler.reset()
    x = torch.randn(5, 40)
    labels = make_labels(x, 3)

    def model(x, p, index, **options):
        results = cross_entropy_with_statistics(
            x * 3, p, target_indices=index, softcap=5.0, label_smoothing=0.1, **options
        )
        return results.loss + 0.1 * results.lse.sum(), results.correct

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    runs = []
    for function, options in ((model, {}), (compiled, MODES[mode])):
        leaf, p = x.clone().requires_grad_(), labels.target.clone()
        p.requires_grad_(mode != "fused")
        loss, correct = function(leaf, p, labels.target_indices, **options)
        loss.backward()
        runs.append((loss.detach(), correct, leaf.grad, *([] if p.grad is None else [p.grad])))
    torch.testing.assert_close(*runs)


class Model(torch.nn.Module):
    """The loss of a linear layer's logits, or of the layer itself."""

    def __init__(self, is_fused):
        super().__init__()
        self.layer, self.is_fused = torch.nn.Linear(8, 11), is_fused

    def forward(self, hidden, p, index):
        weight, bias = self.layer.weight, self.layer.bias
        options = {"target_indices": index, "softcap": 3.0, "label_smoothing": 0.1}
        if self.is_fused:
            return linear_cross_entropy(hidden, weight, p, linear_bias=bias, **options)
        results = cross_entropy_with_statistics(self.layer(hidden), p, **options)
        return results.loss + results.entropy.sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("is_fused", [False, True], ids=["", "linear"])
def test_export_and_decompositions(is_fused):
    model, hidden = Model(is_fused), torch.randn(6, 8)
    labels = make_labels(torch.randn(6, 11), 3)
    inputs = (hidden, labels.target, labels.target_indices)
    program = torch.export.export(model, inputs)
    table = torch.export.default_decompositions() | fused_xent.decompositions()
    decomposed = program.run_decompositions(table)
    assert "fused_xent" in str(program.graph)
    assert "fused_xent" not in str(decomposed.graph)
    expected = model(*inputs)
    exact = torch.autograd.grad(expected, list(model.parameters()))
    for one in (program.module(), decomposed.module()):
        loss = one(*inputs)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, list(one.parameters())), exact)


# ---- without kernels -----------------------------------------------------------------------------


def test_without_kernels(monkeypatch):
    """Torch operations compute the same, also for the linear layer."""
    logits = torch.randn(6, 50)
    labels, options = make_labels(logits, 4), some_options(logits)
    expected = cross_entropy_with_statistics(logits, **labels._asdict(), **options)
    monkeypatch.setattr("fused_xent._ops.has_kernels", lambda tensor: False)
    results = cross_entropy_with_statistics(logits, **labels._asdict(), **options)
    torch.testing.assert_close(tuple(results), tuple(expected))
    of_layer = linear_cross_entropy(logits, torch.eye(50), **labels._asdict(), **options)
    torch.testing.assert_close(of_layer, expected.loss)
    labels.target_indices[5, 2] = 50
    with pytest.raises(IndexError, match=r"^target_indices must .*got 50 at position \(5, 2\)$"):
        cross_entropy(logits, **labels._asdict())


def test_no_classes():
    logits, p = torch.randn(3, 0, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    index = torch.full((3, 2), PADDING)
    loss = cross_entropy(logits, p, target_indices=index, reduction="sum")
    loss.backward()
    assert (loss.item(), p.grad.tolist()) == (0, [[0, 0]] * 3)
    with pytest.raises(IndexError, match=r"target_indices must be in \[0, 0\)"):
        cross_entropy(logits, p, target_indices=index + 101)


@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0)])
def test_no_rows(shape):
    logits = torch.randn(shape, requires_grad=True)
    labels = make_labels(logits, 2)
    loss = cross_entropy(logits, **labels._asdict(), reduction="none")
    loss.sum().backward()
    assert loss.shape == logits.select(1, 0).shape
    assert logits.grad.shape == shape


# ---- modules and the linear layer ----------------------------------------------------------------


def test_modules():
    logits = torch.randn(6, 9)
    labels = make_labels(logits, 3)
    loss = fused_xent.CrossEntropyLoss(reduction="sum")(logits, **labels._asdict())
    expected = F.cross_entropy(logits.double(), labels.dense(logits), reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    module = fused_xent.LinearCrossEntropyLoss(9, 9, reduction="sum")
    torch.nn.init.eye_(module.linear.weight)
    torch.testing.assert_close(module(logits, **labels._asdict()), loss)


PLACES = {"all at once": None, "chunks": in_chunks, "class by class": by_classes}


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("classes", [(37,), (9, 2)], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_linear(place, classes, reduction, dtype, monkeypatch):
    """Loss, statistics and gradients in each place of the logits, with and without positions."""
    if PLACES[place] is not None:
        monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 0)
        PLACES[place](monkeypatch)
    layer = make_layer(dtype, classes=classes)
    logits = unfused(lambda logits, target: logits, layer, None)
    labels = make_labels(logits, 3)
    options = {"reduction": reduction, "label_smoothing": 0.1, "softcap": 20.0}
    options["token_weight"] = tokens_of(logits.select(1, 0).shape)
    hidden, weight, bias = layer
    results = fused_xent.linear_cross_entropy_with_statistics(
        hidden, weight, **labels._asdict(), linear_bias=bias, **options
    )
    alone = linear_cross_entropy(hidden, weight, **labels._asdict(), linear_bias=bias, **options)
    torch.testing.assert_close(alone, results.loss)
    gradients = torch.autograd.grad(alone.sum(), layer)
    exact = [x.detach().double().requires_grad_() for x in layer]
    exact_logits = unfused(lambda logits, target: logits, exact, None)
    expected = reference.cross_entropy_with_statistics(
        exact_logits, labels.dense(logits), **options
    )
    limits = {"rtol": 1e-5, "atol": 1e-6}
    if dtype == torch.bfloat16:
        limits = {"rtol": 0.03, "atol": 0.03}
    for name in ("loss", "lse", "entropy"):
        one, other = getattr(results, name), getattr(expected, name)
        torch.testing.assert_close(one.double(), other, **limits)
    if dtype != torch.bfloat16:
        assert torch.equal(results.correct, expected.correct)
    right = torch.autograd.grad(expected.loss.sum(), exact)
    for one, other in zip(gradients, right, strict=True):
        torch.testing.assert_close(one.double(), other, **limits)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_shift_and_drop_ignored(place, drop, shift, monkeypatch):
    """The labels of the first positions belong to no row: they may be no classes."""
    if PLACES[place] is not None:
        monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 0)
        PLACES[place](monkeypatch)
    layer = make_layer(DOUBLE, rows=(2, 6))
    hidden, weight, bias = layer
    labels = make_labels(torch.empty(2, 6, 37), 3, dim=-1, dtype=DOUBLE)
    tokens = tokens_of((2, 6)).double()
    dense = labels.dense(torch.empty(2, 6, 37), -1)[:, shift:]
    labels.target_indices[:, :shift] = 99
    options = {"token_weight": tokens, "shift": shift, "drop_ignored": drop}
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(
            *(hidden, weight, labels.target),
            **indices(labels),
            linear_bias=bias,
            reduction=reduction,
            **options,
        )
        logits = F.linear(hidden[:, : 6 - shift], weight, bias)
        expected = reference.cross_entropy(
            logits, dense, dim=-1, reduction=reduction, token_weight=tokens[:, shift:]
        )
        torch.testing.assert_close(loss, expected)
        found, right = (torch.autograd.grad(x.sum(), layer) for x in (loss, expected))
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_gradient_of_probabilities(reduction, few_logits_in_chunks):
    layer = make_layer(DOUBLE, bias=False)
    labels = make_labels(torch.empty(11, 37), 3, dtype=DOUBLE)
    leaves = [*layer, labels.target.requires_grad_()]
    loss = linear_cross_entropy(*leaves, **indices(labels), reduction=reduction)
    logits = F.linear(*layer)
    expected = F.cross_entropy(logits, labels.dense(logits), reduction=reduction)
    gradients = [torch.autograd.grad(x.sum(), leaves, create_graph=True) for x in (loss, expected)]
    torch.testing.assert_close(*gradients)
    seconds = [torch.autograd.grad(g[0].pow(2).sum(), leaves) for g in gradients]
    torch.testing.assert_close(*seconds)


def test_linear_memory(few_logits_in_chunks, monkeypatch):
    """With probabilities in float64 too, no more than a chunk of logits is stored."""
    in_chunks(monkeypatch)
    seen = []
    monkeypatch.setattr(
        "fused_xent._linear._ops.forward_backward_",
        lambda problem, call=fused_xent._ops.forward_backward_: (
            seen.append(problem.logits.shape) or call(problem)
        ),
    )
    hidden, weight, _ = make_layer()
    labels = make_labels(torch.empty(11, 37), 3, dtype=DOUBLE)
    loss = linear_cross_entropy(hidden, weight, **labels._asdict())
    assert loss.dtype == DOUBLE
    assert [shape[0] for shape in seen] == [4, 4, 3]


@pytest.mark.parametrize("needs", [[1, 1, 1], [0, 1, 0]])
def test_opcheck_of_the_linear_operators(needs):
    layer = [x.detach() for x in make_layer()]
    labels = make_labels(torch.empty(11, 37), 3)
    inputs = (*layer, labels.target, None, torch.rand(11), None, labels.target_indices, 1)
    inputs += (torch.float32, torch.float32, True, 4, needs)
    upstream = (torch.rand([]), torch.rand(11), None)
    options = {"label_smoothing": 0.1, "softcap": 3.0}
    opcheck(ops.linear_forward.default, inputs, options)
    opcheck(ops.linear_backward.default, (*upstream, *inputs), options)
    table = fused_xent.decompositions()
    for name, given in (("forward", inputs), ("backward", (*upstream, *inputs))):
        operator = getattr(ops, f"linear_{name}").default
        results = [tuple(f(*given, **options)) for f in (table[operator], operator)]
        torch.testing.assert_close(*results)


# ---- errors --------------------------------------------------------------------------------------


INPUT, P, INDEX = torch.zeros(4, 9), torch.full((4, 3), 0.25), torch.zeros(4, 3, dtype=torch.int64)
MANY = torch.zeros(4, 1025, dtype=torch.int64)
WRONG = {
    "target_indices must be a tensor, got list": {"target_indices": [1]},
    "target_indices must be a dense tensor, got layout torch.sparse_coo": {
        "target_indices": INDEX.to_sparse()
    },
    f"target_indices must be on input's device {INPUT.device}, got meta": {
        "target_indices": INDEX.to("meta")
    },
    f"target must be on input's device {INPUT.device}, got meta": {"target": P.to("meta")},
    "target_indices must be int64 or int32, got torch.uint8": {"target_indices": INDEX.byte()},
    "target_indices must be int64 or int32, got torch.float32": {"target_indices": P},
    "target_indices must have shape (4, K), with K from 1 to 1024, for logits of shape (4, 9) with "
    "their classes in dimension 1, got (4, 1025)": {
        "target": torch.rand(4, 1025),
        "target_indices": MANY,
    },
    "target_indices must have shape (4, K), with K from 1 to 1024, for logits of shape (4, 9) with "
    "their classes in dimension 1, got (4, 0)": {
        "target": P[:, :0],
        "target_indices": INDEX[:, :0],
    },
    "target_indices must have shape (4, K), with K from 1 to 1024, for logits of shape (4, 9) with "
    "their classes in dimension 1, got (4,)": {"target": P[:, 0], "target_indices": INDEX[:, 0]},
    "target_indices must have shape (K, 9), with K from 1 to 1024, for logits of shape (4, 9) with "
    "their classes in dimension 0, got (4, 3)": {"dim": 0},
    "target_indices must have shape (K,), with K from 1 to 1024, for logits of shape (9,) with "
    "their classes in dimension 0, got (4, 3)": {"input": INPUT[0]},
    "target must have target_indices' shape (4, 3), one probability for each index, got (4,)": {
        "target": P[:, 0]
    },
    "target must hold floating-point probabilities where target_indices holds their classes, got "
    "torch.int64": {"target": INDEX},
    "target must be a tensor, got NoneType": {"target": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    for function in (cross_entropy, cross_entropy_with_statistics):
        with pytest.raises((ValueError, TypeError)) as error:
            function(**{"input": INPUT, "target": P, "target_indices": INDEX, **WRONG[message]})
        assert str(error.value) == message


def test_class_indices_beside_target_indices():
    """They are not taken for a plain call."""
    for function, inputs in ((cross_entropy, (INPUT,)), (linear_cross_entropy, LAYER)):
        with pytest.raises(ValueError, match="target must hold floating-point probabilities"):
            function(*inputs, torch.arange(4), target_indices=INDEX)


LAYER = (torch.ones(4, 3), torch.ones(9, 3))
WRONG_LAYERS = {
    "target_indices must have shape (4, K), with K from 1 to 1024, for input's rows and "
    "linear_weight's classes, got (3, 3)": (LAYER, P, INDEX[:3], {}),
    "target_indices must have shape (4, K), with K from 1 to 1024, for input's rows and "
    "linear_weight's classes, got (3, 3): with shift=1, pass the labels of all rows, not "
    "shifted": (LAYER, P, INDEX[:3], {"shift": 1}),
    "target_indices must have shape (4, K, 2), with K from 1 to 1024, for input's rows and "
    "linear_weight's classes, got (4, 3)": ((LAYER[0], torch.ones(9, 2, 3)), P, INDEX, {}),
    "target must have target_indices' shape (4, 3), one probability for each index, got (4, 2)": (
        *(LAYER, P[:, :2], INDEX),
        {},
    ),
    "target_indices must be a tensor, got int": (LAYER, P, 3, {}),
}


@pytest.mark.parametrize("message", WRONG_LAYERS)
def test_linear_errors(message):
    layer, p, index, options = WRONG_LAYERS[message]
    for function in (linear_cross_entropy, fused_xent.linear_cross_entropy_with_statistics):
        with pytest.raises((ValueError, TypeError)) as error:
            function(*layer, p, target_indices=index, **options)
        assert str(error.value) == message


@pytest.mark.cpu("a GPU raises no error for targets out of range")
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrong", [-1, 7, 9, 2**31 - 1])
def test_indices_out_of_range(wrong, mode, index_dtype):
    """The message has value, range and position, and no tensor is written to."""
    leaf = torch.randn(2, 4, 7, requires_grad=True)
    logits = leaf * 1
    labels = make_labels(logits, 5, -1, index_dtype=index_dtype)
    labels.target_indices[0, 2, 1] = 99
    labels.target_indices[1, 0, 3] = wrong
    tokens = torch.ones(2, 4)
    tokens[0, 2] = 0  # left out: not checked
    before = [x.clone() for x in (logits, *labels, tokens)]
    for function in (cross_entropy, cross_entropy_with_statistics):
        with pytest.raises(IndexError) as error:
            function(
                logits, labels.target, token_weight=tokens, dim=-1, **indices(labels), **MODES[mode]
            )
        assert str(error.value) == (
            "target_indices must be in [0, 7) or equal to ignore_index (-100), got "
            f"{wrong} at position (1, 0, 3)"
        )
    assert all(map(torch.equal, before, (logits, *labels, tokens)))
    assert logits._version == 0


@pytest.mark.cpu("a GPU raises no error for targets out of range")
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("drop", [False, True])
def test_linear_indices_out_of_range(drop, shift):
    layer, labels = make_layer(rows=(2, 4)), make_labels(torch.empty(2, 4, 37), 3, -1)
    labels.target_indices[:, 0] = 99 if shift else 0  # not the labels of any row
    labels.target_indices[1, 2, 1] = 37
    with pytest.raises(IndexError, match=r"^target_indices .* got 37 at position \(1, 2, 1\)"):
        linear_cross_entropy(
            *(*layer[:2], labels.target),
            **indices(labels),
            shift=shift,
            drop_ignored=drop,
        )


@pytest.mark.parametrize("mode", ["inplace", "fused"])
def test_labels_in_the_memory_of_the_logits(mode):
    for name in ("target", "target_indices"):
        logits = torch.zeros(4, 9, dtype=DOUBLE)
        labels = Labels(P.double(), INDEX)._asdict()
        part = logits[:, :3]
        labels[name] = part if name == "target" else logits.view(torch.int64)[:, :3]
        message = f"{name} shares input's memory, which is overwritten: clone {name}$"
        with pytest.raises(RuntimeError, match=message):
            cross_entropy(logits, **labels, **MODES[mode])


def test_torch_function_of_indices():
    class Seen(Exception):
        pass

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            if function in (cross_entropy, linear_cross_entropy):
                assert isinstance(options["target_indices"], Subclass)
                raise Seen
            return super().__torch_function__(function, types, arguments, options or {})

    index = INDEX.as_subclass(Subclass)
    with pytest.raises(Seen):
        cross_entropy(INPUT, P, target_indices=index)
    with pytest.raises(Seen):
        linear_cross_entropy(*LAYER, P, target_indices=index)

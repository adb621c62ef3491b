"""Sparse labels and selected log-probabilities by the CUDA operators, in the emulator.

The operators are called directly, and compared with dense labels in float64. With
``--device cuda`` the same cases run on a GPU.
"""

import mmap
from typing import NamedTuple

import cuda_builds
import pytest
import torch
from cases import DTYPES, make_logits
from compare import accumulation_dtype, half_ulp, smallest
from problems import ERROR, Problem, assert_near, exact_results, gradient_terms, total
from torch import Tensor

from fused_xent import reference

REDUCTIONS = ("none", "mean", "sum")
MODES = ("default", "inplace", "fused")
COUNTS = (1, 2, 8, 9, 40, 1000)  # up to 8: a thread for each row; more: a warp
SHAPES = {  # of the logits, for each kernel that the rows pass through
    "staged columns": (70, 20),
    "columns": (2, 21, 3, 5),
    "columns of vectors": (1, 21, 64),
    "columns of many classes": (1, 3000, 40),
    "rows of lanes": (40, 300),
    "rows": (5, 5007),
    "split rows": (2, 60000),
    "no batch": (50,),
}
OPTIONS = {  # those of the operators; True: a tensor of numbers
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "weight, smoothing": {"weight": True, "label_smoothing": 0.3},
    "token weight": {"token_weight": True},
    "z-loss": {"lse_square_scale": 0.01},
    "focal": {"focal_gamma": 2.0},
    "focal, all labels": {"focal_gamma": 0.5, "weight": True, "label_smoothing": 0.1},
    "softcap": {"softcap": 5.0},
    "softcap, scale": {"softcap": 30.0, "logit_scale": 0.5, "label_smoothing": 0.1},
    "negative scale": {"logit_scale": -0.75},
    "statistics": {"statistics": True, "token_weight": True},
    "all": {
        "weight": True,
        "token_weight": True,
        "label_smoothing": 0.1,
        "lse_square_scale": 0.01,
        "focal_gamma": 1.5,
        "softcap": 10.0,
        "logit_scale": 1.25,
        "statistics": True,
    },
}


@pytest.fixture(scope="module")
def emulated(emulator_builds, device):
    if device != "cpu":
        pytest.skip("runs on a GPU, not in the emulator")
    if cuda_builds.MISSING:
        pytest.skip(cuda_builds.MISSING)
    module = cuda_builds.module(emulator_builds, "sm_100")
    module.set("sm_count", "3")
    return module


@pytest.fixture
def operators(request, device):
    """The operators under test."""
    if device != "cpu":
        return torch.ops.fused_xent
    request.getfixturevalue("emulated")
    return torch.ops.fused_xent_emulated


class Sparse(NamedTuple):
    """Logits, labels on some of their classes, the options of the operators."""

    logits: Tensor
    labels: Tensor
    classes: Tensor
    dim: int
    reduction: str
    tensors: dict  # weight, token_weight
    options: dict
    statistics: bool

    def arguments(self, logits: Tensor) -> tuple:
        """Return the first arguments of an operator."""
        weight, token_weight = (self.tensors.get(name) for name in ("weight", "token_weight"))
        return logits, self.labels, weight, token_weight

    def dense(self) -> Tensor:
        """Return the same labels on all classes, in float64; 0 in rows that are left out."""
        kept = self.classes != self.options.get("ignore_index", -100)
        if "token_weight" in self.tensors:
            kept = kept & (self.tensors["token_weight"] != 0).unsqueeze(self.dim)
        acc = accumulation_dtype(self.logits.dtype)
        labels = self.labels.to(acc).double().masked_fill(~kept, 0)
        zeros = torch.zeros(self.logits.shape, dtype=torch.float64)
        return zeros.scatter_add(self.dim, self.classes.long().masked_fill(~kept, 0), labels)


def make_sparse(shape, n_labels, dtype, reduction="mean", index=torch.int64, **given) -> Sparse:
    """Make a problem with repeated classes, padding, a row of padding alone, labels of 0.

    Rows of token weight 0 have a class that is out of range.
    """
    dim = 0 if len(shape) == 1 else 1
    rows, n_classes = shape[:dim] + shape[dim + 1 :], shape[dim]
    of_labels = (*shape[:dim], n_labels, *shape[dim + 1 :])
    classes = torch.randint(min(n_classes, 3 * n_labels), of_labels)
    classes = (classes * 7919 + torch.randint(n_classes, (1,))) % n_classes
    pad = torch.rand(of_labels) < 0.2
    if rows:
        pad.movedim(dim, 0).flatten(1)[:, 1:2] = True
    classes = classes.masked_fill(pad, given.get("ignore_index", -100))
    labels = torch.rand(of_labels).pow(2) / n_labels
    labels = labels.masked_fill(torch.rand(of_labels) < 0.1, 0)
    labels = labels.masked_fill(pad, torch.nan)
    logits, options, tensors = make_logits(shape, dtype), dict(given), {}
    statistics = options.pop("statistics", False)
    if options.pop("weight", False):
        tensors["weight"] = torch.rand(n_classes) * (torch.arange(n_classes) % 5 != 3)
    if options.pop("token_weight", False):
        weights = torch.arange(1.0, 1 + (logits.numel() // n_classes)).remainder(3) * 0.75
        tensors["token_weight"] = weights.view(rows)
        left_out = (tensors["token_weight"] == 0).unsqueeze(dim)
        classes.narrow(dim, 0, 1).masked_fill_(left_out, n_classes)
    return Sparse(logits, labels, classes.to(index), dim, reduction, tensors, options, statistics)


def run(operators, sparse: Sparse, mode: str, upstream: list[Tensor]) -> tuple[list, Tensor]:
    """Return the loss, with statistics lse and entropy, and the logits' gradient."""
    reduction = REDUCTIONS.index(sparse.reduction)
    acc, dim = accumulation_dtype(sparse.logits.dtype), sparse.dim
    logits = sparse.logits if mode == "default" else sparse.logits.clone()
    arguments = sparse.arguments(logits)
    forward = (*arguments, None, dim, reduction, acc, sparse.classes)
    if mode == "fused":
        if not sparse.statistics:
            return [operators.forward_backward_(*forward, **sparse.options)], logits
        results = operators.forward_backward_with_statistics_(*forward, **sparse.options)
        return list(results[:3]), logits
    if sparse.statistics:
        loss, total_weight, state, lse, entropy, _ = operators.forward_with_statistics(
            *forward, **sparse.options
        )
    else:
        loss, total_weight, state = operators.forward(*forward, **sparse.options)
        same = operators.loss(*forward, **sparse.options)
        torch.testing.assert_close(same, loss, rtol=0, atol=0, equal_nan=True)
    results = [loss, lse, entropy] if sparse.statistics else [loss]
    total_weight = total_weight if sparse.reduction == "mean" else None
    upstream = [up.to(acc) for up in upstream] + [None] * (3 - len(upstream))
    rest = (results[2] if sparse.statistics else None, *upstream, sparse.classes)
    backward = (*arguments, total_weight, dim, reduction, state, *rest)
    if mode == "default":
        return results, operators.backward(*backward, **sparse.options)
    operators.backward_(*backward, **sparse.options)
    return results, logits


def check(operators, sparse: Sparse, mode: str) -> None:
    """Compare with dense labels in float64."""
    options = {"dim": sparse.dim, "reduction": sparse.reduction, **sparse.tensors, **sparse.options}
    options.pop("ignore_index", None)
    problem = Problem(sparse.logits, sparse.dense(), options, mode, sparse.statistics)
    leaf = sparse.logits.double().requires_grad_()
    exact = exact_results(problem, leaf)
    exact = [exact.loss, exact.lse, exact.entropy] if sparse.statistics else [exact.loss]
    upstream = [torch.ones_like(exact[0])]
    if mode != "fused":
        upstream = [
            torch.arange(1.0 + i, 1 + i + x.numel()).remainder(7).sub(2.5).view(x.shape)
            for i, x in enumerate(exact)  # a different one per result
        ]
    total(exact[: len(upstream)], upstream).backward()
    actual, gradient = run(operators, sparse, mode, upstream)
    error = ERROR if sparse.logits.dtype != torch.float64 else 1e-11
    error *= 1 + sparse.options.get("softcap", 0) / 10
    for name, one, other in zip(("loss", "lse", "entropy"), actual, exact, strict=False):
        assert_near(name, one, other, error * (1 + other.detach().abs()))
    all_results = exact_results(problem, sparse.logits.double())
    terms = gradient_terms(problem, all_results, upstream).abs()
    tolerance = error * terms + half_ulp(gradient.dtype) * 1.01 * leaf.grad.abs()
    assert_near("gradient", gradient, leaf.grad, tolerance + 2 * smallest(gradient.dtype))


def cases() -> list[tuple]:
    """Return all shapes with all numbers of labels; options and dtypes take turns."""
    pairs = [(shape, n) for shape in SHAPES for n in COUNTS]
    names = [name for name in OPTIONS if name != "plain"]
    return [
        (*pair, names[i % len(names)], DTYPES[i // 2 % len(DTYPES)]) for i, pair in enumerate(pairs)
    ]


@pytest.mark.parametrize(("shape", "n_labels", "options", "dtype"), cases())
def test_dense_labels(operators, shape, n_labels, options, dtype):
    index = torch.int32 if n_labels % 2 else torch.int64
    for i, mode in enumerate(MODES):
        given = {} if i == 0 else OPTIONS[options]
        sparse = make_sparse(SHAPES[shape], n_labels, dtype, REDUCTIONS[i], index, **given)
        check(operators, sparse, mode)


def test_shapes_and_options_reach_all_kernels(operators, emulated):
    cuda_builds.launches(emulated)
    kernels = set()
    for shape in SHAPES.values():
        for n_labels in (2, 40):
            for options in ({}, {"softcap": 5.0}, {"statistics": True}):
                sparse = make_sparse(shape, n_labels, torch.float32, "none", **options)
                for mode in MODES:
                    run(operators, sparse, mode, [torch.ones(())])
                    kernels |= {launch.kernel for launch in cuda_builds.launches(emulated)}
    assert kernels == {
        *("read_labels_of_rows", "write_gradients_at_labels", "general_rows", "merge_parts"),
        *("columns", "forward_rows", "forward_lane_rows", "backward_rows", "backward_lane_rows"),
        *("forward_backward_rows",),
    }


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n_labels", [3, 40])
@pytest.mark.parametrize("mode", MODES)
def test_options(operators, options, n_labels, mode):
    """A thread and a warp for each row, whose classes are adjacent or not."""
    for shape, dtype in (((7, 200), torch.float32), ((2, 30, 9), torch.bfloat16)):
        for reduction in REDUCTIONS:
            check(
                operators, make_sparse(shape, n_labels, dtype, reduction, **OPTIONS[options]), mode
            )


@pytest.mark.parametrize("n_labels", [2, 40])
@pytest.mark.parametrize("ignore_index", [3, 255, -1])
def test_ignore_index(operators, n_labels, ignore_index):
    """It may be a class, which then has no label."""
    for mode in MODES:
        sparse = make_sparse((9, 50), n_labels, torch.float32, ignore_index=ignore_index)
        check(operators, sparse, mode)


def spread_out(values: Tensor, dim: int) -> list[Tensor]:
    """Return the same values in other layouts."""
    wide = values.repeat_interleave(2, dim).narrow(dim, 0, 2 * values.shape[dim])
    return [
        values.movedim(dim, -1).contiguous().movedim(-1, dim),
        values.transpose(0, -1).contiguous().transpose(0, -1),
        wide[tuple(slice(None, None, 2 if d == dim else 1) for d in range(values.dim()))],
    ]


@pytest.mark.parametrize("n_labels", [3, 40])
@pytest.mark.parametrize("shape", [(6, 70), (2, 70, 3, 4), (2, 70, 2, 1, 2, 2, 3)], ids=str)
def test_layouts(operators, shape, n_labels):
    sparse = make_sparse(shape, n_labels, torch.bfloat16)
    for i in range(3):
        logits, labels, classes = (
            spread_out(x, sparse.dim)[(i + j) % 3]
            for j, x in enumerate((sparse.logits, sparse.labels, sparse.classes))
        )
        if len(shape) > 4:
            logits = sparse.logits
        other = sparse._replace(logits=logits, labels=labels, classes=classes)
        for mode in MODES:
            check(operators, other, mode)


def test_labels_shared_by_all_rows(operators):
    sparse = make_sparse((6, 70), 12, torch.float32)
    shared = [x[:1].expand(x.shape) for x in (sparse.labels, sparse.classes)]
    for mode in MODES:
        check(operators, sparse._replace(labels=shared[0], classes=shared[1]), mode)


@pytest.mark.parametrize("n_labels", [1, 5, 40])
@pytest.mark.parametrize("bad", [0, -1, -2, 2**32 + 3])
@pytest.mark.parametrize("shape", [(9, 200), (3, 200, 3), (1, 30000)], ids=str)
def test_class_out_of_range(operators, shape, bad, n_labels):
    """Makes its row's loss and gradient NaN, and changes no other row."""
    bad = bad or shape[1]
    right = make_sparse(shape, n_labels, torch.float32, "none")
    classes = right.classes.clone()
    classes[0, -1].view(-1)[-1] = bad
    wrong = right._replace(classes=classes)
    is_bad = (classes == bad).any(1)
    for mode in MODES:
        upstream = [torch.rand(is_bad.shape)]
        ((expected,), expected_gradient), ((loss,), gradient) = (
            run(operators, sparse, mode, upstream) for sparse in (right, wrong)
        )
        expected = expected.masked_fill(is_bad, torch.nan)
        expected_gradient = expected_gradient.masked_fill(is_bad.unsqueeze(1), torch.nan)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n_labels", [2, 33, 64, 1000])
def test_same_bits_in_any_order(operators, emulated, n_labels):
    """Labels on one class add up in their order, whichever thread is first."""
    sparse = make_sparse((3, 400), n_labels, torch.float32, "none")
    labels = torch.rand(sparse.labels.shape).pow(9) * 1e3
    classes = torch.randint(min(400, max(n_labels // 3, 1)), sparse.classes.shape)
    sparse = sparse._replace(labels=labels, classes=classes)
    found = []
    try:
        for seed in range(4):
            emulated.set("order", "random" if seed else "forward")
            emulated.set("seed", str(seed))
            found += [run(operators, sparse, mode, [torch.ones(3)]) for mode in MODES[:2]]
    finally:
        emulated.set("order", "forward")
    for (loss,), gradient in found[1:]:
        assert torch.equal(loss, found[0][0][0])
        assert torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("n_labels", [4, 40])
@pytest.mark.parametrize("mode", MODES)
def test_infinite_logits(operators, n_labels, mode):
    """-inf has a loss of 0 beside a label of 0, and an infinite one beside others."""
    sparse = make_sparse((4, 60), n_labels, torch.float32, "none")
    classes = torch.arange(n_labels).expand(4, -1).clone()
    labels = torch.rand(4, n_labels) + 0.1
    labels[:, 1:3] = 0
    logits = sparse.logits.clone()
    logits[0, 1] = logits[1, 3] = logits[2, 50:] = -torch.inf
    logits[3, 0] = torch.inf
    sparse = sparse._replace(logits=logits, labels=labels, classes=classes)
    (loss,), gradient = run(operators, sparse, mode, [torch.ones(4)])
    leaf = logits.double().requires_grad_()
    exact = reference.cross_entropy(leaf, sparse.dense(), reduction="none")
    assert exact.isinf().tolist() == [False, True, False, False]
    exact.sum().backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_labels", [2, 12])
def test_gradient_of_certain_labels(operators, n_labels, dtype):
    """Where the first label's probability is near 1, its gradient keeps its digits."""
    logits = torch.randn(4, 90, dtype=dtype)
    logits[:, 7] = logits.amax(1) + torch.tensor([4.0, 10.0, 16.0, 25.0], dtype=dtype)
    classes = torch.arange(7, 7 + n_labels).expand(4, -1).clone()
    labels = torch.zeros(classes.shape)
    labels[:, 0] = 1
    sparse = Sparse(logits, labels, classes, 1, "none", {}, {}, False)
    others = (logits.double() - logits[:, 7:8].double()).exp()
    others[:, 7] = 0
    expected = others.sum(1).log1p()
    for mode in MODES:
        (loss,), gradient = run(operators, sparse, mode, [torch.ones(4)])
        rtol = 2e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
        p = others.sum(1) / (1 + others.sum(1))
        torch.testing.assert_close(gradient[:, 7].double(), -p, rtol=rtol, atol=0)


@pytest.mark.parametrize("n_labels", [2, 40])
def test_launches_can_be_captured(operators, emulated, n_labels):
    """No call of the CUDA runtime waits for the device."""
    sparse = make_sparse((5, 90), n_labels, torch.float32, weight=True, label_smoothing=0.1)
    emulated.set("capturing", "1")
    try:
        for mode in MODES:
            check(operators, sparse, mode)
        operators.selected_log_probs(sparse.logits, sparse.classes, 1, True)
    finally:
        emulated.set("capturing", "0")


@pytest.mark.parametrize("n_labels", [2, 12])
def test_classes_beyond_32_bits(operators, emulated, n_labels):
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2**32 + 3)), dtype=torch.bfloat16)
    logits = memory.as_strided((3, 2), (1, 2**32))
    logits.copy_(make_logits((3, 2), torch.bfloat16))
    classes = torch.randint(2, (3, n_labels))
    log_probs, *_ = operators.selected_log_probs(logits, classes, 1, False)
    expected = logits.double().log_softmax(1).gather(1, classes)
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-6)
    labels = torch.rand(classes.shape)
    loss = operators.loss(logits, labels, None, None, None, 1, 2, torch.float32, classes)
    exact = -(labels.double() * expected).sum()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n_rows", [0, 1, 63, 65, 1000])
@pytest.mark.parametrize("n_labels", [1, 9])
def test_numbers_of_rows(operators, n_rows, n_labels):
    for mode in MODES:
        sparse = make_sparse((max(n_rows, 2), 12), n_labels, torch.float32, "sum")
        kept = [x[:n_rows] for x in (sparse.logits, sparse.labels, sparse.classes)]
        check(operators, sparse._replace(logits=kept[0], labels=kept[1], classes=kept[2]), mode)


# ---- selected log-probabilities ----------------------------------------------------------------


@pytest.mark.parametrize("n_labels", COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_selected(operators, shape, n_labels):
    """Log-probabilities, entropy and gradient; a row of padding alone is not read."""
    turn = len(shape) + n_labels
    dtype, index = DTYPES[turn % 4], (torch.int32, torch.int64)[turn % 2]
    options = ({}, {"softcap": 5.0}, {"logit_scale": 0.5}, {"softcap": 2.0, "logit_scale": 3.0})
    options = options[turn // 2 % 4]
    sparse = make_sparse(SHAPES[shape], n_labels, dtype, index=index)
    dim, logits, classes = sparse.dim, sparse.logits.clone(), sparse.classes
    padding = classes == -100
    left_out = padding.all(dim, keepdim=True)
    logits.masked_fill_(left_out, torch.nan)
    selected, state, token_weight, entropy = operators.selected_log_probs(
        logits, classes, dim, True, **options
    )
    leaf = sparse.logits.double().requires_grad_()
    z = reference.transform(leaf, options.get("softcap"), options.get("logit_scale", 1.0))
    log_p = z.log_softmax(dim)
    expected = log_p.gather(dim, classes.long().masked_fill(padding, 0)).masked_fill(padding, 0)
    exact_entropy = -(log_p.exp() * log_p).sum(dim, keepdim=True).masked_fill(left_out, 0)
    exact_entropy = exact_entropy.squeeze(dim)
    assert torch.equal(token_weight, (~left_out).squeeze(dim).to(token_weight.dtype))
    error = (ERROR if dtype != torch.float64 else 1e-11) * (1 + options.get("softcap", 0) / 10)
    assert_near("log_probs", selected, expected, error * (1 + expected.detach().abs()))
    assert_near("entropy", entropy, exact_entropy, error * (1 + exact_entropy.detach().abs()))

    by_labels = torch.randn(classes.shape, dtype=selected.dtype)
    by_entropy = torch.randn(entropy.shape, dtype=entropy.dtype)
    total([expected, exact_entropy], [by_labels, by_entropy]).backward()
    minus_1 = torch.tensor(-1.0, dtype=selected.dtype)
    upstream = (state, entropy, minus_1, None, by_entropy, classes)
    arguments = (logits, by_labels, None, token_weight, None, dim, 0, *upstream)
    gradient = operators.backward(*arguments, **options)
    labels = by_labels.double().abs().masked_fill(padding, 0)
    terms = torch.zeros(logits.shape, dtype=torch.float64)
    terms = terms.scatter_add(dim, classes.long().masked_fill(padding, 0), labels)
    p, scale = log_p.detach().exp(), options.get("logit_scale", 1.0)
    of_softmax = labels.sum(dim, keepdim=True) + by_entropy.double().abs().unsqueeze(dim) * (
        1 + exact_entropy.detach().unsqueeze(dim) - log_p.detach()
    )
    tolerance = error * scale * (terms + p * of_softmax) + half_ulp(dtype) * 1.01 * leaf.grad.abs()
    assert_near("gradient", gradient, leaf.grad, tolerance + 2 * smallest(dtype))


@pytest.mark.parametrize("n_labels", [1, 5, 40])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_selected_class_out_of_range(operators, n_labels, with_entropy):
    """Makes its row NaN, and its gradient, and changes no other row."""
    for n_classes, bad in ((90, 90), (5000, -3)):
        logits = make_logits((5, n_classes), torch.bfloat16)
        right = torch.randint(n_classes, (5, n_labels))
        wrong = right.clone()
        wrong[3, -1] = bad
        all_results = []
        for classes in (right, wrong):
            results = operators.selected_log_probs(logits, classes, 1, with_entropy)
            log_probs, state, token_weight, entropy = results
            assert token_weight.eq(1).all()
            upstream = (state, None, torch.tensor(-1.0), None, None, classes)
            arguments = (logits, torch.ones_like(log_probs), None, token_weight, None)
            gradient = operators.backward(*arguments, 1, 0, *upstream)
            all_results += [[log_probs, gradient, *([entropy] if with_entropy else [])]]
        for one, other in zip(*all_results, strict=True):
            assert other[3].isnan().all()
            assert torch.equal(one[[0, 1, 2, 4]], other[[0, 1, 2, 4]])

"""Problems with all options beyond torch's, and the check of their results in float64."""

from typing import NamedTuple

import torch
from cases import DTYPES
from compare import half_ulp, smallest
from modes import MODES
from torch import Tensor

import fused_xent
from fused_xent import reference

ERROR = 1e-5  # relative to the summed terms; for float64 see check_problem
STATISTICS = ("lse", "z_loss", "entropy")


class Problem(NamedTuple):
    """Tensors, options by name, the mode, and whether statistics are computed.

    For sparse labels, ``labels`` has the function's arguments, and target the same labels dense.
    """

    logits: Tensor
    target: Tensor
    options: dict
    mode: str
    statistics: bool
    labels: dict | None = None

    @property
    def dim(self) -> int:
        return self.options.get("dim", 1) % self.logits.dim()


def make_problem(choose, lay_out=lambda values: values) -> Problem:
    """Make a problem; choose(list) picks each of its properties."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(choose(range(2**16)))

    def numbers(shape) -> Tensor:
        return torch.randn(shape, generator=generator)

    dtype = choose(DTYPES)
    n_classes = choose([1, 2, 5, 9, 33, 100, 129, 300, 1000, 2049, 17001])
    rows = choose([(1,), (3,), (7,), (2, 3), (300,)]) if n_classes < 200 else choose([(1,), (3,)])
    dim = choose([1, -1, len(rows)])
    shape = (*rows, n_classes) if dim != 1 else (rows[0], n_classes, *rows[1:])
    logits = (numbers(shape) * choose([0.5, 3.0])).to(dtype)
    options = {"reduction": choose(["none", "mean", "sum"]), "dim": dim}
    if choose([False, True]):
        target = lay_out(numbers(shape).softmax(dim).to(dtype))
    else:
        target = torch.randint(n_classes, rows, generator=generator)
        target.view(-1)[1::4] = -100
    some = {
        "label_smoothing": 0.1,
        "weight": numbers((n_classes,)).abs().to(dtype),
        "token_weight": numbers(rows).round(decimals=1)
        * torch.arange(rows[-1]).remainder(3).sign(),
        "lse_square_scale": 0.01,
        "softcap": choose([1.0, 30.0]),
        "logit_scale": choose([0.5, 3.0]),
        "focal_gamma": choose([0.5, 2.0]),
    }
    if options["reduction"] == "mean":  # positive weights: their sum, the divisor, must not cancel
        some["token_weight"] = some["token_weight"].abs()
    options |= {name: value for name, value in some.items() if choose([False, True])}
    if choose([False, True]) and options["reduction"] == "mean":
        options["normalizer"] = choose([7, 2.5, torch.tensor(3.0)])
    mode = choose([mode for mode in MODES if dtype != torch.float16 or mode != "fused"])
    return Problem(lay_out(logits), target, options, mode, choose([False, True]))


def exact_results(problem: Problem, logits: Tensor) -> reference.CrossEntropyStatistics:
    """Return the results of fused_xent.reference, in the dtype of logits."""
    tensors = ("weight", "token_weight")
    options = {
        name: value.to(logits.dtype) if name in tensors else value
        for name, value in problem.options.items()
        if name != "loss_dtype"
    }
    target = problem.target
    target = target.to(logits.dtype) if target.is_floating_point() else target
    return reference.cross_entropy_with_statistics(logits, target, **options)


def total(results, upstream: list[Tensor]) -> Tensor:
    """Return the sum of the differentiable results, each times its upstream gradient."""
    return sum((result.double() * up).sum() for result, up in zip(results, upstream, strict=True))


def check_problem(problem: Problem) -> None:
    """Compare loss, statistics and gradient with fused_xent.reference in float64."""
    exact_logits = problem.logits.detach().double().requires_grad_()
    exact = exact_results(problem, exact_logits)
    leaf = problem.logits.detach().requires_grad_()
    logits = leaf if problem.mode == "default" else leaf.clone()
    function = fused_xent.cross_entropy_with_statistics
    if not problem.statistics:
        function = fused_xent.cross_entropy
    loss_dtype = torch.promote_types(problem.logits.dtype, torch.float32)
    options = problem.options | MODES[problem.mode] | {"loss_dtype": loss_dtype}
    actual = function(logits, **(problem.labels or {"target": problem.target}), **options)
    outputs, exact_outputs = [actual], [exact.loss]
    if problem.statistics:
        outputs, exact_outputs = [actual.loss], [exact.loss]
        check_statistics(actual, exact, problem)
        if problem.mode != "fused":
            outputs += [actual.lse, actual.entropy]
            exact_outputs += [exact.lse, exact.entropy]
    error = ERROR if problem.logits.dtype != torch.float64 else 1e-11
    scale = 1 + problem.options.get("softcap", 0) / 10
    assert_near("loss", outputs[0], exact.loss, error * scale * (1 + exact.loss.abs()))
    upstream = [
        torch.arange(1.0 + i, 1 + i + output.numel()).remainder(7).sub(2.5).view(output.shape)
        for i, output in enumerate(exact_outputs)  # a different one per output
    ]
    total(outputs, upstream).backward()
    total(exact_outputs, upstream).backward()
    terms = gradient_terms(problem, exact, upstream)
    tolerance = error * scale * terms + 2 * half_ulp(problem.logits.dtype) * exact_logits.grad.abs()
    tolerance = tolerance + 2 * smallest(problem.logits.dtype)
    assert_near("gradient", leaf.grad, exact_logits.grad, tolerance)


def check_statistics(actual, exact, problem: Problem) -> None:
    error = ERROR if problem.logits.dtype != torch.float64 else 1e-11
    for name in STATISTICS:
        one, other = getattr(actual, name), getattr(exact, name)
        scale = (1 + problem.options.get("softcap", 0) / 10) * (1 + other.abs())
        assert_near(name, one, other, error * scale)
        assert one.dtype == accumulation_dtype(problem), name
    # If softcap makes two logits almost equal, rounding may decide which one is the maximum.
    chosen = [
        reference.transform(
            problem.logits.double(),
            problem.options.get("softcap"),
            problem.options.get("logit_scale", 1.0),
        )
        .gather(problem.dim, results.argmax.clamp(min=0).unsqueeze(problem.dim))
        .squeeze(problem.dim)
        for results in (actual, exact)
    ]
    assert torch.equal(actual.argmax < 0, exact.argmax < 0)
    assert_near("argmax", *chosen, 1e-6 * chosen[1].abs())
    same = actual.argmax == exact.argmax
    assert torch.equal(actual.correct[same], exact.correct[same])


def accumulation_dtype(problem: Problem) -> torch.dtype:
    """Return the dtype of the statistics: with dense probabilities, float64 if a tensor has it."""
    dtype = torch.promote_types(problem.logits.dtype, torch.float32)
    if problem.labels is None and problem.target.is_floating_point():
        for tensor in (problem.target, problem.options.get("weight", problem.target)):
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def gradient_terms(problem: Problem, exact, upstream: list[Tensor]) -> Tensor:
    """Return the magnitude of the terms that each gradient entry sums, by the formulas."""
    options, dim = problem.options, problem.dim
    softcap, scale = options.get("softcap"), options.get("logit_scale", 1.0)
    z = reference.transform(problem.logits.double(), softcap, scale)
    p = z.softmax(dim)
    d = (z.amax(dim, keepdim=True) - z).masked_fill(p == 0, 0)  # which multiplies p
    n_classes, weight = problem.logits.shape[dim], options.get("weight")
    weight = torch.ones(n_classes) if weight is None else weight.double()
    weight = weight.view([-1] + [1] * (z.dim() - dim - 1))
    labels = problem.target
    if not labels.is_floating_point():
        index = labels.long().masked_fill(~is_class(problem), 0)
        labels = torch.zeros_like(z).scatter(dim, index.unsqueeze(dim), 1)
    q = weight * (labels.double() + options.get("label_smoothing", 0) / n_classes)
    g = upstream[0].abs() if options["reduction"] == "none" else upstream[0].abs().expand(1)
    if options["reduction"] == "mean":
        normalizer = options.get("normalizer")
        g = g / abs(normalizer if normalizer is not None else total_weight(problem))
    if options["reduction"] == "none":
        g = g.unsqueeze(dim)
    if "token_weight" in options:
        g = g * options["token_weight"].double().abs().unsqueeze(dim)
    g = g * (1 + options.get("focal_gamma", 0))
    lse = exact.lse.detach().unsqueeze(dim).abs()
    softmax = 2 * g * options.get("lse_square_scale", 0) * lse
    if len(upstream) > 1:
        entropy = exact.entropy.detach().unsqueeze(dim)
        softmax = softmax + upstream[1].abs().unsqueeze(dim)
        softmax = softmax + upstream[2].abs().unsqueeze(dim) * (entropy + d + lse + 1)
    return (p * (g * q.sum(dim, keepdim=True) + softmax) + g * q) * scale


def total_weight(problem: Problem) -> Tensor:
    """Return the divisor of the mean without a normalizer."""
    target, options = problem.target, problem.options
    rows = torch.ones(problem.logits.select(problem.dim, 0).shape, dtype=torch.float64)
    if not target.is_floating_point():
        kept = is_class(problem)
        rows = rows * kept
        if "weight" in options:
            rows = rows * options["weight"].double()[target.long().masked_fill(~kept, 0)]
    return (rows * options.get("token_weight", 1)).sum()


def is_class(problem: Problem) -> Tensor:
    """Return True for the class indices that are not ignored."""
    return problem.target != problem.options.get("ignore_index", -100)


def assert_near(name: str, actual: Tensor, exact: Tensor, tolerance: Tensor) -> None:
    """Compare entry by entry; equal infinities match, and NaN matches NaN."""
    actual, exact = actual.detach().double(), exact.detach()
    assert actual.shape == exact.shape, name
    right = (actual == exact) | (actual.isnan() & exact.isnan())
    right |= (actual - exact).abs() <= tolerance
    if not right.all():
        excess = ((actual - exact).abs() / tolerance).masked_fill(right, 0)
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{name}: {int((~right).sum())} of {right.numel()} wrong, at {at} {actual[at]:.9g} "
            f"instead of {exact[at]:.9g}, {excess[at]:.3g} times the tolerance"
        )

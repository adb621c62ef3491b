"""Compares a call's results, gradients and memory with what they must be."""

from collections.abc import Iterable
from typing import Any

import torch
from compare import half_ulp, smallest
from problems import (
    ERROR,
    Problem,
    assert_near,
    check_statistics,
    exact_results,
    gradient_terms,
    total,
    total_weight,
)
from test_selected import gradient_terms as terms_of_selected
from torch import Tensor

from fused_xent import reference

MOST_BYTES = 1 << 26  # of a tensor's memory, to be compared as a whole


class Memory:
    """The memory of all tensors among a call's arguments, as it was."""

    def __init__(self, given: dict[str, Any], but: Iterable[str] = ()) -> None:
        """Copy it, except for these arguments."""
        tensors = {name: x for name, x in given.items() if name not in but and _has_memory(x)}
        self.copies = [(name, x, self._bytes(x).clone()) for name, x in tensors.items()]

    @staticmethod
    def _bytes(tensor: Tensor) -> Tensor:
        """Return the elements, and what lies between them."""
        storage = tensor.detach().untyped_storage()
        if storage.nbytes() > MOST_BYTES:
            return tensor.detach().contiguous().view(torch.uint8)
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)

    def check(self) -> None:
        """Raise AssertionError if anything was written there."""
        for name, tensor, before in self.copies:
            assert torch.equal(self._bytes(tensor), before), f"{name} was overwritten"


def _has_memory(value: Any) -> bool:
    is_tensor = torch.is_tensor(value) and value.layout == torch.strided
    return is_tensor and value.device.type != "meta"


def check(form) -> None:
    """Call a form's function and its backward; compare everything."""
    given = form.arguments()
    overwritten = ["input"] if form.problem.mode != "default" else []
    memory = Memory(given | {"the leaf": form.leaves["input"]}, overwritten)
    with torch.set_grad_enabled(form.has_gradient):
        (_check_selective if form.is_selective else _check_loss)(form, given)
    memory.check()


def _check_loss(form, given: dict[str, Any]) -> None:
    problem = form.problem
    exact_logits = problem.logits.detach().double().requires_grad_()
    extra = None if form.extra is None else given[form.extra].requires_grad_()
    with torch.enable_grad():
        exact = exact_results(problem, exact_logits)
    given["loss_dtype"] = dtype = _loss_dtype(problem, exact.loss)
    found = form.call(given)
    loss = found.loss if problem.statistics else found
    assert loss.dtype == dtype, f"loss has dtype {loss.dtype}"
    size = exact.loss.abs()
    allowed = _error(problem) * (1 + size) + 1.01 * half_ulp(dtype) * size + smallest(dtype)
    assert_near("loss", loss, exact.loss, allowed)
    outputs, exact_outputs = [loss], [exact.loss]
    if problem.statistics:
        check_statistics(found, _without_infinity(exact), problem)
        if problem.mode != "fused":
            outputs += [found.lse, found.entropy]
            exact_outputs += [exact.lse, exact.entropy]
    if form.has_gradient:
        upstream = _upstream(exact_outputs)
        if extra is not None:
            size = 1 + float(exact.loss.detach().abs().nan_to_num(posinf=0).sum())
            totals = total(outputs, upstream), total(exact_outputs, upstream)
            _check_extra(form.extra, extra, *totals, size / _divisor(problem))
        total(exact_outputs, upstream).backward()
        total(outputs, upstream).backward()
        row_loss = exact_results(_by_row(problem), exact_logits.detach()).loss
        terms = gradient_terms(problem, exact, upstream)
        _check_gradients(form, exact_logits.grad, terms, row_loss)


def _divisor(problem: Problem) -> float:
    """Return what the terms of a mean are divided by, if that is less than 1."""
    return min(1.0, float(total_weight(problem).detach().abs()) or 1.0)


def _check_extra(name: str, leaf: Tensor, found: Tensor, exact: Tensor, size: float) -> None:
    """Compare a gradient that torch operations compute, relative to its greatest entry.

    The terms of a mean's gradient, of this size, may cancel.
    """
    gradient, right = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (found, exact))
    leaf.requires_grad_(False)
    assert gradient.dtype == leaf.dtype, f"gradient of {name} has dtype {gradient.dtype}"
    if right.isfinite().all() and right.numel():
        right = right.double()
        allowed = (1e-4 + 2 * half_ulp(leaf.dtype)) * right.abs().max() + 2 * smallest(leaf.dtype)
        allowed = allowed + ERROR * size
        assert_near(f"gradient of {name}", gradient, right, allowed.expand(right.shape))


def _without_infinity(exact):
    """A logit of plus infinity makes the row's lse NaN."""
    is_infinite = exact.lse.isposinf()
    lse, z_loss = (x.masked_fill(is_infinite, torch.nan) for x in (exact.lse, exact.z_loss))
    return exact._replace(lse=lse, z_loss=z_loss)


def _by_row(problem: Problem) -> Problem:
    options = {name: x for name, x in problem.options.items() if name != "normalizer"}
    return problem._replace(options=options | {"reduction": "none"})


def _check_selective(form, given: dict[str, Any]) -> None:
    problem, index = form.problem, given["index"]
    exact_logits = problem.logits.detach().double().requires_grad_()
    names = [name for name in ("softcap", "logit_scale") if name in problem.options]
    options = {"dim": problem.dim} | {name: problem.options[name] for name in names}
    is_one = index.dim() < exact_logits.dim()
    with torch.enable_grad():
        exact = reference.selective_log_softmax(
            exact_logits, index.unsqueeze(problem.dim) if is_one else index, **options
        )
        log_probs = exact.log_probs.squeeze(problem.dim) if is_one else exact.log_probs
    found = form.call(given)
    outputs = list(found) if problem.statistics else [found]
    exact_outputs = [log_probs, exact.entropy][: len(outputs)]
    for name, one, other in zip(("log_probs", "entropy"), outputs, exact_outputs, strict=False):
        assert one.dtype == torch.promote_types(problem.logits.dtype, torch.float32)
        assert_near(name, one, other, _error(problem) * (1 + other.detach().abs()))
    if form.has_gradient:
        upstream = _upstream(exact_outputs)
        total(exact_outputs, upstream).backward()
        total(outputs, upstream).backward()
        terms = terms_of_selected(problem.logits, index, upstream, **options)
        _check_gradients(form, exact_logits.grad, terms, exact.log_probs.sum(problem.dim))


def _check_gradients(form, exact: Tensor, terms: Tensor, row_loss: Tensor) -> None:
    """Compare target and other entries apart, each relative to the terms that it sums.

    A row whose loss is not finite is left out: autograd's 0 * inf is NaN there.
    """
    dtype = form.problem.logits.dtype
    tolerance = _error(form.problem) * terms.detach() + 2.02 * half_ulp(dtype) * exact.abs()
    tolerance = tolerance.nan_to_num(nan=0, posinf=0) + 2 * smallest(dtype)
    if dtype == torch.float64 and form.problem.options.get("focal_gamma"):
        tolerance = tolerance + 1e-15  # near p = 1, the reference loses the digits of 1 - p
    gradients = form.gradients(exact, tolerance)
    for name, leaf in form.leaves.items():
        right, allowed = gradients[name]
        assert leaf.grad.dtype == dtype, f"gradient of {name} has dtype {leaf.grad.dtype}"
        if form.is_layer:
            assert_near(f"gradient of {name}", leaf.grad, right, allowed)
            continue
        dim = form.problem.dim
        left_out = ~row_loss.detach().isfinite().unsqueeze(dim)
        is_target = form.own(_is_target(form.problem), dim)
        for kind, others in (("target", ~is_target), ("other", is_target)):
            parts = (x.masked_fill(others | left_out, 0) for x in (leaf.grad, right))
            assert_near(f"gradient of {kind} classes", *parts, allowed)


def _is_target(problem: Problem) -> Tensor:
    """Return True at the classes that the labels name."""
    if problem.target.is_floating_point():
        return problem.target != 0
    n_classes = problem.logits.shape[problem.dim]
    index = problem.target.long().unsqueeze(problem.dim)
    is_class = (index >= 0) & (index < n_classes)
    zeros = torch.zeros(problem.logits.shape, dtype=torch.bool)
    return zeros.scatter(problem.dim, index.masked_fill(~is_class, 0), is_class)


def _upstream(outputs: list[Tensor]) -> list[Tensor]:
    """Return upstream gradients that every dtype holds exactly, others for each output."""
    return [
        torch.arange(1.0 + i, 1 + i + x.numel()).remainder(7).sub(2.5).view(x.shape)
        for i, x in enumerate(outputs)
    ]


def _error(problem: Problem) -> float:
    """Return the relative error of sums; a cap or scale rounds the logits once more."""
    options = problem.options
    error = ERROR if problem.logits.dtype != torch.float64 else 1e-11
    return error * (1 + options.get("softcap", 0) / 10)


def _loss_dtype(problem: Problem, exact: Tensor) -> torch.dtype:
    """Return the call's dtype of the loss, or the default if the loss may be too large for it."""
    dtype = problem.options["loss_dtype"]
    is_small = exact.numel() == 0 or bool(exact.abs().nan_to_num(posinf=0).max() < 6e4)
    return dtype if is_small else torch.promote_types(problem.logits.dtype, torch.float32)

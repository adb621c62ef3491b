"""The loss as users call it: from arguments to one validated problem."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic
from typing_extensions import Unpack

from ._autograd import evaluate, evaluate_plain, is_plain
from ._options import CALL_ERRORS, StatisticsOptions, check_names, resolve_once
from ._problem import prepare
from ._torch_private import legacy_reduction
from .reference import CrossEntropyStatistics

T = TypeVar("T")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dim: int | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    focal_gamma: float = 0.0,
    loss_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy, equivalent to :func:`torch.nn.functional.cross_entropy`.

    With :math:`p = \mathrm{softmax}(z)` over the ``C`` classes and class weights ``w`` (1 without
    ``weight``), the loss of a row with class index ``y`` is, for label smoothing ``e``,

    .. math:: c = -(1 - e)\, w_y \log p_y - \frac{e}{C} \sum_j w_j \log p_j

    and for probabilities ``t``, :math:`c = -\sum_j w_j\, ((1 - e)\, t_j + e / C) \log p_j`.
    ``mean`` divides the sum by the sum of ``w_y`` over the rows that are not ignored, or for
    probabilities by the number of rows: torch's rules. A class of probability or weight 0 adds 0
    even where its logit is ``-inf`` (torch: NaN).

    Beyond torch, ``z`` are the logits ``x`` themselves or, with ``logit_scale`` or ``softcap``,
    :math:`z = \mathrm{softcap} \tanh(\mathrm{logit\_scale}\, x / \mathrm{softcap})` (Gemma 2,
    https://arxiv.org/abs/2408.00118), and the loss of a row is, with
    :math:`\mathrm{lse} = \log \sum_j \exp z_j`,

    .. math:: \mathrm{token\_weight}\, \left((1 - P)^{\mathrm{focal\_gamma}}\, c
              + \mathrm{lse\_square\_scale}\; \mathrm{lse}^2\right)

    where :math:`P` is :math:`p_y`, or for probabilities and for smoothed labels
    :math:`\exp(-c / Q)` with :math:`Q` the sum of what multiplies the :math:`-\log p_j` in ``c``:
    the focal loss (https://arxiv.org/abs/1708.02002). The other term is the z-loss
    (https://arxiv.org/abs/2204.02311).

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, of any strides; float32,
            float64, bfloat16 or float16.
        target: class indices of ``input``'s shape without ``C`` (int64, int32 or uint8), or
            probabilities of ``input``'s shape (floating; differentiable).
        weight: one weight per class, ``(C,)``, of any floating-point dtype.
        size_average: deprecated in torch, see ``reduction``.
        ignore_index: rows of this class index have loss and gradient 0, do not count in ``mean``,
            and their logits may hold anything. Any integer. Probabilities have no such rows, so
            that it must be negative beside them: see ``token_weight``.
        reduce: deprecated in torch, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: in [0, 1].
        dim: the dimension of the classes, where it is not torch's: ``-1`` takes ``(B, T, C)``,
            of which probabilities would else be taken for those of ``T`` classes.
        token_weight: one weight a row, of the unreduced loss's shape; any real numbers. A row of
            weight 0 is left out as if it were ignored, whatever its logits, target or
            probabilities, and out of the statistics. ``mean`` divides by the sum of class weight
            times token weight (for probabilities, of token weight); of weights of either sign,
            which may almost cancel each other, pass a ``normalizer``.
        normalizer: what ``mean`` divides the sum by instead, a finite number or a tensor of one
            number: for a part of a batch, what the whole batch would be divided by, which without
            weights is the number of its rows that are not ignored. A mean by 0 is NaN.
        lse_square_scale: of the z-loss, which no class weight multiplies; in [0, 1e30].
        softcap: a number in [1e-30, 1e30]; None: no cap.
        logit_scale: a number in [1e-30, 1e30]. To learn a scale, multiply the logits by it.
        focal_gamma: in [0, 1e30]; 0: plain cross-entropy.
        loss_dtype: dtype of the loss. None is torch's rule: that of ``input``, or that to which it
            is promoted with probabilities; float32 under autocast. Sums are float32 or better at
            any.
        inplace_backward: the backward writes the gradient over the logits: no memory for it, half
            the traffic of a fresh one. The logits must not be needed after the backward; autograd
            raises its own error where it needs them. A compiled function that returns logits which
            it has computed copies them first.
        grad_in_forward: the forward writes the gradient over the logits, and the backward only
            multiplies it by the upstream gradient, if that is not 1: one read and one write of the
            logits in all. The logits must not be needed after the forward; autograd raises an error
            where a gradient is to flow through another use of them. In compiled code, which cannot
            raise that error, this is ``inplace_backward``.

    The last two need ``input`` to be computed, not a leaf of the graph; where no gradient is
    recorded they change nothing. ``grad_in_forward`` refuses float16, whose range a gradient needs
    a loss scale to fit.

    Gradients flow to ``input`` and probabilities from the kernels, and to ``weight``,
    ``token_weight`` and ``normalizer``, second derivatives, and under ``torch.func.vmap`` and
    forward-mode differentiation by torch operations.

    Returns:
        A scalar, or for ``"none"`` a loss a row, of ``input``'s shape without ``C``.

    Raises:
        IndexError: a target is no class and not ``ignore_index``; nothing has been written by then.
            On CUDA devices, where that would wait for the GPU, the row's loss and gradient are NaN.
        ValueError: a shape, dtype, device or option that does not fit; the message names it.
        TypeError: an argument of the wrong type.
        RuntimeError: ``inplace_backward`` or ``grad_in_forward`` with logits that they cannot
        overwrite.
    """
    tensors = (input, target, weight, token_weight, normalizer)
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "dim": dim,
        "lse_square_scale": lse_square_scale,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "focal_gamma": focal_gamma,
        "loss_dtype": loss_dtype,
        "inplace_backward": inplace_backward,
        "grad_in_forward": grad_in_forward,
    }
    if has_torch_function_variadic(*tensors):
        return _overridden(
            cross_entropy, *tensors, size_average=size_average, reduce=reduce, **options
        )
    if size_average is not None or reduce is not None:
        options["reduction"] = legacy_reduction(size_average, reduce)
    if is_plain(*tensors) and not (inplace_backward or grad_in_forward):
        try:
            settings = resolve_once(input.dim(), False, tuple(options), *options.values())
            return evaluate_plain(input, target, settings)
        except CALL_ERRORS:
            pass  # the checks on the long way say which argument is wrong
    return evaluate(prepare(*tensors, False, options))[0]


def cross_entropy_with_statistics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    **options: Unpack[StatisticsOptions],
) -> CrossEntropyStatistics:
    """Return what one pass over the logits tells: the loss, and statistics of each row.

    Takes the arguments of :func:`fused_xent.cross_entropy`, all but the first three by name. The
    statistics have the shape of the unreduced loss, and float64 for float64 logits and float32 for
    others. Rows that are ignored or of token weight 0 are not read, and have 0, ``argmax`` -1 and
    ``correct`` False: ``correct.sum() / (argmax >= 0).sum()`` is the accuracy of the others.

    Returns:
        A named tuple:

        - ``loss``: as of :func:`fused_xent.cross_entropy`, z-loss and all.
        - ``lse``: :math:`\\log \\sum_j \\exp z_j`; differentiable.
        - ``z_loss``: the row's part of the loss that is ``lse_square_scale * lse^2``, times its
          token weight; differentiable.
        - ``entropy``: :math:`-\\sum_j p_j \\log p_j`; differentiable.
        - ``argmax``: int64, the first class of the greatest :math:`z_j`, NaN above all numbers.
          Under a ``softcap``, logits of more than about nine times that are equal.
        - ``correct``: bool, whether that is the target, or the argmax of the probabilities.

        With ``grad_in_forward``, a gradient through any but ``loss`` raises an error, unless in
        compiled code, where that is ``inplace_backward``.
    """
    check_names("cross_entropy_with_statistics", options, _SIGNATURE.parameters)
    tensors = (input, target, weight, token_weight, normalizer)
    if has_torch_function_variadic(*tensors):
        return _overridden(cross_entropy_with_statistics, *tensors, **options)
    given: dict[str, Any] = {**options}
    legacy = given.pop("size_average", None), given.pop("reduce", None)
    if legacy != (None, None):
        given["reduction"] = legacy_reduction(*legacy)
    return cast(CrossEntropyStatistics, evaluate(prepare(*tensors, True, given)))


def _overridden(
    function: Callable[..., T],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | float | None,
    /,
    **options: Any,
) -> T:
    """Ask the tensors that are subclasses with a rule of their own."""
    result: T = handle_torch_function(
        function,
        (input, target, weight, token_weight, normalizer),
        input,
        target,
        weight=weight,
        token_weight=token_weight,
        normalizer=normalizer,
        **options,
    )
    return result


_SIGNATURE = inspect.signature(cross_entropy)
cross_entropy_with_statistics.__signature__ = _SIGNATURE.replace(  # type: ignore[attr-defined]
    parameters=[
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) if i > 2 else parameter
        for i, parameter in enumerate(_SIGNATURE.parameters.values())
    ],
    return_annotation=CrossEntropyStatistics,
)

"""The loss of a linear layer as users call it: from hidden states to the loss, without logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic
from typing_extensions import Unpack

from . import _autograd, _linear_autograd
from ._linear_autograd import Layer
from ._options import (
    CALL_ERRORS,
    REDUCTIONS,
    LinearCrossEntropyOptions,
    LinearOptions,
    check_flag,
    check_index,
    check_names,
    resolve_once,
)
from ._problem import (
    Problem,
    accumulation_dtype,
    check_dense,
    check_device,
    check_floating,
    check_probabilities,
    check_range,
    is_autocast,
    prepare,
)
from ._torch_private import are_ordinary, has_values, is_under_torch_func
from .reference import CrossEntropyStatistics

FEW_LOGITS = 16384  # as many are computed at once: a chunk of its own takes longer than its product

T = TypeVar("T")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    focal_gamma: float = 0.0,
    loss_dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
    shift: int = 0,
    drop_ignored: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    r"""Softmax cross-entropy of the logits ``input @ linear_weight.T``, which never exist as one.

    Equivalent to :func:`torch.nn.functional.linear_cross_entropy` of torch 2.13, and to
    :func:`fused_xent.cross_entropy` of :func:`torch.nn.functional.linear`, in values, dtypes and
    gradients: the logits are rounded to ``input``'s dtype as a linear layer's are. They are made a
    chunk of rows at a time, and the gradients with them, by three matrix products in all. Beside
    the gradients that takes the memory of one chunk, and for several chunks of 16-bit numbers of
    the weight's gradient in float32, in which it is summed.

    Args:
        input: hidden states, ``(H,)``, ``(N, H)`` or with any more dimensions of rows, such as
            ``(B, T, H)``; float32, float64, bfloat16 or float16.
        linear_weight: ``(C, H)`` for ``C`` classes, or ``(C, d1, ..., dk, H)`` for a loss in each
            of ``d1 x ... x dk`` positions of a row; of ``input``'s dtype, or any under autocast.
        target: class indices (int64, int32 or uint8) of the rows' shape, ``(N,)`` or
            ``(N, d1, ..., dk)``, or probabilities, ``(N, C)`` or ``(N, C, d1, ..., dk)``.
        linear_bias: of ``linear_weight``'s shape without ``H``, and its dtype.
        weight: one weight a class, ``(C,)``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: rows of this class index have loss and gradient 0; None: -100. Must be None
            beside probabilities.
        label_smoothing: in [0, 1].
        options: torch's own; its ``batch_chunk_size`` is ``chunk_rows``, all else in it is without
            effect.
        token_weight: one weight for each position of a row, of the class indices' shape.
        normalizer: what ``mean`` divides the sum by instead.
        lse_square_scale: of the z-loss.
        softcap: of the logits; None: no cap.
        logit_scale: of the logits.
        focal_gamma: of the focal loss.
        loss_dtype: dtype of the loss; None: that of the logits, float32 under autocast.
        logits_dtype: dtype of the logits. None: that of ``input``, to which a linear layer rounds
            its output. ``torch.float32`` beside 16-bit ``input`` keeps the logits and their
            gradient in float32, as a head in float32 does; ``input`` and ``linear_weight`` stay in
            16 bits.
        shift: the label of a row is that of the row so many after it, within each sequence, which
            is ``input``'s last dimension before the features: 1 (or True) for next-token labels.
            ``target`` and ``token_weight`` keep the shape of all rows. The last ``shift`` rows of a
            sequence have no label, and no place in an unreduced loss: it is ``(B, T - shift)`` for
            ``(B, T)``. Nothing is copied for it.
        drop_ignored: rows without a label that counts (ignored, or of token weight 0) are left out
            of the matrix products, at the cost of a copy of the hidden states that are left. Which
            rows these are must be known on the host: on a GPU that waits for it, once, so that a
            CUDA graph cannot be captured. Compiled code keeps all rows: the results are the same,
            unless the hidden state of such a row is not finite, which the weight's gradient then is
            not either.
        chunk_rows: how many rows the logits are made of at a time. None: as many as make matrix
            products efficient, 256 rows and 100 MiB on a CPU and 4096 rows and 1 GiB on a GPU at
            most; and on a CPU, where rows are few beside features, all of them, class by class in
            the memory that the weight's gradient takes.

    What is not said here is as in :func:`fused_xent.cross_entropy`. The gradients of ``input``,
    ``linear_weight`` and ``linear_bias``, of those that require one, are made with the loss, and
    multiplied by the upstream gradient in the backward, in place, if that is not 1: they are those
    of the values that the loss was computed of, whatever has been written over them since, and an
    upstream gradient that is not finite makes NaN of the zeros of ignored rows. They are computed
    anew, with the logits, in a second backward, for ``reduction="none"``, float16,
    and gradients through statistics. All logits at once are needed, and used, for gradients of
    gradients, of ``weight``, ``token_weight``, ``normalizer`` and probabilities, and under
    ``torch.func`` and forward-mode differentiation.

    Returns:
        A scalar, or for ``"none"`` a loss for each position of a row.

    Raises:
        IndexError: a target is no class and not ``ignore_index``. On CUDA devices, where that would
            wait for the GPU, loss and gradients are NaN.
        ValueError: a shape, dtype, device or option that does not fit; the message names it.
        TypeError: an argument of the wrong type.
    """
    tensors = (input, linear_weight, target)
    others = (linear_bias, weight, token_weight, normalizer)
    of_layer: dict[str, Any] = {
        "options": options,
        "logits_dtype": logits_dtype,
        "shift": shift,
        "drop_ignored": drop_ignored,
        "chunk_rows": chunk_rows,
    }
    of_loss: dict[str, Any] = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "lse_square_scale": lse_square_scale,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "focal_gamma": focal_gamma,
        "loss_dtype": loss_dtype,
    }
    if has_torch_function_variadic(*tensors, *others):
        given = {"ignore_index": ignore_index, **of_layer, **of_loss}
        return _overridden(linear_cross_entropy, tensors, others, given)
    if ignore_index is not None:
        of_loss["ignore_index"] = ignore_index
    is_default = options is None and logits_dtype is None and chunk_rows is None
    is_default = is_default and drop_ignored is False
    if is_default and type(shift) is int and shift == 0 and _is_plain(*tensors, *others):
        try:
            settings = resolve_once(2, False, tuple(of_loss), *of_loss.values())
            logits = F.linear(input, linear_weight, linear_bias)
            return _autograd.evaluate_plain(logits, target, settings)
        except CALL_ERRORS:
            pass  # the checks on the long way say which argument is wrong
    return _evaluate(*tensors, *others, statistics=False, **of_layer, **of_loss)[0]


def linear_cross_entropy_with_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    **options: Unpack[LinearOptions],
) -> CrossEntropyStatistics:
    """Return the loss of a linear layer, and statistics of each position of a row.

    Takes the arguments of :func:`fused_xent.linear_cross_entropy`, all but the first three by name,
    and returns what :func:`fused_xent.cross_entropy_with_statistics` does. A gradient through
    ``lse``, ``z_loss`` or ``entropy`` multiplies the logits anew in the backward.
    """
    check_names("linear_cross_entropy_with_statistics", options, _NAMES)
    tensors = (input, linear_weight, target)
    others = (linear_bias, weight, token_weight, normalizer)
    if has_torch_function_variadic(*tensors, *others):
        return _overridden(linear_cross_entropy_with_statistics, tensors, others, options)
    results = _evaluate(*tensors, *others, statistics=True, **options)
    return cast(CrossEntropyStatistics, results)


_SIGNATURE = inspect.signature(linear_cross_entropy)
_NAMES = list(_SIGNATURE.parameters)[3:]
linear_cross_entropy_with_statistics.__signature__ = (  # type: ignore[attr-defined]
    _SIGNATURE.replace(return_annotation=CrossEntropyStatistics)
)


def _overridden(
    function: Callable[..., T], tensors: tuple[Any, ...], others: tuple[Any, ...], options: Any
) -> T:
    """Ask the tensors that are subclasses with a rule of their own."""
    linear_bias, weight, token_weight, normalizer = others
    result: T = handle_torch_function(
        function,
        (*tensors, *others),
        *tensors,
        linear_bias=linear_bias,
        weight=weight,
        token_weight=token_weight,
        normalizer=normalizer,
        **options,
    )
    return result


def _is_plain(
    input: Any,
    linear_weight: Any,
    target: Any,
    linear_bias: Any,
    weight: Any,
    token_weight: Any,
    normalizer: Any,
) -> bool:
    """Return True for few logits, for which torch makes all checks: of matrices, and as there."""
    return (
        _autograd.is_plain(input, target, weight, token_weight, normalizer)
        and isinstance(linear_weight, Tensor)
        and are_ordinary(input, linear_weight)
        and input.dim() == linear_weight.dim() == 2
        and 0 < input.size(0) * linear_weight.size(0) <= FEW_LOGITS
        and (
            linear_bias is None
            or (isinstance(linear_bias, Tensor) and linear_bias.shape == linear_weight.shape[:1])
        )
    )


def _evaluate(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Any,
    weight: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | float | None,
    /,
    *,
    statistics: bool,
    ignore_index: int | None = None,
    options: LinearCrossEntropyOptions | None = None,
    logits_dtype: torch.dtype | None = None,
    shift: int = 0,
    drop_ignored: bool = False,
    chunk_rows: int | None = None,
    **loss_options: Any,
) -> tuple[Tensor] | CrossEntropyStatistics:
    """Check the arguments and compute the loss, and with statistics all of them."""
    _check_linear(input, linear_weight, linear_bias)
    shift = _check_shift(shift, input)
    check_flag("drop_ignored", drop_ignored)
    chunk_rows = _check_chunk_rows(chunk_rows, options)
    layer = _autocast(Layer(input, linear_weight, linear_bias))
    logits_dtype = _check_dtypes(layer, logits_dtype)
    rows, classes = layer.hidden.shape[:-1], layer.linear_weight.shape[:-1]
    _check_target(target, rows, classes, ignore_index, shift)
    # Of the logits' shape, dtype and device, which is all that is looked at, but of one element.
    logits = layer.hidden.new_zeros((), dtype=logits_dtype).expand(*rows, *classes)
    loss_options["dim"] = len(rows)
    if ignore_index is not None:
        loss_options["ignore_index"] = ignore_index
    tensors = (logits, target, weight, token_weight, normalizer)
    problem = prepare(*tensors, statistics, loss_options)
    if shift > 0:
        problem = problem._replace(token_weight=_without_first(problem, shift))
    check_range(problem)
    layer, problem = _flatten(layer, problem, shift)
    kept = None
    if drop_ignored and has_values(problem.target):
        kept = _kept_rows(problem)
        layer, problem = _select(layer, problem, kept)
    if _has_few_logits(problem, chunk_rows) or _needs_all_logits(layer, problem):
        logits = layer.logits(logits_dtype).to(problem.logits.dtype)
        results = _autograd.evaluate(problem._replace(logits=logits))
    else:
        results = _linear_autograd.evaluate(layer, problem, chunk_rows)

    def restore(values: Tensor, left_out: float = 0) -> Tensor:
        n_rows = math.prod(rows)
        if kept is not None:
            whole = values.new_full([max(n_rows - shift, 0), *classes[1:]], left_out)
            values = whole.index_copy(0, kept, values)
        if shift > 0:
            values = torch.cat([values, values.new_full([n_rows, *classes[1:]], left_out)])[:n_rows]
        values = values.view([*rows, *classes[1:]])
        return values.narrow(len(rows) - 1, 0, rows[-1] - shift) if shift else values

    is_none = problem.settings.reduction == REDUCTIONS["none"]
    return _restore(results, is_none, restore)


# ---- checks --------------------------------------------------------------------------------------


def _check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Check what a linear layer multiplies."""
    check_dense("input", input)
    check_dense("linear_weight", linear_weight)
    check_device("linear_weight", linear_weight, input)
    check_floating("input", input)
    if input.dim() == 0:
        raise ValueError("input must have a dimension of features, got a tensor of shape ()")
    if linear_weight.dim() < 2:
        raise ValueError(
            "linear_weight must have shape (C, *D, H) for C classes and H features, got "
            f"{tuple(linear_weight.shape)}"
        )
    if linear_weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight must have input's {input.shape[-1]} features in its last dimension, "
            f"got shape {tuple(linear_weight.shape)}"
        )
    if linear_bias is not None:
        check_dense("linear_bias", linear_bias)
        check_device("linear_bias", linear_bias, input)
        if linear_bias.shape != linear_weight.shape[:-1]:
            raise ValueError(
                f"linear_bias must have shape {tuple(linear_weight.shape[:-1])}, got "
                f"{tuple(linear_bias.shape)}"
            )


def _check_dtypes(layer: Layer, logits_dtype: torch.dtype | None) -> torch.dtype:
    """Check that a matrix product takes them, after autocast's casts; return the logits' dtype."""
    hidden, linear_weight, linear_bias = layer
    dtype = hidden.dtype
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} must have input's dtype {dtype}, got {tensor.dtype}")
    if logits_dtype is None or logits_dtype == dtype:
        return dtype
    if logits_dtype != torch.float32 or dtype == torch.float64:
        raise ValueError(
            f"logits_dtype must be None, torch.float32 or input's dtype {dtype}, and not narrower "
            f"than that, got {logits_dtype}"
        )
    return torch.float32


def _check_target(
    target: Tensor,
    rows: Sequence[int],
    classes: Sequence[int],
    ignore_index: int | None,
    shift: int,
) -> None:
    """Check a target's shape where there are no logits to compare it with."""
    check_dense("target", target)
    of_indices, of_probabilities = (*rows, *classes[1:]), (*rows, *classes)
    if target.shape == of_probabilities:
        check_probabilities(
            target, f"the shape of input's rows and linear_weight's classes {of_probabilities}"
        )
        if ignore_index is not None:
            raise ValueError(
                f"ignore_index must be None where target holds probabilities, got {ignore_index}: "
                "to leave rows out, give them a token_weight of 0"
            )
    elif target.shape != of_indices:
        hint = ""
        if shift and target.shape == (*rows[:-1], rows[-1] - shift, *classes[1:]):
            hint = f": with shift={shift}, pass the labels of all rows, not shifted"
        raise ValueError(
            f"target must have shape {of_indices} (class indices) or {of_probabilities} "
            f"(probabilities) for input's rows and linear_weight's classes, got "
            f"{tuple(target.shape)}{hint}"
        )


def _check_shift(shift: int, input: Tensor) -> int:
    """Return by how many positions the labels are ahead of the hidden states."""
    shift = int(shift) if isinstance(shift, bool) else check_index("shift", shift)
    if shift < 0:
        raise ValueError(f"shift must not be negative, got {shift}")
    if shift == 0:
        return 0
    if input.dim() < 2:
        raise ValueError(
            "shift must be 0 unless input has a dimension of positions before its features, got "
            f"{shift} and shape {tuple(input.shape)}"
        )
    if shift >= input.shape[-2]:
        raise ValueError(
            f"shift must be less than the length {input.shape[-2]} of input's sequences, or no "
            f"row has a label, got {shift}"
        )
    return shift


def _check_chunk_rows(chunk_rows: int | None, options: Any) -> int | None:
    """Return of how many rows the logits are made at a time, by what torch's options say too."""
    is_given = options is not None
    if is_given and (isinstance(options, type) or not hasattr(options, "batch_chunk_size")):
        raise TypeError(
            f"options must be None or a LinearCrossEntropyOptions, got {type(options).__name__}"
        )
    if chunk_rows is None and is_given:
        chunk_rows = options.batch_chunk_size
    if chunk_rows is None:
        return None
    chunk_rows = check_index("chunk_rows", chunk_rows)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    return chunk_rows


# ---- rows ----------------------------------------------------------------------------------------


def _autocast(layer: Layer) -> Layer:
    """Return what autocast casts the operands of a linear layer to."""
    if not is_autocast(layer.hidden):
        return layer
    dtype = torch.get_autocast_dtype(layer.hidden.device.type)
    hidden: Any  # that these are no None is lost on the way
    weight: Any
    hidden, weight, bias = (
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in layer
    )
    return Layer(hidden, weight, bias)


def _without_first(problem: Problem, shift: int) -> Tensor:
    """Return the token weights without those labels that are first in a sequence, of no row."""
    logits, token_weight, dim = problem.logits, problem.token_weight, problem.settings.dim
    if token_weight is None:
        acc = accumulation_dtype(logits.dtype)
        token_weight = logits.new_ones(logits.select(dim, 0).shape, dtype=acc)
    first, others = token_weight.tensor_split([shift], dim - 1)
    return torch.cat([torch.zeros_like(first), others], dim - 1)


def _flatten(layer: Layer, problem: Problem, shift: int) -> tuple[Layer, Problem]:
    """Return hidden (N, H), and all that is of rows in one dimension.

    With a shift, row i goes with label i + shift of all sequences one after another. Where that is
    of another sequence, its weight is 0.
    """
    n_row_dims = problem.settings.dim
    if n_row_dims == 1 and not shift:
        return layer, problem
    n_rows = math.prod(layer.hidden.shape[:-1])

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(n_rows, *tensor.shape[n_row_dims:])

    hidden = flat(layer.hidden)[: max(n_rows - shift, 0)]
    tokens = problem.token_weight
    logits = problem.logits.new_zeros(()).expand(hidden.shape[0], *layer.linear_weight.shape[:-1])
    flattened = problem._replace(
        logits=logits,
        target=flat(problem.target)[shift:],
        token_weight=None if tokens is None else flat(tokens)[shift:],
        settings=problem.settings._replace(dim=1),
    )
    return layer._replace(hidden=hidden), flattened


def _kept_rows(problem: Problem) -> Tensor | None:
    """Return which rows have a label that counts; None for all of them."""
    target, token_weight = problem.target, problem.token_weight
    counts = None if token_weight is None else token_weight != 0
    if not target.is_floating_point():
        is_label = target.to(torch.int64) != problem.settings.ignore_index
        counts = is_label if counts is None else counts & is_label
    if counts is None:
        return None
    kept = counts.flatten(1).any(1) if counts.dim() > 1 else counts
    kept = kept.nonzero().squeeze(1)
    return None if kept.numel() == counts.shape[0] else kept


def _select(layer: Layer, problem: Problem, kept: Tensor | None) -> tuple[Layer, Problem]:
    if kept is None:
        return layer, problem
    tokens = problem.token_weight
    selected = problem._replace(
        logits=problem.logits[: kept.numel()],
        target=problem.target.index_select(0, kept),
        token_weight=None if tokens is None else tokens.index_select(0, kept),
    )
    return layer._replace(hidden=layer.hidden.index_select(0, kept)), selected


def _has_few_logits(problem: Problem, chunk_rows: int | None) -> bool:
    """Return True if chunks would take longer than they save; compiled code keeps one graph."""
    if chunk_rows is not None or torch.compiler.is_compiling():
        return False
    return problem.logits.numel() <= FEW_LOGITS


def _needs_all_logits(layer: Layer, problem: Problem) -> bool:
    """Return True for what autograd's own formulas compute."""
    _, target, weight, token_weight, normalizer, _ = problem
    is_compiling = torch.compiler.is_compiling()
    return (
        _autograd.is_for_torch(problem)
        or _autograd.needs_graph(target, weight, token_weight, normalizer)
        or (not is_compiling and is_under_torch_func())
        or 0 in layer.hidden.shape
        or 0 in problem.logits.shape
        or (target.dtype == torch.float64 and layer.hidden.dtype != torch.float64)
    )


def _restore(
    results: tuple[Tensor] | CrossEntropyStatistics, is_none: bool, restore: Callable[..., Tensor]
) -> tuple[Tensor] | CrossEntropyStatistics:
    """Give what is of rows the shape that the caller's have."""
    loss, *of_rows = results
    if is_none:
        loss = restore(loss)
    if not of_rows:
        return (loss,)
    *numbers, argmax, correct = of_rows
    return CrossEntropyStatistics(
        loss, *map(restore, numbers), restore(argmax, -1), restore(correct, False)
    )

"""The public loss functions of a linear layer, which never store all logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic
from typing_extensions import Unpack

from . import _autograd, _linear_autograd
from ._linear_autograd import Layer
from ._linear_checks import (
    check_chunk_rows,
    check_dtypes,
    check_linear,
    check_sequence_parallel,
    check_shift,
    check_target,
    check_target_indices,
    rows_of,
    split_of,
)
from ._linear_rows import Rows, flatten, kept_rows, select, without_first
from ._options import (
    CALL_ERRORS,
    LinearCrossEntropyOptions,
    LinearOptions,
    ProcessGroup,
    check_flag,
    check_names,
    resolve_once,
)
from ._problem import Problem, check_range, has_dtensor, prepare
from ._torch_private import are_ordinary, has_values, is_under_torch_func
from .reference import CrossEntropyStatistics

if TYPE_CHECKING:
    from ._parallel_linear import Split

FEW_LOGITS = 16384  # up to so many are computed at once, which is faster than chunks

T = TypeVar("T")
Results = tuple[Tensor] | CrossEntropyStatistics


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
    target_indices: Tensor | None = None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    focal_gamma: float = 0.0,
    loss_dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
    shift: int = 0,
    drop_ignored: bool = False,
    chunk_rows: int | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    num_classes: int | None = None,
    sequence_parallel: bool = False,
    reduce_grad_hidden: bool = True,
) -> Tensor:
    """Softmax cross-entropy of the logits ``input @ linear_weight.T``, which are never all stored.

    Equivalent to ``torch.nn.functional.linear_cross_entropy`` of torch 2.13, and to
    ``fused_xent.cross_entropy`` of ``torch.nn.functional.linear``, in values, dtypes and
    gradients: the logits are rounded to ``input``'s dtype as in a linear layer. The forward
    computes logits and gradients one chunk of rows at a time, in three matrix products in total.
    Besides the gradients, this needs the memory of one chunk. With several chunks of 16-bit numbers
    it also needs the weight's gradient in float32, where it is summed.

    Args:
        input: hidden states, ``(H,)``, ``(N, H)`` or with any more dimensions of rows, such as
            ``(B, T, H)``; float32, float64, bfloat16 or float16.
        linear_weight: ``(C, H)`` for ``C`` classes, or ``(C, d1, ..., dk, H)`` for one loss in each
            of the ``d1 x ... x dk`` positions of a row; ``input``'s dtype, or any under autocast.
        target: class indices (int64, int32 or uint8) of the rows' shape, ``(N,)`` or
            ``(N, d1, ..., dk)``, or probabilities, ``(N, C)`` or ``(N, C, d1, ..., dk)``, or those
            of ``target_indices``.
        linear_bias: ``linear_weight``'s shape without ``H``, and its dtype.
        weight: one weight per class, ``(C,)``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: rows with this class index have loss and gradient 0; in ``target_indices``,
            it is padding. None: -100. Must be None with probabilities of all classes.
        label_smoothing: in [0, 1].
        options: torch's own. Its ``batch_chunk_size`` is used as ``chunk_rows``; its other fields
            have no effect.
        token_weight: one weight for each position of a row: the class indices' shape.
        normalizer: the divisor of ``mean``.
        target_indices: sparse labels: the classes (int64 or int32) of the probabilities in
            ``target``, of ``target``'s shape ``(N, K)`` or ``(N, K, d1, ..., dk)``, ``K`` from 1 to
            1024. Probabilities of a repeated class add up.
        lse_square_scale: factor of the z-loss.
        softcap: cap of the logits; None: no cap.
        logit_scale: factor of the logits.
        focal_gamma: exponent of the focal loss.
        loss_dtype: dtype of the loss. None: that of the logits, or float32 under autocast.
        logits_dtype: dtype of the logits. None: that of ``input``, as in a linear layer. With
            16-bit ``input``, ``torch.float32`` keeps the logits and their gradient in float32, like
            a head in float32; ``input`` and ``linear_weight`` stay in 16 bits.
        shift: row ``i`` of a sequence takes the label of row ``i + shift``: 1 (or True) for
            next-token labels. A sequence is ``input``'s last dimension before the features.
            ``target``, ``target_indices`` and ``token_weight`` keep the shape of all rows. The last
            ``shift`` rows of a sequence have no label: an unreduced loss is ``(B, T - shift)`` for
            ``(B, T)``. Nothing is copied.
        drop_ignored: leave rows that do not count (ignored, or token weight 0) out of the matrix
            products. This copies the hidden states of the other rows. On a GPU the host waits once,
            to learn which rows count, so a CUDA graph cannot be captured. Compiled code keeps all
            rows. The results are the same, unless the hidden state of such a row is not finite:
            then the weight's gradient in compiled code is not finite either.
        chunk_rows: number of rows in a chunk of logits. None: enough for efficient matrix products,
            at most 512 rows and 128 MiB on a CPU, or 4096 rows and 1 GiB on a GPU. On a CPU, if
            there are few rows compared with features, all rows are one chunk, which is stored
            class by class in the memory of the weight's gradient.
        process_group: the processes that the classes are split over, as in
            ``fused_xent.cross_entropy``: ``linear_weight`` ``(C, H)``, ``linear_bias``,
            ``weight`` and probabilities of all classes hold this rank's classes. All other
            arguments, and the loss, are the same on all ranks of the group.
        vocab_start: this rank's first class.
        num_classes: the number of classes of all ranks.
        sequence_parallel: ``input`` holds this rank's rows only: in its first dimension, an equal
            part of the rows, in the order of the ranks. ``target``, ``target_indices``,
            ``token_weight`` and the results have all rows. ``input``'s gradient is that of this
            rank's rows.
        reduce_grad_hidden: with ``process_group``, the gradient of ``input`` is the sum over the
            ranks. False: it is this rank's part, whose sum over the ranks is the gradient.

    ``fused_xent.cross_entropy`` describes what is not described here. The forward computes the
    gradients of ``input``, ``linear_weight`` and ``linear_bias`` that are required. The backward
    multiplies them in place by the upstream gradient if that is not 1. So they are the gradients at
    the values of the forward, even if these have been overwritten since. If the upstream gradient
    is not finite, the zeros of ignored rows become NaN. The backward recomputes logits and
    gradients if it is a second one, for ``reduction="none"``, for float16, and for gradients
    through statistics. All logits are stored for gradients of gradients, of ``weight``,
    ``token_weight``, ``normalizer`` and probabilities, and under ``torch.func`` and forward-mode
    differentiation.

    With ``process_group``, each chunk gathers a few numbers of each row, and adds up ``input``'s
    gradient over the ranks, in float32 or float64, while the next chunk is computed: ``4 * H``
    bytes a row for 16-bit and float32 ``input``. With ``sequence_parallel``, it also gathers its
    rows of ``input``, ahead of time, and each rank gets the gradient of its own rows. So
    ``input``'s gradient has the same bits on all ranks, and every rank must call the same functions
    in the same order, forward and backward; one that does not leaves the others waiting until the
    group's timeout. Gradients of gradients and of ``target``, ``weight``, ``token_weight`` and
    ``normalizer`` are refused.

    An ``input`` and ``linear_weight`` that are DTensors share the work as their placements say:
    rows, or classes, or both, where rows are gathered. A ``linear_weight`` that ``fully_shard`` has
    sharded is whole in the forward of its module alone: call the loss there, or use
    ``fused_xent.LinearCrossEntropyLoss``. The gradient of its ``full_tensor()`` is wrong.

    Returns:
        A scalar, or with ``"none"`` one loss for each position of a row.

    Raises:
        IndexError: a target, or one of ``target_indices``, is out of range and not
            ``ignore_index``. On CUDA devices the check would wait for the GPU: there the loss and
            gradients are NaN instead.
        ValueError: a shape, dtype, device or option does not fit; the message names it.
        TypeError: an argument has the wrong type.
    """
    tensors = (input, linear_weight, target)
    others = (linear_bias, weight, token_weight, normalizer, target_indices)
    of_layer: dict[str, Any] = {
        "options": options,
        "logits_dtype": logits_dtype,
        "shift": shift,
        "drop_ignored": drop_ignored,
        "chunk_rows": chunk_rows,
        "process_group": process_group,
        "vocab_start": vocab_start,
        "num_classes": num_classes,
        "sequence_parallel": sequence_parallel,
        "reduce_grad_hidden": reduce_grad_hidden,
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
    is_whole = process_group is None and vocab_start is None and num_classes is None
    is_whole = is_whole and sequence_parallel is False and reduce_grad_hidden is True
    is_default = is_default and is_whole
    if is_default and type(shift) is int and shift == 0 and _is_plain(*tensors, *others):
        try:
            settings = resolve_once(2, False, tuple(of_loss), *of_loss.values())
            logits = F.linear(input, linear_weight, linear_bias)
            return _autograd.evaluate_plain(logits, target, settings)
        except CALL_ERRORS:
            pass  # _dispatch() checks everything and names the wrong argument
    return _dispatch(*tensors, *others, statistics=False, **of_layer, **of_loss)[0]


def linear_cross_entropy_with_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    target_indices: Tensor | None = None,
    **options: Unpack[LinearOptions],
) -> CrossEntropyStatistics:
    """Return the loss of a linear layer, and statistics of each position of a row.

    Takes the arguments of ``fused_xent.linear_cross_entropy``, all but the first three by name,
    and returns what ``fused_xent.cross_entropy_with_statistics`` does. For a gradient through
    ``lse``, ``z_loss`` or ``entropy`` the backward recomputes the logits.
    """
    check_names("linear_cross_entropy_with_statistics", options, _NAMES)
    tensors = (input, linear_weight, target)
    others = (linear_bias, weight, token_weight, normalizer, target_indices)
    if has_torch_function_variadic(*tensors, *others):
        return _overridden(linear_cross_entropy_with_statistics, tensors, others, options)
    results = _dispatch(*tensors, *others, statistics=True, **options)
    return cast(CrossEntropyStatistics, results)


_SIGNATURE = inspect.signature(linear_cross_entropy)
_NAMES = list(_SIGNATURE.parameters)[3:]
linear_cross_entropy_with_statistics.__signature__ = (  # type: ignore[attr-defined]
    _SIGNATURE.replace(return_annotation=CrossEntropyStatistics)
)


def _overridden(
    function: Callable[..., T], tensors: tuple[Any, ...], others: tuple[Any, ...], options: Any
) -> T:
    """Call the ``__torch_function__`` of a tensor subclass."""
    named = dict(zip(("linear_bias", *Problem._fields[2:-1]), others, strict=True))
    result: T = handle_torch_function(function, (*tensors, *others), *tensors, **named, **options)
    return result


def _is_plain(
    input: Any,
    linear_weight: Any,
    target: Any,
    linear_bias: Any,
    weight: Any,
    token_weight: Any,
    normalizer: Any,
    target_indices: Any,
) -> bool:
    """Return True for a plain call (see _autograd) with few logits; torch checks the product."""
    return (
        _autograd.is_plain(input, target, weight, token_weight, normalizer, target_indices)
        and isinstance(linear_weight, Tensor)
        and are_ordinary(input, linear_weight)
        and input.dim() == linear_weight.dim() == 2
        and 0 < input.size(0) * linear_weight.size(0) <= FEW_LOGITS
        and (
            linear_bias is None
            or (isinstance(linear_bias, Tensor) and linear_bias.shape == linear_weight.shape[:1])
        )
    )


def _dispatch(*tensors: Any, **options: Any) -> Results:
    """Return the loss, or all statistics, of plain tensors or of DTensors."""
    if has_dtensor(*tensors):
        from . import _dtensor

        return _dtensor.evaluate_linear(_evaluate, *tensors, **options)
    return _evaluate(*tensors, **options)


def _evaluate(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Any,
    weight: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | float | None,
    target_indices: Tensor | None,
    /,
    *,
    statistics: bool,
    ignore_index: int | None = None,
    options: LinearCrossEntropyOptions | None = None,
    logits_dtype: torch.dtype | None = None,
    shift: int = 0,
    drop_ignored: bool = False,
    chunk_rows: int | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    num_classes: int | None = None,
    sequence_parallel: bool = False,
    reduce_grad_hidden: bool = True,
    **loss_options: Any,
) -> Results:
    """Check the arguments and return the loss, or all statistics."""
    check_linear(input, linear_weight, linear_bias)
    shift = check_shift(shift, input)
    check_flag("drop_ignored", drop_ignored)
    chunk_rows = check_chunk_rows(chunk_rows, options)
    of_shard = (process_group, vocab_start, num_classes, sequence_parallel, reduce_grad_hidden)
    split = split_of(input, linear_weight, *of_shard)
    if split is not None and sequence_parallel:
        check_sequence_parallel(shift, drop_ignored)
    layer = Layer(input, linear_weight, linear_bias).autocast()
    logits_dtype = check_dtypes(layer, logits_dtype)
    rows, classes = rows_of(input, split), layer.linear_weight.shape[:-1]
    if target_indices is None:
        check_target(target, rows, classes, ignore_index, shift)
    else:
        check_target_indices(target_indices, rows, classes, shift)
    # Stands in for the logits in checks: their shape, dtype and device, but one element of memory.
    logits = layer.hidden.new_zeros((), dtype=logits_dtype).expand(*rows, *classes)
    loss_options["dim"] = len(rows)
    if ignore_index is not None:
        loss_options["ignore_index"] = ignore_index
    tensors = (logits, target, weight, token_weight, normalizer, target_indices)
    problem = prepare(*tensors, statistics, loss_options)
    if shift > 0:
        problem = problem._replace(token_weight=without_first(problem, shift))
    check_range(problem, None if split is None else split.shard.n_classes)
    layer, problem = flatten(layer, problem, shift)
    kept = None
    if drop_ignored and has_values(problem.target):
        kept = kept_rows(problem)
        layer, problem = select(layer, problem, kept)
    if split is not None:
        results = _of_split(layer, problem, chunk_rows, split)
    elif _has_few_logits(problem, chunk_rows) or _needs_all_logits(layer, problem):
        logits = layer.logits(logits_dtype).to(problem.logits.dtype)
        results = _autograd.evaluate(problem._replace(logits=logits))
    else:
        results = _linear_autograd.evaluate(layer, problem, chunk_rows)
    return Rows(rows, classes[1:], shift, kept).restore(results, problem.settings.reduction)


def _of_split(
    layer: Layer, problem: Problem, chunk_rows: int | None, split: Split
) -> tuple[Tensor] | CrossEntropyStatistics:
    """Return the loss, or all statistics, of a layer that is split over processes."""
    from . import _parallel_linear

    if problem.logits.dtype == torch.float64 != layer.hidden.dtype:
        raise ValueError(
            "target and weight must not be float64 beside narrower input with process_group, got "
            f"input of {layer.hidden.dtype}: round them, or make input float64"
        )
    return _parallel_linear.evaluate(layer, problem, chunk_rows, split)


def _has_few_logits(problem: Problem, chunk_rows: int | None) -> bool:
    """Return True if chunks would be slower. False in compiled code, to keep one graph."""
    if chunk_rows is not None or torch.compiler.is_compiling():
        return False
    return problem.logits.numel() <= FEW_LOGITS


def _needs_all_logits(layer: Layer, problem: Problem) -> bool:
    """Return True if autograd must differentiate through the logits."""
    _, target, weight, token_weight, normalizer, *_ = problem
    is_compiling = torch.compiler.is_compiling()
    return (
        _autograd.is_for_torch(problem)
        or _autograd.needs_graph(target, weight, token_weight, normalizer)
        or (not is_compiling and is_under_torch_func())
        or 0 in problem.logits.shape
        or (target.dtype == torch.float64 and layer.hidden.dtype != torch.float64)
    )

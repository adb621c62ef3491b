"""The loss of a linear layer as users call it: from hidden states to the loss, without logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _linear_autograd, _ops, functional
from ._autograd import Options, Tensors, is_under_torch_func
from .reference import CrossEntropyStatistics

IGNORE_INDEX = -100  # where none is given


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
    options: torch.nn.LinearCrossEntropyOptions | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    focal_gamma: float = 0.0,
    loss_dtype: torch.dtype | None = None,
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
        loss_dtype: dtype of the loss; None: that of ``input``, float32 under autocast.
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
    tensors = (input, linear_weight, target, linear_bias, weight, token_weight, normalizer)
    arguments = {
        "linear_bias": linear_bias,
        "weight": weight,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "options": options,
        "token_weight": token_weight,
        "normalizer": normalizer,
        "lse_square_scale": lse_square_scale,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "focal_gamma": focal_gamma,
        "loss_dtype": loss_dtype,
        "shift": shift,
        "drop_ignored": drop_ignored,
        "chunk_rows": chunk_rows,
    }
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_cross_entropy, tensors, input, linear_weight, target, **arguments
        )
    return _evaluate(input, linear_weight, target, statistics=False, **arguments)[0]


def linear_cross_entropy_with_statistics(
    input: Tensor, linear_weight: Tensor, target: Tensor, **options
) -> CrossEntropyStatistics:
    """Return the loss of a linear layer, and statistics of each position of a row.

    Takes the arguments of :func:`fused_xent.linear_cross_entropy`, all but the first three by name,
    and returns what :func:`fused_xent.cross_entropy_with_statistics` does. A gradient through
    ``lse``, ``z_loss`` or ``entropy`` multiplies the logits anew in the backward.
    """
    _checks.check_names("linear_cross_entropy_with_statistics", options, _NAMES)
    others = ("linear_bias", "weight", "token_weight", "normalizer")
    tensors = (input, linear_weight, target, *map(options.get, others))
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_cross_entropy_with_statistics, tensors, input, linear_weight, target, **options
        )
    return _evaluate(input, linear_weight, target, statistics=True, **options)


_SIGNATURE = inspect.signature(linear_cross_entropy)
_NAMES = list(_SIGNATURE.parameters)[3:]
linear_cross_entropy_with_statistics.__signature__ = _SIGNATURE.replace(
    return_annotation="CrossEntropyStatistics"
)


class _Layer(NamedTuple):
    """A linear layer and its inputs, with rows of any shape or in one dimension."""

    hidden: Tensor  # (*rows, H)
    linear_weight: Tensor  # (C, *D, H)
    linear_bias: Tensor | None  # (C, *D)


def _evaluate(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    statistics: bool,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    options: torch.nn.LinearCrossEntropyOptions | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    shift: int = 0,
    drop_ignored: bool = False,
    chunk_rows: int | None = None,
    **loss_options,
) -> tuple:
    """Check the arguments and compute; without statistics, only the loss of these is meant."""
    _checks.check_linear(input, linear_weight, linear_bias)
    shift = _checks.check_shift(shift, input)
    _checks.check_flag("drop_ignored", drop_ignored)
    chunk_rows = _checks.check_chunk_rows(chunk_rows, options)
    layer = _autocast(_Layer(input, linear_weight, linear_bias))
    _checks.check_linear_dtypes(*layer)
    rows, classes = layer.hidden.shape[:-1], layer.linear_weight.shape[:-1]
    # Of the logits' shape, dtype and device, which is all that is looked at, but of one element.
    logits = layer.hidden.new_zeros(()).expand(*rows, *classes)
    _checks.check_linear_target(target, rows, classes, ignore_index)
    ignore_index = IGNORE_INDEX if ignore_index is None else ignore_index
    tensors, loss_options = functional.prepare(
        *(logits, target, weight, token_weight, normalizer),
        dim=len(rows),
        ignore_index=ignore_index,
        statistics=statistics,
        **loss_options,
    )
    if shift > 0:
        tensors = tensors._replace(token_weight=_without_first(tensors, len(rows), shift))
    if functional.has_values(tensors.target) and tensors.target.device.type == "cpu":
        _check_range(tensors, classes[0], ignore_index)
    layer, tensors = _flatten(layer, tensors, shift)
    kept = None
    if drop_ignored and functional.has_values(tensors.target):
        kept = _kept_rows(tensors, ignore_index)
        layer, tensors = _select(layer, tensors, kept)
    results = _compute(layer, tensors, loss_options._replace(dim=1), chunk_rows)

    def restore(values: Tensor, left_out: float = 0) -> Tensor:
        n_rows = math.prod(rows)
        if kept is not None:
            whole = values.new_full([max(n_rows - shift, 0), *classes[1:]], left_out)
            values = whole.index_copy(0, kept, values)
        if shift > 0:
            values = torch.cat([values, values.new_full([n_rows, *classes[1:]], left_out)])[:n_rows]
        values = values.view([*rows, *classes[1:]])
        return values.narrow(len(rows) - 1, 0, max(rows[-1] - shift, 0)) if shift else values

    return _restore(results, loss_options.reduction, restore)


def _check_range(tensors: Tensors, n_classes: int, ignore_index: int) -> None:
    if not tensors.target.is_floating_point():
        _checks.check_range(tensors.target, tensors.token_weight, n_classes, ignore_index)


def _autocast(layer: _Layer) -> _Layer:
    """Return what autocast casts the operands of a linear layer to."""
    device = layer.hidden.device
    if not _checks.is_autocast(device):
        return layer
    dtype = torch.get_autocast_dtype(device.type)
    return _Layer(
        *(
            tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
            for tensor in layer
        )
    )


def _without_first(tensors: Tensors, n_row_dims: int, shift: int) -> Tensor:
    """Return the token weights without those labels that are first in a sequence, of no row."""
    logits, _, _, token_weight, _ = tensors
    if token_weight is None:
        acc = _ops.accumulation_dtype(logits.dtype)
        token_weight = logits.new_ones(logits.select(n_row_dims, 0).shape, dtype=acc)
    dim, shift = n_row_dims - 1, min(shift, logits.shape[n_row_dims - 1])
    first, others = token_weight.tensor_split([shift], dim)
    return torch.cat([torch.zeros_like(first), others], dim)


def _flatten(layer: _Layer, tensors: Tensors, shift: int) -> tuple[_Layer, Tensors]:
    """Return hidden (N, H), linear_weight (K, H), and all that is of rows in one dimension.

    With a shift, row i goes with label i + shift of all sequences one after another. Where that is
    of another sequence, its weight is 0.
    """
    hidden, linear_weight, linear_bias = layer
    logits, target, weight, token_weight, normalizer = tensors
    classes = linear_weight.shape[:-1]
    n_row_dims = hidden.dim() - 1
    n_rows = math.prod(hidden.shape[:-1])

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(n_rows, *tensor.shape[n_row_dims:])

    hidden = flat(hidden)[: max(n_rows - shift, 0)]
    linear_weight = linear_weight.reshape(math.prod(classes), linear_weight.shape[-1])
    if linear_bias is not None:
        linear_bias = linear_bias.reshape(math.prod(classes))
    token_weight = None if token_weight is None else flat(token_weight)[shift:]
    logits = logits.new_zeros(()).expand(hidden.shape[0], *classes)
    tensors = Tensors(logits, flat(target)[shift:], weight, token_weight, normalizer)
    return _Layer(hidden, linear_weight, linear_bias), tensors


def _kept_rows(tensors: Tensors, ignore_index: int) -> Tensor | None:
    """Return which rows have a label that counts; None for all of them."""
    _, target, _, token_weight, _ = tensors
    counts = None if token_weight is None else token_weight != 0
    if not target.is_floating_point():
        is_label = target.to(torch.int64) != ignore_index
        counts = is_label if counts is None else counts & is_label
    if counts is None:
        return None
    kept = counts.flatten(1).any(1) if counts.dim() > 1 else counts
    kept = kept.nonzero().squeeze(1)
    return None if kept.numel() == counts.shape[0] else kept


def _select(layer: _Layer, tensors: Tensors, kept: Tensor | None) -> tuple[_Layer, Tensors]:
    if kept is None:
        return layer, tensors
    logits, target, weight, token_weight, normalizer = tensors
    target = target.index_select(0, kept)
    token_weight = None if token_weight is None else token_weight.index_select(0, kept)
    tensors = Tensors(logits[: kept.numel()], target, weight, token_weight, normalizer)
    return layer._replace(hidden=layer.hidden.index_select(0, kept)), tensors


def _compute(
    layer: _Layer, tensors: Tensors, options: Options, chunk_rows: int | None
) -> tuple[Tensor] | CrossEntropyStatistics:
    """Compute the loss, and with statistics all of them, of flat rows."""
    if _needs_all_logits(layer, tensors, options):
        logits = F.linear(*layer).reshape(tensors.logits.shape)
        return functional.compute(functional.with_logits(tensors, logits), options)
    tensors = functional.for_kernels(tensors)
    classes = list(tensors.logits.shape[1:])
    loss, lse, entropy, argmax = _linear_autograd.evaluate(
        *layer, tensors, options, classes, chunk_rows
    )
    if not options.statistics:
        return (loss,)
    return functional.with_statistics(tensors, options, loss, lse, entropy, argmax)


def _needs_all_logits(layer: _Layer, tensors: Tensors, options: Options) -> bool:
    """Whether these are a case for autograd's own formulas, or too small for chunks."""
    _, target, *_ = tensors
    return (
        functional.is_for_torch(tensors, options)
        or (not torch.compiler.is_compiling() and is_under_torch_func())
        or 0 in layer.hidden.shape
        or 0 in tensors.logits.shape
        or (torch.is_grad_enabled() and target.requires_grad)
        or (target.dtype == torch.float64 and layer.hidden.dtype != torch.float64)
    )


def _restore(results: tuple, reduction: str, restore: Callable) -> tuple:
    """Give what is of rows the shape that the caller's have."""
    loss, *of_rows = results
    if reduction == "none":
        loss = restore(loss)
    if not of_rows:
        return (loss,)
    *numbers, argmax, correct = of_rows
    return CrossEntropyStatistics(
        loss, *map(restore, numbers), restore(argmax, -1), restore(correct, False)
    )

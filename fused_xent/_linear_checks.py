"""Checks of the arguments of a linear layer's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._linear_autograd import Layer
from ._options import ProcessGroup, check_flag, check_index
from ._problem import (
    SPARSE_HINT,
    check_dense,
    check_device,
    check_floating,
    check_probabilities,
    is_labels_shape,
    labels_shape,
)

if TYPE_CHECKING:
    from ._parallel_linear import Split


def check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Check the tensors of the linear layer."""
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


def check_dtypes(layer: Layer, logits_dtype: torch.dtype | None) -> torch.dtype:
    """Check the dtypes of the matrix product, after autocast; return the logits' dtype."""
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


def check_target(
    target: Tensor,
    rows: Sequence[int],
    classes: Sequence[int],
    ignore_index: int | None,
    shift: int,
) -> None:
    """Check the target's shape against hidden states and weight, and name these in the message."""
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
        if shift and target.shape == (*_shifted(rows, shift), *classes[1:]):
            hint = _hint(shift)
        elif is_labels_shape(target.shape, tuple(rows), tuple(classes[1:])):
            hint = f": {SPARSE_HINT}"
        raise ValueError(
            f"target must have shape {of_indices} (class indices) or {of_probabilities} "
            f"(probabilities) for input's rows and linear_weight's classes, got "
            f"{tuple(target.shape)}{hint}"
        )


def check_target_indices(
    target_indices: Tensor, rows: Sequence[int], classes: Sequence[int], shift: int
) -> None:
    """Check the shape of sparse labels' classes against hidden states and weight."""
    check_dense("target_indices", target_indices)
    shape, positions = target_indices.shape, classes[1:]
    if not is_labels_shape(shape, rows, positions):
        is_shifted = shift and is_labels_shape(shape, _shifted(rows, shift), positions)
        raise ValueError(
            f"target_indices must have shape {labels_shape(rows, positions)} for input's rows and "
            f"linear_weight's classes, got {tuple(shape)}{_hint(shift) if is_shifted else ''}"
        )


def _shifted(rows: Sequence[int], shift: int) -> tuple[int, ...]:
    return (*rows[:-1], rows[-1] - shift)


def _hint(shift: int) -> str:
    return f": with shift={shift}, pass the labels of all rows, not shifted"


def check_shift(shift: int, input: Tensor) -> int:
    """Return shift as an int."""
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


def check_chunk_rows(chunk_rows: int | None, options: Any) -> int | None:
    """Return chunk_rows, which torch's options may give too."""
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


def split_of(
    input: Tensor,
    linear_weight: Tensor,
    process_group: ProcessGroup | None,
    vocab_start: int | None,
    num_classes: int | None,
    sequence_parallel: bool,
    reduce_grad_hidden: bool,
) -> Split | None:
    """Check the arguments of a layer that is split over processes; None for one that is not."""
    check_flag("sequence_parallel", sequence_parallel)
    check_flag("reduce_grad_hidden", reduce_grad_hidden)
    if process_group is None:
        if sequence_parallel:
            raise ValueError("sequence_parallel must be False without a process_group, got True")
        if not reduce_grad_hidden:
            raise ValueError("reduce_grad_hidden must be True without a process_group, got False")
        if vocab_start is None and num_classes is None:
            return None
    from . import _parallel, _parallel_linear  # need torch.distributed: see functional

    n_classes = linear_weight.shape[0]
    shard, n_own = _parallel.shard_of(n_classes, process_group, vocab_start, num_classes)
    if linear_weight.dim() != 2:
        raise ValueError(
            "linear_weight must have shape (C, H) with process_group, got "
            f"{tuple(linear_weight.shape)}: for several positions in a row, compute the logits for "
            "cross_entropy"
        )
    if sequence_parallel and not reduce_grad_hidden:
        raise ValueError(
            "reduce_grad_hidden must be True with sequence_parallel, got False: each rank gets the "
            "gradient of its own rows, which has parts of all ranks"
        )
    if sequence_parallel and input.dim() < 2:
        raise ValueError(
            "sequence_parallel must be False where input has no dimension of rows, got input of "
            f"shape {tuple(input.shape)}"
        )
    _parallel.check_supported(input)
    return _parallel_linear.Split(shard, n_own, sequence_parallel, reduce_grad_hidden)


def check_sequence_parallel(shift: int, drop_ignored: bool) -> None:
    if shift:
        raise ValueError(
            f"shift must be 0 with sequence_parallel, got {shift}: sequences may go on on another "
            "rank, so shift the target, with ignore_index at the end"
        )
    if drop_ignored:
        raise ValueError(
            "drop_ignored must be False with sequence_parallel, got True: every rank must keep as "
            "many rows as the others"
        )


def rows_of(input: Tensor, split: Split | None) -> torch.Size:
    """Return the shape of the rows of all ranks."""
    rows = input.shape[:-1]
    if split is None or not split.sequence_parallel:
        return rows
    return torch.Size([split.n_parts * rows[0], *rows[1:]])

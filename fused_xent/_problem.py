"""Checks of a user's tensors. Errors name the argument, the rule and the value."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _torch_private
from ._options import DTYPES, REDUCTION_NAMES, REDUCTIONS, Settings, resolve

# Called once, at import: some versions of torch.compile cannot trace this function.
_AUTOCAST_DEVICES = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))
_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)
_SPARSE_INDEX_DTYPES = (torch.int64, torch.int32)
MAX_LABELS = 1024  # sparse labels of a row: the kernels' limit


class Problem(NamedTuple):
    """A loss to compute: checked and promoted tensors, and frozen options."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    token_weight: Tensor | None
    normalizer: Tensor | None  # a float64 scalar
    target_indices: Tensor | None  # of sparse labels: the classes of target's probabilities
    settings: Settings


# Input, target, weight, token_weight, normalizer and target_indices, as users give them.
Arguments = tuple[Any, Any, Any, Any, Any, Any]


class Saved(NamedTuple):
    """What a forward leaves for the backward, besides its inputs."""

    total_weight: Tensor | None  # the divisor of the mean
    state: Tensor
    entropy: Tensor | None  # with statistics


class Upstream(NamedTuple):
    """The upstream gradients; None where there is none."""

    loss: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None


def prepare(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | float | None,
    target_indices: Tensor | None,
    statistics: bool,
    options: dict[str, Any],
) -> Problem:
    """Check the arguments against each other and promote tensors. Reads no values of tensors."""
    check_dense("input", input)
    check_floating("input", input)
    settings = resolve(input.dim(), statistics, options)
    _check_target(input, target, target_indices, settings)
    if weight is not None:
        _check_weight(input, settings.dim, weight)
    logits, loss_dtype = input, None
    if target.dtype not in _INDEX_DTYPES:
        is_sparse = target_indices is not None
        logits, target, loss_dtype = _promote(input, target, weight, is_sparse)
    elif input.dtype != torch.float64 and is_autocast(input):
        loss_dtype = torch.float32
    if token_weight is not None:
        _check_token_weight(input, settings.dim, token_weight)
        token_weight = token_weight.to(accumulation_dtype(logits.dtype))
    if normalizer is not None:
        normalizer = _check_normalizer(normalizer, settings.reduction, input)
    if loss_dtype is not None and settings.loss_dtype is None and loss_dtype != logits.dtype:
        settings = settings._replace(loss_dtype=loss_dtype)
    return Problem(logits, target, weight, token_weight, normalizer, target_indices, settings)


def has_dtensor(*tensors: Any) -> bool:
    """Return True if one of the tensors is a DTensor.

    The module of DTensors is slow to import. Without it there are none.
    """
    module = sys.modules.get("torch.distributed.tensor")
    of_dtensors = getattr(module, "DTensor", ())
    return any(isinstance(tensor, of_dtensors) for tensor in tensors)


def is_autocast(tensor: Tensor) -> bool:
    """Return True if operations on the tensor's device are cast."""
    if tensor.is_cpu:  # first, because device.type is slower
        return torch.is_autocast_enabled("cpu")
    device = tensor.device
    return device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the kernels sum, for logits of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_shape(logits: Tensor, dim: int) -> torch.Size:
    """Return the shape of the unreduced loss."""
    shape = logits.shape
    return shape[:dim] + shape[dim + 1 :]


def _promote(
    input: Tensor, target: Tensor, weight: Tensor | None, is_sparse: bool
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return logits and probabilities in dtypes that the kernels take, and the loss's dtype.

    The kernels read 16-bit logits with probabilities of the same dtype or float32. Only other pairs
    need a copy. Sparse labels are few: they alone are cast, to the accumulation dtype.
    """
    dtype = torch.promote_types(input.dtype, target.dtype)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    loss_dtype = torch.float32 if dtype != torch.float64 and is_autocast(input) else dtype
    if is_sparse:
        return input, target.to(accumulation_dtype(input.dtype)), loss_dtype
    if dtype == torch.float64:
        return input.to(dtype), target.to(dtype), dtype
    if target.dtype != input.dtype:
        target = target.to(torch.float32)
    return input, target, loss_dtype


# ---- checks --------------------------------------------------------------------------------------


def check_dense(name: str, tensor: Any) -> None:
    """Check that something is a dense tensor of this process alone."""
    if has_dtensor(tensor):
        raise TypeError(
            f"{name} must be a plain tensor here, got a DTensor: pass its to_local(), with "
            "process_group where its classes are sharded"
        )
    if isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_nested:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    raise ValueError(
        f"{name} must be a dense tensor, got a nested one: pass its values(), or pad it"
    )


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    """Check that a tensor is on input's device."""
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on input's device {input.device}, got {tensor.device}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Check that the kernels support a tensor's dtype."""
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}"
        )


def _check_target(
    input: Tensor, target: Tensor, target_indices: Tensor | None, settings: Settings
) -> None:
    """Check a target's layout, device, dtype and shape."""
    check_dense("target", target)
    check_device("target", target, input)
    dim, shape = settings.dim, target.shape
    rows = row_shape(input, dim)
    if target_indices is not None:
        _check_sparse_labels(input, target, target_indices, dim)
    elif shape == rows:
        if target.dtype not in _INDEX_DTYPES:
            raise ValueError(
                "target must be int64, int32 or uint8 where it holds class indices, got "
                f"{target.dtype}"
            )
    elif shape == input.shape:
        check_probabilities(target, f"input's shape {tuple(input.shape)}")
        if settings.ignore_index >= 0:
            raise ValueError(
                "ignore_index must be negative (without effect) where target holds probabilities, "
                f"got {settings.ignore_index}: to leave rows out, give them a token_weight of 0"
            )
    else:
        raise ValueError(
            f"target must have shape {tuple(rows)} (class indices) or {tuple(input.shape)} "
            f"(probabilities) for logits of shape {tuple(input.shape)} with their classes in "
            f"dimension {dim}, got {tuple(shape)}: {_target_hint(target, input, dim)}"
        )


def _target_hint(target: Tensor, input: Tensor, dim: int) -> str:
    shape, rows = target.shape, row_shape(input, dim)
    ones = [d for d, size in enumerate(shape) if size == 1 and shape[:d] + shape[d + 1 :] == rows]
    if ones:
        return f"target.squeeze({ones[0]}) has the shape of class indices"
    if target.dim() == input.dim() and row_shape(target, dim) == rows:
        return SPARSE_HINT
    return "if the classes are in another dimension, pass dim"


def check_probabilities(target: Tensor, shape: str) -> None:
    """Check the dtype of a target that has the logits' shape."""
    if target.dtype not in DTYPES:
        raise ValueError(
            f"target must hold floating-point probabilities where it has {shape}, got "
            f"{target.dtype}"
        )


def _check_sparse_labels(input: Tensor, target: Tensor, target_indices: Tensor, dim: int) -> None:
    """Check the classes of sparse labels, and the target that holds their probabilities."""
    check_dense("target_indices", target_indices)
    check_device("target_indices", target_indices, input)
    if target_indices.dtype not in _SPARSE_INDEX_DTYPES:
        raise ValueError(f"target_indices must be int64 or int32, got {target_indices.dtype}")
    others = (input.shape[:dim], input.shape[dim + 1 :])
    if not is_labels_shape(target_indices.shape, *others):
        raise ValueError(
            f"target_indices must have shape {labels_shape(*others)} for logits of shape "
            f"{tuple(input.shape)} with their classes in dimension {dim}, got "
            f"{tuple(target_indices.shape)}"
        )
    if target.dtype not in DTYPES:
        raise ValueError(
            "target must hold floating-point probabilities where target_indices holds their "
            f"classes, got {target.dtype}"
        )
    if target.shape != target_indices.shape:
        raise ValueError(
            f"target must have target_indices' shape {tuple(target_indices.shape)}, one "
            f"probability for each index, got {tuple(target.shape)}"
        )


# Of probabilities of some classes without their classes.
SPARSE_HINT = (
    "for the probabilities of K classes in each row, pass their classes by name, as target_indices"
)


def is_labels_shape(shape: Sequence[int], before: Sequence[int], after: Sequence[int]) -> bool:
    """Return True for K classes, from 1 to MAX_LABELS, between these dimensions of rows."""
    n_before = len(before)
    return (
        len(shape) == n_before + 1 + len(after)
        and shape[:n_before] == before
        and shape[n_before + 1 :] == after
        and 1 <= shape[n_before] <= MAX_LABELS
    )


def labels_shape(before: Sequence[int], after: Sequence[int]) -> str:
    """Return what an error says of these shapes."""
    sizes = ", ".join([*map(str, before), "K", *map(str, after)])
    return f"({sizes}{'' if before or after else ','}), with K from 1 to {MAX_LABELS},"


def _check_weight(input: Tensor, dim: int, weight: Tensor) -> None:
    check_dense("weight", weight)
    check_device("weight", weight, input)
    n_classes = input.shape[dim]
    if weight.shape != (n_classes,):
        raise ValueError(f"weight must have shape ({n_classes},), got {tuple(weight.shape)}")
    check_floating("weight", weight)


def _check_token_weight(input: Tensor, dim: int, token_weight: Tensor) -> None:
    check_dense("token_weight", token_weight)
    check_device("token_weight", token_weight, input)
    rows = row_shape(input, dim)
    if token_weight.shape != rows:
        raise ValueError(
            f"token_weight must have the unreduced loss's shape {tuple(rows)}, got "
            f"{tuple(token_weight.shape)}"
        )
    if token_weight.dtype.is_complex:
        raise ValueError(f"token_weight must hold real numbers, got {token_weight.dtype}")


def _check_normalizer(normalizer: Any, reduction: int, input: Tensor) -> Tensor:
    """Return the divisor of the mean as a float64 scalar on input's device."""
    if reduction != REDUCTIONS["mean"]:
        raise ValueError(
            f"normalizer must be None unless reduction is 'mean', got {normalizer} and "
            f"{REDUCTION_NAMES[reduction]!r}"
        )
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1 or normalizer.dtype.is_complex:
            raise ValueError(
                "normalizer must be a number or a tensor of one real number, got "
                f"{normalizer.dtype} of shape {tuple(normalizer.shape)}"
            )
        return normalizer.reshape(()).to(input.device, torch.float64)
    if isinstance(normalizer, bool) or not isinstance(normalizer, Real):
        raise TypeError(f"normalizer must be a number or a tensor, got {type(normalizer).__name__}")
    if not math.isfinite(normalizer):
        raise ValueError(f"normalizer must be finite, got {normalizer}")
    return input.new_full((), float(normalizer), dtype=torch.float64)


def is_checked(index: Tensor) -> bool:
    """Return True if ``check_range`` reads class indices: not on a GPU, nor in traced code."""
    return index.is_cpu and _torch_private.has_values(index)


def check_range(problem: Problem, n_classes: int | None = None) -> None:
    """Check the class indices of the rows that count; not on a GPU, where the host would wait.

    Classes are [0, n_classes), by default those of the logits.
    """
    _, target, _, token_weight, _, target_indices, settings = problem
    index = target if target_indices is None else target_indices
    if index.is_floating_point() or not is_checked(index):
        return
    kept = None if token_weight is None else token_weight != 0
    if kept is not None and target_indices is not None:
        kept = kept.unsqueeze(settings.dim)
    name = "target" if target_indices is None else "target_indices"
    n_classes = problem.logits.shape[settings.dim] if n_classes is None else n_classes
    padding = settings.ignore_index
    check_classes(name, index, n_classes, padding, f"equal to ignore_index ({padding})", kept)


def check_classes(
    name: str, index: Tensor, n_classes: int, padding: int, or_else: str, kept: Tensor | None = None
) -> None:
    """Check that all indices, or those that are ``kept``, are classes or ``padding``."""
    index = index.to(torch.int64)  # a narrower dtype may not hold padding
    bad = ((index < 0) | (index >= n_classes)) & (index != padding)
    if kept is not None:
        bad = bad & kept
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"{name} must be in [0, {n_classes}) or {or_else}, got {index[position].item()} at "
            f"position {position}"
        )

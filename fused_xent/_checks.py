"""What a user can get wrong: each error names the argument, the rule and the value."""

import math
import operator
from numbers import Real
from typing import SupportsIndex

import torch
from torch import Tensor

from . import _ops, reference

# Asked once: of some versions of torch, the compiler cannot trace the question.
_AUTOCAST_DEVICES = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))
_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)


def is_autocast(device: torch.device) -> bool:
    """Return whether operations on this device are cast."""
    return device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def check_index(name: str, value: int) -> int:
    """Return an integer of any type as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, SupportsIndex)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    value = operator.index(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    return value


def check_input(input: Tensor, dim: int | None) -> int:
    """Return the dimension of the classes."""
    _check_dense("input", input)
    if input.dtype not in _ops.DTYPES:
        raise ValueError(f"input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input must have a class dimension, got a tensor of shape ()")
    if dim is None:
        return reference.class_dim(input)
    index = check_index("dim", dim)
    if not -input.dim() <= index < input.dim():
        raise IndexError(f"dim must be in [{-input.dim()}, {input.dim()}), got {index}")
    return index % input.dim()


def _check_dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def _check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on input's device {input.device}, got {tensor.device}")


def check_target(input: Tensor, target: Tensor, dim: int, ignore_index: int) -> None:
    """Check all of a target but its values."""
    _check_dense("target", target)
    _check_device("target", target, input)
    row_shape = input.shape[:dim] + input.shape[dim + 1 :]
    if target.shape == input.shape:
        if target.dtype not in _ops.DTYPES:
            raise ValueError(
                "target must hold floating-point probabilities where it has input's shape "
                f"{tuple(input.shape)}, got {target.dtype}"
            )
        if ignore_index >= 0:
            raise ValueError(
                "ignore_index must be negative (without effect) where target holds probabilities, "
                f"got {ignore_index}"
            )
    elif target.shape != row_shape:
        raise ValueError(
            f"target must have shape {tuple(row_shape)} (class indices) or {tuple(input.shape)} "
            f"(probabilities) for logits of shape {tuple(input.shape)} with their classes in "
            f"dimension {dim}, got {tuple(target.shape)}: for classes elsewhere, see dim"
        )
    elif target.dtype not in _INDEX_DTYPES:
        raise ValueError(
            f"target must be int64, int32 or uint8 where it holds class indices, got {target.dtype}"
        )


def check_weight(input: Tensor, target: Tensor, dim: int, weight: Tensor | None) -> None:
    """Check the classes' weights."""
    if weight is None:
        return
    _check_dense("weight", weight)
    _check_device("weight", weight, input)
    n_classes = input.shape[dim]
    if weight.shape != (n_classes,):
        raise ValueError(f"weight must have shape ({n_classes},), got {tuple(weight.shape)}")
    promotes = target.is_floating_point() or is_autocast(input.device)
    if weight.dtype not in _ops.DTYPES or (weight.dtype != input.dtype and not promotes):
        raise ValueError(f"weight must have input's dtype {input.dtype}, got {weight.dtype}")


def check_token_weight(input: Tensor, dim: int, token_weight: Tensor | None) -> None:
    """Check the rows' weights."""
    if token_weight is None:
        return
    _check_dense("token_weight", token_weight)
    _check_device("token_weight", token_weight, input)
    row_shape = input.shape[:dim] + input.shape[dim + 1 :]
    if token_weight.shape != row_shape:
        raise ValueError(
            f"token_weight must have the unreduced loss's shape {tuple(row_shape)}, got "
            f"{tuple(token_weight.shape)}"
        )
    if token_weight.dtype.is_complex:
        raise ValueError(f"token_weight must hold real numbers, got {token_weight.dtype}")


def check_names(function: str, given, known) -> None:
    """Check the names of keyword arguments."""
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Check what a linear layer multiplies."""
    _check_dense("input", input)
    _check_dense("linear_weight", linear_weight)
    _check_device("linear_weight", linear_weight, input)
    if input.dtype not in _ops.DTYPES:
        raise ValueError(f"input must be float32, float64, bfloat16 or float16, got {input.dtype}")
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
        _check_dense("linear_bias", linear_bias)
        _check_device("linear_bias", linear_bias, input)
        if linear_bias.shape != linear_weight.shape[:-1]:
            raise ValueError(
                f"linear_bias must have shape {tuple(linear_weight.shape[:-1])}, got "
                f"{tuple(linear_bias.shape)}"
            )


def check_linear_dtypes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Check that a matrix product takes them together, after autocast's casts."""
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise ValueError(f"{name} must have input's dtype {input.dtype}, got {tensor.dtype}")


def check_linear_target(target: Tensor, rows, classes, ignore_index: int | None) -> None:
    """Check a target's shape where there are no logits to compare it with."""
    _check_dense("target", target)
    of_indices, of_probabilities = (*rows, *classes[1:]), (*rows, *classes)
    if target.shape == of_probabilities:
        if target.dtype not in _ops.DTYPES:
            raise ValueError(
                "target must hold floating-point probabilities where it has the shape of input's "
                f"rows and linear_weight's classes {of_probabilities}, got {target.dtype}"
            )
        if ignore_index is not None:
            raise ValueError(
                f"ignore_index must be None where target holds probabilities, got {ignore_index}"
            )
    elif target.shape != of_indices:
        raise ValueError(
            f"target must have shape {of_indices} (class indices) or {of_probabilities} "
            f"(probabilities) for input's rows and linear_weight's classes, got "
            f"{tuple(target.shape)}"
        )


def check_shift(shift: int, input: Tensor) -> int:
    """Return by how many positions the labels are ahead of the hidden states."""
    shift = int(shift) if isinstance(shift, bool) else check_index("shift", shift)
    if shift < 0:
        raise ValueError(f"shift must not be negative, got {shift}")
    if shift > 0 and input.dim() < 2:
        raise ValueError(
            "shift must be 0 unless input has a dimension of positions before its features, got "
            f"{shift} and shape {tuple(input.shape)}"
        )
    return shift


def check_chunk_rows(chunk_rows: int | None, options) -> int | None:
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


def check_normalizer(normalizer: Tensor | float | None, reduction: str) -> None:
    """Check by what the sum is divided."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            "normalizer must be None unless reduction is 'mean', got "
            f"{normalizer} and {reduction!r}"
        )
    if not isinstance(normalizer, Tensor):
        if isinstance(normalizer, bool) or not isinstance(normalizer, Real):
            raise TypeError(
                f"normalizer must be a number or a tensor, got {type(normalizer).__name__}"
            )
        if normalizer == 0 or not -math.inf < normalizer < math.inf:
            raise ValueError(f"normalizer must be finite and not 0, got {normalizer}")
    elif normalizer.dim() != 0 or normalizer.dtype.is_complex:
        raise ValueError(
            "normalizer must be a number or a tensor of shape () of real numbers, got "
            f"{normalizer.dtype} of shape {tuple(normalizer.shape)}"
        )


def check_number(name: str, value: float, least: float, most: float) -> float:
    """Return a number in [least, most] as a float."""
    if isinstance(value, bool) or not isinstance(value, (float, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be in [{least:g}, {most:g}], got {value}")
    return float(value)


def check_transform(softcap: float | None, logit_scale: float) -> None:
    """Check what the kernels multiply a logit by before they take its tanh."""
    if softcap is not None and not 1e-30 <= logit_scale / softcap <= 1e30:
        raise ValueError(
            "logit_scale / softcap must be in [1e-30, 1e+30], got "
            f"{logit_scale} / {softcap} = {logit_scale / softcap}"
        )


def check_reduction(reduction: str) -> None:
    """Check the name of a reduction."""
    if not isinstance(reduction, str) or reduction not in _ops.REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def check_loss_dtype(loss_dtype: torch.dtype | None) -> None:
    """Check the dtype that is asked for."""
    if loss_dtype is not None and loss_dtype not in _ops.DTYPES:
        raise ValueError(
            "loss_dtype must be torch.float32, torch.float64, torch.bfloat16 or torch.float16, got "
            f"{loss_dtype!r}"
        )


def check_flag(name: str, value: bool) -> None:
    """Check what overwrites the logits: no string or tensor turns that on."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def _has_layout(tensor: Tensor, dim: int) -> bool:
    """Whether the kernels can count its rows: in at most 4 dimensions, merged where possible."""
    merged = []
    for d in range(tensor.dim()):
        size, stride = tensor.shape[d], tensor.stride(d)
        if d == dim or size == 1:
            continue
        if merged and merged[-1] == size * stride:
            merged[-1] = stride
        else:
            merged.append(stride)
    return len(merged) <= 4


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def check_overwritable(
    input: Tensor, target: Tensor, dim: int, inplace_backward: bool, grad_in_forward: bool
) -> None:
    """Check that the gradient may take input's memory."""
    if inplace_backward and grad_in_forward:
        raise ValueError("inplace_backward must be False where grad_in_forward is True, got True")
    name = "grad_in_forward" if grad_in_forward else "inplace_backward"
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and torch._C._functorch.get_interpreter_stack():
        raise RuntimeError(f"{name} must be False under the transforms of torch.func")
    if not is_compiling and input.is_neg():
        raise RuntimeError(
            f"{name} must be False where input is a view with its signs to be changed"
        )
    memory = input if input._base is None else input._base
    if torch.is_grad_enabled() and input.requires_grad and (input.is_leaf or memory.is_leaf):
        raise RuntimeError(
            f"{name} must be False where input is a leaf of the graph: its values are the "
            "caller's, and would be overwritten by their gradient"
        )
    if any(
        stride == 0 < size - 1 for size, stride in zip(input.shape, input.stride(), strict=True)
    ):
        raise RuntimeError(
            f"{name} must be False where several elements of input share memory, got strides "
            f"{input.stride()} of shape {tuple(input.shape)}: clone it"
        )
    if not _has_layout(input, dim):
        raise RuntimeError(
            f"{name} must be False where input has more than 4 row dimensions that cannot be "
            f"merged, got strides {input.stride()} of shape {tuple(input.shape)}: clone it"
        )
    if not is_compiling and _share_memory(target, input):
        raise RuntimeError(
            f"{name} must be False where target shares input's memory, which is overwritten"
        )
    if grad_in_forward and target.requires_grad:
        raise RuntimeError(
            "grad_in_forward must be False where target requires a gradient: the logits that it "
            "would be computed from are overwritten; use inplace_backward"
        )
    if grad_in_forward and input.dtype == torch.float16:
        raise ValueError(
            "grad_in_forward must be False for float16 input: what the forward writes, not yet "
            "multiplied by a loss scale, falls below float16's range; use inplace_backward"
        )
    if grad_in_forward and (memory.numel() != input.numel() or memory.dtype != input.dtype):
        raise RuntimeError(
            "grad_in_forward must be False where input is a view of a part of another tensor, "
            f"got shape {tuple(input.shape)} of {tuple(memory.shape)}: use inplace_backward, or "
            "clone it"
        )


def check_range(
    target: Tensor, token_weight: Tensor | None, n_classes: int, ignore_index: int
) -> None:
    """Check the values of class indices, of those rows that count."""
    target = target.to(torch.int64)  # in fewer bits, ignore_index would be another number
    bad = ((target < 0) | (target >= n_classes)) & (target != ignore_index)
    if token_weight is not None:
        bad = bad & (token_weight != 0)
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"target must be in [0, {n_classes}) or equal to ignore_index ({ignore_index}), got "
            f"{target[position].item()} at position {position}"
        )

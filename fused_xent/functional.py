"""The loss as users call it: arguments, their checks, and which implementation runs."""

import operator
from numbers import Real

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _ops, reference
from ._autograd import CrossEntropy, CrossEntropyGradInForward, Options

_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)


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
    loss_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy, equivalent to :func:`torch.nn.functional.cross_entropy`.

    With :math:`p = \mathrm{softmax}(x)` over the ``C`` classes and class weights ``w`` (1 without
    ``weight``), the loss of a row with class index ``y`` is, for label smoothing ``e``,

    .. math:: -(1 - e)\, w_y \log p_y - \frac{e}{C} \sum_c w_c \log p_c

    and for probabilities ``t``, :math:`-\sum_c w_c\, ((1 - e)\, t_c + e / C) \log p_c`. ``mean``
    divides the sum by the sum of ``w_y`` over the rows that are not ignored, or for probabilities
    by the number of rows: torch's rules. A class of probability or weight 0 adds 0 even where its
    logit is ``-inf`` (torch: NaN).

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, of any strides; float32,
            float64, bfloat16 or float16.
        target: class indices of ``input``'s shape without ``C`` (int64, int32 or uint8), or
            probabilities of ``input``'s shape (floating; differentiable).
        weight: one weight a class, ``(C,)``, of ``input``'s dtype.
        size_average: deprecated in torch, see ``reduction``.
        ignore_index: rows of this class index have loss and gradient 0, do not count in ``mean``,
            and their logits may hold anything. Any integer. Probabilities have no ignored rows.
        reduce: deprecated in torch, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: in [0, 1].
        loss_dtype: dtype of the loss. None is torch's rule: that of ``input``, or that to which it
            is promoted with probabilities; float32 under autocast. Sums are float32 or better at
            any.
        inplace_backward: the backward writes the gradient over the logits: no memory for it, half
            the traffic of a fresh one. The logits must not be needed after the backward; autograd
            raises its own error where it needs them.
        grad_in_forward: the forward writes the gradient over the logits, and the backward only
            multiplies it by the upstream gradient, if that is not 1: one read and one write of the
            logits in all. The logits must not be needed after the forward; autograd raises an error
            where a gradient is to flow through another use of them.

    The last two need ``input`` to be computed, not a leaf of the graph; where no gradient is
    recorded they change nothing. ``grad_in_forward`` refuses float16, whose range a gradient needs
    a loss scale to fit.

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
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            loss_dtype=loss_dtype,
            inplace_backward=inplace_backward,
            grad_in_forward=grad_in_forward,
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    ignore_index = _check_index("ignore_index", ignore_index)
    _check_tensors(input, target, weight, ignore_index)
    _check_options(reduction, label_smoothing, loss_dtype)
    input, target, result_dtype = _promote(input, target, weight)
    options = Options(
        reference.class_dim(input),
        ignore_index,
        float(label_smoothing),
        reduction,
        loss_dtype or result_dtype,
    )
    if inplace_backward or grad_in_forward:
        _check_overwritable(input, target, inplace_backward, grad_in_forward)
    if not _ops.has_kernels(input.device) or (weight is not None and weight.requires_grad):
        return _by_torch(input, target, weight, options)
    if weight is not None:
        weight = weight.to(_ops.accumulation_dtype(input.dtype)).contiguous()
    if grad_in_forward and torch.is_grad_enabled() and input.requires_grad:
        return _grad_in_forward(input, target, weight, options)
    return CrossEntropy.apply(input, target, weight, options, inplace_backward)[0]


def _is_autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _check_index(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    value = operator.index(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    return value


def _check_tensors(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(tensor, Tensor) and (name != "weight" or tensor is not None):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if input.dtype not in _ops.DTYPES:
        raise ValueError(f"input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input must have a class dimension, got a tensor of shape ()")
    _check_target(input, target, ignore_index)
    if weight is not None:
        _check_weight(input, target, weight)


def _check_target(input: Tensor, target: Tensor, ignore_index: int) -> None:
    if target.device != input.device:
        raise ValueError(f"target must be on input's device {input.device}, got {target.device}")
    dim = reference.class_dim(input)
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
            f"(probabilities) for input of shape {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    elif target.dtype not in _INDEX_DTYPES:
        raise ValueError(
            f"target must be int64, int32 or uint8 where it holds class indices, got {target.dtype}"
        )


def _check_weight(input: Tensor, target: Tensor, weight: Tensor) -> None:
    if weight.device != input.device:
        raise ValueError(f"weight must be on input's device {input.device}, got {weight.device}")
    n_classes = input.shape[reference.class_dim(input)]
    if weight.shape != (n_classes,):
        raise ValueError(f"weight must have shape ({n_classes},), got {tuple(weight.shape)}")
    promotes = target.is_floating_point() or _is_autocast(input.device)
    if weight.dtype not in _ops.DTYPES or (weight.dtype != input.dtype and not promotes):
        raise ValueError(f"weight must have input's dtype {input.dtype}, got {weight.dtype}")


def _check_options(reduction: str, label_smoothing: float, loss_dtype: torch.dtype | None) -> None:
    if reduction not in _ops.REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not isinstance(label_smoothing, Real):
        raise TypeError(f"label_smoothing must be a number, got {type(label_smoothing).__name__}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if loss_dtype is not None and loss_dtype not in _ops.DTYPES:
        raise ValueError(
            f"loss_dtype must be float32, float64, bfloat16 or float16, got {loss_dtype}"
        )


def _promote(
    input: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return input and target in dtypes that the kernels take together, and the loss's dtype.

    The kernels read 16-bit logits beside probabilities of their own dtype or float32, so that only
    rarer pairs need a copy.
    """
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
        if dtype == torch.float64:
            input, target = input.to(dtype), target.to(dtype)
        elif target.dtype != input.dtype:
            target = target.to(torch.float32)
    if _is_autocast(input.device) and dtype != torch.float64:
        dtype = torch.float32
    return input, target, dtype


def _check_overwritable(
    input: Tensor, target: Tensor, inplace_backward: bool, grad_in_forward: bool
) -> None:
    if inplace_backward and grad_in_forward:
        raise ValueError("inplace_backward must be False where grad_in_forward is True, got True")
    name = "grad_in_forward" if grad_in_forward else "inplace_backward"
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
    if target.untyped_storage()._cdata == input.untyped_storage()._cdata:
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


def _grad_in_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> Tensor:
    memory = input if input._base is None else input._base
    view = (input.size(), input.stride(), input.storage_offset())
    return CrossEntropyGradInForward.apply(memory, view, target, weight, options)[1]


def _by_torch(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """Compute the loss where no kernel can, in the kernels' precision."""
    acc = _ops.accumulation_dtype(input.dtype)
    if target.is_floating_point():
        target = target.to(acc)
    else:
        _check_range(target, input.shape[options.dim], options.ignore_index)
    loss = reference.cross_entropy(
        input.to(acc),
        target,
        None if weight is None else weight.to(acc),
        options.ignore_index,
        options.reduction,
        options.label_smoothing,
    )
    return loss.to(options.loss_dtype)


def _check_range(target: Tensor, n_classes: int, ignore_index: int) -> None:
    bad = ((target < 0) | (target >= n_classes)) & (target != ignore_index)
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"target must be in [0, {n_classes}) or equal to ignore_index ({ignore_index}), got "
            f"{target[position].item()} at position {position}"
        )

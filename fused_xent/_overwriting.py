"""Checks that the in-place modes, ``inplace_backward`` and ``grad_in_forward``, may be used."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _torch_private
from ._problem import Problem


def check_overwritable(problem: Problem) -> None:
    """Check that the in-place mode, if one is on, may overwrite the logits."""
    input, *_, settings = problem
    if not (settings.inplace_backward or settings.grad_in_forward):
        return
    name = "grad_in_forward" if settings.grad_in_forward else "inplace_backward"

    def refuse(why: str, advice: str = "clone it") -> None:
        raise RuntimeError(f"{name} must be False where {why}: {advice}")

    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and _torch_private.is_under_torch_func():
        raise RuntimeError(f"{name} must be False under the transforms of torch.func")
    if not is_compiling and input.is_neg():
        refuse("input is a view with its signs to be changed")
    # The compiler does not know the base of a view: see _torch_private.overwritable.
    memory = input if is_compiling else _torch_private.memory_of(input)
    if torch.is_grad_enabled() and input.requires_grad:
        if input.is_leaf or (memory.is_leaf and memory.requires_grad):
            refuse(
                "input is a leaf of the graph, or a view of one",
                "its values are the caller's, and would be overwritten by their gradient",
            )
        if not is_compiling and _torch_private.is_one_of_several_views(input):
            refuse("input is one of several views that chunk, split or unbind returned")
        if memory.is_leaf:
            refuse("input is a view of a tensor that autograd has not recorded")
    strides = f"got strides {input.stride()} of shape {tuple(input.shape)}"
    # Without elements torch may give any strides, and a rank of several may have no classes.
    if input.numel() > 0 and any(
        stride == 0 < size - 1 for size, stride in zip(input.shape, input.stride(), strict=True)
    ):
        refuse(f"several elements of input share memory, {strides}")
    if not _has_layout(input, settings.dim):
        refuse(f"input has more than 4 row dimensions that cannot be merged, {strides}")
    for other, tensor in zip(Problem._fields[1:-1], problem[1:-1], strict=True):
        if tensor is None or is_compiling:
            continue
        if _torch_private.share_memory(tensor, input):
            refuse(f"{other} shares input's memory, which is overwritten", f"clone {other}")
    if settings.grad_in_forward:
        _check_grad_in_forward(problem, memory)


def _check_grad_in_forward(problem: Problem, memory: Tensor) -> None:
    input, *others = problem[:-1]
    if torch.is_grad_enabled() and input.requires_grad:
        for name, tensor in zip(Problem._fields[1:-1], others, strict=True):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"grad_in_forward must be False where {name} requires a gradient: the logits "
                    "that it would be computed from are overwritten; use inplace_backward"
                )
    if input.dtype == torch.float16:
        raise ValueError(
            "grad_in_forward must be False for float16 input: what the forward writes, not yet "
            "multiplied by a loss scale, falls below float16's range; use inplace_backward"
        )
    if memory.numel() != input.numel() or memory.dtype != input.dtype:
        raise RuntimeError(
            "grad_in_forward must be False where input is a view of a part of another tensor, "
            f"got shape {tuple(input.shape)} of {tuple(memory.shape)}: use inplace_backward, or "
            "clone it"
        )


def _has_layout(tensor: Tensor, dim: int) -> bool:
    """Return True if the rows have at most 4 dimensions after merging: the kernels' limit."""
    merged: list[int] = []
    for d in range(tensor.dim()):
        size, stride = tensor.shape[d], tensor.stride(d)
        if d == dim or size == 1:
            continue
        if merged and merged[-1] == size * stride:
            merged[-1] = stride
        else:
            merged.append(stride)
    return len(merged) <= 4

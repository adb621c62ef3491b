"""The meta implementations of the operators: memory for their results, without values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._options import REDUCTIONS
from ._problem import accumulation_dtype, row_shape


class AddedUp(NamedTuple):
    """The rows of a split vocabulary: of shape (rows,) if nothing else is said.

    With the parts of the loss: ``loss`` and ``other_mass``; without them, ``rise``. ``lse``,
    ``entropy`` and ``argmax`` are those of statistics. What is not wanted is empty.
    """

    state: Tensor  # (k, rows): what backward reads
    rise: Tensor  # (n_ranks, rows): the lse of all classes minus that of each shard
    loss: Tensor
    other_mass: Tensor  # the mass of other ranks' labels: by it, their loss has a gradient of lse
    lse: Tensor
    entropy: Tensor
    argmax: Tensor


def state_size(target: Tensor, target_indices: Tensor | None, options: dict[str, float]) -> int:
    """Return how many numbers a row the state has."""
    has_mass = target.is_floating_point() and target_indices is None
    return 2 + has_mass + (options.get("focal_gamma", 0) != 0)


def _empty_gradient(logits: Tensor, dim: int) -> Tensor:
    """Return memory like ``empty_gradient`` of ``csrc/binding/layout.cpp``.

    On CUDA devices, rows of the gradient lie relative to 16-byte addresses as the logits' rows do.
    """
    size, stride = logits.size(), logits.stride()
    vector, vocab_size = 16 // logits.element_size(), size[dim]
    outer = [d for d in range(logits.dim()) if d != dim and size[d] > 1]
    is_short = vocab_size * logits.element_size() < 512 or logits.numel() == 0
    is_inner = stride[dim] == 1 and all(stride[d] >= vocab_size for d in outer)
    if not logits.is_cuda or is_short or not is_inner:
        return torch.empty_like(logits)
    strides, extent, last, padding = list(stride), 1, 0, 0
    for d in sorted(range(logits.dim()), key=lambda d: stride[d]):
        pad = (stride[d] - extent) % vector if size[d] > 1 else 0
        padding += pad
        strides[d] = extent + pad
        last += (size[d] - 1) * strides[d]
        extent = size[d] * strides[d]
    offset = logits.storage_offset() % vector
    if offset + padding == 0:
        return torch.empty_like(logits)
    return logits.new_empty(offset + last + 1).as_strided(size, strides, offset)


def meta_of(schema: torch.FunctionSchema) -> Callable[..., Any]:
    """Return the meta implementation of an operator: memory for each result that it names."""
    names = [argument.name for argument in schema.arguments]
    results = [result.name for result in schema.returns]

    def meta(*arguments: Any, **options: Any) -> Any:
        given = {**dict(zip(names, arguments, strict=False)), **options}
        if not results:
            return None
        logits, dim = given["logits"], given["dim"]
        acc, rows = accumulation_dtype(logits.dtype), row_shape(logits, dim)
        loss_shape = rows if given["reduction"] == REDUCTIONS["none"] else []
        labels = given["target"], given.get("target_indices")
        kinds: dict[str, tuple[Sequence[int], torch.dtype | None]] = {
            "loss": (loss_shape, given.get("loss_dtype")),
            "total_weight": ([], torch.float64),
            "state": ([state_size(*labels, options), *rows], acc),
            "lse": (rows, acc),
            "entropy": (rows, acc),
            "argmax": (rows, torch.int64),
        }
        memory = [
            _empty_gradient(logits, dim)
            if name == "grad_logits"
            else logits.new_empty(kinds[name][0], dtype=kinds[name][1])
            for name in results
        ]
        return memory[0] if len(memory) == 1 else tuple(memory)

    return meta


def selected_meta(
    logits: Tensor, target_indices: Tensor, dim: int, with_entropy: bool, **options: Any
) -> tuple[Tensor, ...]:
    """Return memory for the results of ``selected_log_probs``."""
    rows = row_shape(logits, dim)
    shapes = (target_indices.shape, (2, *rows), rows, rows if with_entropy else (0,))
    acc = accumulation_dtype(logits.dtype)
    return tuple(logits.new_empty(shape, dtype=acc) for shape in shapes)


def shards_meta(
    max: Tensor,
    log_sum: Tensor,
    part: Tensor | None,
    label_mass: Tensor | None,
    entropy: Tensor | None,
    argmax: Tensor | None,
    *others: Any,
    focal_gamma: float = 0.0,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return memory for the results of ``add_up_shards``."""
    n_ranks, n_rows = max.shape
    *_, keeps_mass = others
    has_loss = part is not None
    n_state = 2 + (has_loss and keeps_mass) + (has_loss and focal_gamma != 0)
    of_loss, of_argmax = n_rows * has_loss, n_rows * (argmax is not None)
    return AddedUp(
        max.new_empty(n_state, n_rows),
        max.new_empty(0) if has_loss else max.new_empty(n_ranks, n_rows),
        max.new_empty(of_loss),
        max.new_empty(of_loss),
        max.new_empty(of_argmax),
        max.new_empty(n_rows * (entropy is not None)),
        max.new_empty(of_argmax, dtype=torch.int64),
    )

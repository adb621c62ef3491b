"""Matrix products that round once: sums are in float32 or float64 for tensors of any dtypes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._torch_private import mkldnn_has

# Of a slab, in float32. Beside other busy processes, each product waits for its slowest thread, so
# there should be few.
SLAB_BYTES, GPU_SLAB_BYTES = 8 << 20, 256 << 20


def product(
    one: Tensor, other: Tensor, out: Tensor, bias: Tensor | None = None, beta: int = 0
) -> None:
    """Write ``beta * out + one @ other``, or with a bias, which is broadcast, product plus bias.

    Sums are in float32 or float64 and rounded once, for any dtypes of the three.
    """
    if bias is not None:
        out.copy_(bias)
        beta = 1
    is_one_dtype = one.dtype == other.dtype
    if is_one_dtype and out.dtype == one.dtype and not _is_slow(one):
        out.addmm_(one, other, beta=beta)
    elif is_one_dtype and out.is_cuda and out.dtype == torch.float32:
        if beta == 0:
            torch.ops.aten.mm.dtype_out(one, other, out.dtype, out=out)
        else:
            torch.ops.aten.addmm.dtype_out(out, one, other, out.dtype, out=out)
    else:
        _slab_by_slab(one, other, out, beta)


def _is_slow(matrix: Tensor) -> bool:
    """Return True if torch has no fast product for this dtype here: 16 bits on most CPUs."""
    return matrix.is_cpu and matrix.element_size() == 2 and not mkldnn_has(matrix.dtype)


def _slab_by_slab(one: Tensor, other: Tensor, out: Tensor, beta: int) -> None:
    """Write ``beta * out + one @ other`` by products in float32.

    The longest dimension is cut into slabs, so that only a slab is converted to float32.
    """
    sizes = (one.shape[0], one.shape[1], other.shape[1])
    longest = max(range(3), key=sizes.__getitem__)
    slices = slabs(sizes[longest], 4 * (sum(sizes) - sizes[longest]), out.is_cuda)

    def multiplied(one: Tensor, other: Tensor, out: Tensor, beta: int) -> Tensor:
        return torch.addmm(out.float(), one.float(), other.float(), beta=beta)

    if longest == 0:
        other = other.float()
        for slab in slices:
            out[slab] = multiplied(one[slab], other, out[slab], beta)
    elif longest == 2:
        one = one.float()
        for slab in slices:
            out[:, slab] = multiplied(one, other[:, slab], out[:, slab], beta)
    else:
        total = out
        for slab in slices:
            total = multiplied(one[:, slab], other[slab], total, beta if slab.start == 0 else 1)
        out.copy_(total)


def slabs(length: int, item_bytes: int, is_cuda: bool = False) -> Iterator[slice]:
    """Yield slabs of a dimension, given the bytes of one of its items."""
    size = max(1, (GPU_SLAB_BYTES if is_cuda else SLAB_BYTES) // max(1, item_bytes))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))

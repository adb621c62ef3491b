"""Losses of DArguments: the placements of the logits say what each process computes.

For each dimension of the device mesh: where it shards the classes, its processes compute the loss
of a split vocabulary together (see _parallel.py). Where it shards rows, each process has rows of
its own, and a sum over all rows is a ``Partial`` DTensor: the sum is still to be done. Where the
logits are replicated, each process computes the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from . import _autograd, _parallel
from ._options import REDUCTIONS, Settings, resolve
from ._problem import Arguments, accumulation_dtype, check_dense, prepare, row_shape
from ._torch_private import memory_of
from .reference import CrossEntropyStatistics

Placements = tuple[Placement, ...]
NAMES = ("input", "target", "weight", "token_weight", "normalizer", "target_indices")
INPLACE = ("inplace_backward", "grad_in_forward")


class Layout(NamedTuple):
    """The placements of a loss's tensors, one for each dimension of the mesh."""

    mesh: DeviceMesh
    logits: Placements  # also of probabilities of all classes
    labels: Placements  # of sparse labels, which have dimensions as the logits
    rows: Placements  # of one number a row
    classes: Placements  # of one number a class
    sums: Placements  # of a sum over all rows

    @property
    def has_own_rows(self) -> bool:
        """True if a process has only some of the rows."""
        return any(placement.is_partial() for placement in self.sums)

    @property
    def whole(self) -> Placements:
        """The placements of what all processes have as a whole."""
        return (Replicate(),) * self.mesh.ndim


def layout_of(input: DTensor, dim: int) -> Layout:
    """Return the layout of the tensors of a loss, given its logits."""
    mesh, placements = input.device_mesh, input.placements
    if mesh.get_coordinate() is None:
        raise ValueError(f"input must be on a mesh with this process, got {mesh}")
    whole = Replicate()
    for placement in placements:
        if placement.is_partial():
            wanted = [whole if p.is_partial() else p for p in placements]
            raise ValueError(
                f"input must not be Partial, got placements {placements}: sum it up first, by "
                f"input.redistribute(placements={wanted})"
            )
        if type(placement) not in (Shard, Replicate):
            raise ValueError(f"input must be placed by Shard and Replicate, got {placement}")
    is_class = [placement.is_shard(dim) for placement in placements]
    if sum(is_class) > 1:
        raise ValueError(
            "input must have its classes sharded over one dimension of the mesh, got placements "
            f"{placements}: gather them over the others, by input.redistribute(placements=...)"
        )
    labels = tuple(whole if place.is_shard(dim) else place for place in placements)
    rows = tuple(_of_row(placement, dim) for placement in labels)
    return Layout(
        mesh,
        placements,
        labels,
        rows,
        classes=tuple(Shard(0) if of_class else whole for of_class in is_class),
        sums=tuple(Partial() if placement.is_shard() else whole for placement in rows),
    )


def _of_row(placement: Placement, dim: int) -> Placement:
    """Return the placement of one number a row, which has no dimension of classes."""
    if not isinstance(placement, Shard):
        return placement
    return Shard(placement.dim - (placement.dim > dim))


def evaluate(
    tensors: Arguments, statistics: bool, options: dict[str, Any], of_shard: tuple[Any, ...]
) -> tuple[Tensor] | CrossEntropyStatistics:
    """Check the arguments and return the loss, or all statistics, as DArguments."""
    input = tensors[0]
    _check_are_dtensors(tensors, of_shard)
    settings = resolve(input.dim(), statistics, options)
    layout = layout_of(input, settings.dim)
    check_dense("target", tensors[1])
    _check_whole(tensors, settings, options, layout)
    if settings.grad_in_forward:  # autograd would not notice later uses of the DTensor
        options = {**options, "grad_in_forward": False, "inplace_backward": True}
    problem = prepare(*_own(tensors, settings, layout), statistics, options)
    mesh_dims = [i for i, placement in enumerate(layout.classes) if placement.is_shard()]
    if mesh_dims:
        shard = _shard(layout.mesh, mesh_dims[0], input.shape[settings.dim])
        results = _parallel.of_shard(problem, shard)
    else:
        results = _autograd.evaluate(problem)
    loss, *of_rows = results
    shape = row_shape(input, settings.dim)
    if settings.reduction == REDUCTIONS["none"]:
        loss = _of_all_rows(loss, shape, layout)
    else:
        loss = DTensor.from_local(loss, layout.mesh, layout.sums)
    if not statistics:
        return (loss,)
    return CrossEntropyStatistics(loss, *(_of_all_rows(row, shape, layout) for row in of_rows))


def _shard(mesh: DeviceMesh, mesh_dim: int, n_classes: int) -> _parallel.Shard:
    """Return the classes of this process: DArguments are split as torch.chunk splits."""
    coordinate: Any = mesh.get_coordinate()  # not None: layout_of has checked
    size = -(-n_classes // mesh.size(mesh_dim))
    start = min(coordinate[mesh_dim] * size, n_classes)
    return _parallel.Shard(mesh.get_group(mesh_dim), start, n_classes)


def _of_all_rows(values: Tensor, shape: torch.Size, layout: Layout) -> DTensor:
    """Return a DTensor of a shape, one number a row, given those of this process."""
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(values, layout.mesh, layout.rows, shape=shape, stride=strides)


# ---- the tensors of one process ------------------------------------------------------------------


def _own(tensors: Arguments, settings: Settings, layout: Layout) -> Arguments:
    """Return what this process has of each tensor."""
    input, target, weight, token_weight, normalizer, target_indices = tensors
    of_target = layout.rows
    if target_indices is not None:
        of_target = layout.labels
    elif target.shape == input.shape:
        of_target = layout.logits
    target = _local(target, of_target, layout)
    token_weight = _local(token_weight, layout.rows, layout)
    if normalizer is None and layout.has_own_rows and settings.reduction == REDUCTIONS["mean"]:
        weight_of_all = None if target.is_floating_point() else _local(weight, layout.whole, layout)
        normalizer = _total_weight(input, target, weight_of_all, token_weight, settings, layout)
    elif isinstance(normalizer, Tensor):
        normalizer = _local(normalizer, layout.whole, layout)
    return (
        _local_logits(input, settings),
        target,
        _local(weight, layout.classes, layout),
        token_weight,
        normalizer,
        _local(target_indices, layout.labels, layout),
    )


def _local(tensor: Any, placements: Placements, layout: Layout) -> Any:
    """Return this process's part. A plain tensor is the whole, which each process cuts.

    Each process that has rows of its own computes a part of the gradient of what is replicated.
    """
    if tensor is None:
        return None
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, layout.mesh, layout.whole)
    pairs = zip(placements, layout.sums, strict=True)
    grads = [of_sum if of_sum.is_partial() and p.is_replicate() else p for p, of_sum in pairs]
    tensor = tensor.redistribute(layout.mesh, placements)
    return _waited(tensor.to_local(grad_placements=grads))


def _waited(local: Any) -> Any:
    """Wait for a tensor that a redistribution is still computing, as ``to_local`` asks to."""
    return local.wait() if hasattr(local, "wait") else local


def _total_weight(
    input: DTensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    settings: Settings,
    layout: Layout,
) -> Tensor:
    """Return the divisor of the mean over the rows of all processes. ``weight`` is of all classes.

    Each process's own divisor would be wrong: they may ignore different numbers of rows.
    """
    is_index = not target.is_floating_point()
    weights: Any = token_weight
    if token_weight is None:
        shape = target.shape if is_index else row_shape(target, settings.dim)
        weights = target.new_ones(shape, dtype=accumulation_dtype(input.dtype))
    if is_index:
        classes = target.long()
        is_left_out = (classes == settings.ignore_index) | (weights == 0)
        if weight is not None and weight.numel() > 0:
            weights = weights * weight[classes.clamp(0, weight.numel() - 1)]
        weights = weights.masked_fill(is_left_out, 0)
    own = DTensor.from_local(weights.sum(dtype=torch.float64), layout.mesh, layout.sums)
    return _local(own, layout.whole, layout)  # type: ignore[no-any-return]


# ---- the logits ----------------------------------------------------------------------------------


def _local_logits(input: DTensor, settings: Settings) -> Tensor:
    """Return this process's logits. Their gradient has the placements of the DTensor."""
    is_inplace = settings.inplace_backward or settings.grad_in_forward
    if is_inplace:
        _check_overwritable(input, "grad_in_forward" if settings.grad_in_forward else INPLACE[0])
    local = _waited(input.to_local())
    if not (torch.is_grad_enabled() and input.requires_grad) or torch.compiler.is_compiling():
        return local  # type: ignore[no-any-return]
    return Local.apply(local, input, is_inplace)  # type: ignore[no-any-return]


class Local(torch.autograd.Function):
    """The local tensor of a DTensor, with the DTensor's version.

    The local tensor has a version of its own, by which autograd would not notice that one of them
    overwrites what the other has saved.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, input: DTensor, is_inplace: bool) -> Tensor:
        """Return the local tensor."""
        ctx.save_for_backward(input)
        ctx.is_inplace = is_inplace
        return local.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient, unless the logits have been overwritten."""
        (input,) = ctx.saved_tensors  # autograd checks the version here
        if ctx.is_inplace:
            torch.autograd.graph.increment_version(input)
        return grad, None, None


# ---- checks --------------------------------------------------------------------------------------


def _check_are_dtensors(tensors: Arguments, of_shard: tuple[Any, ...]) -> None:
    """Check that the logits are a DTensor, and that no argument says what they say."""
    if not isinstance(tensors[0], DTensor):
        pairs = zip(NAMES, tensors, strict=True)
        name = next(name for name, tensor in pairs if isinstance(tensor, DTensor))
        raise TypeError(f"{name} must be a plain tensor where input is one, got a DTensor")
    if of_shard != (None, None, None):
        raise ValueError(
            "process_group, vocab_start and num_classes must be None where input is a DTensor, "
            f"which has a mesh, got {of_shard}"
        )


def _check_whole(
    tensors: Arguments, settings: Settings, options: dict[str, Any], layout: Layout
) -> None:
    """Check the arguments by their global shapes, so that all processes raise the same errors."""
    input = tensors[0]
    for name, tensor in zip(NAMES, tensors, strict=True):
        if isinstance(tensor, DTensor):
            if tensor.device_mesh != layout.mesh:
                raise ValueError(
                    f"{name} must be on input's mesh {layout.mesh}, got {tensor.device_mesh}"
                )
        elif isinstance(tensor, Tensor) and name not in ("weight", "normalizer"):
            _check_is_whole(name, tensor, input, settings.dim, layout)
    of_prepare = {name: value for name, value in options.items() if name not in INPLACE}
    whole = cast(Arguments, tuple(map(_without_memory, tensors)))
    prepare(*whole, settings.statistics, of_prepare)


def _check_is_whole(name: str, tensor: Tensor, input: DTensor, dim: int, layout: Layout) -> None:
    """Check that a plain tensor is not this process's part: all processes must have the whole."""
    is_rows = tensor.dim() == input.dim() - 1
    rows = tensor.shape if is_rows else row_shape(tensor, dim)
    own = input.to_local().shape
    if rows == own[:dim] + own[dim + 1 :] != row_shape(input, dim):
        raise ValueError(
            f"{name} must be a DTensor, or the whole, where input's rows are sharded, got shape "
            f"{tuple(tensor.shape)} for logits of shape {tuple(input.shape)}: pass DTensor."
            f"from_local({name}, input.device_mesh, {layout.rows if is_rows else layout.labels})"
        )


def _without_memory(tensor: Any) -> Any:
    """Return a tensor of the same global shape and dtype."""
    if not isinstance(tensor, Tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _check_overwritable(input: DTensor, name: str) -> None:
    """Check that the logits' memory is not that of a leaf."""
    with torch.no_grad():
        local = input.to_local()
    for memory in (memory_of(input), memory_of(local)):
        if memory.is_leaf and memory.requires_grad:
            raise RuntimeError(
                f"{name} must be False where input is a leaf of the graph, or a view of one: its "
                "values are the caller's, and would be overwritten by their gradient"
            )

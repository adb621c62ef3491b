"""How the tensors of a loss of DTensors are placed, given the placements of its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from . import _parallel_rows

Placements = tuple[Placement, ...]


class Layout(NamedTuple):
    """The placements of a loss's tensors, one for each dimension of the mesh."""

    mesh: DeviceMesh
    dim: int  # of the classes, in the logits
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

    def shard(self, n_classes: int) -> _parallel_rows.Shard | None:
        """Return the classes of this process if they are split."""
        for mesh_dim, placement in enumerate(self.classes):
            if placement.is_shard():
                start, _ = self._chunk(n_classes, mesh_dim)
                return _parallel_rows.Shard(self.mesh.get_group(mesh_dim), start, n_classes)
        return None

    def own_rows(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of this process's part of one number a row."""
        own = list(shape)
        for mesh_dim, placement in enumerate(self.rows):
            if isinstance(placement, Shard):
                _, own[placement.dim] = self._chunk(own[placement.dim], mesh_dim)
        return torch.Size(own)

    def _chunk(self, size: int, mesh_dim: int) -> tuple[int, int]:
        """Return start and length of this process's part: DTensors are split as by torch.chunk."""
        coordinate: Any = self.mesh.get_coordinate()  # not None: _check_input has checked
        most = -(-size // self.mesh.size(mesh_dim))
        start = min(coordinate[mesh_dim] * most, size)
        return start, min(most, size - start)


def layout_of(mesh: DeviceMesh, placements: Placements, dim: int) -> Layout:
    """Return the layout of the tensors of a loss, given the placements of its logits."""
    is_class = [placement.is_shard(dim) for placement in placements]
    if sum(is_class) > 1:
        raise ValueError(
            "input must have its classes sharded over one dimension of the mesh, got placements "
            f"{placements}: gather them over the others, by input.redistribute(placements=...)"
        )
    whole, pairs = Replicate(), list(zip(placements, is_class, strict=True))
    labels = tuple(whole if of_class else placement for placement, of_class in pairs)
    rows = tuple(_of_row(placement, dim) for placement in labels)
    classes = tuple(Shard(0) if of_class else whole for of_class in is_class)
    sums = tuple(Partial() if placement.is_shard() else whole for placement in rows)
    return Layout(mesh, dim, placements, labels, rows, classes, sums)


def _of_row(placement: Placement, dim: int) -> Placement:
    """Return the placement of one number a row, which has no dimension of classes."""
    if not isinstance(placement, Shard):
        return placement
    return Shard(placement.dim - (placement.dim > dim))


def layout_of_layer(input: DTensor, linear_weight: Any) -> Layout:
    """Return the layout of the loss of a linear layer.

    Where a dimension of the mesh shards rows and classes (sequence parallelism), the rows are
    gathered over it.
    """
    features = input.dim() - 1  # in the logits, the classes
    of_weight: Placements = (Replicate(),) * input.device_mesh.ndim
    if isinstance(linear_weight, DTensor):
        check_placements("linear_weight", linear_weight)
        of_weight = linear_weight.placements
    for name, tensor, is_wrong in (
        ("input", input, [place.is_shard(features) for place in input.placements]),
        ("linear_weight", linear_weight, [p.is_shard() and not p.is_shard(0) for p in of_weight]),
    ):
        if any(is_wrong):
            raise ValueError(
                f"{name} must not have its features sharded, got placements {tensor.placements}: "
                f"gather them, by {name}.redistribute(placements=...)"
            )
    pairs = zip(input.placements, of_weight, strict=True)
    logits = tuple(Shard(features) if weight.is_shard() else rows for rows, weight in pairs)
    return layout_of(input.device_mesh, logits, features)


def check_placements(name: str, tensor: DTensor) -> None:
    """Check that a tensor is placed by Shard and Replicate."""
    placements = tensor.placements
    if any(placement.is_partial() for placement in placements):
        wanted = [Replicate() if place.is_partial() else place for place in placements]
        raise ValueError(
            f"{name} must not be Partial, got placements {placements}: sum it up first, by "
            f"{name}.redistribute(placements={wanted})"
        )
    for placement in placements:
        # In some versions of torch a strided shard is a Shard too.
        is_shard = placement.is_shard() and not hasattr(placement, "split_factor")
        if not (is_shard or placement.is_replicate()):
            raise ValueError(f"{name} must be placed by Shard and Replicate, got {placement}")

"""Losses of DTensors: the placements of the logits say what each process computes.

For each dimension of the device mesh: where it shards the classes, its processes compute the loss
of a split vocabulary together (see _parallel.py). Where it shards rows, each process has rows of
its own, and a sum over all rows is a ``Partial`` DTensor: the sum is still to be done. Where the
logits are replicated, each process computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed.tensor import DTensor, Replicate

from . import _autograd, _formulas, _parallel
from ._dtensor_layout import Layout, Placements, check_placements, layout_of, layout_of_layer
from ._options import DEFAULTS, OF_SHARD, REDUCTION_NAMES, resolve
from ._problem import Arguments, check_dense, is_autocast, prepare, row_shape
from ._torch_private import memory_of
from .reference import CrossEntropyStatistics

Results = tuple[Tensor] | CrossEntropyStatistics
INPLACE = ("inplace_backward", "grad_in_forward")
OF_LAYER = ("linear_weight", "linear_bias")
# What to do with a sharded weight. Its full_tensor() is no remedy: the gradient would be wrong.
ADVICE = (
    ": if fully_shard has sharded it, call the loss in the forward of the module that was passed "
    "to fully_shard, where it is whole (for LinearCrossEntropyLoss, pass it or its linear); for "
    "tensor parallelism pass input as a DTensor too, or the local weight with process_group"
)


class Labels(NamedTuple):
    """The tensors of a loss beside its logits, as users pass them."""

    target: Any
    weight: Any
    token_weight: Any
    normalizer: Any
    target_indices: Any


# ---- losses --------------------------------------------------------------------------------------


def evaluate(
    tensors: Arguments, statistics: bool, options: dict[str, Any], of_shard: tuple[Any, ...]
) -> Results:
    """Check the arguments and return the loss, or all statistics, as DTensors."""
    input, labels = tensors[0], Labels(*tensors[1:])
    _check_input(input, labels._asdict())
    _check_of_shard(of_shard)
    settings = resolve(input.dim(), statistics, options)
    layout = layout_of(input.device_mesh, input.placements, settings.dim)
    _check_labels(labels, input.shape, layout)
    _check_whole(tensors, statistics, options)
    own = _own(labels, labels.target.shape == input.shape, layout)
    reduction = REDUCTION_NAMES[settings.reduction]
    if _needs_divisor(labels, reduction, layout):
        own = own._replace(normalizer=_divisor(labels, own, settings.ignore_index, layout))
    is_inplace = settings.inplace_backward or settings.grad_in_forward
    if is_inplace:  # grad_in_forward is not used: autograd would not notice later uses of input
        _check_overwritable(input, INPLACE[settings.grad_in_forward])
        options = {**options, "grad_in_forward": False, "inplace_backward": not is_compiling()}
    problem = prepare(_local_logits(input, is_inplace), *own, statistics, options)
    shard = layout.shard(input.shape[settings.dim])
    results = _autograd.evaluate(problem) if shard is None else _parallel.of_shard(problem, shard)
    return _distributed(results, row_shape(input, settings.dim), reduction, layout)


def evaluate_linear(
    function: Callable[..., Results],
    input: Any,
    linear_weight: Any,
    target: Any,
    linear_bias: Any,
    *others: Any,
    statistics: bool,
    **options: Any,
) -> Results:
    """Return the loss, or all statistics, of hidden states and a linear layer, as DTensors.

    ``function`` computes those of plain tensors.
    """
    labels = Labels(target, *others)
    layer = dict(zip(OF_LAYER, (linear_weight, linear_bias), strict=True))
    _check_input(input, {**layer, **labels._asdict()})
    _check_of_shard([options.pop(name, None) for name in OF_SHARD])
    layout = layout_of_layer(input, linear_weight)
    shift, reduction = options.get("shift", 0), options.get("reduction", "mean")
    if shift and any(placement.is_shard(layout.dim - 1) for placement in layout.rows):
        raise ValueError(
            f"shift must be 0 where input's sequences are sharded, got {shift}: other processes "
            "have the next labels, so shift the target before"
        )
    logits = torch.Size([*input.shape[:-1], *linear_weight.shape[:-1]])
    _check_labels(labels, logits, layout)
    tensors = (input, linear_weight, target, linear_bias, *others)
    whole = function(*_of_layer_without_memory(tensors), statistics=statistics, **options)
    own = _own(labels, target.shape == logits, layout)
    if _needs_divisor(labels, reduction, layout):
        ignore_index = options.get("ignore_index")
        ignore_index = DEFAULTS["ignore_index"] if ignore_index is None else ignore_index
        counted = _without_first(own, shift, layout)
        own = own._replace(normalizer=_divisor(labels, counted, ignore_index, layout))
    shard = layout.shard(linear_weight.shape[0])
    if shard is not None:
        options |= dict(zip(OF_SHARD, shard, strict=True))
    hidden = _local(input, layout.rows, layout)
    weight, bias = (_local(tensor, layout.classes, layout) for tensor in layer.values())
    tensors = (hidden, weight, own.target, bias, *own[1:])
    results = function(*tensors, statistics=statistics, **options)
    return _distributed(results, whole[-1].shape, reduction, layout)


def _distributed(results: Results, rows: torch.Size, reduction: str, layout: Layout) -> Results:
    """Return the results of all processes as DTensors, given those of this one."""
    strides = torch.empty(rows, device="meta").stride()

    def of_rows(values: Tensor) -> Tensor:
        return DTensor.from_local(values, layout.mesh, layout.rows, shape=rows, stride=strides)

    loss, *others = results
    if reduction == "none":
        loss = of_rows(loss)
    else:
        loss = DTensor.from_local(loss, layout.mesh, layout.sums)
    return CrossEntropyStatistics(loss, *map(of_rows, others)) if others else (loss,)


# ---- the tensors of one process ------------------------------------------------------------------


def _own(labels: Labels, is_dense: bool, layout: Layout) -> Labels:
    """Return what this process has of each tensor."""
    of_target = layout.logits if is_dense else layout.rows
    if labels.target_indices is not None:
        of_target = layout.labels
    is_tensor = isinstance(labels.normalizer, Tensor)
    return Labels(
        _local(labels.target, of_target, layout),
        _local(labels.weight, layout.classes, layout),
        _local(labels.token_weight, layout.rows, layout),
        _local(labels.normalizer, layout.whole, layout) if is_tensor else labels.normalizer,
        _local(labels.target_indices, layout.labels, layout),
    )


def _local(tensor: Any, placements: Placements, layout: Layout) -> Any:
    """Return this process's part. A plain tensor is the whole, which each process cuts.

    Each process that has rows of its own computes a part of the gradient of what is replicated: a
    ``Partial`` gradient, as torch's own operations leave it.
    """
    if tensor is None:
        return None
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, layout.mesh, layout.whole)
    pairs = zip(placements, layout.sums, strict=True)
    grads = [of_sum if of_sum.is_partial() and not p.is_shard() else p for p, of_sum in pairs]
    if tensor.placements != placements:  # the backward of redistribute would add the parts up
        tensor = tensor.redistribute(placements=placements)
    return _waited(tensor.to_local(grad_placements=grads))


def _waited(local: Any) -> Any:
    """Wait for a tensor that a redistribution is still computing, as ``to_local`` asks to."""
    return local.wait() if hasattr(local, "wait") else local


def _needs_divisor(labels: Labels, reduction: str, layout: Layout) -> bool:
    return reduction == "mean" and labels.normalizer is None and layout.has_own_rows


def _divisor(labels: Labels, own: Labels, ignore_index: Any, layout: Layout) -> Tensor:
    """Return the divisor of the mean: the weights of the rows of all processes.

    A process's own divisor would be wrong: they may ignore different numbers of rows.
    """
    target, token_weight = own.target, own.token_weight
    is_index = not target.is_floating_point()
    if token_weight is None:
        token_weight = target.new_ones(target.shape if is_index else row_shape(target, layout.dim))
    # Of all classes, not only of a shard's.
    weight = _local(labels.weight, layout.whole, layout) if is_index else None
    own_total = _formulas.sum_of_weights(target, weight, token_weight, ignore_index)
    total = DTensor.from_local(own_total, layout.mesh, layout.sums)
    placements = list(layout.sums)
    for mesh_dim in range(layout.mesh.ndim):  # one by one: torch warns of several
        placements[mesh_dim] = Replicate()
        total = total.redistribute(placements=placements)
    return _local(total, layout.whole, layout)  # type: ignore[no-any-return]


def _without_first(own: Labels, shift: int, layout: Layout) -> Labels:
    """Return the labels without the first of each sequence, which belong to no row."""
    if not shift:
        return own
    first = layout.dim - 1

    def without_first(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.narrow(first, shift, tensor.shape[first] - shift)

    token_weight = without_first(own.token_weight)
    return own._replace(target=without_first(own.target), token_weight=token_weight)


# ---- logits --------------------------------------------------------------------------------------


def _local_logits(input: DTensor, is_inplace: bool) -> Tensor:
    """Return this process's logits. Their gradient has the placements of the DTensor."""
    local = _waited(input.to_local())
    if not (torch.is_grad_enabled() and input.requires_grad) or is_compiling():
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


def _check_input(input: Any, others: dict[str, Any]) -> None:
    """Check that input is a DTensor, and that the other DTensors are on its mesh."""
    if not isinstance(others["target"], DTensor):
        check_dense("target", others["target"])
    dtensors = {name: tensor for name, tensor in others.items() if isinstance(tensor, DTensor)}
    if not isinstance(input, DTensor):
        name, tensor = next(iter(dtensors.items()))
        advice = ADVICE if name in OF_LAYER else ""
        raise ValueError(
            f"{name} must be a plain tensor where input is one, got a DTensor with placements "
            f"{tensor.placements}{advice}"
        )
    mesh = input.device_mesh
    if mesh.get_coordinate() is None:
        raise ValueError(f"input must be on a mesh with this process, got {mesh}")
    check_placements("input", input)
    for name, tensor in dtensors.items():
        if tensor.device_mesh != mesh:
            raise ValueError(f"{name} must be on input's mesh {mesh}, got {tensor.device_mesh}")


def _check_of_shard(given: Sequence[Any]) -> None:
    """Check that no argument says what the placements say."""
    for name, value in zip(OF_SHARD, given, strict=True):
        if value is not None:
            raise ValueError(
                f"{name} must be None where input is a DTensor, whose placements say which "
                f"classes a process has, got {value}"
            )


def _check_labels(labels: Labels, logits: torch.Size, layout: Layout) -> None:
    """Check that no plain tensor holds the rows of this process alone. ``logits`` is global."""
    dim = layout.dim
    rows = logits[:dim] + logits[dim + 1 :]
    for name in ("target", "token_weight", "target_indices"):
        tensor = getattr(labels, name)
        if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
            continue
        is_rows = tensor.dim() == len(rows)
        shape = tensor.shape if is_rows else row_shape(tensor, dim)
        if shape == layout.own_rows(rows) != rows:
            raise ValueError(
                f"{name} must have all rows or be a DTensor where input's rows are sharded, got "
                f"shape {tuple(tensor.shape)} for logits of shape {tuple(logits)}: pass DTensor."
                f"from_local({name}, mesh, {layout.rows if is_rows else layout.labels})"
            )


def _check_whole(tensors: Arguments, statistics: bool, options: dict[str, Any]) -> None:
    """Check all arguments by their global shapes. So all processes have the same errors."""
    of_prepare = {name: value for name, value in options.items() if name not in INPLACE}
    whole = cast(Arguments, tuple(map(_without_memory, tensors)))
    prepare(*whole, statistics, of_prepare)


def _of_layer_without_memory(tensors: Sequence[Any]) -> list[Any]:
    """Return such tensors of a layer and its loss, as autocast casts them."""
    input, linear_weight, target, linear_bias, *others = map(_without_memory, tensors)
    if is_autocast(tensors[0]):
        dtype = torch.get_autocast_dtype(tensors[0].device.type)
        layer = (input, linear_weight, linear_bias)
        input, linear_weight, linear_bias = (None if x is None else x.to(dtype) for x in layer)
    return [input, linear_weight, target, linear_bias, *others]


def _without_memory(tensor: Any) -> Any:
    """Return a tensor of the same global shape and dtype on the meta device."""
    if not isinstance(tensor, Tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _check_overwritable(input: DTensor, name: str) -> None:
    """Check that the logits' memory is not that of a leaf. Compiled code does not overwrite it."""
    if is_compiling():
        return
    with torch.no_grad():
        local = input.to_local()
    for memory in (memory_of(input), memory_of(local)):
        if memory.is_leaf and memory.requires_grad:
            raise RuntimeError(
                f"{name} must be False where input is a leaf of the graph, or a view of one: its "
                "values are the caller's, and would be overwritten by their gradient"
            )

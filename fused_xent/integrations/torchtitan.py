"""Losses for torchtitan 0.3. In a trainer's configuration, they take the place of its loss.

    from fused_xent.integrations.torchtitan import FusedLinearCrossEntropyLoss

    config.loss = FusedLinearCrossEntropyLoss.Config(global_vocab_size=128256)

``FusedCrossEntropyLoss`` computes the loss of the model's logits, instead of ``CrossEntropyLoss``.
``FusedLinearCrossEntropyLoss`` computes it from hidden states and ``lm_head``, instead of
``ChunkedLossWrapper``, without storing all logits. Both work with FSDP, tensor parallelism and
sequence parallelism, in torchtitan's backends ``spmd_types``, ``partial_dtensor`` and
``full_dtensor``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import spmd_types as spmd  # type: ignore[import, unused-ignore]
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torchtitan.components.loss import (  # type: ignore[import, unused-ignore]
    ChunkedLossWrapper,
    CrossEntropyLoss,
)
from torchtitan.distributed.spmd_types import (  # type: ignore[import, unused-ignore]
    current_spmd_mesh,
    spmd_mesh_size,
)
from torchtitan.distributed.utils import (  # type: ignore[import, unused-ignore]
    get_spmd_backend,
)

from ..functional import cross_entropy
from ..linear import linear_cross_entropy


class FusedCrossEntropyLoss(CrossEntropyLoss):  # type: ignore[misc, unused-ignore]
    """``fused_xent.cross_entropy`` of the model's logits, summed as in torchtitan's losses."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):  # type: ignore[misc, unused-ignore]
        """``global_vocab_size`` is needed for tensor parallelism in the backend spmd_types."""

        label_smoothing: float = 0.0
        lse_square_scale: float = 0.0
        """Factor of the z-loss."""
        inplace_backward: bool = False
        """The backward writes the gradient over the logits."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        """Keep the options; compile the loss if torchtitan is to compile losses."""
        self.fn = partial(
            _loss_of_logits,
            label_smoothing=config.label_smoothing,
            lse_square_scale=config.lse_square_scale,
            inplace_backward=config.inplace_backward,
        )
        self._maybe_compile(compile_config)
        self.global_vocab_size = config.global_vocab_size


class FusedLinearCrossEntropyLoss(ChunkedLossWrapper):  # type: ignore[misc, unused-ignore]
    """``fused_xent.linear_cross_entropy`` of hidden states and ``lm_head``, summed.

    It is a ``ChunkedLossWrapper`` so that torchtitan's trainer leaves ``lm_head`` out of the
    model's forward and hands it over by ``set_lm_head``. ``num_chunks`` and ``loss_fn`` have no
    effect: chunks of rows need no divisible length, and no backward of their own. The loss is
    computed in the forward of ``lm_head``, whose hooks make the weights of FSDP whole.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):  # type: ignore[misc, unused-ignore]
        """``global_vocab_size`` is needed for tensor parallelism in the backend spmd_types."""

        global_vocab_size: int | None = None
        label_smoothing: float = 0.0
        lse_square_scale: float = 0.0
        """Factor of the z-loss."""
        drop_ignored: bool = False
        """Leave ignored rows out of the matrix products. On a GPU the host waits once."""
        chunk_rows: int | None = None
        """Rows in a chunk of logits."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        """Keep the options; ``compile_config`` has no effect, as on ``lm_head``."""
        super().__init__(config, compile_config=None)
        self.global_vocab_size = config.global_vocab_size
        self.options = {
            "label_smoothing": config.label_smoothing,
            "lse_square_scale": config.lse_square_scale,
            "drop_ignored": config.drop_ignored,
            "chunk_rows": config.chunk_rows,
        }

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Set the layer that makes logits.

        Raises:
            ValueError: its logits are not those of a linear layer, as with LoRA, a quantised layer,
                a layer that caps its logits, or a hook on its output.
        """
        more = _more_than_linear(lm_head)
        if more is not None:
            raise ValueError(
                "lm_head must compute what torch.nn.Linear does, got a "
                f"{type(lm_head).__name__} with {more}: the loss is computed from "
                "its weight, so anything else would be left out. Use ChunkedLossWrapper with "
                "FusedCrossEntropyLoss instead"
            )
        super().set_lm_head(lm_head)

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of hidden states ``pred`` (B, T, H) and labels (B, T), and no metrics.

        It is the sum over all tokens, divided by ``global_valid_tokens`` if given.
        """
        del loss_inputs
        if self.lm_head is None:
            raise RuntimeError("lm_head must be set before the loss is called: use set_lm_head()")
        loss_of = partial(_loss_of_hidden, self.lm_head, labels, self.global_vocab_size)
        is_type_checking = spmd.is_type_checking()
        with spmd.no_typecheck():
            with _forward_of(self.lm_head, partial(loss_of, **self.options)):
                loss = self.lm_head(pred)
            if global_valid_tokens is not None:
                loss = loss / global_valid_tokens
            if is_type_checking:
                spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, {}


def _more_than_linear(lm_head: nn.Module) -> str | None:
    """Return what a layer has that may change its logits.

    The forward and the hooks that torchtitan and FSDP give to a layer place tensors; these run.
    """
    forward = vars(lm_head).get("forward")
    if type(lm_head).forward is not nn.Linear.forward or not _is_of(forward, "torchtitan."):
        return "a forward of its own"
    if not all(_is_of(hook, "torch.distributed.") for hook in lm_head._forward_hooks.values()):
        return "a forward hook"
    return None


def _is_of(function: Any, package: str) -> bool:
    return function is None or str(getattr(function, "__module__", "")).startswith(package)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Give a module another forward for one call, in which its hooks run as usual."""
    before = module.__dict__.get("forward")  # torchtitan's, with its redistribution
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _loss_of_logits(
    pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None, **options: Any
) -> Tensor:
    """Return the sum of the losses of logits (B, T, V), of which a rank may have some classes."""
    if not isinstance(pred, DTensor):
        options |= _split_of(global_vocab_size, pred.shape[-1])
    loss = cross_entropy(pred, labels, dim=-1, reduction="sum", loss_dtype=torch.float32, **options)
    return _like(loss, labels)


def _loss_of_hidden(
    lm_head: nn.Module,
    labels: Tensor,
    global_vocab_size: int | None,
    hidden: Tensor,
    **options: Any,
) -> Tensor:
    """Return the sum of the losses of hidden states (B, T, H), in the forward of lm_head."""
    weight: Any = lm_head.weight
    bias: Any = lm_head.bias
    options |= {"reduction": "sum", "loss_dtype": torch.float32, "linear_bias": bias}
    if isinstance(weight, DTensor):
        return _like(_loss_of_dtensors(hidden, weight, labels, **options), hidden)
    split = _split_of(global_vocab_size, weight.shape[0])
    # As in torchtitan: where hidden states are gathered from the ranks, their gradient is the sum
    # of the ranks' parts.
    options |= {**split, "reduce_grad_hidden": False} if split else {}
    return linear_cross_entropy(hidden, weight, labels, **options)


def _loss_of_dtensors(
    hidden: Tensor, weight: DTensor, labels: Tensor, linear_bias: Any, **options: Any
) -> Tensor:
    """Return the loss of DTensors, computed from what this process has of them.

    A weight that all processes have, with rows that they do not, gets a ``Partial`` gradient, which
    FSDP adds up. So do hidden states that all processes have, with classes that they do not.
    """
    mesh, placements = weight.device_mesh, weight.placements
    if not isinstance(hidden, DTensor):
        hidden = DTensor.from_local(hidden, mesh, [Replicate()] * mesh.ndim, run_check=False)
    is_split = [placement.is_shard(0) for placement in placements]
    for i, (of_weight, of_rows) in enumerate(zip(placements, hidden.placements, strict=True)):
        is_known = of_rows.is_replicate() if is_split[i] else of_weight.is_replicate()
        if not is_known or of_rows.is_partial() or sum(is_split) > 1:
            raise ValueError(
                "lm_head.weight and hidden states must share their work as in torchtitan: on each "
                "mesh dimension one of them is replicated, and the weight is split on at most one; "
                f"got placements {placements} and {hidden.placements}"
            )
    if any(is_split):
        group, n_classes = mesh.get_group(is_split.index(True)), weight.shape[0]
        start, _ = _range_of(group, n_classes)
        options |= {"process_group": group, "vocab_start": start, "num_classes": n_classes}
        options["reduce_grad_hidden"] = False
    of_weight_grad = [Shard(0) if split else Partial() for split in is_split]
    pairs = zip(is_split, hidden.placements, strict=True)
    of_hidden_grad = [Partial() if split else placement for split, placement in pairs]
    if linear_bias is not None:
        linear_bias = linear_bias.to_local(grad_placements=of_weight_grad)
    loss = linear_cross_entropy(
        hidden.to_local(grad_placements=of_hidden_grad),
        weight.to_local(grad_placements=of_weight_grad),
        labels.to_local() if isinstance(labels, DTensor) else labels,
        linear_bias=linear_bias,
        **options,
    )
    of_loss = [Partial() if rows.is_shard() else Replicate() for rows in hidden.placements]
    return DTensor.from_local(loss, mesh, of_loss, run_check=False)


def _split_of(global_vocab_size: int | None, n_own: int) -> dict[str, Any]:
    """Return the options of a vocabulary that plain tensors are shards of; {} if whole."""
    if get_spmd_backend() != "spmd_types" or spmd_mesh_size("tp") == 1:
        return {}
    if global_vocab_size is None:
        raise ValueError(
            "global_vocab_size must be the number of all classes for tensor parallelism, got None: "
            "set it in the Config of the loss"
        )
    group = current_spmd_mesh().get_group("tp")
    start, end = _range_of(group, global_vocab_size)
    if n_own != end - start:
        raise ValueError(
            f"global_vocab_size must be the number of all classes, got {global_vocab_size}: rank "
            f"{group.rank()} of {group.size()} has {n_own} classes"
        )
    return {"process_group": group, "vocab_start": start, "num_classes": global_vocab_size}


def _range_of(group: Any, n_classes: int) -> tuple[int, int]:
    """Return this rank's range of the classes, which are split as by torch.chunk."""
    n_each = -(-n_classes // group.size())
    start = min(n_each * group.rank(), n_classes)
    return start, min(start + n_each, n_classes)


def _like(loss: Tensor, other: Tensor) -> Tensor:
    """Return the loss as a plain tensor where another tensor is one, as torchtitan's losses do."""
    if isinstance(loss, DTensor) and not isinstance(other, DTensor):
        return loss.to_local()
    return loss

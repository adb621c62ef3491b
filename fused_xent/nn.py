"""The loss as a module."""

import torch
from torch import Tensor

from .functional import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Module of :func:`fused_xent.cross_entropy`, equivalent to :class:`torch.nn.CrossEntropyLoss`.

    Takes torch's arguments, and ``loss_dtype``, ``inplace_backward`` and ``grad_in_forward`` as the
    function does. A subclass of torch's: state dicts and isinstance checks carry over.
    """

    def __init__(
        self,
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
    ) -> None:
        """Keep the arguments of the function, but for input and target."""
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.loss_dtype = loss_dtype
        self.inplace_backward = inplace_backward
        self.grad_in_forward = grad_in_forward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits ``input``; shapes as in :func:`fused_xent.cross_entropy`."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            loss_dtype=self.loss_dtype,
            inplace_backward=self.inplace_backward,
            grad_in_forward=self.grad_in_forward,
        )

"""The loss as a module."""

import inspect

import torch
from torch import Tensor

from .functional import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Module of :func:`fused_xent.cross_entropy`, equivalent to :class:`torch.nn.CrossEntropyLoss`.

    Takes torch's arguments and the options of the function, where each is explained, but for
    ``token_weight`` and ``normalizer``, which are a batch's and go to ``forward``. They are checked
    when the loss is computed. A subclass of torch's: state dicts and isinstance checks carry over.
    """

    # Of a module that was made, and pickled, as torch's or before an option was there.
    dim = softcap = loss_dtype = None
    lse_square_scale = focal_gamma = 0.0
    logit_scale = 1.0
    inplace_backward = grad_in_forward = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dim: int | None = None,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        focal_gamma: float = 0.0,
        loss_dtype: torch.dtype | None = None,
        inplace_backward: bool = False,
        grad_in_forward: bool = False,
    ) -> None:
        """Keep the arguments of the function, but for a batch's tensors."""
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.dim = dim
        self.lse_square_scale = lse_square_scale
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.focal_gamma = focal_gamma
        self.loss_dtype = loss_dtype
        self.inplace_backward = inplace_backward
        self.grad_in_forward = grad_in_forward

    def extra_repr(self) -> str:
        """Name the options that are not at their defaults."""
        options = inspect.signature(type(self)).parameters.values()
        values = ((p.name, vars(self).get(p.name, p.default), p.default) for p in options)
        return ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input``; shapes as in :func:`fused_xent.cross_entropy`."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            dim=self.dim,
            token_weight=token_weight,
            normalizer=normalizer,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            focal_gamma=self.focal_gamma,
            loss_dtype=self.loss_dtype,
            inplace_backward=self.inplace_backward,
            grad_in_forward=self.grad_in_forward,
        )

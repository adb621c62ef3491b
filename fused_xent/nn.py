"""The losses as modules."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor

from .functional import cross_entropy
from .linear import linear_cross_entropy


def _options_of(module: torch.nn.Module) -> str:
    """Name the options of a module that are not at their defaults."""
    parameters = inspect.signature(type(module)).parameters.values()
    values = ((p.name, vars(module).get(p.name, p.default), p.default) for p in parameters)
    return ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)


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
        return _options_of(self)

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


class LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """Module of :func:`fused_xent.linear_cross_entropy`: a linear layer and its loss.

    Takes the arguments, and has the parameters, of ``torch.nn.LinearCrossEntropyLoss``:
    ``linear.weight`` of shape ``(num_classes * d1 * ... * dk, in_features)`` and, with ``bias``,
    ``linear.bias``, for ``out_features = (d1, ..., dk)``; state dicts carry over. To tie it to an
    embedding, assign ``linear.weight``. All other arguments are the function's, but for
    ``token_weight`` and ``normalizer``, which are a batch's and go to ``forward``; they are checked
    when the loss is computed.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: torch.nn.LinearCrossEntropyOptions | None = None,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        focal_gamma: float = 0.0,
        loss_dtype: torch.dtype | None = None,
        shift: int = 0,
        drop_ignored: bool = False,
        chunk_rows: int | None = None,
    ) -> None:
        """Make the layer, and keep the arguments of the function."""
        super().__init__(weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        n_outputs = math.prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, n_outputs, bias, device=device, dtype=dtype)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.lse_square_scale = lse_square_scale
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.focal_gamma = focal_gamma
        self.loss_dtype = loss_dtype
        self.shift = shift
        self.drop_ignored = drop_ignored
        self.chunk_rows = chunk_rows

    def extra_repr(self) -> str:
        """Name the options that are not at their defaults; the layer shows itself."""
        return _options_of(self)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss; shapes as in :func:`fused_xent.linear_cross_entropy`."""
        linear_weight, linear_bias = self.linear.weight, self.linear.bias
        if self.out_features:
            shape = (self.num_classes, *self.out_features)
            linear_weight = linear_weight.view(*shape, self.linear.in_features)
            linear_bias = None if linear_bias is None else linear_bias.view(shape)
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            token_weight=token_weight,
            normalizer=normalizer,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            focal_gamma=self.focal_gamma,
            loss_dtype=self.loss_dtype,
            shift=self.shift,
            drop_ignored=self.drop_ignored,
            chunk_rows=self.chunk_rows,
        )

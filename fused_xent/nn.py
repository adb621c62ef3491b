"""The losses as modules."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._options import CrossEntropyOptions, LinearLossOptions, ProcessGroup, check_names
from ._torch_private import WeightedLoss
from .functional import cross_entropy
from .linear import linear_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable


OF_A_BATCH = ("token_weight", "normalizer", "target_indices")  # go to forward
DEPRECATED = ("size_average", "reduce")  # torch's, which reduction says


def _defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the options that a module of the function keeps, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
        and name not in (*OF_A_BATCH, *DEPRECATED, "weight", "linear_bias")
    }


class _Loss(WeightedLoss):
    """Base of both modules: keeps each option as an attribute, and passes it on in forward."""

    DEFAULTS: dict[str, Any]

    def _keep(self, options: dict[str, Any]) -> None:
        check_names(type(self).__name__, options, self.DEFAULTS)
        for name, default in self.DEFAULTS.items():
            setattr(self, name, options.get(name, default))

    def _options(self) -> dict[str, Any]:
        """Return all options."""
        attributes = self.__dict__  # getattr takes twice as long
        try:
            return {name: attributes[name] for name in self.DEFAULTS}
        except KeyError:  # a subclass keeps one elsewhere, or an older version, pickled, lacks it
            return {name: getattr(self, name, value) for name, value in self.DEFAULTS.items()}

    def extra_repr(self) -> str:
        """Name the options that are not at their defaults."""
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self._options().items()
            if not _is_default(value, self.DEFAULTS[name])
        )


def _is_default(value: Any, default: Any) -> bool:
    """Compare with ==, but not tensors and arrays, whose == is not a bool."""
    return value is default or (isinstance(value, (int, float, str)) and value == default)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss, _Loss):
    """Module of ``fused_xent.cross_entropy``, equivalent to ``torch.nn.CrossEntropyLoss``.

    Takes torch's arguments and the options of the function. ``token_weight``, ``normalizer`` and
    ``target_indices`` belong to a batch and go to ``forward``. Options are checked when the loss is
    computed. It is a subclass of torch's class: state dicts and isinstance checks carry over.
    """

    DEFAULTS = _defaults_of(cross_entropy)

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Unpack[CrossEntropyOptions],
    ) -> None:
        """Keep the options of the function."""
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        own = {
            "ignore_index": ignore_index,
            "reduction": self.reduction,
            "label_smoothing": label_smoothing,
        }
        self._keep({**options, **own})

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        target_indices: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input``; shapes as in ``fused_xent.cross_entropy``."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            token_weight=token_weight,
            normalizer=normalizer,
            target_indices=target_indices,
            **self._options(),
        )


class Linear(torch.nn.Linear):
    """The layer of ``LinearCrossEntropyLoss``, whose loss is computed in its ``forward``.

    So whatever hooks the layer has run at the right time: those of ``fully_shard`` make the
    parameters whole for its ``forward`` and reduce their gradients afterwards.
    """

    def forward(self, input: Tensor, loss: Callable[..., Tensor] | None = None) -> Tensor:
        """Return ``loss(input, weight, bias)``, or what a linear layer does."""
        return super().forward(input) if loss is None else loss(input, self.weight, self.bias)


class LinearCrossEntropyLoss(_Loss):
    """Module of ``fused_xent.linear_cross_entropy``: a linear layer and its loss.

    Takes the arguments, and has the parameters, of ``torch.nn.LinearCrossEntropyLoss``:
    ``linear.weight`` of shape ``(num_classes * d1 * ... * dk, in_features)`` and, with ``bias``,
    ``linear.bias``, for ``out_features = (d1, ..., dk)``; state dicts carry over. To tie it to an
    embedding, assign ``linear.weight``. All other arguments are options of the function;
    ``token_weight``, ``normalizer`` and ``target_indices`` belong to a batch and go to ``forward``.
    Options are checked when the loss is computed.

    With ``process_group``, ``num_classes`` is the number of classes of all ranks. Each rank has a
    layer of ``num_classes / n_ranks`` classes, rounded up; those beyond ``num_classes`` are padding
    without a gradient. For other shards, assign ``linear.weight`` and give ``vocab_start``.
    """

    DEFAULTS = _defaults_of(linear_cross_entropy)
    DEFAULTS.pop("num_classes")  # of the layer: not an option here

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        **options: Unpack[LinearLossOptions],
    ) -> None:
        """Make the layer, and keep the options of the function."""
        super().__init__(weight)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        n_own = -(-num_classes // _n_ranks(options.get("process_group")))
        n_outputs = math.prod(self.out_features, start=n_own)
        self.linear: torch.nn.Linear = Linear(
            in_features, n_outputs, bias, device=device, dtype=dtype
        )
        self._keep({**options})

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        target_indices: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; shapes as in ``fused_xent.linear_cross_entropy``."""

        def loss(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
            if self.out_features:
                is_split = self._classes_of_all_ranks() is not None  # and then refused
                shape = (-1 if is_split else self.num_classes, *self.out_features)
                linear_weight = linear_weight.view(*shape, linear_weight.shape[-1])
                linear_bias = None if linear_bias is None else linear_bias.view(shape)
            return linear_cross_entropy(
                input,
                linear_weight,
                target,
                linear_bias=linear_bias,
                weight=self.weight,
                token_weight=token_weight,
                normalizer=normalizer,
                target_indices=target_indices,
                num_classes=self._classes_of_all_ranks(),
                **self._options(),
            )

        if isinstance(self.linear, Linear):
            # By name: tensor parallelism's hooks pass on the first argument alone.
            return self.linear(input, loss=loss)  # type: ignore[no-any-return]
        return loss(input, self.linear.weight, self.linear.bias)

    def _classes_of_all_ranks(self) -> int | None:
        return None if self._options()["process_group"] is None else self.num_classes


def _n_ranks(process_group: ProcessGroup | None) -> int:
    if process_group is None:
        return 1
    from . import _parallel  # needs torch.distributed, which some builds of torch lack

    _parallel.check_group(process_group)
    return process_group.size()


def _signature_of(module: type[_Loss], function: Callable[..., Any]) -> inspect.Signature:
    """Return a module's signature, its options with the function's defaults and types."""
    *named, _ = inspect.signature(module.__init__).parameters.values()
    of_function = inspect.signature(function).parameters
    names = {parameter.name for parameter in named}
    options = [
        of_function[name].replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name in module.DEFAULTS
        if name not in names
    ]
    return inspect.Signature([*named, *options])


CrossEntropyLoss.__init__.__signature__ = _signature_of(CrossEntropyLoss, cross_entropy)  # type: ignore[attr-defined]
LinearCrossEntropyLoss.__init__.__signature__ = _signature_of(  # type: ignore[attr-defined]
    LinearCrossEntropyLoss, linear_cross_entropy
)

"""Losses with the contract of transformers' own, as ``model.loss_function`` calls them.

Each is an object and no closure, so that models with it can be copied and pickled. Values are those
of ``transformers.loss.loss_utils``. Logits are not converted to float32: the loss alone is computed
and returned in float32.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cross_entropy

NumItems = Tensor | float | None


class HeadLoss(Protocol):
    """Computes a loss of the captured hidden states, see _transformers_head."""

    @property
    def n_classes(self) -> int:
        """The number of classes of the logits that are not computed."""

    def __call__(
        self, logits: Tensor, labels: Tensor, num_items: NumItems, ignore_index: int, shift: int
    ) -> Tensor:
        """Return the loss of labels that are aligned (0) or to be shifted by ``shift``."""


def reduced(
    logits: Tensor,
    labels: Tensor,
    num_items: NumItems,
    ignore_index: int,
    options: dict[str, Any],
    loss_dtype: torch.dtype | None = torch.float32,
) -> Tensor:
    """Return the mean loss of logits (..., V), or their summed loss divided by ``num_items``."""
    labels = labels.to(logits.device)
    if labels.shape != logits.shape[:-1]:  # transformers compares the number of rows alone
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        check_rows(len(logits), len(labels))
    loss = cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        dim=-1,
        normalizer=num_items,
        loss_dtype=loss_dtype,
        **options,
    )
    return of_shape(loss, num_items)


def check_rows(n_rows: int, n_labels: int) -> None:
    """Raise an error unless there is a label for each row of logits."""
    if n_rows != n_labels:
        raise ValueError(
            f"labels must have one label for each of the {n_rows} rows of logits, got {n_labels}: "
            "with logits_to_keep, pass the labels of those positions as labels and shift_labels"
        )


def of_shape(loss: Tensor, num_items: NumItems) -> Tensor:
    """Give a scalar the shape of a quotient by ``num_items``, such as (1,)."""
    return loss.reshape(num_items.shape) if isinstance(num_items, Tensor) else loss


def next_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Return each position's next label; the last position has none."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


class Loss:
    """A loss function of a model: its options, and its head if that is fused."""

    name: str  # of the function of transformers that has the same contract

    def __init__(self, options: dict[str, Any], head: HeadLoss | None = None) -> None:
        """Keep the options of ``fused_xent.cross_entropy``."""
        self.options = options
        self.head = head


class LanguageLoss(Loss):
    """A loss of all positions."""

    is_causal: bool  # position i predicts label i + 1

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: NumItems = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the loss. ``shift_labels`` of a causal model are aligned with the logits."""
        shift = int(self.is_causal and shift_labels is None)
        if self.is_causal and shift_labels is not None:
            labels = shift_labels
        head = self.head if logits.shape[-1] == 0 else None  # the stand-in for logits
        n_classes = logits.shape[-1] if head is None else head.n_classes
        if vocab_size not in (n_classes, logits.shape[-1]):  # some models pass logits.shape[-1]
            raise ValueError(
                f"logits must have vocab_size = {vocab_size} classes, got shape "
                f"{(*logits.shape[:-1], n_classes)}: set the vocab_size of the model and of its "
                "config"
            )
        if head is not None:
            return head(logits, labels, num_items_in_batch, ignore_index, shift)
        if shift:
            labels = next_labels(labels, ignore_index)
        return reduced(logits, labels, num_items_in_batch, ignore_index, self.options)


class CausalLoss(LanguageLoss):
    """The loss of the next token: ForCausalLMLoss."""

    name, is_causal = "ForCausalLMLoss", True


class MaskedLoss(LanguageLoss):
    """The loss of labels that are aligned with the logits: ForMaskedLMLoss."""

    name, is_causal = "ForMaskedLMLoss", False


class TokenClassificationLoss(Loss):
    """The loss of one class for each token: ForTokenClassification."""

    name = "ForTokenClassification"

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        config: Any,
        num_items_in_batch: NumItems = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> Tensor:
        """Return the loss."""
        logits = logits.reshape(-1, config.num_labels)
        return reduced(logits, labels.reshape(-1), num_items_in_batch, ignore_index, self.options)


class SequenceClassificationLoss(Loss):
    """ForSequenceClassificationLoss: this package computes that of single labels alone."""

    name = "ForSequenceClassificationLoss"

    def __call__(
        self,
        labels: Tensor,
        pooled_logits: Tensor,
        config: Any,
        num_items_in_batch: NumItems = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> Tensor:
        """Return the loss. Sets ``config.problem_type`` as transformers does if it is None."""
        if config.problem_type is None:
            config.problem_type = _problem_type(labels, config.num_labels)
        if config.problem_type != "single_label_classification":
            stock = importlib.import_module("transformers.loss.loss_utils")
            loss: Tensor = stock.ForSequenceClassificationLoss(labels, pooled_logits, config)
            return loss
        logits = pooled_logits.reshape(-1, config.num_labels)
        labels = labels.reshape(-1)
        return reduced(logits, labels, num_items_in_batch, ignore_index, self.options, None)


def _problem_type(labels: Tensor, num_labels: int) -> str:
    if num_labels == 1:
        return "regression"
    if labels.dtype in (torch.long, torch.int):
        return "single_label_classification"
    return "multi_label_classification"


LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (CausalLoss, MaskedLoss, TokenClassificationLoss, SequenceClassificationLoss)
}

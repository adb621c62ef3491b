"""Which rows of a linear layer have a label: shift and drop_ignored, there and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._linear_autograd import Layer
from ._options import REDUCTIONS
from ._problem import Problem, accumulation_dtype, row_shape
from .reference import CrossEntropyStatistics


class Rows(NamedTuple):
    """The caller's rows, and which of them have been computed."""

    shape: Sequence[int]
    positions: Sequence[int]  # in each row: (*D)
    shift: int
    kept: Tensor | None  # the indices that kept_rows has returned

    def restore(
        self, results: tuple[Tensor] | CrossEntropyStatistics, reduction: int
    ) -> tuple[Tensor] | CrossEntropyStatistics:
        """Give the results of rows the shape of the caller's rows."""
        loss, *of_rows = results
        if reduction == REDUCTIONS["none"]:
            loss = self._restore(loss)
        if not of_rows:
            return (loss,)
        *numbers, argmax, correct = of_rows
        return CrossEntropyStatistics(
            loss,
            *map(self._restore, numbers),
            self._restore(argmax, -1),
            self._restore(correct, False),
        )

    def _restore(self, values: Tensor, left_out: float = 0) -> Tensor:
        n_rows, shift = math.prod(self.shape), self.shift
        if self.kept is not None:
            whole = values.new_full([max(n_rows - shift, 0), *self.positions], left_out)
            values = whole.index_copy(0, self.kept, values)
        if shift > 0:
            missing = values.new_full([n_rows, *self.positions], left_out)
            values = torch.cat([values, missing])[:n_rows]
        values = values.view([*self.shape, *self.positions])
        if shift == 0:
            return values
        return values.narrow(len(self.shape) - 1, 0, self.shape[-1] - shift)


def without_first(problem: Problem, shift: int) -> Tensor:
    """Return token weights with 0 for the first labels of each sequence, which belong to no row."""
    logits, token_weight, dim = problem.logits, problem.token_weight, problem.settings.dim
    if token_weight is None:
        acc = accumulation_dtype(logits.dtype)
        token_weight = logits.new_ones(row_shape(logits, dim), dtype=acc)
    first, others = token_weight.tensor_split([shift], dim - 1)
    return torch.cat([torch.zeros_like(first), others], dim - 1)


def flatten(layer: Layer, problem: Problem, shift: int) -> tuple[Layer, Problem]:
    """Return hidden (N, H), and a problem with all rows in one dimension.

    With a shift, row i takes label i + shift of all sequences, one after another. Labels of the
    next sequence have weight 0.
    """
    n_row_dims = problem.settings.dim
    if n_row_dims == 1 and not shift:
        return layer, problem

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(math.prod(tensor.shape[:n_row_dims]), *tensor.shape[n_row_dims:])

    hidden = flat(layer.hidden)
    hidden = hidden[: max(len(hidden) - shift, 0)]
    target = flat(problem.target)[shift:]
    tokens, indices = problem.token_weight, problem.target_indices
    logits = problem.logits.new_zeros(()).expand(len(target), *layer.linear_weight.shape[:-1])
    flattened = problem._replace(
        logits=logits,
        target=target,
        token_weight=None if tokens is None else flat(tokens)[shift:],
        target_indices=None if indices is None else flat(indices)[shift:],
        settings=problem.settings._replace(dim=1),
    )
    return layer._replace(hidden=hidden), flattened


def kept_rows(problem: Problem) -> Tensor | None:
    """Return the indices of the rows that count; None if all do."""
    target, token_weight = problem.target, problem.token_weight
    counts = None if token_weight is None else token_weight != 0
    if not target.is_floating_point():
        is_label = target.to(torch.int64) != problem.settings.ignore_index
        counts = is_label if counts is None else counts & is_label
    if counts is None:
        return None
    kept = counts.flatten(1).any(1) if counts.dim() > 1 else counts
    kept = kept.nonzero().squeeze(1)
    return None if kept.numel() == counts.shape[0] else kept


def select(layer: Layer, problem: Problem, kept: Tensor | None) -> tuple[Layer, Problem]:
    if kept is None:
        return layer, problem
    tokens, indices = problem.token_weight, problem.target_indices
    selected = problem._replace(
        logits=problem.logits[: kept.numel()],
        target=problem.target.index_select(0, kept),
        token_weight=None if tokens is None else tokens.index_select(0, kept),
        target_indices=None if indices is None else indices.index_select(0, kept),
    )
    return layer._replace(hidden=layer.hidden.index_select(0, kept)), selected

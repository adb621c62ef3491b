"""The operators of a linear layer and its loss, which store one chunk of logits at a time.

With ``N`` rows of ``H`` features, ``C`` classes in each of the positions ``D`` (mostly none), and
``K`` the product of ``(C, *D)``:

``linear_forward`` takes ``hidden`` (N, H), ``linear_weight`` (C, *D, H), ``linear_bias`` (C, *D),
and what the operators of ``_ops`` take besides logits, which would be (N, C, *D). It returns the
loss, the statistics, and the gradients of hidden, weight and bias for an upstream gradient of 1.
Statistics that are not wanted and gradients that ``needs`` does not name are empty.
``linear_backward`` recomputes the logits and returns these gradients for any upstream gradient.

A chunk is a range of rows. Its logits lie in one buffer. The fused kernels turn them into their
gradient, which is multiplied into the gradients of hidden and weight. If there are few rows
compared with features, the logits of all rows are stored class by class in the memory of the
weight's gradient instead: one matrix product each, and only one slab of logits as extra memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _formulas, _ops
from ._options import DEFAULTS, REDUCTIONS, Settings
from ._problem import Problem, Upstream, accumulation_dtype
from ._products import product, slabs
from ._torch_private import below_autograd

# How many rows make a matrix product efficient, and how many bytes of logits a chunk may have.
CPU_ROWS, CPU_BYTES = 512, 128 << 20
GPU_ROWS, GPU_BYTES = 4096, 1 << 30
FEW_BYTES = 32 << 20  # of logits: below this, both layouts are equally fast

Turn = Callable[[Tensor, slice], None]  # turns logits (n, C, *D) of these rows into their gradient


class Inputs(NamedTuple):
    """The arguments of both operators, in their order."""

    hidden: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    token_weight: Tensor | None
    normalizer: Tensor | None
    target_indices: Tensor | None
    reduction: int
    logits_dtype: torch.dtype
    loss_dtype: torch.dtype
    statistics: bool
    chunk_rows: int | None
    needs: Sequence[int]  # 1 for a gradient that is wanted, of hidden, weight and bias
    options: dict[str, Any]

    @property
    def classes(self) -> torch.Size:
        """The shape (C, *D) of a row's logits."""
        return self.linear_weight.shape[:-1]

    @property
    def row_shape(self) -> list[int]:
        """The shape of the unreduced loss."""
        return [self.hidden.shape[0], *self.classes[1:]]

    def problem(self, logits: Tensor, rows: slice, total: Tensor | None) -> Problem:
        """Return the problem of some rows; ``total`` is the divisor of the mean of all rows."""
        tokens = None if self.token_weight is None else self.token_weight[rows]
        indices = None if self.target_indices is None else self.target_indices[rows]
        is_none = self.reduction == REDUCTIONS["none"]
        loss_dtype = self.loss_dtype if is_none else torch.float64
        ignore_index: Any
        ignore_index = self.options.get("ignore_index", DEFAULTS["ignore_index"])
        flags = (self.statistics, ignore_index, False, False)
        settings = Settings(1, self.reduction, loss_dtype, *flags, self.options)
        return Problem(logits, self.target[rows], self.weight, tokens, total, indices, settings)

    def problem_of_all(self, logits: Tensor) -> Problem:
        """Return the problem of all rows."""
        problem = self.problem(logits, slice(None), self.normalizer)
        return problem._replace(settings=problem.settings._replace(loss_dtype=self.loss_dtype))


def of_backward(*arguments: Any, **options: Any) -> tuple[Upstream, Inputs]:
    """Return what ``linear_backward`` is called with."""
    return Upstream(*arguments[:3]), Inputs._make((*arguments[3:], options))


_SIGNATURE = """(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor target,
Tensor? weight, Tensor? token_weight, Tensor? normalizer, Tensor? target_indices, int reduction,
ScalarType logits_dtype, ScalarType loss_dtype, bool statistics, SymInt? chunk_rows, int[] needs,
{options})"""
_GRADIENTS = "Tensor grad_hidden, Tensor grad_linear_weight, Tensor grad_linear_bias)"


def _forward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """Return loss, lse, entropy, argmax and the gradients."""
    inputs = Inputs._make((*arguments, options))
    total = _total_weight(inputs)
    losses, statistics = [], []

    def turn(logits: Tensor, rows: slice) -> None:
        problem = inputs.problem(logits, rows, total)
        if not any(inputs.needs):
            loss, _, _, *others = _ops.forward(problem)
        else:
            loss, *others = _ops.forward_backward_(problem)
        losses.append(loss)
        statistics.append(others)

    gradients = multiply(inputs, turn)
    if inputs.reduction == REDUCTIONS["none"]:
        loss = torch.cat(losses)
    else:
        loss = torch.stack(losses).sum().to(inputs.loss_dtype)
    if inputs.statistics:
        rows = [torch.cat(parts) for parts in zip(*statistics, strict=True)]
    else:
        rows = _empty_statistics(inputs)
    return loss, *rows, *gradients


def _backward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """Return the gradients of hidden, weight and bias."""
    upstream, inputs = of_backward(*arguments, **options)
    inputs = inputs._replace(statistics=upstream.entropy is not None)
    total = _total_weight(inputs)

    def turn(logits: Tensor, rows: slice) -> None:
        of_rows = (x if x is None or x.dim() == 0 else x[rows] for x in upstream)
        problem = inputs.problem(logits, rows, total)
        saved = _ops.saved_of(_ops.forward(problem))
        _ops.backward_(problem, saved, Upstream(*of_rows))

    return multiply(inputs, turn)


def _empty_statistics(inputs: Inputs) -> list[Tensor]:
    """Return memory for lse, entropy and argmax; empty without statistics."""
    shape = inputs.row_shape if inputs.statistics else [0]
    acc = accumulation_dtype(inputs.logits_dtype)
    return [inputs.hidden.new_empty(shape, dtype=dtype) for dtype in (acc, acc, torch.int64)]


def _empty_gradients(inputs: Inputs) -> list[Tensor]:
    """Return memory for the gradients of hidden, weight and bias; empty for those not needed."""
    tensors: tuple[Any, ...] = (inputs.hidden, inputs.linear_weight, inputs.linear_bias)
    return [
        inputs.hidden.new_empty(tensor.shape if needed else [0])
        for tensor, needed in zip(tensors, inputs.needs, strict=True)
    ]


def empty_results(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return memory for all that ``linear_forward`` returns."""
    shape = inputs.row_shape if inputs.reduction == REDUCTIONS["none"] else []
    loss = inputs.hidden.new_empty(shape, dtype=inputs.loss_dtype)
    return loss, *_empty_statistics(inputs), *_empty_gradients(inputs)


def _fake_forward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    return empty_results(Inputs._make((*arguments, options)))


def _fake_backward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    _, inputs = of_backward(*arguments, **options)
    return tuple(_empty_gradients(inputs))


def _total_weight(inputs: Inputs) -> Tensor | None:
    """Return the divisor of the mean over all chunks; None for other reductions."""
    if inputs.reduction != REDUCTIONS["mean"]:
        return None
    logits = inputs.hidden.new_zeros(()).expand(inputs.hidden.shape[0], *inputs.classes)
    return _formulas.total_weight(inputs.problem(logits, slice(None), inputs.normalizer))


def multiply(inputs: Inputs, turn: Turn) -> tuple[Tensor, ...]:
    """Compute logits, turn them into their gradient, and multiply that; return the gradients."""
    # Tensors are already cast; turn autocast off.
    with below_autograd(), torch.autocast(inputs.hidden.device.type, enabled=False):
        return (_by_classes if _is_by_classes(inputs) else _by_rows)(inputs, turn)


# ---- chunks of rows ----------------------------------------------------------------------------


def _chunks(inputs: Inputs) -> Iterator[slice]:
    row_bytes = math.prod(inputs.classes) * inputs.logits_dtype.itemsize
    most = inputs.chunk_rows or most_rows(row_bytes, inputs.hidden.is_cpu)
    return chunks(inputs.hidden.shape[0], most)


def most_rows(row_bytes: int, is_cpu: bool) -> int:
    """Return how many rows a chunk may have whose logits take so many bytes a row."""
    most, n_bytes = (CPU_ROWS, CPU_BYTES) if is_cpu else (GPU_ROWS, GPU_BYTES)
    return max(1, min(most, n_bytes // row_bytes))


def chunks(n_rows: int, most: int) -> Iterator[slice]:
    """Yield chunks of almost equal sizes."""
    n_chunks = -(-n_rows // most)
    size = -(-n_rows // n_chunks)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _by_rows(inputs: Inputs, turn: Turn) -> tuple[Tensor, ...]:
    hidden, linear_weight, linear_bias = _matrices(inputs)
    slices = list(_chunks(inputs))
    gradients = _Gradients(inputs, len(slices))
    memory = hidden.new_empty(slices[0].stop, linear_weight.shape[0], dtype=inputs.logits_dtype)
    for rows in slices:
        logits = memory[: rows.stop - rows.start]
        product(hidden[rows], linear_weight.t(), logits, linear_bias)
        turn(logits.view(-1, *inputs.classes), rows)
        gradients.add(logits, rows)
    return gradients.results()


def _matrices(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden (N, H), weight (K, H) and bias (K,)."""
    weight, bias = inputs.linear_weight, inputs.linear_bias
    return inputs.hidden, weight.flatten(0, -2), None if bias is None else bias.flatten()


class _Gradients:
    """The gradients of hidden, weight and bias, summed over chunks in at least float32."""

    def __init__(self, inputs: Inputs, n_chunks: int) -> None:
        self.hidden, self.linear_weight, _ = _matrices(inputs)
        sums = torch.float32 if self.hidden.element_size() == 2 else self.hidden.dtype
        dtypes = (None, sums if n_chunks > 1 else None, sums)
        self.grad_hidden, self.grad_weight, self.grad_bias = (
            torch.empty_like(gradient, dtype=dtype)
            for gradient, dtype in zip(_empty_gradients(inputs), dtypes, strict=True)
        )
        self.needs = inputs.needs

    def add(self, grad_logits: Tensor, rows: slice) -> None:
        """Add the gradients of a chunk; the first chunk starts at row 0."""
        needs_hidden, needs_weight, needs_bias = self.needs
        is_first = rows.start == 0
        if needs_hidden:
            product(grad_logits, self.linear_weight, self.grad_hidden[rows])
        if needs_weight:
            total = self.grad_weight.flatten(0, -2)
            product(grad_logits.t(), self.hidden[rows], total, beta=0 if is_first else 1)
        if needs_bias:
            summed = grad_logits.sum(0, dtype=self.grad_bias.dtype).view_as(self.grad_bias)
            self.grad_bias = summed if is_first else self.grad_bias.add_(summed)

    def results(self) -> tuple[Tensor, ...]:
        """Return the gradients in the dtype of their tensors."""
        gradients = (self.grad_hidden, self.grad_weight, self.grad_bias)
        return tuple(gradient.to(self.hidden.dtype) for gradient in gradients)


# ---- all rows, class by class ------------------------------------------------------------------


def _is_by_classes(inputs: Inputs) -> bool | int:
    """Return True if all rows at once need less memory, or read the weight fewer times."""
    (n_rows, n_features), n_classes = inputs.hidden.shape, inputs.classes[0]
    size = inputs.hidden.element_size()
    # With more rows, chunks need less memory; in 16 bits, they also need sums in float32.
    most = n_features * (3 if size == 2 else 1)
    return (
        inputs.hidden.is_cpu
        and inputs.logits_dtype == inputs.hidden.dtype
        and inputs.needs[1]
        and inputs.chunk_rows is None
        and len(inputs.classes) == 1
        and n_rows * n_classes * size > FEW_BYTES
        and n_rows <= most
    )


def _by_classes(inputs: Inputs, turn: Turn) -> tuple[Tensor, ...]:
    """Store logits (K, n) of the first rows at the end of the weight's gradient, others beside it.

    The weight's gradient is then written over them, slab by slab from its start. Up to class c it
    takes c * H elements; later classes' logits start at K * (H - n) + c * n, which is no less.
    """
    hidden, linear_weight, linear_bias = _matrices(inputs)
    (n_rows, n_features), n_classes = hidden.shape, linear_weight.shape[0]
    grad_hidden, grad_weight, grad_bias = _empty_gradients(inputs)
    n_first = min(n_rows, n_features)
    blocks = [grad_weight.view(-1)[n_classes * (n_features - n_first) :].view(n_classes, n_first)]
    if n_first < n_rows:
        blocks.append(hidden.new_empty(n_classes, n_rows - n_first))
    for start, block in zip((0, n_first), blocks, strict=False):
        rows = slice(start, start + block.shape[1])
        bias = None if linear_bias is None else linear_bias.unsqueeze(1)
        product(linear_weight, hidden[rows].t(), block, bias)
        turn(block.t(), rows)
        if inputs.needs[0]:
            product(block.t(), linear_weight, grad_hidden[rows])
    for slab in slabs(n_classes, n_rows * hidden.element_size()):
        grad_logits = torch.cat([block[slab] for block in blocks], 1)
        if inputs.needs[2]:
            acc = accumulation_dtype(hidden.dtype)
            grad_bias[slab] = grad_logits.sum(1, dtype=acc)
        product(grad_logits, hidden, grad_weight[slab])
    return grad_hidden, grad_weight, grad_bias


# ---- the operators -----------------------------------------------------------------------------


def _define() -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    signature = _SIGNATURE.format(options=f"*, {_ops.options_schema()}").replace("\n", " ")
    of_forward = " -> (Tensor loss, Tensor lse, Tensor entropy, Tensor argmax, " + _GRADIENTS
    upstream = "(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, "
    forward = _ops.define("linear_forward", signature + of_forward, _forward, _fake_forward)
    of_backward = signature.replace("(", upstream, 1) + " -> (" + _GRADIENTS
    return forward, _ops.define("linear_backward", of_backward, _backward, _fake_backward)


if _ops.LOAD_ERROR is None:
    forward, backward = _define()

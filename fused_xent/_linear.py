"""The operators of a linear layer and its loss, which hold no more logits than a chunk's.

With ``N`` rows of ``H`` features, ``C`` classes in each of the positions ``D`` (mostly none), and
``K`` the product of ``classes = (C, *D)``:

``linear_forward`` takes ``hidden`` (N, H), ``linear_weight`` (K, H), ``linear_bias`` (K,), and of
the loss what the operators of ``_ops`` take beside logits of shape (N, C, *D). It returns the loss,
the statistics (of no elements where they are not wanted), and the gradients of hidden, weight and
bias for an upstream gradient of 1, of no elements but for those that ``needs`` names.
``linear_backward`` makes these gradients for any upstream gradient, from logits that it multiplies
anew.

Chunks are of rows. A chunk's logits lie in one buffer, which the fused kernels turn into their
gradient, to be multiplied into the gradients of hidden and weight. Where the rows are few beside
the features, the logits of all rows are instead kept class by class, in the memory that the
weight's gradient will take: one matrix product each, and only a slab of logits beyond the outputs.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _ops

# How many rows make a matrix product efficient, and how many bytes of logits a chunk may have.
CPU_ROWS, CPU_BYTES = 256, 100 << 20
GPU_ROWS, GPU_BYTES = 4096, 1 << 30
FEW_BYTES = 32 << 20  # of logits, for which no layout is better than another
SLAB_BYTES = 1 << 20

Turn = Callable[[Tensor, slice], None]  # logits (n, C, *D) into their gradient; of which rows


class Inputs(NamedTuple):
    """What both operators take, in their order."""

    hidden: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    token_weight: Tensor | None
    normalizer: Tensor | None
    classes: list[int]
    ignore_index: int
    numbers: list[float]
    reduction: int
    loss_dtype: torch.dtype
    statistics: bool
    chunk_rows: int | None
    needs: list[bool]  # gradients of hidden, weight and bias

    @property
    def row_shape(self) -> list[int]:
        """The shape of the unreduced loss."""
        return [self.hidden.shape[0], *self.classes[1:]]

    def of_loss(self, rows: slice, total: Tensor | None) -> tuple:
        """Return what the loss of some rows' logits takes: the operands beside the logits."""
        tokens = None if self.token_weight is None else self.token_weight[rows]
        return self.target[rows], self.weight, tokens, total, 1, *self[8:11]


_SIGNATURE = """(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor target,
Tensor? weight, Tensor? token_weight, Tensor? normalizer, SymInt[] classes, int ignore_index,
float[] numbers, int reduction, ScalarType loss_dtype, bool statistics, SymInt? chunk_rows,
bool[] needs) -> (Tensor loss, Tensor lse, Tensor entropy, Tensor argmax, Tensor grad_hidden,
Tensor grad_linear_weight, Tensor grad_linear_bias)"""
_BACKWARD_SIGNATURE = _SIGNATURE.partition(" -> ")[0].replace(
    "(", "(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, ", 1
) + (" -> (Tensor grad_hidden, Tensor grad_linear_weight, Tensor grad_linear_bias)")


@torch.library.custom_op("fused_xent::linear_forward", mutates_args=(), schema=_SIGNATURE)
def forward(*arguments) -> tuple[Tensor, ...]:
    """Return loss, lse, entropy, argmax and the gradients."""
    inputs = Inputs(*arguments)
    total = _total_weight(inputs)
    is_reduced = inputs.reduction != _ops.REDUCTIONS["none"]
    loss_dtype = torch.float64 if is_reduced else inputs.loss_dtype
    losses, statistics = [], []

    def turn(logits: Tensor, rows: slice) -> None:
        operands = (*inputs.of_loss(rows, total), loss_dtype, inputs.statistics)
        if any(inputs.needs):
            loss, row_max, log_sum, *others = _ops.forward_backward_(logits, *operands)
        else:
            loss, _, row_max, log_sum, _, _, *others = _ops.forward(logits, *operands)
        losses.append(loss)
        if inputs.statistics:
            statistics.append((row_max + log_sum, *others))

    gradients = _multiply(inputs, turn)
    loss = torch.stack(losses).sum() if is_reduced else torch.cat(losses)
    if inputs.statistics:
        rows = [torch.cat(parts) for parts in zip(*statistics, strict=True)]
    else:
        rows = _empty_statistics(inputs)
    return loss.to(inputs.loss_dtype), *rows, *gradients


@torch.library.custom_op("fused_xent::linear_backward", mutates_args=(), schema=_BACKWARD_SIGNATURE)
def backward(grad_loss, grad_lse, grad_entropy, *arguments) -> tuple[Tensor, ...]:
    """Return the gradients of hidden, weight and bias."""
    inputs = Inputs(*arguments)
    total = _total_weight(inputs)

    def turn(logits: Tensor, rows: slice) -> None:
        upstream = [
            grad if grad is None or grad.dim() == 0 else grad[rows].contiguous()
            for grad in (grad_loss, grad_lse, grad_entropy)
        ]
        operands = inputs.of_loss(rows, total)
        _, *saved, _ = _ops.forward(logits, *operands, torch.float32, grad_entropy is not None)
        target, weight, tokens, _, *options = operands
        _ops.backward_(*upstream, logits, target, weight, tokens, *saved, *options)

    return _multiply(inputs, turn)


def _empty_statistics(inputs: Inputs) -> list[Tensor]:
    """Return memory for lse, entropy and argmax; of no elements where they are not wanted."""
    shape = inputs.row_shape if inputs.statistics else [0]
    acc = _ops.accumulation_dtype(inputs.hidden.dtype)
    return [inputs.hidden.new_empty(shape, dtype=dtype) for dtype in (acc, acc, torch.int64)]


def _empty_gradients(inputs: Inputs) -> list[Tensor]:
    """Return memory for those of hidden, weight and bias; of no elements for those not needed."""
    tensors = (inputs.hidden, inputs.linear_weight, inputs.linear_bias)
    return [
        inputs.hidden.new_empty(tensor.shape if needed else [0])
        for tensor, needed in zip(tensors, inputs.needs, strict=True)
    ]


@forward.register_fake
def _fake_forward(*arguments) -> tuple[Tensor, ...]:
    inputs = Inputs(*arguments)
    shape = inputs.row_shape if inputs.reduction == _ops.REDUCTIONS["none"] else []
    loss = inputs.hidden.new_empty(shape, dtype=inputs.loss_dtype)
    return loss, *_empty_statistics(inputs), *_empty_gradients(inputs)


@backward.register_fake
def _fake_backward(grad_loss, grad_lse, grad_entropy, *arguments) -> tuple[Tensor, ...]:
    return tuple(_empty_gradients(Inputs(*arguments)))


def _total_weight(inputs: Inputs) -> Tensor | None:
    """Return by what the mean of all chunks divides; None for other reductions."""
    if inputs.reduction != _ops.REDUCTIONS["mean"]:
        return None
    if inputs.normalizer is not None:
        return inputs.normalizer
    weights = inputs.hidden.new_ones(inputs.row_shape, dtype=torch.float64)
    if inputs.token_weight is not None:
        weights = weights * inputs.token_weight
    if not inputs.target.is_floating_point():
        target = inputs.target.to(torch.int64)  # in fewer bits, ignore_index would be another
        left_out = (target == inputs.ignore_index) | (weights == 0)
        if inputs.weight is not None:
            weights = weights * inputs.weight[target.clamp(0, inputs.classes[0] - 1)]
        weights = weights.masked_fill(left_out, 0)
    return weights.sum()


def _multiply(inputs: Inputs, turn: Turn) -> tuple[Tensor, ...]:
    """Multiply the logits, let each be turned into its gradient, and multiply by those."""
    with torch.autocast(inputs.hidden.device.type, enabled=False):  # the dtypes are as they shall
        return (_by_classes if _is_by_classes(inputs) else _by_rows)(inputs, turn)


# ---- chunks of rows ----------------------------------------------------------------------------


def _chunks(inputs: Inputs) -> Iterator[slice]:
    """Yield chunks of almost equal sizes."""
    n_rows = inputs.hidden.shape[0]
    most = inputs.chunk_rows
    if most is None:
        is_cpu = inputs.hidden.device.type == "cpu"
        most, n_bytes = (CPU_ROWS, CPU_BYTES) if is_cpu else (GPU_ROWS, GPU_BYTES)
        row_bytes = inputs.linear_weight.shape[0] * inputs.hidden.element_size()
        most = max(1, min(most, n_bytes // row_bytes))
    n_chunks = -(-n_rows // most)
    size = -(-n_rows // n_chunks)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _by_rows(inputs: Inputs, turn: Turn) -> tuple[Tensor, ...]:
    hidden, linear_weight, linear_bias = inputs[:3]
    chunks = list(_chunks(inputs))
    gradients = _Gradients(inputs, len(chunks))
    memory = hidden.new_empty(chunks[0].stop, linear_weight.shape[0])
    for rows in chunks:
        logits = memory[: rows.stop - rows.start]
        _product(hidden[rows], linear_weight.t(), logits, linear_bias)
        turn(logits.view(-1, *inputs.classes), rows)
        gradients.add(logits, rows)
    return gradients.results()


class _Gradients:
    """The gradients of hidden, weight and bias, summed over chunks: in float32 of 16-bit ones."""

    def __init__(self, inputs: Inputs, n_chunks: int) -> None:
        self.hidden, self.linear_weight, _ = inputs[:3]
        sums = torch.float32 if self.hidden.element_size() == 2 else self.hidden.dtype
        dtypes = (None, sums if n_chunks > 1 else None, sums)
        self.grad_hidden, self.grad_weight, self.grad_bias = (
            torch.empty_like(gradient, dtype=dtype)
            for gradient, dtype in zip(_empty_gradients(inputs), dtypes, strict=True)
        )
        self.needs = inputs.needs

    def add(self, grad_logits: Tensor, rows: slice) -> None:
        """Add those of a chunk, the first of which starts at row 0."""
        needs_hidden, needs_weight, needs_bias = self.needs
        if needs_hidden:
            _product(grad_logits, self.linear_weight, self.grad_hidden[rows])
        if needs_weight:
            _add_product(self.grad_weight, grad_logits.t(), self.hidden[rows], rows.start == 0)
        if needs_bias:
            summed = grad_logits.sum(0, dtype=self.grad_bias.dtype)
            self.grad_bias = summed if rows.start == 0 else self.grad_bias.add_(summed)

    def results(self) -> tuple[Tensor, ...]:
        """Return them in the dtype of the tensors whose gradients they are."""
        gradients = (self.grad_hidden, self.grad_weight, self.grad_bias)
        return tuple(gradient.to(self.hidden.dtype) for gradient in gradients)


def _add_product(total: Tensor, one: Tensor, other: Tensor, is_first: bool) -> None:
    """Add ``one @ other``, or write it over what is there, not rounded before it is added."""
    if total.dtype == one.dtype:
        _product(one, other, total) if is_first else total.addmm_(one, other)
    elif total.is_cuda:
        aten = torch.ops.aten
        if is_first:
            aten.mm.dtype_out(one, other, total.dtype, out=total)
        else:
            aten.addmm.dtype_out(total, one, other, total.dtype, out=total)
    else:
        _slab_by_slab(one, other, total, 0 if is_first else 1)


# ---- products ----------------------------------------------------------------------------------


def _product(one: Tensor, other: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Write ``one @ other``, plus a bias of a shape that is expanded, summed in float32 or more."""
    if not _is_slow(one):
        torch.mm(one, other, out=out) if bias is None else torch.addmm(bias, one, other, out=out)
    elif bias is None:
        _slab_by_slab(one, other, out, 0)
    else:
        _slab_by_slab(one, other, out.copy_(bias), 1)


def _is_slow(matrix: Tensor) -> bool:
    """Whether torch multiplies such matrices element by element: 16-bit ones on most CPUs."""
    if matrix.device.type != "cpu" or matrix.element_size() != 2:
        return False
    name = "bf16" if matrix.dtype == torch.bfloat16 else "fp16"
    is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return is_supported is None or not is_supported()


def _slab_by_slab(one: Tensor, other: Tensor, out: Tensor, beta: int) -> None:
    """Write ``beta * out + one @ other``, of 16-bit matrices, by products in float32.

    The longest dimension is cut into slabs, so that nothing large is there in float32.
    """
    sizes = (one.shape[0], one.shape[1], other.shape[1])
    longest = max(range(3), key=sizes.__getitem__)
    slabs = _slabs(sizes[longest], 4 * (sum(sizes) - sizes[longest]))

    def product(one: Tensor, other: Tensor, out: Tensor, beta: int) -> Tensor:
        return torch.addmm(out.float(), one.float(), other.float(), beta=beta)

    if longest == 0:
        other = other.float()
        for slab in slabs:
            out[slab] = product(one[slab], other, out[slab], beta)
    elif longest == 2:
        one = one.float()
        for slab in slabs:
            out[:, slab] = product(one, other[:, slab], out[:, slab], beta)
    else:
        total = out
        for slab in slabs:
            total = product(one[:, slab], other[slab], total, beta if slab.start == 0 else 1)
        out.copy_(total)


def _slabs(length: int, item_bytes: int) -> Iterator[slice]:
    size = max(1, SLAB_BYTES // item_bytes)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


# ---- all rows, class by class ------------------------------------------------------------------


def _is_by_classes(inputs: Inputs) -> bool:
    """Whether that takes less memory than chunks of rows, or repeats less."""
    (n_rows, n_features), n_classes = inputs.hidden.shape, inputs.linear_weight.shape[0]
    size = inputs.hidden.element_size()
    # Beyond these, chunks take less: of 16-bit numbers, they need sums in float32.
    most = n_features * (3 if size == 2 else 1)
    return (
        inputs.hidden.device.type == "cpu"
        and inputs.needs[1]
        and inputs.chunk_rows is None
        and len(inputs.classes) == 1
        and n_rows * n_classes * size > FEW_BYTES
        and n_rows <= most
    )


def _by_classes(inputs: Inputs, turn: Turn) -> tuple[Tensor, ...]:
    """Compute with logits (K, n) of the first rows in the gradient's memory, others beside it.

    They lie at its end. Slab by slab from its start, the weight's gradient is written over them:
    up to class c that takes c * H elements, and the logits of later classes start at
    K * (H - n) + c * n, which is no less.
    """
    hidden, linear_weight, linear_bias = inputs[:3]
    (n_rows, n_features), n_classes = hidden.shape, linear_weight.shape[0]
    grad_hidden, grad_weight, grad_bias = _empty_gradients(inputs)
    n_first = min(n_rows, n_features)
    blocks = [grad_weight.view(-1)[n_classes * (n_features - n_first) :].view(n_classes, n_first)]
    if n_first < n_rows:
        blocks.append(hidden.new_empty(n_classes, n_rows - n_first))
    for start, block in zip((0, n_first), blocks, strict=False):
        rows = slice(start, start + block.shape[1])
        bias = None if linear_bias is None else linear_bias.unsqueeze(1)
        _product(linear_weight, hidden[rows].t(), block, bias)
        turn(block.t(), rows)
        if inputs.needs[0]:
            _product(block.t(), linear_weight, grad_hidden[rows])
    for slab in _slabs(n_classes, n_rows * hidden.element_size()):
        grad_logits = torch.cat([block[slab] for block in blocks], 1)
        if inputs.needs[2]:
            acc = _ops.accumulation_dtype(hidden.dtype)
            grad_bias[slab] = grad_logits.sum(1, dtype=acc)
        _product(grad_logits, hidden, grad_weight[slab])
    return grad_hidden, grad_weight, grad_bias

"""The public functions of selected log-probabilities."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic
from typing_extensions import Unpack

from . import _autograd, _linear_checks, _selected, linear
from ._linear_autograd import Layer
from ._options import (
    CALL_ERRORS,
    LinearSelectedOptions,
    ProcessGroup,
    SelectedOptions,
    check_flag,
    check_index,
    resolve,
    resolve_once,
)
from ._problem import (
    Problem,
    accumulation_dtype,
    check_dense,
    check_device,
    check_floating,
    is_labels_shape,
    labels_shape,
)
from ._torch_private import is_under_torch_func
from .reference import SelectedLogProbs


@overload
def selective_log_softmax(
    input: Tensor,
    index: Tensor,
    *,
    with_entropy: Literal[False] = False,
    **options: Unpack[SelectedOptions],
) -> Tensor: ...


@overload
def selective_log_softmax(
    input: Tensor,
    index: Tensor,
    *,
    with_entropy: Literal[True],
    **options: Unpack[SelectedOptions],
) -> SelectedLogProbs: ...


@overload
def selective_log_softmax(
    input: Tensor,
    index: Tensor,
    *,
    with_entropy: bool,
    **options: Unpack[SelectedOptions],
) -> Tensor | SelectedLogProbs: ...


def selective_log_softmax(
    input: Tensor,
    index: Tensor,
    *,
    dim: int = -1,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    num_classes: int | None = None,
) -> Tensor | SelectedLogProbs:
    """Log-probabilities of selected classes, from one pass over the logits.

    Equivalent to ``input.log_softmax(dim).gather(dim, index)``, or for one class in each row to
    ``input.log_softmax(dim).gather(dim, index.unsqueeze(dim)).squeeze(dim)``, but without storing
    the log-probabilities of all classes. The backward reads the logits once more and writes the
    gradient.

    The results are never rounded to 16 bits. In bfloat16, a log-probability of -8 is rounded by up
    to 0.03: the ratio of two policies' probabilities would be off by up to 3 %. As the probability
    approaches 1, log-probabilities keep their relative precision.

    Args:
        input: logits of any dimensions and strides; float32, float64, bfloat16 or float16.
        index: classes, int64 or int32. One class in each row: ``input``'s shape without dimension
            ``dim``. ``K`` classes in each row, ``K`` from 1 to 1024: ``input``'s shape with size
            ``K`` in dimension ``dim``. Classes may repeat. -100 is padding: its log-probability is
            0, without a gradient. Rows of padding only are left out: their logits may hold
            anything, their gradient and their entropy are 0.
        dim: the dimension of the classes.
        softcap: cap of the logits, as in ``fused_xent.cross_entropy``; None: no cap.
        logit_scale: factor of the logits: 1 / temperature.
        with_entropy: return the entropy of each row too.
        inplace_backward: the backward writes the gradient over the logits: see
            ``fused_xent.cross_entropy``.
        process_group: the processes that the classes are split over: ``input`` has this rank's
            classes, and ``index`` classes of all ranks, the same on each. See
            ``fused_xent.cross_entropy``.
        vocab_start: this rank's first class.
        num_classes: the number of classes of all ranks.

    With ``process_group``, the forward gathers ``2 + K`` numbers of each row from each rank, one
    more with the entropy, and results have the same bits on all ranks. The backward needs no
    communication. Gradients of gradients are refused.

    Kernels compute results and gradient. Torch operations compute second derivatives, and
    everything under ``torch.func.vmap`` and forward-mode differentiation.

    Returns:
        Log-probabilities of ``index``'s shape, float64 for float64 logits and float32 for all
        others. With ``with_entropy``, a named tuple ``(log_probs, entropy)``. Entropies,
        ``-sum_j p[j] * log p[j]``, have the rows' shape, and are 0 for rows of padding. Both are
        differentiable.

    Raises:
        IndexError: an index is out of range and not padding. Nothing has been written. On CUDA
            devices the check would wait for the GPU: there the row's results and gradient are NaN
            instead, as under ``torch.func.vmap``. In compiled code the message calls the index
            ``target`` or ``target_indices``.
        ValueError: a shape, dtype, device or option does not fit; the message names it.
        TypeError: an argument has the wrong type.
        RuntimeError: ``inplace_backward`` cannot overwrite these logits.
    """
    options: dict[str, Any] = {
        "dim": dim,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "inplace_backward": inplace_backward,
    }
    of_shard: dict[str, Any] = {
        "process_group": process_group,
        "vocab_start": vocab_start,
        "num_classes": num_classes,
    }
    if has_torch_function_variadic(input, index):
        options |= {"with_entropy": with_entropy, **of_shard}
        return _overridden(selective_log_softmax, (input, index), input, index, **options)
    is_whole = process_group is None and vocab_start is None and num_classes is None
    is_default = with_entropy is False and inplace_backward is False and dim is not None
    if is_default and is_whole and _autograd.is_plain(input, index, None, None, None, None):
        try:
            settings = resolve_once(input.dim(), False, *_keys(input.dtype, options))
            return _selected.evaluate_plain(input, index, settings)
        except CALL_ERRORS:
            pass  # below, everything is checked, and the wrong argument is named
    check_dense("input", input)
    check_floating("input", input)
    problem = _prepare(input, index, with_entropy, options)
    return _results(_evaluate(problem) if is_whole else _of_shard(problem, **of_shard))


@overload
def linear_selective_log_softmax(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    with_entropy: Literal[False] = False,
    **options: Unpack[LinearSelectedOptions],
) -> Tensor: ...


@overload
def linear_selective_log_softmax(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    with_entropy: Literal[True],
    **options: Unpack[LinearSelectedOptions],
) -> SelectedLogProbs: ...


@overload
def linear_selective_log_softmax(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    with_entropy: bool,
    **options: Unpack[LinearSelectedOptions],
) -> Tensor | SelectedLogProbs: ...


def linear_selective_log_softmax(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    num_classes: int | None = None,
    sequence_parallel: bool = False,
    reduce_grad_hidden: bool = True,
) -> Tensor | SelectedLogProbs:
    """Log-probabilities of selected classes of the logits ``input @ linear_weight.T``.

    Equivalent to ``fused_xent.selective_log_softmax`` of ``torch.nn.functional.linear``,
    but the logits are never all stored: the forward computes them one chunk of rows at a time, and
    the backward computes them again. This takes four matrix products instead of three. Besides the
    gradients, it needs the memory of one chunk.

    For next tokens pass ``input[:, :-1]`` and ``labels[:, 1:]``. Rows of padding take part in the
    matrix products: their hidden states must be finite. To skip them, select the other rows first.

    Args:
        input: hidden states, ``(H,)``, ``(N, H)`` or with any more dimensions of rows, such as
            ``(B, T, H)``; float32, float64, bfloat16 or float16.
        linear_weight: ``(C, H)`` for ``C`` classes; ``input``'s dtype, or any under autocast.
        index: classes, int64 or int32: the rows' shape, such as ``(B, T)``, or with ``K`` classes
            in each row, ``(B, T, K)``. -100 is padding.
        linear_bias: ``(C,)``, of ``linear_weight``'s dtype.
        softcap: cap of the logits; None: no cap.
        logit_scale: factor of the logits: 1 / temperature.
        with_entropy: return the entropy of each row too.
        logits_dtype: dtype of the logits. None: that of ``input``, as in a linear layer. With
            16-bit ``input``, ``torch.float32`` keeps the logits in float32.
        chunk_rows: number of rows in a chunk of logits. None: as in
            ``fused_xent.linear_cross_entropy``.
        process_group: the processes that the classes are split over: ``linear_weight`` and
            ``linear_bias`` have this rank's classes. This and the following arguments are those of
            ``fused_xent.linear_cross_entropy``.
        vocab_start: this rank's first class.
        num_classes: the number of classes of all ranks.
        sequence_parallel: ``input`` has this rank's rows only, ``index`` and the results all rows.
        reduce_grad_hidden: the gradient of ``input`` is the sum over the ranks. False: it is this
            rank's part.

    For everything else, see ``fused_xent.selective_log_softmax``. All logits are stored for
    gradients of gradients, and under ``torch.func`` and forward-mode differentiation.

    Returns:
        Log-probabilities of ``index``'s shape, float64 for float64 logits and float32 for all
        others. With ``with_entropy``, a named tuple ``(log_probs, entropy)``.

    Raises:
        IndexError: an index is out of range and not padding. On CUDA devices the check would wait
            for the GPU: there results and gradients are NaN instead.
        ValueError: a shape, dtype, device or option does not fit; the message names it.
        TypeError: an argument has the wrong type.
    """
    tensors = (input, linear_weight, index, linear_bias)
    options: dict[str, Any] = {"softcap": softcap, "logit_scale": logit_scale}
    of_shard: dict[str, Any] = {
        "process_group": process_group,
        "vocab_start": vocab_start,
        "num_classes": num_classes,
        "sequence_parallel": sequence_parallel,
        "reduce_grad_hidden": reduce_grad_hidden,
    }
    if has_torch_function_variadic(*tensors):
        options |= {"linear_bias": linear_bias, "logits_dtype": logits_dtype, **of_shard}
        options |= {"chunk_rows": chunk_rows, "with_entropy": with_entropy}
        return _overridden(linear_selective_log_softmax, tensors, *tensors[:3], **options)
    _linear_checks.check_linear(input, linear_weight, linear_bias)
    if linear_weight.dim() != 2:
        raise ValueError(
            "linear_weight must have shape (C, H) for C classes and H features, got "
            f"{tuple(linear_weight.shape)}"
        )
    chunk_rows = _linear_checks.check_chunk_rows(chunk_rows, None)
    layer = Layer(input, linear_weight, linear_bias).autocast()
    dtype = _linear_checks.check_dtypes(layer, logits_dtype)
    split = _linear_checks.split_of(input, linear_weight, **of_shard)
    rows, n_classes = _linear_checks.rows_of(input, split), linear_weight.shape[0]
    # Stands in for the logits: their shape, dtype and device, but one element of memory.
    logits = layer.hidden.new_zeros((), dtype=dtype).expand(*rows, n_classes)
    problem = _prepare(logits, index, with_entropy, {"dim": len(rows), **options})
    _selected.check_range(index, n_classes if split is None else split.shard.n_classes)
    if split is None and _needs_all_logits(problem, chunk_rows):
        return _results(_evaluate(problem._replace(logits=layer.logits(dtype))))
    n_labels = index.shape[-1] if index.dim() > len(rows) else 1
    flat = problem._replace(
        target=index.reshape(math.prod(rows), n_labels),
        settings=problem.settings._replace(dim=1),
    )
    n_hidden = math.prod(input.shape[:-1])
    layer = layer._replace(hidden=layer.hidden.reshape(n_hidden, input.shape[-1]))
    if split is None:
        log_probs, *entropy = _selected.evaluate_linear(layer, flat, chunk_rows)
    else:
        from . import _parallel_selected  # needs torch.distributed: see functional

        log_probs, *entropy = _parallel_selected.evaluate_linear(layer, flat, chunk_rows, split)
    return _results((log_probs.view(index.shape), *(x.view(rows) for x in entropy)))


def _overridden(
    function: Any, tensors: Any, *arguments: Any, **options: Any
) -> Tensor | SelectedLogProbs:
    """Call the ``__torch_function__`` of a tensor subclass."""
    results: Any = handle_torch_function(function, tensors, *arguments, **options)
    return results  # type: ignore[no-any-return]


def _keys(dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, ...]:
    """Return the names of a loss's options, and after them their values."""
    names, acc = ("reduction", "loss_dtype", *options), accumulation_dtype(dtype)
    return names, "none", acc, *options.values()


def _evaluate(problem: Problem) -> tuple[Tensor, ...]:
    """Compute the results; an error of the range names ``index``, not the operators' arguments."""
    if torch.compiler.is_compiling():
        return _selected.evaluate(problem)
    try:
        return _selected.evaluate(problem)
    except IndexError:
        _selected.check_range(problem.target, problem.logits.shape[problem.settings.dim])
        raise


def _of_shard(
    problem: Problem,
    process_group: ProcessGroup | None,
    vocab_start: int | None,
    num_classes: int | None,
) -> tuple[Tensor, ...]:
    """Compute the results where the logits are a shard of the classes."""
    from . import _parallel, _parallel_selected  # need torch.distributed: see functional

    logits, index, dim = problem.logits, problem.target, problem.settings.dim
    shard, n_own = _parallel.shard_of(logits.shape[dim], process_group, vocab_start, num_classes)
    _parallel.check_supported(logits)
    _selected.check_range(index, shard.n_classes)
    if n_own < logits.shape[dim]:  # the others are padding
        problem = problem._replace(logits=logits.narrow(dim, 0, n_own))
    if index.dim() == logits.dim():
        return _parallel_selected.evaluate(problem, shard)
    problem = problem._replace(target=index.unsqueeze(dim))
    log_probs, *entropy = _parallel_selected.evaluate(problem, shard)
    return log_probs.squeeze(dim), *entropy


def _results(found: tuple[Tensor, ...]) -> Tensor | SelectedLogProbs:
    return SelectedLogProbs(*found) if len(found) > 1 else found[0]


def _needs_all_logits(problem: Problem, chunk_rows: int | None) -> bool:
    """Return True if autograd must differentiate through the logits, or if chunks are slower."""
    if problem.logits.numel() == 0 or _autograd.is_for_torch(problem):
        return True
    if torch.compiler.is_compiling():
        return False
    is_few = chunk_rows is None and problem.logits.numel() <= linear.FEW_LOGITS
    return is_few or is_under_torch_func()


# ---- checks --------------------------------------------------------------------------------------


def _prepare(input: Tensor, index: Tensor, with_entropy: bool, options: dict[str, Any]) -> Problem:
    """Check the arguments; return a problem whose target is the index."""
    check_flag("with_entropy", with_entropy)
    check_index("dim", options["dim"])  # the loss has a default for None
    names, *values = _keys(input.dtype, options)
    settings = resolve(input.dim(), with_entropy, dict(zip(names, values, strict=True)))
    _check_index(index, input, settings.dim)
    return Problem(input, index, None, None, None, None, settings)


def _check_index(index: Tensor, input: Tensor, dim: int) -> None:
    """Check an index's layout, device, dtype and shape."""
    check_dense("index", index)
    check_device("index", index, input)
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"index must be int64 or int32, got {index.dtype}")
    before, after = input.shape[:dim], input.shape[dim + 1 :]
    if index.shape != before + after and not is_labels_shape(index.shape, before, after):
        raise ValueError(
            f"index must have shape {tuple(before + after)} (one class in each row) or "
            f"{labels_shape(before, after)} got {tuple(index.shape)}"
        )

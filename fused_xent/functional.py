"""The public loss functions: check the arguments and make one problem of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic
from typing_extensions import Unpack

from ._autograd import evaluate, evaluate_plain, is_plain
from ._options import (
    CALL_ERRORS,
    OF_SHARD,
    ProcessGroup,
    StatisticsOptions,
    check_names,
    resolve_once,
)
from ._problem import Arguments, Problem, has_dtensor, prepare
from ._torch_private import legacy_reduction
from .reference import CrossEntropyStatistics

T = TypeVar("T")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dim: int | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    target_indices: Tensor | None = None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    focal_gamma: float = 0.0,
    loss_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """Softmax cross-entropy, equivalent to ``torch.nn.functional.cross_entropy``.

    With ``p = softmax(z)`` over the ``C`` classes and class weights ``w`` (1 without ``weight``),
    the loss of a row with class index ``y`` is, for label smoothing ``e``,

        c = -(1 - e) * w[y] * log p[y] - e / C * sum_j w[j] * log p[j]

    and for probabilities ``t``

        c = -sum_j w[j] * ((1 - e) * t[j] + e / C) * log p[j]

    ``mean`` divides the sum by the sum of ``w[y]`` over the rows that are not ignored, or for
    probabilities by the number of rows: torch's rules. A class of probability or weight 0 adds 0
    even where its logit is ``-inf`` (torch: NaN).

    Beyond torch, ``z`` are the logits ``x`` themselves or, with ``logit_scale`` or ``softcap``
    (Gemma 2, https://arxiv.org/abs/2408.00118),

        z = softcap * tanh(logit_scale * x / softcap)

    and the loss of a row is, with ``lse = log sum_j exp z[j]``,

        token_weight * ((1 - P)^focal_gamma * c + lse_square_scale * lse^2)

    The first term is the focal loss (https://arxiv.org/abs/1708.02002). ``P`` is ``p[y]``, or for
    probabilities and for smoothed labels ``exp(-c / Q)``, with ``Q`` the sum of what multiplies the
    ``-log p[j]`` in ``c``. The second term is the z-loss (https://arxiv.org/abs/2204.02311).

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, of any strides; float32,
            float64, bfloat16 or float16.
        target: class indices of ``input``'s shape without ``C`` (int64, int32 or uint8), or
            probabilities of ``input``'s shape (floating; differentiable), or those of
            ``target_indices``.
        weight: one weight per class, ``(C,)``, of any floating-point dtype.
        size_average: deprecated in torch, see ``reduction``.
        ignore_index: rows with this class index have loss and gradient 0 and do not count in
            ``mean``; their logits may hold anything. Any integer. With probabilities it has no
            effect and must be negative: use ``token_weight`` to leave rows out.
        reduce: deprecated in torch, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: in [0, 1].
        dim: the dimension of the classes. None: torch's rule above. ``-1`` takes ``(B, T, C)``;
            torch's rule would read that as ``T`` classes.
        token_weight: one weight a row, of the unreduced loss's shape; any real numbers. A row of
            weight 0 is left out as if it were ignored, whatever its logits, target or
            probabilities, and out of the statistics. ``mean`` divides by the sum of class weight
            times token weight (for probabilities, of token weight). If weights have both signs,
            that sum may be close to 0: pass a ``normalizer``.
        normalizer: the divisor of ``mean``, a finite number or a tensor of one number. For one part
            of a batch (a micro-batch, or the rows of one process) pass the divisor of the whole
            batch: without weights, its number of rows that are not ignored. A mean by 0 is NaN.
        target_indices: sparse labels: the class of each probability in ``target``, int64 or int32.
            Both have ``input``'s shape with ``K`` in the place of ``C``, ``K`` from 1 to 1024:
            ``(N, K)`` for logits ``(N, C)``, ``(N, K, d1, ..., dk)`` for ``(N, C, d1, ..., dk)``.
            All other classes have probability 0. The loss is that of the dense probabilities
            ``torch.zeros(input.shape).scatter_add(dim, target_indices, target)``, which are never
            stored. The probabilities of a repeated class are added. They need not sum to 1, and are
            not normalized. An index equal to ``ignore_index``, which may be any integer here, is
            padding: its probability is not used, and may be NaN. A row that is all padding still
            counts in ``mean``, and has a loss with ``label_smoothing`` or z-loss. To leave a row
            out, give it a ``token_weight`` of 0. Probabilities of any floating-point dtype are used
            in float32, or in float64 for float64 logits.
        lse_square_scale: factor of the z-loss; class weights do not apply to it; in [0, 1e30].
        softcap: a number in [1e-30, 1e30]; None: no cap.
        logit_scale: a number in [1e-30, 1e30]. To learn a scale, multiply the logits by it.
        focal_gamma: in [0, 1e30]; 0: plain cross-entropy.
        loss_dtype: dtype of the loss. None: torch's rule, which is the dtype of ``input`` (promoted
            with that of probabilities), or float32 under autocast. Sums are always computed in
            float32 or float64.
        inplace_backward: the backward writes the gradient over the logits. It needs no memory for
            the gradient and half the memory traffic. Nothing may need the logits after the
            backward; autograd raises its own error if it needs them. Compiled code overwrites only
            logits that it has computed itself, as a whole, and copies them first if it returns
            them.
        grad_in_forward: the forward writes the gradient over the logits. The backward multiplies it
            by the upstream gradient if that is not 1: in total, one read and one write of the
            logits. Nothing may need the logits after the forward; autograd raises an error if a
            gradient flows through another use of them, but ``retain_grad()`` and hooks that are
            registered after the loss get None. Compiled code cannot raise that error: there
            this option means ``inplace_backward``.

        process_group: the processes that the classes are split over. ``input`` has the classes of
            this rank, in the order of the ranks; ``weight`` and probabilities of all classes are
            split like it. Class indices, also those of ``target_indices``, count the classes of all
            ranks. They and all values of rows are the same on each rank. All ranks must call. One
            all-gather in the forward sends 12 bytes of each row, up to 8 more with weights,
            probabilities or smoothing, and up to 16 more for statistics. The backward needs no
            communication. All ranks get the same bits.
        vocab_start: this rank's first class, if the ranks have different numbers of classes. A rank
            may have none. Needs ``num_classes``. None: all ranks have as many as this one.
        num_classes: the number of classes of all ranks. Classes from there on are padding: they
            have probability and gradient 0, whatever their logits.

    Sparse labels are the top classes of a teacher, or the two labels of an image that mixup or
    CutMix has mixed. Then ``K`` is 2, and the probabilities are ``[lam, 1 - lam]``:

        lam = 0.7
        mixed = torch.randperm(len(labels))
        logits = model(lam * images + (1 - lam) * images[mixed])
        classes = torch.stack([labels, labels[mixed]], 1)
        p = torch.tensor([lam, 1 - lam]).expand(len(labels), 2)
        loss = fused_xent.cross_entropy(logits, p, target_indices=classes)

    The placements of an ``input`` that is a DTensor say what each process computes. A mesh
    dimension that shards the classes splits the vocabulary, as ``process_group`` does. One that
    shards rows leaves each process its own: the loss is sharded too or, where it is a mean or a
    sum, ``Partial``: ``loss.full_tensor()`` adds it up. A mean divides by the weights of the rows
    of all processes. Other tensors are DTensors on the same mesh, or plain tensors that all
    processes have as a whole. ``grad_in_forward`` then means ``inplace_backward``.

    ``inplace_backward`` and ``grad_in_forward`` need an ``input`` that is not a leaf of the graph.
    They have no effect if no gradient is recorded. ``grad_in_forward`` refuses float16: without a
    loss scale, gradients underflow there.

    With ``process_group``, ``grad_in_forward`` acts as ``inplace_backward``. Refused are gradients
    of ``weight``, ``token_weight``, ``normalizer`` and sparse labels, gradients of gradients, and
    ``torch.func``.

    Kernels compute the gradient of ``input``. Torch operations compute those of probabilities,
    ``weight``, ``token_weight`` and ``normalizer``, second derivatives, and everything under
    ``torch.func.vmap`` and forward-mode differentiation.

    Returns:
        A scalar, or with ``"none"`` one loss per row, in ``input``'s shape without ``C``.

    Raises:
        IndexError: a target, or one of ``target_indices``, is out of range and not
            ``ignore_index``. Nothing has been written. On CUDA devices the check would wait for
            the GPU: there the row's loss and gradient are NaN instead, as under
            ``torch.func.vmap``.
        ValueError: a shape, dtype, device or option does not fit; the message names it.
        TypeError: an argument has the wrong type.
        RuntimeError: ``inplace_backward`` or ``grad_in_forward`` cannot overwrite these logits.
    """
    tensors = (input, target, weight, token_weight, normalizer, target_indices)
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "dim": dim,
        "lse_square_scale": lse_square_scale,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "focal_gamma": focal_gamma,
        "loss_dtype": loss_dtype,
        "inplace_backward": inplace_backward,
        "grad_in_forward": grad_in_forward,
    }
    shard = (process_group, vocab_start, num_classes)
    if has_torch_function_variadic(*tensors):
        legacy = {"size_average": size_average, "reduce": reduce}
        of_shard = dict(zip(OF_SHARD, shard, strict=True))
        return _overridden(cross_entropy, tensors, **legacy, **options, **of_shard)
    if size_average is not None or reduce is not None:
        options["reduction"] = legacy_reduction(size_average, reduce)
    is_whole = shard == (None, None, None)
    if is_whole and is_plain(*tensors) and not (inplace_backward or grad_in_forward):
        try:
            settings = resolve_once(input.dim(), False, tuple(options), *options.values())
            return evaluate_plain(input, target, settings)
        except CALL_ERRORS:
            pass  # prepare() checks everything and names the wrong argument
    return _evaluate(tensors, False, options, shard)[0]


def cross_entropy_with_statistics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    target_indices: Tensor | None = None,
    **options: Unpack[StatisticsOptions],
) -> CrossEntropyStatistics:
    """Return the loss and statistics of each row, from one pass over the logits.

    Takes the arguments of ``fused_xent.cross_entropy``, all but the first three by name. The
    statistics have the shape of the unreduced loss. They are float64 for float64 logits and float32
    for all others. Rows that are ignored or have token weight 0 get 0, ``argmax`` -1 and
    ``correct`` False: ``correct.sum() / (argmax >= 0).sum()`` is the accuracy of all other rows.

    Returns:
        A named tuple. Its fields are

        - ``loss``: that of ``fused_xent.cross_entropy``, with all of its terms.
        - ``lse``: ``log sum_j exp z[j]``; differentiable.
        - ``z_loss``: the row's ``lse_square_scale * lse^2`` times its token weight: a term of its
            loss; differentiable.
        - ``entropy``: ``-sum_j p[j] * log p[j]``; differentiable.
        - ``argmax``: int64, the first class with the largest ``z[j]``; NaN counts as largest.
            With a ``softcap``, logits above about nine times the cap are equal.
        - ``correct``: bool, True if ``argmax`` is the target, or the argmax of the probabilities
            (with ``target_indices``, of the sums for each class).

        With ``grad_in_forward`` in eager mode, a gradient through any field but ``loss`` raises an
        error.
    """
    check_names("cross_entropy_with_statistics", options, _SIGNATURE.parameters)
    tensors = (input, target, weight, token_weight, normalizer, target_indices)
    if has_torch_function_variadic(*tensors):
        return _overridden(cross_entropy_with_statistics, tensors, **options)
    given: dict[str, Any] = {**options}
    legacy = given.pop("size_average", None), given.pop("reduce", None)
    if legacy != (None, None):
        given["reduction"] = legacy_reduction(*legacy)
    shard = tuple(given.pop(name, None) for name in OF_SHARD)
    return cast(CrossEntropyStatistics, _evaluate(tensors, True, given, shard))


def _evaluate(
    tensors: Arguments, statistics: bool, options: dict[str, Any], shard: tuple[Any, ...]
) -> tuple[Tensor] | CrossEntropyStatistics:
    """Return the loss, or all statistics, of all classes or of a shard of them."""
    if has_dtensor(*tensors):
        from . import _dtensor

        return _dtensor.evaluate(tensors, statistics, options, shard)
    if shard == (None, None, None):
        return evaluate(prepare(*tensors, statistics, options))
    from . import _parallel  # needs torch.distributed, which some builds of torch lack

    return _parallel.evaluate(tensors, statistics, options, *shard)


def _overridden(function: Callable[..., T], tensors: Arguments, **options: Any) -> T:
    """Call the ``__torch_function__`` of a tensor subclass."""
    input, target, *others = tensors
    named = dict(zip(Problem._fields[2:-1], others, strict=True))
    result: T = handle_torch_function(function, tensors, input, target, **named, **options)
    return result


_SIGNATURE = inspect.signature(cross_entropy)
cross_entropy_with_statistics.__signature__ = _SIGNATURE.replace(  # type: ignore[attr-defined]
    parameters=[
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) if i > 2 else parameter
        for i, parameter in enumerate(_SIGNATURE.parameters.values())
    ],
    return_annotation=CrossEntropyStatistics,
)

"""The loss as users call it: its arguments, and which implementation runs."""

import inspect

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _ops
from ._autograd import CrossEntropyGradInForward, Options, Tensors, by_torch, evaluate
from ._checks import check_number, is_autocast
from .reference import CrossEntropyStatistics


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
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    focal_gamma: float = 0.0,
    loss_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy, equivalent to :func:`torch.nn.functional.cross_entropy`.

    With :math:`p = \mathrm{softmax}(z)` over the ``C`` classes and class weights ``w`` (1 without
    ``weight``), the loss of a row with class index ``y`` is, for label smoothing ``e``,

    .. math:: c = -(1 - e)\, w_y \log p_y - \frac{e}{C} \sum_j w_j \log p_j

    and for probabilities ``t``, :math:`c = -\sum_j w_j\, ((1 - e)\, t_j + e / C) \log p_j`.
    ``mean`` divides the sum by the sum of ``w_y`` over the rows that are not ignored, or for
    probabilities by the number of rows: torch's rules. A class of probability or weight 0 adds 0
    even where its logit is ``-inf`` (torch: NaN).

    Beyond torch, ``z`` are the logits ``x`` themselves or, with ``logit_scale`` or ``softcap``,
    :math:`z = \mathrm{softcap} \tanh(\mathrm{logit\_scale}\, x / \mathrm{softcap})` (Gemma 2,
    https://arxiv.org/abs/2408.00118), and the loss of a row is, with
    :math:`\mathrm{lse} = \log \sum_j \exp z_j`,

    .. math:: \mathrm{token\_weight}\, \left((1 - P)^{\mathrm{focal\_gamma}}\, c
              + \mathrm{lse\_square\_scale}\; \mathrm{lse}^2\right)

    where :math:`P` is :math:`p_y`, or for probabilities and for smoothed labels
    :math:`\exp(-c / Q)` with :math:`Q` the sum of what multiplies the :math:`-\log p_j` in ``c``:
    the focal loss (https://arxiv.org/abs/1708.02002). The other term is the z-loss
    (https://arxiv.org/abs/2204.02311).

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, of any strides; float32,
            float64, bfloat16 or float16.
        target: class indices of ``input``'s shape without ``C`` (int64, int32 or uint8), or
            probabilities of ``input``'s shape (floating; differentiable).
        weight: one weight a class, ``(C,)``, of ``input``'s dtype; of any under autocast or beside
            probabilities.
        size_average: deprecated in torch, see ``reduction``.
        ignore_index: rows of this class index have loss and gradient 0, do not count in ``mean``,
            and their logits may hold anything. Any integer. Probabilities have no such rows, so
            that it must be negative beside them: see ``token_weight``.
        reduce: deprecated in torch, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: in [0, 1].
        dim: the dimension of the classes, where it is not torch's: ``-1`` takes ``(B, T, C)``,
            of which probabilities would else be taken for those of ``T`` classes.
        token_weight: one weight a row, of the unreduced loss's shape; any real numbers. A row of
            weight 0 is left out as if it were ignored, whatever its logits, target or
            probabilities, and out of the statistics. ``mean`` divides by the sum of class weight
            times token weight (for probabilities, of token weight); of weights of either sign,
            which may almost cancel each other, pass a ``normalizer``.
        normalizer: what ``mean`` divides the sum by instead, a number that is finite and not 0, or
            a tensor of shape ``()``: where this is a part of a batch, what the whole batch would be
            divided by, without weights the number of its rows that are not ignored.
        lse_square_scale: of the z-loss, which no class weight multiplies; in [0, 1e30].
        softcap: a number in [1e-30, 1e30]; None: no cap.
        logit_scale: a number in [1e-30, 1e30]. To learn a scale, multiply the logits by it.
        focal_gamma: in [0, 1e30]; 0: plain cross-entropy.
        loss_dtype: dtype of the loss. None is torch's rule: that of ``input``, or that to which it
            is promoted with probabilities; float32 under autocast. Sums are float32 or better at
            any.
        inplace_backward: the backward writes the gradient over the logits: no memory for it, half
            the traffic of a fresh one. The logits must not be needed after the backward; autograd
            raises its own error where it needs them. A compiled function must not return them:
            torch's compiler then fails with an assertion that a node is invalid but is output.
        grad_in_forward: the forward writes the gradient over the logits, and the backward only
            multiplies it by the upstream gradient, if that is not 1: one read and one write of the
            logits in all. The logits must not be needed after the forward; autograd raises an error
            where a gradient is to flow through another use of them. In compiled code, which cannot
            raise that error, this is ``inplace_backward``.

    The last two need ``input`` to be computed, not a leaf of the graph; where no gradient is
    recorded they change nothing. ``grad_in_forward`` refuses float16, whose range a gradient needs
    a loss scale to fit.

    Gradients flow to ``input`` and probabilities from the kernels, and to ``weight``,
    ``token_weight`` and ``normalizer``, second derivatives, and under ``torch.func.vmap`` and
    forward-mode differentiation by torch operations.

    Returns:
        A scalar, or for ``"none"`` a loss a row, of ``input``'s shape without ``C``.

    Raises:
        IndexError: a target is no class and not ``ignore_index``; nothing has been written by then.
            On CUDA devices, where that would wait for the GPU, the row's loss and gradient are NaN.
        ValueError: a shape, dtype, device or option that does not fit; the message names it.
        TypeError: an argument of the wrong type.
        RuntimeError: ``inplace_backward`` or ``grad_in_forward`` with logits that they cannot
        overwrite.
    """
    tensors = (input, target, weight, token_weight, normalizer)
    options = {
        "size_average": size_average,
        "ignore_index": ignore_index,
        "reduce": reduce,
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
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            cross_entropy,
            tensors,
            input,
            target,
            weight=weight,
            token_weight=token_weight,
            normalizer=normalizer,
            **options,
        )
    return _evaluate(*tensors, statistics=False, **options)[0]


def cross_entropy_with_statistics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    **options,
) -> CrossEntropyStatistics:
    """Return what one pass over the logits tells: the loss, and statistics of each row.

    Takes the arguments of :func:`fused_xent.cross_entropy`, all but the first three by name. The
    statistics have the shape of the unreduced loss, and float64 for float64 logits and float32 for
    others. Rows that are ignored or of token weight 0 are not read, and have 0, ``argmax`` -1 and
    ``correct`` False: ``correct.sum() / (argmax >= 0).sum()`` is the accuracy of the others.

    Returns:
        A named tuple:

        - ``loss``: as of :func:`fused_xent.cross_entropy`, z-loss and all.
        - ``lse``: :math:`\\log \\sum_j \\exp z_j`; differentiable.
        - ``z_loss``: the row's part of the loss that is ``lse_square_scale * lse^2``, times its
          token weight; differentiable.
        - ``entropy``: :math:`-\\sum_j p_j \\log p_j`; differentiable.
        - ``argmax``: int64, the first class of the greatest :math:`z_j`, NaN above all numbers.
          Under a ``softcap``, logits of more than about nine times that are equal.
        - ``correct``: bool, whether that is the target, or the argmax of the probabilities.

        With ``grad_in_forward``, a gradient through any but ``loss`` raises an error, unless in
        compiled code, where that is ``inplace_backward``.
    """
    _checks.check_names("cross_entropy_with_statistics", options, _NAMES)
    tensors = (input, target, weight, token_weight, normalizer)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            cross_entropy_with_statistics,
            tensors,
            input,
            target,
            weight=weight,
            token_weight=token_weight,
            normalizer=normalizer,
            **options,
        )
    return _evaluate(*tensors, statistics=True, **options)


def _evaluate(
    *tensors,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    **options,
) -> tuple:
    """Check the arguments and compute; without statistics, only the loss of these is meant."""
    _checks.check_flag("inplace_backward", inplace_backward)
    _checks.check_flag("grad_in_forward", grad_in_forward)
    tensors, options = prepare(*tensors, **options)
    tensors = with_logits(tensors, tensors.logits)
    if inplace_backward or grad_in_forward:
        _checks.check_overwritable(
            tensors.logits, tensors.target, options.dim, inplace_backward, grad_in_forward
        )
    return compute(tensors, options, inplace_backward, grad_in_forward)


def prepare(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | float | None,
    *,
    statistics: bool,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dim: int | None = None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    focal_gamma: float = 0.0,
    loss_dtype: torch.dtype | None = None,
) -> tuple[Tensors, Options]:
    """Check the arguments, of which input's values are not looked at, and put them in order."""
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    ignore_index = _checks.check_index("ignore_index", ignore_index)
    dim = _checks.check_input(input, dim)
    _checks.check_target(input, target, dim, ignore_index)
    _checks.check_weight(input, target, dim, weight)
    _checks.check_token_weight(input, dim, token_weight)
    _checks.check_reduction(reduction)
    _checks.check_normalizer(normalizer, reduction)
    _checks.check_loss_dtype(loss_dtype)
    target, result_dtype = _promote(input, target, weight)
    options = Options(  # at most 1e30: the kernels' float32 has a little more
        dim,
        ignore_index,
        check_number("label_smoothing", label_smoothing, 0, 1),
        check_number("lse_square_scale", lse_square_scale, 0, 1e30),
        check_number("focal_gamma", focal_gamma, 0, 1e30),
        None if softcap is None else check_number("softcap", softcap, 1e-30, 1e30),
        check_number("logit_scale", logit_scale, 1e-30, 1e30),
        reduction,
        loss_dtype or result_dtype,
        statistics,
    )
    _checks.check_transform(options.softcap, options.logit_scale)
    if token_weight is not None:
        dtype = torch.float64 if target.dtype == torch.float64 else input.dtype
        token_weight = token_weight.to(_ops.accumulation_dtype(dtype)).contiguous()
    if normalizer is not None:
        normalizer = _as_scalar(normalizer, input)
    return Tensors(input, target, weight, token_weight, normalizer), options


def with_logits(tensors: Tensors, logits: Tensor) -> Tensors:
    """Return what has been prepared with these logits, promoted as their target is."""
    is_promoted = tensors.target.dtype == torch.float64
    return tensors._replace(logits=logits.to(torch.float64) if is_promoted else logits)


def compute(
    tensors: Tensors,
    options: Options,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
) -> tuple:
    """Compute the loss, and with statistics all of them, of what has been prepared."""
    if is_for_torch(tensors, options):
        return _by_torch(tensors, options)
    tensors = for_kernels(tensors)
    if grad_in_forward and torch.is_grad_enabled() and tensors.logits.requires_grad:
        if not torch.compiler.is_compiling():
            return _grad_in_forward(tensors, options)
        inplace_backward = True  # compiled code cannot tell whether the logits are used later
    loss, *results = evaluate(tensors, options, inplace_backward)
    if not options.statistics:
        return (loss,)
    *_, entropy, argmax, lse = results
    return with_statistics(tensors, options, loss, lse, entropy, argmax)


def for_kernels(tensors: Tensors) -> Tensors:
    """Return the class weights in the type of the kernels' sums."""
    if tensors.weight is None:
        return tensors
    acc = _ops.accumulation_dtype(tensors.logits.dtype)
    return tensors._replace(weight=tensors.weight.to(acc).contiguous())


_PARAMETERS = inspect.signature(cross_entropy).parameters.values()
_NAMES = {parameter.name for parameter in _PARAMETERS}
cross_entropy_with_statistics.__signature__ = inspect.Signature(
    [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) if i > 2 else parameter
        for i, parameter in enumerate(_PARAMETERS)
    ],
    return_annotation=CrossEntropyStatistics,
)


def _as_scalar(normalizer: Tensor | float, input: Tensor) -> Tensor:
    if isinstance(normalizer, Tensor):
        return normalizer.to(input.device, torch.float64)
    return input.new_full((), float(normalizer), dtype=torch.float64)


def is_for_torch(tensors: Tensors, options: Options) -> bool:
    """Whether the loss is computed by torch operations, which know all of autograd."""
    _, target, *scales = tensors
    return (
        not _ops.has_kernels(tensors.logits.device)
        or tensors.logits.shape[options.dim] == 0
        or any(tensor is not None and tensor.requires_grad for tensor in scales)
        or (options.focal_gamma != 0 and target.requires_grad)
        or (not torch.compiler.is_compiling() and _is_transformed())
    )


def has_values(tensor: Tensor) -> bool:
    """Whether this runs now, for numbers that can be looked at."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    return not (_is_transformed() or isinstance(tensor, FakeTensor))


def _is_transformed() -> bool:
    """Whether this runs under vmap or forward-mode differentiation."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds = torch._C._functorch.TransformType
    return any(interpreter.key() in (kinds.Vmap, kinds.Jvp) for interpreter in stack)


def _by_torch(tensors: Tensors, options: Options) -> CrossEntropyStatistics:
    logits, target, _, token_weight, _ = tensors
    if not target.is_floating_point() and has_values(target):
        n_classes = logits.shape[options.dim]
        _checks.check_range(target, token_weight, n_classes, options.ignore_index)
    results = by_torch(tensors, options)
    return results._replace(loss=results.loss.to(options.loss_dtype))


def with_statistics(tensors, options, loss, lse, entropy, argmax) -> CrossEntropyStatistics:
    """Return all statistics, those that follow from the others as well."""
    _, target, _, token_weight, _ = tensors
    z_loss = options.lse_square_scale * lse.square()
    if token_weight is not None:
        z_loss = z_loss * token_weight.masked_fill(argmax < 0, 0)
    if target.is_floating_point():
        target = target.argmax(options.dim) if target.shape[options.dim] else argmax
    correct = (argmax == target) & (argmax >= 0)
    return CrossEntropyStatistics(loss, lse, z_loss, entropy, argmax, correct)


def _promote(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, torch.dtype]:
    """Return the target in a dtype that the kernels take, and the loss's dtype.

    The kernels read 16-bit logits beside probabilities of their own dtype or float32, so that only
    rarer pairs need a copy. Of float64 where the logits are to become that, too.
    """
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
        if dtype == torch.float64:
            target = target.to(dtype)
        elif target.dtype != input.dtype:
            target = target.to(torch.float32)
    if is_autocast(input.device) and dtype != torch.float64:
        dtype = torch.float32
    return target, dtype


def _grad_in_forward(tensors: Tensors, options: Options) -> tuple:
    logits, *others = tensors
    memory = logits if logits._base is None else logits._base
    view = (logits.size(), logits.stride(), logits.storage_offset())
    _, loss, *rows = CrossEntropyGradInForward.apply(memory, view, *others, options)
    return with_statistics(tensors, options, loss, *rows) if options.statistics else (loss,)

"""The autograd Functions: the only place that knows what is saved from forward for backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _ops, reference


class Options(NamedTuple):
    """What the operators take besides tensors."""

    dim: int
    ignore_index: int
    label_smoothing: float
    lse_square_scale: float
    focal_gamma: float
    softcap: float | None
    logit_scale: float
    reduction: str
    loss_dtype: torch.dtype
    statistics: bool

    def for_backward(self) -> tuple:
        """Return the trailing arguments of the backward operators."""
        softcap = 0.0 if self.softcap is None else self.softcap
        numbers = [*self[2:5], softcap, self.logit_scale]
        return self.dim, self.ignore_index, numbers, _ops.REDUCTIONS[self.reduction]

    def for_forward(self) -> tuple:
        """Return the trailing arguments of the forward operators."""
        return *self.for_backward(), self.loss_dtype, self.statistics


class Tensors(NamedTuple):
    """The tensors that make a loss, in the operators' order."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    token_weight: Tensor | None
    normalizer: Tensor | None


def by_torch(tensors: Tensors, options: Options) -> reference.CrossEntropyStatistics:
    """Compute the loss by torch operations, in the kernels' precision and without a cast of it."""
    acc = _ops.accumulation_dtype(tensors.logits.dtype)
    logits, target, weight, token_weight, normalizer = (
        tensor.to(acc) if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in tensors
    )
    return reference.cross_entropy_with_statistics(
        logits,
        target,
        weight,
        options.ignore_index,
        options.reduction,
        options.label_smoothing,
        dim=options.dim,
        token_weight=token_weight,
        normalizer=normalizer,
        lse_square_scale=options.lse_square_scale,
        softcap=options.softcap,
        logit_scale=options.logit_scale,
        focal_gamma=options.focal_gamma,
    )


def evaluate(tensors: Tensors, options: Options, inplace: bool) -> tuple:
    """Return the loss; with statistics, after it what a backward needs, argmax, and the lse."""
    is_compiling = torch.compiler.is_compiling()
    wants_graph = torch.is_grad_enabled() and (
        tensors.logits.requires_grad or tensors.target.requires_grad
    )
    if wants_graph if is_compiling else is_under_torch_func():
        return CrossEntropy.apply(*tensors, options, inplace)
    if wants_graph:
        return CrossEntropyInEager.apply(*tensors, options, inplace)
    return _forward(tensors, options)


def is_under_torch_func() -> bool:
    """Whether a transform of torch.func is at work."""
    return bool(torch._C._functorch.get_interpreter_stack())


def is_batched(tensor: Tensor | None) -> bool:
    """Whether it is many tensors at once: autograd's own vmap, which is none of torch.func."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def _forward(tensors: Tensors | list, options: Options) -> tuple:
    results = _ops.forward(*tensors, *options.for_forward())
    if not options.statistics:
        return results
    _, _, row_max, log_sum, *_ = results
    return *results, row_max + log_sum


# Function.apply binds its arguments to forward's signature in every call, to fill in defaults.
# There are none, and *inputs is bound in no time, where the true signature takes longer than a
# small loss.


class CrossEntropy(torch.autograd.Function):
    """Loss in one read of the logits; gradient in one more read and one write.

    With ``inplace`` the gradient takes the logits' memory, once: that counts as a modification of
    the logits, which autograd reports to whoever needs them later, a second backward included.
    """

    @staticmethod
    def forward(*inputs):
        """Return what the operator does, and with statistics the lse.

        The inputs are Tensors, Options and inplace.
        """
        *tensors, options, _ = inputs
        return _forward(tensors, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save the inputs and one or two numbers a row; nothing else of the logits' size."""
        *tensors, _, ctx.options, ctx.inplace = inputs
        _, *saved, entropy, argmax = output[:8]
        ctx.set_materialize_grads(False)
        without_gradient = (*saved, argmax) if ctx.options.statistics else output[1:]
        ctx.mark_non_differentiable(*without_gradient)
        ctx.save_for_backward(*tensors, *saved, entropy)

    @staticmethod
    def backward(ctx, grad_loss, *grads):
        """Return the gradients of logits and probabilities."""
        logits, target, weight, token_weight, *saved = ctx.saved_tensors
        needs_logits, needs_target = ctx.needs_input_grad[:2]
        # Compiled code gives zeros for None, also where there are no statistics.
        *_, grad_entropy, _, grad_lse = grads if ctx.options.statistics else (None, None, None)
        grad_lse, grad_entropy = (
            None if grad is None else grad.contiguous() for grad in (grad_lse, grad_entropy)
        )
        upstream = (grad_loss, grad_lse, grad_entropy)
        if all(grad is None for grad in upstream):
            return (None,) * 7
        if ctx.inplace and torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_backward must be False for create_graph=True and for torch.func: a second "
                "derivative needs the logits that the first overwrites"
            )
        inputs = (*upstream, logits, target, weight, token_weight, *saved)
        grad_logits = grad_target = None
        if needs_target and grad_loss is not None:
            grad_target = _target_gradient(ctx.options, inputs)
        if needs_logits and ctx.inplace:
            _ops.backward_(*inputs, *ctx.options.for_backward())
            grad_logits = logits.detach()
        elif needs_logits and torch.is_grad_enabled() and any(map(is_batched, upstream)):
            # A Function inside autograd's own vmap would return what no graph leads to.
            variables = [grad for grad in upstream if grad is not None]
            grad_logits = _gradients(ctx.options, inputs, variables, logits)[0]
        elif needs_logits and torch.is_grad_enabled():
            grad_logits = CrossEntropyBackward.apply(*inputs, ctx.options)
        elif needs_logits:
            grad_logits = _ops.backward(*inputs, *ctx.options.for_backward())
        return grad_logits, grad_target, None, None, None, None, None


class CrossEntropyInEager(CrossEntropy):
    """The same in half the time: where only a transform or a compiler sees more than the loss."""

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx, *inputs):
        """Return the loss, and with statistics all of them."""
        *tensors, options, _ = inputs
        output = _forward(tensors, options)
        if options.statistics:
            CrossEntropy.setup_context(ctx, inputs, output)
            return output
        loss, *saved, _ = output
        ctx.options, ctx.inplace = inputs[5:]
        ctx.save_for_backward(*tensors[:4], *saved)
        return loss, None


def _loss_and_statistics(options: Options, inputs: tuple, logits: Tensor, target: Tensor) -> tuple:
    """Return loss, lse and entropy as differentiable functions, for the inputs of a backward."""
    weight, token_weight, total_weight = inputs[5:8]
    by_reference = by_torch(Tensors(logits, target, weight, token_weight, total_weight), options)
    return by_reference.loss, by_reference.lse, by_reference.entropy


def _gradients(options: Options, inputs: tuple, upstream: tuple, *variables: Tensor) -> tuple:
    """Return the gradients of logits and, if among the variables, target, by torch operations."""
    acc = _ops.accumulation_dtype(inputs[3].dtype)

    def outputs(*variables: Tensor) -> tuple:
        logits, target = (*variables, inputs[4])[:2]
        results = _loss_and_statistics(options, inputs, logits, target)
        return tuple(
            result for result, grad in zip(results, inputs[:3], strict=True) if grad is not None
        )

    _, vjp = torch.func.vjp(outputs, *variables)
    return vjp(tuple(grad.to(acc) for grad in upstream))


class CrossEntropyBackward(torch.autograd.Function):
    """The gradient of the logits by the kernels, its own derivatives by torch operations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        """Return the gradient of the logits."""
        *tensors, options = inputs
        return _ops.backward(*tensors, *options.for_backward())

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Save all of the inputs."""
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_grad_logits):
        """Return the gradients of the upstream gradients, the logits and probabilities."""
        inputs = ctx.saved_tensors
        upstream = [grad for grad in inputs[:3] if grad is not None]
        variables = [*upstream, *inputs[3 : 5 if inputs[4].is_floating_point() else 4]]

        def gradient(*variables: Tensor) -> Tensor:
            n = len(upstream)
            return _gradients(ctx.options, inputs, variables[:n], *variables[n:])[0]

        _, vjp = torch.func.vjp(gradient, *variables)
        gradients = iter(vjp(grad_grad_logits))
        results = [None if grad is None else next(gradients) for grad in inputs[:3]]
        results += [next(gradients), next(gradients, None)]
        return *results, *[None] * (len(inputs) - 5), None


def _target_gradient(options: Options, inputs: tuple) -> Tensor:
    """Return d loss / d target of probabilities: minus the weighted log-probabilities."""
    grad_loss, _, _, logits, target, weight, token_weight = inputs[:7]
    if torch.is_grad_enabled():
        upstream = [grad for grad in inputs[:3] if grad is not None]
        return _gradients(options, inputs, upstream, logits, target)[1].to(target.dtype)
    total_weight, row_max, log_sum, *_ = inputs[7:]
    dim = options.dim
    scale = grad_loss.to(row_max.dtype) * (1 - options.label_smoothing)
    if options.reduction == "mean":  # by 0 it is NaN, as the loss is
        scale = scale / total_weight.masked_fill(total_weight == 0, torch.nan)
    if token_weight is not None:
        scale = scale * token_weight
    scale = scale if scale.dim() == 0 else scale.unsqueeze(dim)
    seen = reference.transform(logits.to(row_max.dtype), options.softcap, options.logit_scale)
    minus_log_prob = log_sum.unsqueeze(dim) - (seen - row_max.unsqueeze(dim))
    q = (1 - options.label_smoothing) * target + options.label_smoothing / target.shape[dim]
    if weight is not None:
        weight = weight.reshape([-1] + [1] * (logits.dim() - dim - 1))
        minus_log_prob, q = minus_log_prob * weight, q * weight
    minus_log_prob = minus_log_prob.masked_fill((q == 0) & seen.isneginf(), 0)  # as in the loss
    gradient = minus_log_prob * scale
    if token_weight is not None:
        gradient = gradient.masked_fill((token_weight == 0).unsqueeze(dim), 0)
    return gradient.to(target.dtype)


class CrossEntropyGradInForward(torch.autograd.Function):
    """Loss and gradient in one read and one write of the logits, which then hold the gradient.

    ``memory`` is the tensor that owns the logits' memory, ``view`` how the logits lie in it:
    marking the owner dirty, and not a view of it, makes later uses of either pass through this
    node.
    """

    @staticmethod
    def forward(ctx, memory, view, *inputs):
        """Return the memory, now the gradient for an upstream of 1, loss and statistics.

        The further inputs are all other Tensors and Options.
        """
        target, _, token_weight, _, options = inputs
        *tensors, _ = inputs
        loss, row_max, log_sum, *rows = _ops.forward_backward_(
            memory.as_strided(*view), *tensors, *options.for_forward()
        )
        ctx.view, ctx.options = view, options
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(memory)
        ctx.save_for_backward(memory, target, token_weight)
        if not options.statistics:
            return memory, loss
        ctx.mark_non_differentiable(rows[-1])
        return memory, loss, row_max + log_sum, *rows

    @staticmethod
    def backward(ctx, grad_memory, grad_loss, *grads):
        """Scale the gradient by the upstream one, once."""
        if any(grad is not None for grad in grads):
            raise RuntimeError(
                "grad_in_forward must be False where lse, z_loss or entropy are differentiated: "
                "their gradient needs the logits that are overwritten; use inplace_backward"
            )
        if grad_memory is not None:
            raise RuntimeError(
                "grad_in_forward must be False where the logits are used after the loss: they have "
                "been overwritten by their gradient"
            )
        if torch.is_grad_enabled():
            raise RuntimeError("grad_in_forward must be False for create_graph=True")
        if grad_loss is None:
            return (None,) * 7
        memory, target, token_weight = ctx.saved_tensors
        gradient = memory.detach()  # of the same version: a second backward finds it changed
        logits = gradient.as_strided(*ctx.view)
        _ops.scale_gradient_(logits, grad_loss, target, token_weight, *ctx.options[:2])
        return gradient, *[None] * 6

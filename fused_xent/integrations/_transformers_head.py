"""The head of a language model and its loss in one, for ``apply(fuse_head=True)``.

No forward of a model is written again. While the model's own forward runs, its head (``lm_head``)
returns logits of 0 classes and keeps the hidden states it got. So everything else in that forward
happens as always: slices of positions, auxiliary losses, caches, classes of outputs. When the
forward calls ``loss_function``, the head is called once more, and computes the loss of the hidden
states in its own ``forward``: that is where ``fully_shard`` makes its weight whole.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import linear_cross_entropy
from ._transformers_losses import NumItems, check_rows, next_labels, of_shape
from ._transformers_tail import NEVER_DONE, Tail, measure_tail, numbers_of

COMPILED = 0  # in place of the number of a thread


# ---- the head ------------------------------------------------------------------------------------


class HeadForward:
    """The ``forward`` of a head: a linear layer, or a loss of its input."""

    def __init__(self, fused: FusedHead, module: nn.Linear) -> None:
        """Keep the head's module."""
        self.fused, self.module = fused, module

    def __call__(self, input: Tensor, loss: Callable[..., Tensor] | None = None) -> Tensor:
        """Return logits, or ``loss(input, weight, bias)``, or logits of 0 classes."""
        if loss is not None:
            return loss(input, self.module.weight, self.module.bias)
        if self.fused.is_active_here():
            return self.fused.capture(input)
        return nn.Linear.forward(self.module, input)


def why_not_linear(head: Any) -> str:
    """Say why a head is more than ``input @ weight.T + bias``; empty if it is just that."""
    if not isinstance(head, nn.Module):
        return f"it has no output embeddings (get_output_embeddings() returned {head!r})"
    kinds = [kind for kind in type(head).__mro__ if not _is_of_fsdp(kind.__module__)]
    is_sharded = type(head).__mro__[1:2] != (nn.Module,) and len(kinds) < len(type(head).__mro__)
    if type(head) is not nn.Linear and not (is_sharded and kinds[:1] == [nn.Linear]):
        return f"its head is a {type(head).__module__}.{type(head).__qualname__}, not a nn.Linear"
    forward = head.__dict__.get("forward")
    if forward is not None and not isinstance(forward, HeadForward):
        return f"the forward of its head has been replaced by {forward!r}"
    for hooks in (head._forward_pre_hooks, head._forward_hooks, head._backward_hooks):
        for hook in hooks.values():
            if not _is_of_fsdp(getattr(inspect.unwrap(hook), "__module__", None) or ""):
                return f"its head has a hook, {hook!r}"
    if head._backward_pre_hooks:
        return "its head has a backward hook"
    return _why_not_weight(head)


def _is_of_fsdp(module: str) -> bool:
    return module.startswith("torch.distributed.fsdp")


def _why_not_weight(head: nn.Module) -> str:
    weight = head._parameters.get("weight")
    if weight is None:
        return "the weight of its head is not a parameter of its own"
    kind = type(weight.data)
    if kind is not Tensor and kind.__module__ != "torch.distributed.tensor":
        return f"the weight of its head is a {kind.__module__}.{kind.__qualname__}"
    if not weight.is_floating_point():
        return f"the weight of its head is {weight.dtype}"
    return ""


# ---- the model -----------------------------------------------------------------------------------


class ModelForward:
    """The ``forward`` of a model: its own one, with the loss computed by the head if that helps."""

    def __init__(self, fused: FusedHead, inner: Callable[..., Any] | None) -> None:
        """Keep a forward that was set on the instance; None: that of the class."""
        self.fused, self.inner = fused, inner

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model: transformers asks which arguments it takes."""
        if self.inner is not None:
            return inspect.signature(self.inner)
        signature = inspect.signature(type(self.fused.model).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        fused = self.fused
        if not (fused.is_wanted(args, kwargs) and fused.start()):
            return self._run(args, kwargs)
        try:
            return fused.finish(self._run(args, kwargs))
        finally:
            fused.stop()

    def _run(self, args: Any, kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        model = self.fused.model
        return type(model).forward(model, *args, **kwargs)


def _thread() -> int:
    """Return the number of this thread. Compiled code cannot ask for it."""
    return COMPILED if torch.compiler.is_compiling() else threading.get_ident()


class FusedHead:
    """Replaces the forward of a model and of its head; computes the loss of the hidden states."""

    def __init__(self, model: Any, options: dict[str, Any], in_evaluation: bool) -> None:
        """Check the model, and replace both forwards.

        Raises:
            ValueError: the model's logits are not those of a linear layer.
        """
        self.model, self.options, self.in_evaluation = model, options, in_evaluation
        self.is_enabled = True
        self.active: dict[str, int] = {}  # the thread of the call that is fused, if there is one
        self.hidden: Tensor | None = None
        self.is_computed = False
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.labels_at = names.index("labels") if "labels" in names else None
        self.module, self.tail = self._checked()
        self.module.__dict__["forward"] = HeadForward(self, self.module)
        self.forward = ModelForward(self, model.__dict__.get("forward"))
        model.__dict__["forward"] = self.forward

    def undo(self) -> None:
        """Put both forwards back. One that was replaced since is left; it finds this one off."""
        self.is_enabled = False
        forward = self.module.__dict__.get("forward")
        if isinstance(forward, HeadForward) and forward.fused is self:
            del self.module.__dict__["forward"]
        if self.model.__dict__.get("forward") is self.forward:
            del self.model.__dict__["forward"]
            if self.forward.inner is not None:
                self.model.__dict__["forward"] = self.forward.inner

    def _checked(self) -> tuple[nn.Linear, Tail]:
        """Return the head, and what the model does to its logits."""
        head = self.model.get_output_embeddings()
        reason = why_not_linear(head)
        forward = None if reason else head.__dict__.get("forward")
        if isinstance(forward, HeadForward) and forward.fused is not self:
            reason = f"its head is fused into another {type(forward.fused.model).__name__} already"
        if reason:
            raise ValueError(
                f"fuse_head must be False for this {type(self.model).__name__}, got True: "
                f"{reason}. Its logits may not be input @ weight.T + bias; {NEVER_DONE}"
            )
        tail = measure_tail(self.model, head)
        self.numbers = numbers_of(self.model)
        return head, tail

    def _follow(self) -> None:
        """Check the head again if it was replaced or wrapped, or if the config has changed."""
        head = self.model.get_output_embeddings()
        is_same = torch.compiler.is_compiling() or self.numbers == numbers_of(self.model)
        if head is self.module and is_same and not why_not_linear(head):
            return
        head, self.tail = self._checked()
        self.module.__dict__.pop("forward", None)
        self.module = head
        head.__dict__["forward"] = HeadForward(self, head)

    # ---- one call ----

    def is_wanted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return True if this call computes a loss whose logits nobody needs."""
        if not self.is_enabled or self.active or not self._is_of_loss():
            return False
        labels = kwargs.get("labels")
        if labels is None and self.labels_at is not None and len(args) > self.labels_at:
            labels = args[self.labels_at]
        if labels is None:
            return False
        return torch.is_grad_enabled() if self.model.training else self.in_evaluation

    def _is_of_loss(self) -> bool:
        """Return False if another loss function has been set since: it needs logits."""
        return getattr(self.model.__dict__.get("_loss_function"), "head", None) is self

    def start(self) -> bool:
        """Let the head keep its input; return False if a call of another thread does so now."""
        self._follow()
        here = _thread()
        if self.active.setdefault("thread", here) != here:  # one step, which no thread interrupts
            return False
        self.is_computed = False
        return True

    def is_active_here(self) -> bool:
        """Return True during a fused call, but not for the calls of other threads."""
        return "thread" in self.active and self.active["thread"] in (_thread(), COMPILED)

    def stop(self) -> None:
        """Let the head compute logits again."""
        self.hidden = None
        self.active.clear()

    def capture(self, hidden: Tensor) -> Tensor:
        """Keep the input of the head; return logits of 0 classes."""
        if self.hidden is not None:
            raise RuntimeError(
                f"{type(self.model).__name__} calls its head twice in one forward, which fuse_head "
                f"does not support: {NEVER_DONE}"
            )
        self.hidden = hidden
        return hidden.new_empty([*hidden.shape[:-1], 0])

    @property
    def n_classes(self) -> int:
        """The number of classes of the logits that are not computed."""
        return self.module.out_features

    def __call__(
        self, logits: Tensor, labels: Tensor, num_items: NumItems, ignore_index: int, shift: int
    ) -> Tensor:
        """Return the loss of the captured hidden states; ``logits`` have 0 classes."""
        hidden = self.hidden
        if hidden is None or logits.shape[:-1] != hidden.shape[:-1]:
            raise RuntimeError(
                f"{type(self.model).__name__} computes its loss from {tuple(logits.shape[:-1])} "
                f"rows of logits, which are not those of its head, got "
                f"{None if hidden is None else tuple(hidden.shape[:-1])}: {NEVER_DONE}"
            )
        labels = labels.to(hidden.device)
        if shift and (labels.shape != hidden.shape[:-1] or labels.shape[-1] <= shift):
            labels, shift = next_labels(labels, ignore_index), 0
        if labels.shape != hidden.shape[:-1]:
            hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
            check_rows(len(hidden), len(labels))

        def loss(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear_cross_entropy(
                input,
                weight,
                labels,
                linear_bias=bias,
                ignore_index=ignore_index,
                normalizer=num_items,
                logit_scale=self.tail.logit_scale,
                softcap=self.tail.softcap,
                loss_dtype=torch.float32,
                shift=shift,
                **self.options,
            )

        self.is_computed = True
        return of_shape(self.module(hidden, loss=loss), num_items)

    def finish(self, output: Any) -> Any:
        """Take the logits of 0 classes out of the model's output."""
        if self.hidden is None:  # the head was not called
            return output
        if not self.is_computed:
            raise RuntimeError(
                f"{type(self.model).__name__} called its head, but not loss_function, with these "
                f"arguments, which fuse_head does not support: {NEVER_DONE}"
            )
        if isinstance(output, tuple):
            return tuple(value for value in output if not _is_placeholder(value))
        kept = {name: value for name, value in output.items() if not _is_placeholder(value)}
        return type(output)(**kept)


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape[-1:] == (0,)

"""The head of a language model and its loss in one, for ``apply(fuse_head=True)``.

No forward of a model is written again. While the model's own forward runs, its head (``lm_head``)
returns logits of 0 classes and keeps the hidden states it got. So everything else in that forward
happens as always: slices of positions, auxiliary losses, caches, classes of outputs. When the
forward calls ``loss_function``, the head is called once more, and computes the loss of the hidden
states in its own ``forward``: that is where ``fully_shard`` makes its weight whole.

What a model does to its logits after the head is measured: a stand-in for the head returns known
numbers, and the forward must return ``softcap * tanh(logit_scale * number / softcap)`` of them, or
``logit_scale * number``, for two numbers that tell the scale and the cap and for random ones.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import linear_cross_entropy
from ._transformers_losses import NumItems, check_rows, next_labels, of_shape

SMALL, LARGE = 2.0**-30, 2.0**40  # logits that tell the scale and the cap
COMPILED = 0  # in place of the number of a thread
NEVER_DONE = "call apply(model) without fuse_head"


class Tail(NamedTuple):
    """What the model does to the logits of its head."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Do the same."""
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def __str__(self) -> str:
        """Return the formula."""
        scaled = "x" if self.logit_scale == 1 else f"{self.logit_scale:g} x"
        return (
            scaled
            if self.softcap is None
            else f"{self.softcap:g} tanh({scaled} / {self.softcap:g})"
        )


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
        if not fused.is_wanted(args, kwargs):
            return self._run(args, kwargs)
        if not fused.start():
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
        return head, measure_tail(self.model, head)

    def _follow(self) -> None:
        """Check the head once more: it may have been replaced, resized or wrapped since."""
        head = self.model.get_output_embeddings()
        if head is self.module and not why_not_linear(head):
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


# ---- what the model does to the logits of its head -----------------------------------------------


class _Output(tuple[Any, ...]):
    """The output of a backbone, of any class: hidden states, and None for everything else."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


class _StandIn(nn.Module):
    """Returns one thing in place of a module, and has all other attributes of it."""

    def __init__(self, module: nn.Module, returned: Any) -> None:
        super().__init__()
        self.__dict__["module"], self.__dict__["returned"] = module, returned

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["returned"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


class _LossStandIn:
    """A loss function that keeps the logits it gets, and returns 0."""

    def __init__(self) -> None:
        self.logits: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.logits.append(kwargs["logits"] if "logits" in kwargs else args[0])
        return torch.zeros((), device=self.logits[-1].device)


def measure_tail(model: Any, head: nn.Linear) -> Tail:
    """Return what a model does to the logits of its head.

    Raises:
        ValueError: it is not a scale and a softcap, or its loss is not that of these logits alone.
    """
    name = type(model).__name__
    probe, loss = _probe(head), _LossStandIn()
    try:
        total = _loss_of(model, head, probe, loss)
    except Exception as error:
        raise ValueError(
            f"fuse_head must be False for {name}, got True: its forward could not be tried with "
            f"stand-ins for its modules ({type(error).__name__}: {error}). Apply before "
            f"fully_shard; otherwise {NEVER_DONE}"
        ) from error
    reason = "it does not compute its loss from one tensor of logits of the head's shape"
    if [logits.shape for logits in loss.logits] == [probe.shape]:
        found = loss.logits[0]
        reason = "it does more to its logits than a scale and a softcap"
        tail = _fitted(probe, found.detach())
        if found.requires_grad:
            reason = "it multiplies its logits by a parameter, or adds one"
        elif tail is not None and total.item() != 0:
            reason = "it adds a term to its loss that depends on logits, such as a z-loss"
        elif tail is not None:
            return tail
    raise ValueError(f"fuse_head must be False for {name}, got True: {reason}. {NEVER_DONE}")


def _probe(head: nn.Linear) -> Tensor:
    """Return logits of two positions: SMALL, LARGE, and random ones."""
    device = head.weight.device if head.weight.device.type in ("cpu", "cuda") else "cpu"
    numbers = torch.Generator().manual_seed(0)
    probe = 20 * torch.randn(
        1, 2, head.out_features, dtype=torch.float64, device="cpu", generator=numbers
    )
    probe.view(-1)[:2] = torch.tensor([SMALL, LARGE], dtype=torch.float64)
    return probe.to(device)


def _fitted(probe: Tensor, found: Tensor) -> Tail | None:
    """Return the scale and the cap that the first two logits tell, if they explain all logits."""
    probe, found = (logits.to("cpu", torch.float64).flatten() for logits in (probe, found))
    scale, most = found[0].item() / SMALL, found[1].item()
    if abs(scale - 1) < 1e-6:
        scale = 1.0
    softcap = None if abs(most / LARGE - scale) <= 1e-5 * abs(scale) else most
    if not (1e-30 <= scale <= 1e30 and (softcap is None or 1e-30 <= softcap <= 1e30)):
        return None
    tail = Tail(scale, softcap)
    return tail if torch.allclose(found, tail(probe), rtol=1e-5, atol=1e-5) else None


def _loss_of(model: Any, head: nn.Linear, logits: Tensor, loss: _LossStandIn) -> Any:
    """Run the forward of the model's class with stand-ins for backbone, head and loss function."""
    weight = head.weight
    backbone = _backbone(model)
    # The head of BERT and its like starts with a layer of another size.
    n_features = getattr(model.config.get_text_config(), "hidden_size", head.in_features)
    hidden = torch.ones(1, 2, n_features, device=weight.device, dtype=weight.dtype)
    places = [*_places(model, backbone), *_places(model, head)]
    stand_ins = {backbone: _StandIn(backbone, _Output([hidden])), head: _StandIn(head, logits)}
    kept = {
        name: model.__dict__[name]
        for name in ("training", "_loss_function")
        if name in model.__dict__
    }
    given = {"output_router_logits": False} if _takes(model, "output_router_logits") else {}
    try:
        model.training = True
        model.loss_function = loss
        for parent, name, module in places:
            parent._modules[name] = stand_ins[module]
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=logits.device)
        with torch.enable_grad():
            return type(model).forward(model, input_ids=tokens, labels=tokens, **given)[0]
    finally:
        model.__dict__.pop("_loss_function", None)
        model.__dict__.update(kept)
        for parent, name, module in places:
            parent._modules[name] = module


def _takes(model: Any, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters


def _backbone(model: Any) -> nn.Module:
    """Return the module that computes the hidden states of the head."""
    backbone: Any = model.base_model
    if backbone is model:
        backbone = model.get_decoder()
    if backbone is None or backbone is model:  # Llama 4 has no module of its base_model_prefix
        backbone = getattr(model, "model", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError("it has no base_model, no decoder and no module that is named model")
    return backbone


def _places(model: nn.Module, wanted: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return where a module is registered."""
    return [
        (parent, name, module)
        for parent in model.modules()
        for name, module in parent._modules.items()
        if module is wanted
    ]

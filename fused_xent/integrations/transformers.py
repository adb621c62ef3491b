"""This package's losses in models of Hugging Face transformers 5: one line, undone by another.

``apply(model)`` sets the model's ``loss_function``, and ``apply(model, fuse_head=True)`` computes
the loss in training from hidden states, without logits. Both change one instance of a model, and no
class. ``compute_loss_func()`` makes the argument of that name of ``transformers.Trainer``, for
models that build their own ``CrossEntropyLoss`` and for label smoothing.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import cross_entropy, linear_cross_entropy
from ._transformers_head import FusedHead
from ._transformers_losses import LOSSES, Loss, NumItems, next_labels, reduced

__all__ = ["Handle", "apply", "compute_loss_func"]

OF_LOSS = ("label_smoothing", "lse_square_scale", "focal_gamma")
OF_LOGITS = ("inplace_backward",)
OF_HEAD = ("drop_ignored", "chunk_rows", "logits_dtype")
HANDLE = "_fused_xent_handle"  # attribute of a model
LIGER = "liger_kernel"


def apply(
    model: Any, *, fuse_head: bool = False, skip_eval_logits: bool = False, **options: Any
) -> Handle:
    """Compute the loss of a transformers model by this package.

    Sets ``model.loss_function``, which the model's forward calls: losses and gradients are those of
    before, up to rounding, and logits stay what they were. Supported are ForCausalLMLoss,
    ForMaskedLMLoss, ForTokenClassification and ForSequenceClassificationLoss (of single labels;
    regression and several labels stay transformers' own), with ``num_items_in_batch``,
    ``shift_labels`` and ``ignore_index`` as there. The loss is float32, without a float32 copy of
    the logits.

    With ``fuse_head``, a call of a model in training mode, with ``labels`` and gradients enabled,
    computes no logits: hidden states go to ``fused_xent.linear_cross_entropy``. The output
    then has no ``logits`` (None; in tuples they are missing). All else in it stays: caches, hidden
    states, attentions, auxiliary losses of routers. Every other call, such as evaluation,
    generation, and training mode under ``torch.no_grad()``, runs the model's own forward.

    ``torch.nn.DataParallel`` cannot replicate a model with a fused head: it raises an error about
    devices. A ``num_items_in_batch`` of 0 gives NaN.

    A second call replaces the first. Copies and pickles of the model keep what was applied.

    Args:
        model: a ``PreTrainedModel``, also inside of PEFT, DistributedDataParallel or
            ``torch.compile``. Apply before or after these and ``fully_shard``;
            before ``fully_shard`` if the head has other layers before the linear one, as BERT's.
        fuse_head: whether to compute the loss from hidden states. The head must be exactly a
            ``torch.nn.Linear``: no LoRA on it, not quantized, no hooks. What the model does to its
            logits (scale, softcap) is measured once, and must be
            ``softcap * tanh(logit_scale * x / softcap)``.
        skip_eval_logits: with ``fuse_head``, compute no logits in evaluation mode either, where
            labels are given: less memory for an evaluation of the loss alone.
        options: ``label_smoothing``, ``lse_square_scale``, ``focal_gamma``, in all calls with
            labels; ``inplace_backward``, where logits are computed: the backward overwrites them;
            with ``fuse_head`` also ``drop_ignored``, ``chunk_rows`` and ``logits_dtype`` of
            ``fused_xent.linear_cross_entropy``.

    Returns:
        A handle. ``print(handle)`` says what was done, ``handle.undo()`` restores the model.

    Raises:
        TypeError: ``model`` is not a model of transformers, or an option is unknown.
        ValueError: the model's forward does not call ``loss_function``, its loss is another one, or
            its head is not a linear layer; Liger-Kernel has replaced its forward. The model is then
            as it was before the call, without an earlier ``apply``.
    """
    of_logits, of_head = _checked_options(fuse_head, skip_eval_logits, options)
    model = _unwrapped(model)
    previous = model.__dict__.get(HANDLE)
    if previous is not None:
        previous.undo()
    refuse_liger(model)
    loss = _loss_of(model)
    fused = FusedHead(model, of_head, skip_eval_logits) if fuse_head else None
    return Handle(model, loss(of_logits, fused), fused)


class Handle:
    """What ``apply`` has done to a model."""

    def __init__(self, model: Any, loss: Loss, fused: FusedHead | None) -> None:
        """Set the model's loss function. ``apply`` makes handles."""
        self.model, self.loss, self.fused = model, loss, fused
        self.previous = model.__dict__.get("_loss_function")
        self.is_applied = True
        model.loss_function = loss
        model.__dict__[HANDLE] = self
        self.guard = _LigerGuard(model)
        self.guarded = model.base_model  # is called even where Liger-Kernel replaces the forward
        self.guarded.register_forward_pre_hook(self.guard)

    def undo(self) -> None:
        """Restore the model. Does nothing the second time."""
        if not self.is_applied:
            return
        self.is_applied = False
        model = self.model
        if model.__dict__.get("_loss_function") is self.loss:
            del model.__dict__["_loss_function"]
            if self.previous is not None:
                model.loss_function = self.previous
        if self.fused is not None:
            self.fused.undo()
        hooks = self.guarded._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self.guard]:
            del hooks[key]
        if model.__dict__.get(HANDLE) is self:
            del model.__dict__[HANDLE]

    def __str__(self) -> str:
        """Say what was done, what was not, and why."""
        name = type(self.model).__name__
        if not self.is_applied:
            return f"fused_xent in {name}: undone"
        return "\n  ".join([f"fused_xent in {name}:", *self._lines()])

    __repr__ = __str__

    def _lines(self) -> Iterator[str]:
        loss, fused = self.loss, self.fused
        given = "".join(f", {name}={value!r}" for name, value in loss.options.items())
        yield f"loss_function: {loss.name} by fused_xent.cross_entropy{given}"
        if self.model.__dict__.get("_loss_function") is not loss:
            yield "NOT IN USE: loss_function has been set to another one since"
        if loss.name == "ForSequenceClassificationLoss":
            yield "not done: regression and several labels a sequence stay transformers' own"
        if fused is None:
            yield "not done: the head; logits are computed and stay what they were"
            return
        given = "".join(f", {name}={value!r}" for name, value in fused.options.items())
        yield f"head: {fused.tail} of x = a linear layer, by fused_xent.linear_cross_entropy{given}"
        if self.model.__dict__.get("forward") is not fused.forward:
            yield "the forward has been replaced or wrapped since, and may not be in use"
        yield "in training with labels and gradients enabled; outputs.logits is None there"
        where = "training mode without gradients, calls without labels, generation"
        if fused.in_evaluation:
            yield "in evaluation with labels too; outputs.logits is None there"
        else:
            where = f"evaluation, {where}"
        yield f"not done: {where}: the model's own forward computes logits"


# ---- checks --------------------------------------------------------------------------------------


def _checked_options(
    fuse_head: bool, skip_eval_logits: bool, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the loss of logits, and of hidden states."""
    for name, value in (("fuse_head", fuse_head), ("skip_eval_logits", skip_eval_logits)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    if skip_eval_logits and not fuse_head:
        raise ValueError("skip_eval_logits must be False without fuse_head=True, got True")
    known = (*OF_LOSS, *OF_LOGITS, *(OF_HEAD if fuse_head else ()))
    for name in options:
        if name not in known:
            hint = f"; with fuse_head=True also {', '.join(OF_HEAD)}" * (not fuse_head)
            raise TypeError(f"an option of apply must be one of {', '.join(known)}{hint}: {name!r}")
    of_logits = {name: options[name] for name in (*OF_LOSS, *OF_LOGITS) if name in options}
    of_head = {name: options[name] for name in (*OF_LOSS, *OF_HEAD) if name in options}
    _check_values(of_logits)
    _check_values(of_head, linear_cross_entropy, torch.zeros(2, 2, device="cpu"))
    return of_logits, of_head


def _check_values(
    options: dict[str, Any], function: Callable[..., Tensor] = cross_entropy, *layer: Tensor
) -> None:
    """Check the values of options: compute a loss with them."""
    numbers = torch.zeros(1, 2, device="cpu")
    label = torch.zeros(1, dtype=torch.int64, device="cpu")
    function(numbers, *layer, label, **options)


def _unwrapped(model: Any) -> Any:
    """Return the model of transformers inside of wrappers."""
    given = type(model).__name__
    while isinstance(model, nn.Module):
        if isinstance(model, _transformers("modeling_utils").PreTrainedModel):
            return model
        wrapper: Any = model
        if callable(getattr(wrapper, "get_base_model", None)):  # PEFT
            model = wrapper.get_base_model()
        else:  # torch.compile; DistributedDataParallel
            model = getattr(wrapper, "_orig_mod", None) or getattr(wrapper, "module", None)
    raise TypeError(f"model must be a PreTrainedModel of transformers, or wrap one, got {given}")


def _transformers(module: str) -> Any:
    return importlib.import_module(f"transformers.{module}")


def _loss_of(model: Any) -> type[Loss]:
    """Return the class of this package's loss for the model's own."""
    name = type(model).__name__
    if not _calls_loss_function(type(model)):
        raise ValueError(
            f"model must call its loss_function, which the forward of {name} does not: pass "
            "compute_loss_func() of this module to Trainer as compute_loss_func"
        )
    stock = model.loss_function
    of_transformers = _transformers("loss.loss_utils")
    for loss_name, loss in LOSSES.items():
        if stock is getattr(of_transformers, loss_name):
            return loss
    found = getattr(stock, "__qualname__", repr(stock))
    raise ValueError(
        f"model must have the loss function {', '.join(LOSSES)}, got {name} with {found}: its loss "
        "has not been changed"
    )


def _calls_loss_function(model: type) -> bool:
    """Return True if the forward of a class, or the one that it calls by super(), names it."""
    for kind in model.__mro__:
        forward = vars(kind).get("forward")
        if forward is None:
            continue
        code = getattr(inspect.unwrap(forward), "__code__", None)
        if code is None:
            return False
        if "loss_function" in _names(code):
            return True
        if "super" not in code.co_names:
            return False
    return False


def _names(code: types.CodeType) -> set[str]:
    """Return the names that a function uses, with those of its inner functions."""
    inner = [_names(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*inner)


def refuse_liger(model: Any) -> None:
    """Raise an error if Liger-Kernel computes the model's loss."""
    forwards = {
        "the forward of this model": model.__dict__.get("forward"),
        f"the forward of {type(model).__name__}": type(model).forward,
        "torch.nn.functional.cross_entropy": F.cross_entropy,
    }
    for what, function in forwards.items():
        module = getattr(getattr(function, "__func__", function), "__module__", None) or ""
        if module.partition(".")[0] == LIGER:
            raise ValueError(
                f"model must not use Liger-Kernel's loss together with fused_xent's, but {what} is "
                "Liger-Kernel's: leave out use_liger_kernel, or pass TrainingArguments "
                "liger_kernel_config={'cross_entropy': False, 'fused_linear_cross_entropy': False}"
            )


class _LigerGuard:
    """A hook that notices if Liger-Kernel replaces the model's forward after apply."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling():
            refuse_liger(self.model)


# ---- Trainer's compute_loss_func -----------------------------------------------------------------


class LossOfOutputs:
    """Computes the loss of a model's outputs, as Trainer calls it."""

    def __init__(self, shift: bool | None, ignore_index: int, options: dict[str, Any]) -> None:
        """Keep the options. ``compute_loss_func`` makes these."""
        self.shift, self.ignore_index, self.options = shift, ignore_index, options

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: NumItems = None
    ) -> Tensor:
        """Return the mean loss, or the sum divided by ``num_items_in_batch``."""
        if labels is None:
            raise ValueError("labels must be a tensor, got None: name the labels of the dataset so")
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if labels.is_floating_point() or logits.shape[-1] == 1:
            raise ValueError(
                "labels must be class indices of at least 2 classes, got "
                f"{labels.dtype} for {logits.shape[-1]}: regression and several labels a row are "
                "not cross-entropy; leave out compute_loss_func"
            )
        if self._is_shifted(outputs):
            labels = next_labels(labels, self.ignore_index)
        return reduced(logits, labels, num_items_in_batch, self.ignore_index, self.options)

    def _is_shifted(self, outputs: Any) -> bool:
        if self.shift is not None:
            return self.shift
        name = type(outputs).__name__
        if "CausalLM" in name:
            return True
        if any(kind in name for kind in ("Seq2SeqLM", "MaskedLM", "Classifier")):
            return False
        raise ValueError(
            "shift must be True (the labels of the next token) or False (aligned labels) for "
            f"outputs of class {name}: pass it to compute_loss_func, got None"
        )


def compute_loss_func(
    *,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    focal_gamma: float = 0.0,
    ignore_index: int = -100,
    shift: bool | None = None,
) -> Callable[..., Tensor]:
    """Return a loss for ``transformers.Trainer(compute_loss_func=...)``.

    It serves every model whose outputs have logits of classes: also those that do not call
    ``loss_function``, such as T5 and BERT's classifiers. It also takes the place of
    ``label_smoothing_factor``, for which Trainer computes log-probabilities of all classes. Leave
    that at 0: Trainer prefers this loss. Trainer passes the number of labels of all accumulated
    batches, and the sum of the losses is divided by it. The loss is float32. Trainer keeps the
    labels from the model, which therefore computes logits, also with ``fuse_head`` of
    ``apply``, and leaves out auxiliary losses. An encoder-decoder then needs
    ``decoder_input_ids`` in its batches: ``DataCollatorForSeq2Seq(tokenizer, model=model)`` makes
    them.

    Args:
        label_smoothing: as in ``fused_xent.cross_entropy``; so are the next two.
        lse_square_scale: factor of the z-loss.
        focal_gamma: exponent of the focal loss.
        ignore_index: labels that do not count. Trainer counts the labels that are not -100.
        shift: whether position ``i`` predicts label ``i + 1``. None: True for outputs of a class
            that is named CausalLM, False for Seq2SeqLM, MaskedLM and Classifier.

    Returns:
        A function of outputs, labels and num_items_in_batch. It raises ValueError for labels that
        are not class indices, and for outputs that do not tell ``shift``.
    """
    if shift is not None and not isinstance(shift, bool):
        raise TypeError(f"shift must be a bool or None, got {type(shift).__name__}")
    options: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "lse_square_scale": lse_square_scale,
        "focal_gamma": focal_gamma,
    }
    _check_values({"ignore_index": ignore_index, **options})
    return LossOfOutputs(shift, ignore_index, options)

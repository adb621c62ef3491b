"""The log-probabilities of TRL's trainers by fused_xent.

    from fused_xent.integrations.trl import apply

    trainer = SFTTrainer(model, args, train_dataset=dataset)
    print(apply(trainer))
    trainer.train()

TRL's trainers compute log-probabilities, entropies and accuracies from hidden states, in chunks,
by a forward that TRL adds to the model ("fused head"). ``apply`` exchanges only what computes them,
in the models of this trainer. Losses and metrics are TRL's own, from the same numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from . import _trl_checks, _trl_head
from ._trl_gkd import fused_jsd_loss

# Trainers that train on the values of the fused head.
TRAINERS = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")


class Handle:
    """What ``apply`` has done: print it. ``undo()`` restores the trainer."""

    def __init__(self, title: str) -> None:
        """Nothing is done yet."""
        self.title = title
        self.done: list[str] = []
        self.not_done: list[str] = []
        self.is_applied = True
        self._models: dict[str, Any] = {}  # by their role in the trainer
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Restore what was there before ``apply``. A second call does nothing.

        Raises:
            RuntimeError: something else has been put over a model's forward since.
        """
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self.is_applied = False

    def __str__(self) -> str:
        """Return what is fused, and what is not and why."""
        lines = [self.title, *(f"  fused: {line}" for line in self.done)]
        lines += [f"  not fused: {line}" for line in self.not_done]
        return "\n".join(lines if self.is_applied else [f"{self.title}: undone"])

    __repr__ = __str__


def apply(trainer: Any) -> Handle:
    """Compute the log-probabilities of a TRL trainer's models with fused_xent.

    The trainer keeps its loss, its metrics and its options. Models are changed per instance: the
    trainer's model and its reference model. Generation, and evaluation that needs logits, run as
    before. Calling it again returns the same handle.

    Args:
        trainer: an SFTTrainer (also with ``completion_only_loss``, ``packing``, PEFT),
            DPOTrainer, KTOTrainer, GRPOTrainer or RLOOTrainer of TRL 1.16, or a subclass, made
            before or after training has started; or a GKDTrainer with ``beta=0``.

    Returns:
        A handle. ``print(handle)`` says what is fused, what is not, and why; ``handle.undo()``
        restores the trainer.

    Raises:
        TypeError: ``trainer`` is no such trainer; the message says why.
        ValueError: an option, or the head of a model, cannot be used: Liger kernels, a head that is
            more than a linear layer (such as LoRA on the head, or a quantized head), or logits
            that are not those of the model.
        RuntimeError: TRL's release computes log-probabilities in another way, or a model's forward
            has been replaced.
    """
    before: Handle | None = getattr(trainer, "_fused_xent_handle", None)
    if before is not None and before.is_applied and _is_current(trainer, before):
        return before
    _trl_checks.check_trainer(trainer, TRAINERS)
    trl: Any = importlib.import_module("trl")
    handle = Handle(f"fused_xent in {type(trainer).__name__} of TRL {trl.__version__}")
    if before is not None:
        handle._undo = before._undo  # the trainer has got other models since: undo() does both
    if _trl_checks.is_gkd(trainer):
        _apply_to_gkd(trainer, handle)
    else:
        _apply_to_models(trainer, handle)
    trainer._fused_xent_handle = handle
    return handle


def _is_current(trainer: Any, handle: Handle) -> bool:
    """Return False if the trainer has got other models since."""
    return all(
        getattr(trainer, role) is not None
        and _trl_checks.base_model(trainer, getattr(trainer, role)) is model
        and is_applied(model)
        for role, model in handle._models.items()
    )


def _apply_to_gkd(trainer: Any, handle: Handle) -> None:
    """Replace the trainer's divergence."""
    if trainer.beta != 0:
        raise ValueError(
            f"trainer.beta must be 0 for fused_xent in GKDTrainer, got {trainer.beta}: only the "
            "forward KL is a cross-entropy. Other divergences need all log-probabilities of both "
            "models. Use GKDConfig(beta=0.0), or the trainer without apply()"
        )
    before = trainer.__dict__.get("generalized_jsd_loss")
    trainer.generalized_jsd_loss = ours = fused_jsd_loss(trainer.generalized_jsd_loss)

    def undo() -> None:
        if trainer.__dict__.get("generalized_jsd_loss") is not ours:
            raise RuntimeError("trainer.generalized_jsd_loss has been replaced since apply()")
        del trainer.generalized_jsd_loss
        if before is not None:
            trainer.generalized_jsd_loss = before

    handle._undo.append(undo)
    handle.done.append("KL(teacher || student), by cross_entropy with the teacher's probabilities")
    handle.not_done.append(
        "the heads of both models: GKDTrainer computes all logits before its loss. The "
        "probabilities of the teacher are stored"
    )


def _apply_to_models(trainer: Any, handle: Handle) -> None:
    """Exchange the forward of the model and of the reference model."""
    found: list[tuple[str, Any, Any, Any]] = []
    for role in ("model", "ref_model"):
        if getattr(trainer, role, None) is not None:
            model = _trl_checks.base_model(trainer, getattr(trainer, role))
            if any(model is other for _, other, _, _ in found):
                continue  # one model in both roles
            forward = _trl_checks.fused_forward(model, role)
            _trl_checks.check_head(model, _trl_head.head_of(forward), role)
            ours = _trl_head.with_fused_xent(forward)
            handle.not_done += _trl_checks.compare_logits(trainer, model, ours, role)
            found.append((role, model, forward, ours))
    for role, model, forward, ours in found:  # nothing is changed before all checks are done
        _exchange(trainer, model, forward, ours)
        handle._models[role] = model
        handle._undo.append(_undo_of(trainer, model, forward, ours, role))
        handle.done.append(f"trainer.{role}: {_describe(_trl_head.head_of(forward))}")
    handle.not_done += _trl_checks.left_to_trl(trainer)


def _undo_of(trainer: Any, model: Any, forward: Any, ours: Any, role: str) -> Callable[[], None]:
    def undo() -> None:
        if _trl_checks.fused_forward(model, role).__func__ is not ours.__func__:
            raise RuntimeError(
                f"the forward of trainer.{role} is not apply()'s any more: undo what replaced it, "
                "then call undo() again"
            )
        _exchange(trainer, model, ours, forward)

    return undo


def _exchange(trainer: Any, model: Any, old: Any, new: Any) -> None:
    """Replace the forward of a model, also below accelerate's mixed precision."""
    if model.forward == old:
        model.forward = new
        return
    utils: Any = importlib.import_module("accelerate.utils")
    modeling: Any = importlib.import_module("accelerate.utils.modeling")
    accelerator = trainer.accelerator
    autocast = modeling.get_mixed_precision_context_manager(
        accelerator.native_amp, accelerator.autocast_handler
    )
    # As Accelerator.prepare_model does it, so that unwrap_model finds what it expects.
    model._original_forward = new
    model.forward = MethodType(utils.convert_outputs_to_fp32(autocast(new.__func__)), model)


def _describe(head: _trl_head.Head) -> str:
    """Say which function computes which value."""
    function, names = "linear_selective_log_softmax", ["log_probs"]
    if "is_top1" in head.outputs:
        function = "linear_cross_entropy_with_statistics"
    names += [name for name in ("entropy", "is_top1") if name in head.outputs]
    text = f"{', '.join(names)} by {function}"
    others = [name for name in ("log_sum_sq_probs", "mean_logits") if name in head.outputs]
    if others:
        text += f"; {', '.join(others)} from passes of their own"
    options = {
        "temperature": (head.temperature, 1.0),
        "logit_scale": (head.logit_scale, 1.0),
        "softcap": (head.final_logit_softcapping, None),
        "cast_lm_head_to_fp32": (head.cast_lm_head_to_fp32, False),
    }
    used = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
    return f"{text} ({', '.join(used)})" if used else text


def is_applied(model: torch.nn.Module) -> bool:
    """Return True if a model's log-probabilities come from fused_xent."""
    return _trl_head.is_ours(_trl_checks.forward_below_autocast(model))

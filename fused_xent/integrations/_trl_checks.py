"""What fused_xent.integrations.trl checks before it changes a trainer."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import _trl_head

N_CHECKED = 8  # tokens whose log-probabilities are compared
METHODS = ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")


def check_trainer(trainer: Any, names: tuple[str, ...]) -> None:
    """Refuse trainers that fused_xent cannot be used in, by name."""
    trl: Any = importlib.import_module("trl")
    name, classes = type(trainer).__name__, tuple(getattr(trl, name, ()) for name in names)
    args = getattr(trainer, "args", None)
    for option in ("use_liger_kernel", "use_liger_loss"):
        if getattr(args, option, False):
            raise ValueError(
                f"trainer.args.{option} must be False for fused_xent in {name}, got True: both "
                "would replace the model's loss. Turn one of them off"
            )
    if isinstance(trainer, trl.DistillationTrainer):
        raise TypeError(
            f"trainer must not be a DistillationTrainer, got {name}: its divergence compares all "
            "classes of two heads, which no function of fused_xent does. TRL's own loss stores no "
            "logits either: use it without apply()"
        )
    if not isinstance(trainer, classes):
        raise TypeError(
            f"trainer must be one of {', '.join(names)} or GKDTrainer of TRL, got {name}, which "
            "does not train on the log-probabilities of TRL's fused head. fused_xent's functions "
            "can be called in its compute_loss"
        )
    experimental = [
        cls.__name__ for cls in type(trainer).mro() if cls.__module__.startswith("trl.experimental")
    ]
    if not is_gkd(trainer) and not set(experimental) <= {"KTOTrainer", "GMPOTrainer"}:
        raise TypeError(
            f"trainer must not be an experimental {experimental[0]}, got {name}: its loss is "
            "computed from logits, or in a way that is not tested. Use it without apply()"
        )
    _trl_head.check_version()


def is_gkd(trainer: Any) -> bool:
    """Return True for TRL's experimental GKDTrainer."""
    return any(
        cls.__name__ == "GKDTrainer" and cls.__module__.startswith("trl.experimental.gkd")
        for cls in type(trainer).mro()
    )


def base_model(trainer: Any, model: Any) -> Any:
    """Return the model that has the fused head: without DDP and the like, and without PEFT."""
    model = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    is_peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return model.get_base_model() if is_peft else model


def forward_below_autocast(model: Any) -> Any:
    """Return a model's forward, without the one that accelerate puts around it."""
    forward = model.__dict__.get("forward")
    operations: Any = importlib.import_module("accelerate.utils.operations")
    wrapped = getattr(getattr(forward, "__func__", forward), "__wrapped__", None)
    if isinstance(wrapped, operations.ConvertOutputsToFp32):  # else another wrapper is over it
        forward = model.__dict__.get("_original_forward", forward)
    return forward


def fused_forward(model: Any, role: str) -> Any:
    """Return TRL's fused forward of a model, or with_fused_xent's."""
    forward = forward_below_autocast(model)
    if not _trl_head.is_fused_forward(forward):
        raise RuntimeError(
            f"the forward of trainer.{role} must be TRL's fused head, got {forward!r}: something "
            "has replaced it. Call apply() before that"
        )
    return forward


def check_head(model: Any, head: _trl_head.Head, role: str) -> None:
    """Refuse a head whose output is not a linear layer's: TRL and fused_xent read its weight."""
    layer = model.get_output_embeddings()
    layers = [layer]
    if type(layer).__name__ == "ModulesToSaveWrapper":  # PEFT's: trained copies of the layer
        layers = list(layer.modules_to_save.values())
    for layer in layers:
        what = type(layer).__name__
        if type(layer) is not nn.Linear:
            found = f"a {what}"
        elif nn.utils.parametrize.is_parametrized(layer):
            found = f"a {what} with parametrizations"
        elif layer._forward_hooks or layer._forward_pre_hooks:
            found = f"a {what} with forward hooks"
        elif "forward" in layer.__dict__ and not head.cast_lm_head_to_fp32:
            found = f"a {what} with a forward of its own"
        else:
            continue
        raise ValueError(
            f"the head of trainer.{role} must be a torch.nn.Linear, got {found}: log-probabilities "
            "are computed from its weight, so anything else that it does would be left out. For "
            "LoRA, leave lm_head out of target_modules, or train it whole by modules_to_save"
        )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def compare_logits(trainer: Any, model: Any, forward: Any, role: str) -> list[str]:
    """Compare log-probabilities of a few tokens with those of the model's own logits.

    Raises ValueError if they differ. Returns why they could not be compared, if so.
    """
    if trainer.is_deepspeed_enabled or getattr(trainer, "is_fsdp_enabled", False):
        return [f"trainer.{role} is sharded: its logits were not compared with the model's own"]
    vocab_size = model.config.get_text_config().vocab_size
    numbers = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (1, N_CHECKED + 1), generator=numbers).to(model.device)
    with torch.no_grad(), _in_eval_mode(model):
        try:
            logits = forward(input_ids=tokens, use_cache=False).logits[:, :-1]
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            return [f"trainer.{role} does not run on token ids alone ({why}): logits not compared"]
        found = forward(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs
    _check_near(logits, tokens, found, _trl_head.head_of(forward).temperature, role)
    return []


def _check_near(
    logits: Tensor, tokens: Tensor, found: Tensor, temperature: float, role: str
) -> None:
    eps = torch.finfo(logits.dtype).eps
    logits = logits.double() / temperature
    tokens = tokens[:, 1:].to(logits.device)
    wanted = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    error = (found.to(wanted) - wanted).abs().max().item()
    tolerance = max(1e-4, 4 * eps) * (1 + logits.abs().max().item())
    if not error <= tolerance:
        raise ValueError(
            f"the log-probabilities of trainer.{role} must be those of its logits, got a "
            f"difference of {error:.3g}: its head does more than its weight, "
            "config.final_logit_softcapping, logit_scale and logits_scaling say. Use the trainer "
            "without apply(), and check TRL's log-probabilities"
        )


def left_to_trl(trainer: Any) -> list[str]:
    """Say what of this trainer does not use the fused head."""
    found = ["generation, and evaluation that needs logits (compute_metrics): as before"]
    args = trainer.args
    if getattr(trainer, "label_smoother", None) is not None:
        found.append("the loss: label smoothing computes it from all logits; metrics are fused")
    if getattr(trainer, "compute_loss_func", None) is not None:
        found.append("the loss: compute_loss_func gets all logits; metrics are fused")
    if getattr(args, "precompute_ref_log_probs", False):
        found.append("reference log-probabilities that were computed before apply()")
    own = type(trainer)
    methods = [getattr(own, name, None) for name in METHODS]
    overrides = [x.__name__ for x in methods if x and not x.__module__.startswith("trl.")]
    if overrides:
        found.append(f"what {own.__name__}.{', '.join(overrides)} computes without fused_lm_head")
    return found

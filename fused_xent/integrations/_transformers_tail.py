"""What a model does to the logits of its head: a scale and a softcap, or it is refused.

It is measured: stand-ins for the backbone and the head return known numbers. From the head's
numbers, the model's own forward must make ``softcap * tanh(logit_scale * number / softcap)`` or
``logit_scale * number``, and pass it to its loss function. Two of the numbers tell the scale and
the cap; the others are random, and must agree.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SMALL, LARGE = 2.0**-30, 2.0**40  # logits that tell the scale and the cap
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
        if self.softcap is None:
            return scaled
        return f"{self.softcap:g} tanh({scaled} / {self.softcap:g})"


def numbers_of(model: Any) -> dict[str, float]:
    """Return the numbers of a model's config, among which a scale and a softcap are."""
    config = vars(model.config.get_text_config())
    return {name: value for name, value in config.items() if isinstance(value, float)}


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
    known = inspect.signature(type(model).forward).parameters
    given = {"output_router_logits": False} if "output_router_logits" in known else {}
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

"""The providers: torch, this package, and other implementations if they are installed.

Each has a small adapter, which returns the provider's losses for a request, or raises `Unsupported`
with the reason why there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

import fused_xent

from .cases import IGNORE_INDEX, MODES, Case
from .check import torch_loss
from .timing import Loss, Samples, Timer, Workload

Found = TypeVar("Found")


@dataclass(frozen=True)
class Provider:
    """A loss to measure, and the modes that its options affect."""

    name: str
    loss: Loss
    modes: tuple[str, ...] = MODES
    fused: bool = False  # computes loss and gradient in one pass

    def timers(self, workload: Workload, modes: list[str]) -> Iterator[Timer]:
        """Yields what to run in a round: a forward pass, and a step that gives two timings."""
        wanted = [mode for mode in self.modes if mode in modes]

        def forward() -> Samples:
            return {("forward", self.name): workload.forward(self.loss)[1]}

        def step() -> Samples:
            step = workload.step(self.loss)
            seconds = {"backward": step.backward, "both": step.forward + step.backward}
            return {(mode, self.name): seconds[mode] for mode in wanted if mode != "forward"}

        if "forward" in wanted:
            yield forward
        if set(wanted) - {"forward"}:
            yield step


class Unsupported(Exception):
    """A provider does not support a request. The message says why."""


@dataclass(frozen=True)
class Request:
    """What to measure: the case, dtype and device."""

    case: Case
    dtype: str
    device: str

    def takes_rows_on_a_gpu(self, *options: str) -> dict[str, float]:
        """Checks a case for a provider with GPU kernels for (N, C), indices and these options.

        Returns the options of the case as arguments. Raises Unsupported if it has others.
        """
        if self.device != "cuda":
            raise Unsupported("needs a GPU")
        if self.case.soft:
            raise Unsupported("takes no soft labels")
        if len(self.case.shape) != 2:
            raise Unsupported("takes logits (N, C) only")
        wanted = self.case.options.wanted
        for name in wanted:
            if name not in options:
                raise Unsupported(f"has no {name}")
        return {name: value for name, value in wanted.items() if name != "ignored"}


def torch_eager(request: Request) -> list[Provider]:
    """The baseline of all ratios."""
    return [Provider("torch eager", partial(torch_loss, options=request.case.options))]


def torch_compile(request: Request) -> list[Provider]:
    """Compiled for this case only: drops what was compiled for earlier cases."""
    torch.compiler.reset()
    options = request.case.options

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return torch_loss(logits, target, options)

    return [Provider("torch.compile", torch.compile(loss, dynamic=False))]


def ours(request: Request) -> list[Provider]:
    """The default mode and both in-place modes; the fused one does not take float16."""
    wanted = {k: v for k, v in request.case.options.wanted.items() if k != "ignored"}
    loss = partial(fused_xent.cross_entropy, **wanted)
    inplace = partial(loss, inplace_backward=True)
    fused = partial(loss, grad_in_forward=True)
    found = [
        Provider("fused_xent", loss),
        Provider("fused_xent inplace", inplace, modes=("backward", "both")),
        Provider("fused_xent fused", fused, modes=("both",), fused=True),
    ]
    return found[:-1] if request.dtype == "float16" else found


def liger(request: Request) -> list[Provider]:
    """The forward reads the logits twice and writes the gradient over them."""
    wanted = request.takes_rows_on_a_gpu(
        "ignored", "label_smoothing", "lse_square_scale", "softcap"
    )
    from liger_kernel.transformers.functional import liger_cross_entropy

    return [Provider("liger-kernel", partial(liger_cross_entropy, **wanted), ("forward", "both"))]


def quack(request: Request) -> list[Provider]:
    """With a new gradient tensor, and in place."""
    request.takes_rows_on_a_gpu("ignored")
    from quack.cross_entropy import cross_entropy

    inplace = partial(cross_entropy, inplace_backward=True)
    return [
        Provider("quack-kernels", cross_entropy),
        Provider("quack-kernels inplace", inplace, ("backward", "both")),
    ]


def flash_attention(request: Request) -> list[Provider]:
    """With a new gradient tensor, and in place."""
    wanted = request.takes_rows_on_a_gpu("ignored", "label_smoothing", "lse_square_scale")
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    inplace = CrossEntropyLoss(**wanted, inplace_backward=True)
    return [
        Provider("flash-attn", CrossEntropyLoss(**wanted)),
        Provider("flash-attn inplace", inplace, ("backward", "both")),
    ]


def apex(request: Request) -> list[Provider]:
    """Gets no ignored rows: it would read a logit at their index, -100."""
    smoothing = request.takes_rows_on_a_gpu("label_smoothing").get("label_smoothing", 0.0)
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        to_float = logits.dtype != torch.float32
        losses = SoftmaxCrossEntropyLoss.apply(logits, target, smoothing, IGNORE_INDEX, to_float)
        return losses.mean()

    return [Provider("apex", loss)]


def transformer_engine(request: Request) -> list[Provider]:
    """Takes logits (B, T, C), so a batch of one sequence is made."""
    wanted = request.takes_rows_on_a_gpu("ignored", "label_smoothing")
    if request.dtype == "float16":
        raise Unsupported("takes no float16")
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return parallel_cross_entropy(
            logits.unsqueeze(0), target.unsqueeze(0), reduce_loss=True, **wanted
        )

    return [Provider("transformer-engine", loss)]


Adapters = dict[str, Callable[[Request], list[Provider]]]
ADAPTERS: Adapters = {
    "torch eager": torch_eager,
    "torch.compile": torch_compile,
    "fused_xent": ours,
    "liger-kernel": liger,
    "quack-kernels": quack,
    "flash-attn": flash_attention,
    "apex": apex,
    "transformer-engine": transformer_engine,
}


def gather(
    adapters: dict[str, Callable[..., list[Found]]], request: object, names: list[str] | None
) -> tuple[list[Found], dict[str, str]]:
    """Returns the providers that support the request, and why others do not; only of `names`."""
    found, absent = [], {}
    for name, adapter in adapters.items():
        if names and name not in names:
            continue
        try:
            found += adapter(request)
        except Unsupported as error:
            absent[name] = str(error)
        except ModuleNotFoundError as error:
            absent[name] = f"not installed: no module {error.name}"
        except Exception as error:  # a package may be installed and still not load
            absent[name] = f"does not load: {type(error).__name__}: {error}"
    return found, absent

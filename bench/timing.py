"""How a loss is timed: as in a training step, all providers in turn.

Before each timing the logits are restored, so a provider that overwrites them does not affect the
others. Then the caches are emptied: every provider starts from the same state, and GB/s are those
of memory. A backward starts with the caches that its forward left. The gradient of the previous
round has been freed by then. So each provider pays for the allocation of its own, page faults
included, as in training, where a gradient lives only until the layer below has used it; fused_xent
keeps that memory for the next gradient. No provider pays for `.grad`: logits have none. On a GPU,
memory comes from torch's caching allocator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from .device import PeakMemory, clock

Loss = Callable[[Tensor, Tensor], Tensor]
Key = tuple[str, str]  # (mode, provider)
Samples = dict[Key, float]  # seconds
Timer = Callable[[], Samples]  # runs something once


class _LastLayer(torch.autograd.Function):
    """Stands in for the model: returns its logits, and keeps their gradient without a copy."""

    @staticmethod
    def forward(ctx, parameter: Tensor, logits: Tensor, received: list[Tensor]) -> Tensor:
        ctx.received = received
        return logits.detach()  # the same memory in a tensor that is neither a leaf nor a view

    @staticmethod
    def backward(ctx, grad_logits: Tensor) -> tuple[None, None, None]:
        ctx.received.append(grad_logits)
        return None, None, None


@dataclass
class Step:
    """The results of a forward and a backward pass, and the seconds that each took."""

    loss: Tensor
    grad_logits: Tensor
    forward: float
    backward: float


class Workload:
    """The tensors of one case: logits and target for the providers, and the originals."""

    def __init__(self, logits: Tensor, target: Tensor) -> None:
        """Logits (N, C, ...); target (N, ...) of indices or (N, C, ...) of probabilities."""
        self.original = logits
        self.logits = logits.clone()
        self.original_target = target
        self.target = target.clone()
        self.clock = clock(logits.device.type)
        self._parameter = torch.zeros((), requires_grad=True, device=logits.device)

    def restore(self) -> None:
        """Resets logits and target, which a provider may have overwritten, to the originals."""
        self.logits.copy_(self.original)
        self.target.copy_(self.original_target)

    @torch.no_grad()
    def forward(self, loss: Loss) -> tuple[Tensor, float]:
        """Returns the loss, computed without a graph as in evaluation, and its seconds."""
        self.restore()
        start = self.clock.start()
        value = loss(self.logits, self.target)
        return value, self.clock.seconds(start, self.clock.mark())

    def step(self, loss: Loss, upstream: Tensor | None = None) -> Step:
        """Computes the loss and its gradient, scaled by `upstream` (None: 1), as in training."""
        self.restore()
        received: list[Tensor] = []
        logits = _LastLayer.apply(self._parameter, self.logits, received)
        start = self.clock.start()
        value = loss(logits, self.target)
        middle = self.clock.mark()
        value.backward(upstream)
        end = self.clock.mark()
        seconds = self.clock.seconds
        return Step(value.detach(), received.pop(), seconds(start, middle), seconds(middle, end))

    def peak_bytes(self, loss: Loss) -> dict[str, int | None]:
        """Returns peak memory beyond logits and target, by mode; backward has that of the step."""
        with PeakMemory(self.logits.device.type) as of_forward:
            self.forward(loss)
        with PeakMemory(self.logits.device.type) as of_step:
            self.step(loss)
        return {"forward": of_forward.bytes, "backward": of_step.bytes, "both": of_step.bytes}

    def baselines(self) -> Samples:
        """Times a copy of the logits into memory that has been touched, and a read of them.

        The read is torch's sum of 64-bit integers, whatever the dtype: memory bandwidth limits it.
        A sum of 32-bit integers would be limited by arithmetic.
        """
        words = self.logits.view(-1).view(torch.uint8)
        words = words[: words.numel() // 8 * 8].view(torch.int64)
        self.logits.copy_(self.original)
        start = self.clock.start()
        self.logits.copy_(self.original)
        copy = self.clock.seconds(start, self.clock.mark())
        start = self.clock.start()
        words.sum()
        return {
            ("copy", "torch"): copy,
            ("read", "torch"): self.clock.seconds(start, self.clock.mark()),
        }


def interleave(
    timers: list[tuple[str, Timer]],
    min_rounds: int,
    min_seconds: float,
    on_round: Callable[[int], None],
    samples: dict[Key, list[float]],
) -> dict[str, Exception]:
    """Runs all timers in turn, round after round, for at least so many rounds and seconds.

    If something disturbs the machine for a while, it thus affects all providers, and their ratios
    hold. Adds each sample to `samples` at once, so that none is lost if the user interrupts. A
    provider that raises is left out from then on; its exception is returned.
    """
    start, n_rounds = perf_counter(), 0
    raised: dict[str, Exception] = {}
    gc.collect()
    gc.disable()
    try:
        while n_rounds < min_rounds or perf_counter() - start < min_seconds:
            n_rounds += 1
            on_round(n_rounds)
            for provider, timer in timers:
                if provider in raised:
                    continue
                try:
                    measured = timer()
                except Exception as error:  # the others are still measured
                    raised[provider] = error
                    continue
                for key, seconds in measured.items():
                    samples.setdefault(key, []).append(seconds)
    finally:
        gc.enable()
    return raised

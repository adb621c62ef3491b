"""How a loss is timed: as a training step pays for it, all providers in turn.

Before each timing the logits are written anew, so that one who overwrites them harms no other, and
then the caches are emptied: every provider finds them in one state, and GB/s are those of memory.
The gradient of the round before has been freed by then, so each provider pays for the allocation of
its own, page faults included, as in training, where a gradient lives only until the layer below has
used it. No provider pays for `.grad`: logits have none. On a GPU memory comes from torch's pool.
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
Key = tuple[str, str]  # a mode and a provider
Samples = dict[Key, float]  # seconds
Timer = Callable[[], Samples]  # runs something once


class _LastLayer(torch.autograd.Function):
    """Stands for the model: hands out its logits, and takes their gradient without a copy."""

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
    """What one forward and backward pass gave, and the seconds that each took."""

    loss: Tensor
    grad_logits: Tensor
    forward: float
    backward: float


class Workload:
    """The tensors of one case: logits and target for providers, and the originals of both."""

    def __init__(self, logits: Tensor, target: Tensor) -> None:
        """Logits (N, C, ...); target (N, ...) of indices or (N, C, ...) of probabilities."""
        self.original = logits
        self.logits = logits.clone()
        self.original_target = target
        self.target = target.clone()
        self.clock = clock(logits.device.type)
        self._parameter = torch.zeros((), requires_grad=True, device=logits.device)

    def restore(self) -> None:
        """Makes the originals of what one provider was given what the next one is given."""
        self.logits.copy_(self.original)
        self.target.copy_(self.original_target)

    @torch.no_grad()
    def forward(self, loss: Loss) -> tuple[Tensor, float]:
        """The loss without a graph, as in evaluation, and its seconds."""
        self.restore()
        start = self.clock.start()
        value = loss(self.logits, self.target)
        return value, self.clock.seconds(start, self.clock.mark())

    def step(self, loss: Loss, upstream: Tensor | None = None) -> Step:
        """The loss and its gradient, scaled by `upstream` (1 when None), as in training."""
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
        """The most memory at once beyond logits and target, by mode; a backward's is a step's."""
        with PeakMemory(self.logits.device.type) as of_forward:
            self.forward(loss)
        with PeakMemory(self.logits.device.type) as of_step:
            self.step(loss)
        return {"forward": of_forward.bytes, "backward": of_step.bytes, "both": of_step.bytes}

    def baselines(self) -> Samples:
        """One copy of the logits into memory that is already touched, and one bare read of them.

        The read is a sum of 64-bit integers, whatever the dtype: of torch's reductions it is among
        those that memory alone bounds, where sums of 32-bit integers are bound by their arithmetic.
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
    """All providers' timers in turn, round after round, until there are enough rounds and seconds.

    What disturbs the machine for a while thus disturbs all of them, and their ratios stand. Adds to
    `samples`, which has what there is when the user interrupts. Whoever raises is left out from
    then on, and returned.
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

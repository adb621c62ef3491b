"""What is measured: cases named after real models, and the bytes that they must move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = ("float32", "bfloat16")
MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Case:
    """One shape of logits, class dimension 1, with class indices or soft labels as target."""

    name: str
    shape: tuple[int, ...]
    soft: bool = False

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The logits and the target, the same in every run."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.shape, generator=generator).to(dtype)
        if self.soft:
            return logits, torch.randn(self.shape, generator=generator).softmax(1).to(dtype)
        positions = self.shape[:1] + self.shape[2:]
        return logits, torch.randint(self.shape[1], positions, generator=generator)


CASES = {
    case.name: case
    for case in (
        Case("gpt2", (512, 50257)),  # odd: no two rows are aligned alike
        Case("llama2", (1024, 32000)),
        Case("llama3", (256, 128256)),
        Case("qwen", (256, 151936)),
        Case("gpt-oss", (128, 201088)),
        Case("gemma", (128, 262144)),
        Case("imagenet", (4096, 1000)),
        Case("cifar", (65536, 10)),  # a row is shorter than a cache line
        Case("segmentation", (8, 21, 256, 256)),  # the class dimension is strided
        Case("llama3-soft", (256, 128256), soft=True),  # distillation
    )
}
DEFAULT = ("llama3", "llama2", "gpt2", "imagenet", "cifar", "segmentation", "llama3-soft")
QUICK = ("llama3", "imagenet")

# What the algorithm must move: reads of its inputs (logits and target) and writes of the gradient,
# which is as large as the logits. A target is as large as the logits too where labels are soft, and
# 8 bytes a row where they are class indices. What a provider moves beyond that, in temporaries or
# per-row state, is its own affair: it shows as fewer GB/s.
PASSES = {"forward": (1, 0), "backward": (1, 1), "both": (2, 1)}  # mode: (reads, writes)
FUSED_PASSES = (1, 1)  # loss and gradient from one read


def bytes_moved(logits: Tensor, target: Tensor, mode: str, fused: bool = False) -> int:
    """Bytes that `mode` must move; the baselines "copy" and "read" touch the logits alone."""
    if mode in ("copy", "read"):
        return logits.nbytes * (2 if mode == "copy" else 1)
    reads, writes = FUSED_PASSES if fused else PASSES[mode]
    return reads * (logits.nbytes + target.nbytes) + writes * logits.nbytes

"""What is measured: cases named after real models, and the bytes that they must move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOTH_DTYPES = ("float32", "bfloat16")
MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Case:
    """One shape of logits, class dimension 1, with class indices or soft labels as target."""

    name: str
    shape: tuple[int, ...]
    soft: bool = False
    dtypes: tuple[str, ...] = BOTH_DTYPES  # unless others are asked for

    def tensors(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """The logits and the target, the same in every run."""
        source = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        logits = torch.randn(self.shape, **source).to(dtype)
        if self.soft:
            return logits, torch.randn(self.shape, **source).softmax(1).to(dtype)
        positions = self.shape[:1] + self.shape[2:]
        return logits, torch.randint(self.shape[1], positions, **source)


@dataclass(frozen=True)
class Suite:
    """The cases of one kind of device."""

    cases: dict[str, Case]
    default: tuple[str, ...]
    quick: tuple[str, ...]


def _by_name(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


CPU = Suite(
    _by_name(
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
    ),
    default=("llama3", "llama2", "gpt2", "imagenet", "cifar", "segmentation", "llama3-soft"),
    quick=("llama3", "imagenet"),
)

ROWS, BFLOAT16 = 8192, ("bfloat16",)  # a micro-batch of tokens, as a GPU trains on
CUDA = Suite(
    _by_name(
        Case("imagenet", (ROWS, 1000)),
        Case("codec", (ROWS, 4096), dtypes=BFLOAT16),  # tokens of images or sound
        Case("llama2", (ROWS, 32000)),
        Case("gpt2", (ROWS, 50257)),
        Case("llama3", (ROWS, 128256)),
        Case("qwen", (ROWS, 151936), dtypes=BFLOAT16),
        Case("gpt-oss", (ROWS, 201088), dtypes=BFLOAT16),
        Case("gemma", (ROWS, 262144), dtypes=BFLOAT16),
        Case("llama3-few", (64, 128256), dtypes=BFLOAT16),  # fewer rows than multiprocessors
        Case("cifar", (1 << 20, 10), dtypes=BFLOAT16),
        Case("segmentation", (16, 21, 512, 512), dtypes=BFLOAT16),
        Case("llama2-soft", (ROWS, 32000), soft=True, dtypes=BFLOAT16),
        Case("llama3-soft", (ROWS, 128256), soft=True, dtypes=BFLOAT16),
    ),
    default=(
        *("imagenet", "codec", "llama2", "gpt2", "llama3", "qwen", "gpt-oss", "gemma"),
        *("llama3-few", "cifar", "segmentation", "llama2-soft", "llama3-soft"),
    ),
    quick=("llama3", "imagenet"),
)
SUITES = {"cpu": CPU, "cuda": CUDA}

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

"""What is measured: cases named after real models, and what they must move and compute."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOTH_DTYPES = ("float32", "bfloat16")
MODES = ("forward", "backward", "both")


IGNORE_INDEX = -100


@dataclass(frozen=True)
class Options:
    """What a loss is asked for beyond torch's plain mean, which the defaults are."""

    label_smoothing: float = 0.0
    ignored: float = 0.0  # share of the rows, chosen at random; one is left
    lse_square_scale: float = 0.0
    softcap: float = 0.0  # 0 for none

    @property
    def wanted(self) -> dict[str, float]:
        """Those that are not their defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True)
class Case:
    """One shape of logits, class dimension 1, with class indices or soft labels as target."""

    name: str
    shape: tuple[int, ...]
    soft: bool = False
    dtypes: tuple[str, ...] = BOTH_DTYPES  # unless others are asked for
    options: Options = Options()

    def tensors(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """The logits and the target, the same in every run."""
        source = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        logits = torch.randn(self.shape, **source).to(dtype)
        if self.soft:
            return logits, torch.randn(self.shape, **source).softmax(1).to(dtype)
        positions = self.shape[:1] + self.shape[2:]
        target = torch.randint(self.shape[1], positions, **source)
        if self.options.ignored:
            order = torch.randperm(target.numel(), **source).view(positions)
            # Of one row at least the loss remains.
            n_ignored = min(round(self.options.ignored * target.numel()), target.numel() - 1)
            target[order < n_ignored] = IGNORE_INDEX
        return logits, target


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


def sweep(vocabs: list[int], device: str, soft: bool, options: Options) -> list[Case]:
    """One case for each number of classes: as many logits each on a CPU, as many rows on a GPU."""
    cases = []
    for vocab in vocabs:
        n_rows = ROWS if device == "cuda" else max(1, SWEPT_LOGITS // vocab)
        dtypes = ("bfloat16",) if device == "cuda" else ("float32",)
        cases.append(Case(f"{SWEPT}{vocab}", (n_rows, vocab), soft, dtypes, options))
    return cases


SWEPT = "V="  # how the names of its cases begin
SWEPT_VOCABS = (1000, 2048, 4096, 8192, 16384, 32000, 50257, 65536, 128256, 151936, 201088, 262144)
SWEPT_LOGITS = 1 << 25

# What the algorithm must move: reads of its inputs (the target, and the logits of rows that are not
# ignored) and writes of the gradient, which is as large as the logits. A target is as large as the
# logits too where labels are soft, and 8 bytes a row where they are class indices. What a provider
# moves beyond that, in temporaries or per-row state, is its own affair: it shows as fewer GB/s.
PASSES = {"forward": (1, 0), "backward": (1, 1), "both": (2, 1)}  # mode: (reads, writes)
FUSED_PASSES = (1, 1)  # loss and gradient from one read

# What it must compute, for a logit: forward, a maximum, a difference, an exponential and a sum;
# backward, a difference, an exponential and a product; with soft labels a product and a sum more in
# each. An exponential counts as one operation, whatever it takes.
OPERATIONS = {"forward": 4, "backward": 3, "both": 7}
SOFT_OPERATIONS = {"forward": 2, "backward": 2, "both": 4}


def _counted(logits: Tensor, target: Tensor) -> int:
    """Logits of rows that are not ignored."""
    if target.is_floating_point():
        return logits.numel()
    return int((target != IGNORE_INDEX).sum()) * logits.size(1)


def bytes_moved(logits: Tensor, target: Tensor, mode: str, fused: bool = False) -> int:
    """Bytes that `mode` must move; the baselines "copy" and "read" touch the logits alone."""
    if mode in ("copy", "read"):
        return logits.nbytes * (2 if mode == "copy" else 1)
    reads, writes = FUSED_PASSES if fused else PASSES[mode]
    counted = _counted(logits, target) * logits.element_size()
    return reads * (counted + target.nbytes) + writes * logits.nbytes


def operations(logits: Tensor, target: Tensor, mode: str) -> int:
    """Operations that `mode` must compute; the baselines compute nothing."""
    if mode in ("copy", "read"):
        return 0
    soft = SOFT_OPERATIONS[mode] if target.is_floating_point() else 0
    return (OPERATIONS[mode] + soft) * _counted(logits, target)

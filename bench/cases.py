"""Cases, named after real models, and the bytes and operations that each mode needs."""

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
    """Options of the loss. The defaults are torch's plain mean."""

    label_smoothing: float = 0.0
    ignored: float = 0.0  # share of the rows, chosen at random; at least one row counts
    lse_square_scale: float = 0.0
    softcap: float = 0.0  # 0: off

    @property
    def wanted(self) -> dict[str, float]:
        """The options that differ from their defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value}


def _source(device: str) -> dict[str, torch.Generator | str]:
    """Returns the arguments with which random numbers are the same in every run."""
    return {"generator": torch.Generator(device).manual_seed(0), "device": device}


@dataclass(frozen=True)
class Case:
    """Logits of one shape, classes in dimension 1; the target is class indices or soft labels."""

    name: str
    shape: tuple[int, ...]
    soft: bool = False
    dtypes: tuple[str, ...] = BOTH_DTYPES  # measured by default
    options: Options = Options()

    def tensors(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """Makes the logits and the target, the same in every run."""
        source = _source(device)
        logits = torch.randn(self.shape, **source).to(dtype)
        if self.soft:
            return logits, torch.randn(self.shape, **source).softmax(1).to(dtype)
        positions = self.shape[:1] + self.shape[2:]
        target = torch.randint(self.shape[1], positions, **source)
        if self.options.ignored:
            order = torch.randperm(target.numel(), **source).view(positions)
            # At least one row counts: the mean of no rows is NaN.
            n_ignored = min(round(self.options.ignored * target.numel()), target.numel() - 1)
            target[order < n_ignored] = IGNORE_INDEX
        return logits, target


@dataclass(frozen=True)
class SparseCase(Case):
    """Several classes in each row: equal labels on them, or their log-probabilities."""

    n_labels: int = 64
    selected: bool = False  # no labels, but log-probabilities

    def tensors(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """Makes the logits and the classes (N, K), the same in every run."""
        source = _source(device)
        n_rows, n_classes = self.shape
        logits = torch.randn(n_rows, n_classes, **source).to(dtype)
        return logits, torch.randint(n_classes, (n_rows, self.n_labels), **source)


def is_sparse(logits: Tensor, target: Tensor) -> bool:
    """Returns True if the target holds several classes of each row."""
    return target.dim() == logits.dim() and not target.is_floating_point()


def dense_labels(logits: Tensor, target: Tensor) -> Tensor:
    """Returns labels of all classes: the same loss as equal labels on those in the target."""
    labels = torch.full(target.shape, 1 / target.size(1), dtype=logits.dtype, device=logits.device)
    return torch.zeros_like(logits).scatter_add(1, target, labels)


@dataclass(frozen=True)
class Suite:
    """The cases for one type of device."""

    cases: dict[str, Case]
    default: tuple[str, ...]
    quick: tuple[str, ...]


def _by_name(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


CPU = Suite(
    _by_name(
        Case("gpt2", (512, 50257)),  # odd: neighbouring rows differ in alignment
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

ROWS, BFLOAT16 = 8192, ("bfloat16",)  # tokens of a micro-batch in training on a GPU
CUDA = Suite(
    _by_name(
        Case("imagenet", (ROWS, 1000)),
        Case("codec", (ROWS, 4096), dtypes=BFLOAT16),  # tokens of images or audio
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
    """Makes a case per number of classes, with equal logits on a CPU, equal rows on a GPU."""
    cases = []
    for vocab in vocabs:
        n_rows = ROWS if device == "cuda" else max(1, SWEPT_LOGITS // vocab)
        dtypes = ("bfloat16",) if device == "cuda" else ("float32",)
        cases.append(Case(f"{SWEPT}{vocab}", (n_rows, vocab), soft, dtypes, options))
    return cases


SWEPT = "V="  # prefix of the names of its cases
SWEPT_VOCABS = (1000, 2048, 4096, 8192, 16384, 32000, 50257, 65536, 128256, 151936, 201088, 262144)
SWEPT_LOGITS = 1 << 25

# Bytes that the algorithm must move: it reads its inputs (the target, and the logits of rows that
# are not ignored) and writes the gradient, which is as large as the logits. Soft labels are as
# large as the logits too; class indices take 8 bytes each. Other traffic of a provider, for
# temporaries or per-row state, is not counted: it lowers the provider's GB/s.
PASSES = {"forward": (1, 0), "backward": (1, 1), "both": (2, 1)}  # mode: (reads, writes)
FUSED_PASSES = (1, 1)  # loss and gradient from one read

# Operations per logit. Forward: maximum, difference, exponential, sum. Backward: difference,
# exponential, product. Soft labels add a product and a sum to each. An exponential counts as one
# operation.
OPERATIONS = {"forward": 4, "backward": 3, "both": 7}
SOFT_OPERATIONS = {"forward": 2, "backward": 2, "both": 4}


def _counted(logits: Tensor, target: Tensor) -> int:
    """Returns the number of logits in rows that are not ignored."""
    if target.is_floating_point() or is_sparse(logits, target):
        return logits.numel()
    return int((target != IGNORE_INDEX).sum()) * logits.size(1)


def bytes_moved(logits: Tensor, target: Tensor, mode: str, fused: bool = False) -> int:
    """Bytes that `mode` must move; the baselines "copy" and "read" touch only the logits."""
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

"""Test cases: one table per dimension of the problem, with the reason for each entry."""

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")

VOCABULARIES = (
    *range(1, 18),  # every remainder of every vector width
    *(31, 32, 33, 63, 64, 65),
    *(
        127,
        128,
        129,
        *range(131, 162, 3),
    ),  # up to 128: one row per lane; above: one class per lane
    *(255, 256, 257, 1000),
    *(2047, 2048, 2049),  # a block of the sweep
    *(4097, 6144),
    *(16384, 16385),  # segment size: longer rows, if few, are split over threads
    32768 + 3,
)

SHAPES = {  # of the logits
    "no batch": (7,),
    "no batch, one class": (1,),
    "one row": (1, 11),
    "one row of one class": (1, 1),
    "two dimensions": (5, 7),
    "sequence": (2, 7, 5),
    "image": (2, 5, 3, 4),
    "volume": (2, 3, 2, 3, 4),
    "one long row": (1, 40000),
    "few long rows": (3, 20000),
    "more rows than a tile holds": (300, 10),
    "image wider than a tile": (2, 5, 3, 300),
    "image of many classes": (2, 150, 9, 3),
    "many rows of many classes": (40, 1500),
    "rows of no elements": (0, 5),
    "image of no pixels": (2, 3, 0),
    "image of size 1": (2, 9, 1, 1),
}


class Labels(NamedTuple):
    """A kind of target, and the options that belong to it."""

    probabilities: bool = False
    weighted: bool = False
    label_smoothing: float = 0.0
    ignored: float = 0.0  # fraction of the rows
    dtype: torch.dtype | None = None  # of target; None: int64, or that of the logits
    ignore_index: int = -100


LABELS = {
    "index": Labels(),
    "index, int32": Labels(dtype=torch.int32, ignored=0.3),
    "index, uint8": Labels(dtype=torch.uint8, ignored=0.3, ignore_index=255),
    "index, mostly ignored": Labels(ignored=0.9),
    "index, a class ignored": Labels(ignored=0.3, ignore_index=0),
    "index, smoothed": Labels(label_smoothing=0.1),
    "index, smoothed entirely": Labels(label_smoothing=1.0, ignored=0.3),
    "index, weighted": Labels(weighted=True, ignored=0.3),
    "index, weighted and smoothed": Labels(weighted=True, label_smoothing=0.1, ignored=0.3),
    "probabilities": Labels(True),
    "probabilities, float32": Labels(True, dtype=torch.float32),
    "probabilities, weighted": Labels(True, weighted=True),
    "probabilities, smoothed": Labels(True, label_smoothing=0.1),
    "probabilities, all options": Labels(True, weighted=True, label_smoothing=0.2),
}


def class_dim(shape) -> int:
    return 0 if len(shape) == 1 else 1


def make_logits(shape, dtype, scale=2.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def make_target(logits: Tensor, labels: Labels) -> Tensor:
    dim = class_dim(logits.shape)
    if labels.probabilities:
        target = torch.rand(logits.shape, dtype=torch.float64).pow(4)
        target = target / target.sum(dim, keepdim=True)
        return target.to(labels.dtype or logits.dtype)
    shape = logits.shape[:dim] + logits.shape[dim + 1 :]
    n_classes = logits.shape[dim]
    high = min(n_classes, 255) if labels.dtype == torch.uint8 else n_classes
    target = torch.randint(0, high, shape)
    target[torch.rand(shape) < labels.ignored] = labels.ignore_index
    if labels.ignored and target.numel() and (target == labels.ignore_index).all():
        target.view(-1)[-1] = high - 1  # at least one row counts; test_all_rows_ignored has none
    return target.to(labels.dtype or torch.int64)


def make_options(logits: Tensor, labels: Labels) -> dict:
    """Return the loss options; class weights include zero and negative ones."""
    options = {"label_smoothing": labels.label_smoothing}
    if not labels.probabilities:
        options["ignore_index"] = labels.ignore_index
    if labels.weighted:
        weight = torch.rand(logits.shape[class_dim(logits.shape)]) + 0.5
        weight[3::7] = 0
        weight[5::11] *= -0.1
        options["weight"] = weight.to(logits.dtype)
    return options


def make_upstream(row_shape, reduction: str) -> Tensor:
    """Return upstream gradients in [0.5, 1.5), multiples of 1/8; one per row for 'none'."""
    shape = row_shape if reduction == "none" else ()
    return torch.randint(4, 12, shape) / 8


def edge_classes(n_classes: int) -> list[int]:
    """Return the first and last classes of vectors, blocks, segments and the row."""
    edges = (0, 1, 8, 16, 32, 2048, 16384, n_classes - 8, n_classes - 1, n_classes)
    return sorted({i for e in edges for i in (e - 1, e) if 0 <= i < n_classes})

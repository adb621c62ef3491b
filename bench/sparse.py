"""Measures sparse labels and log-probabilities of selected classes.

`labels` is the loss of K equal labels in each row of the logits, `selected` is minus the mean of
the log-probabilities of K classes, and `hidden` is the same from hidden states, beside the four
bare matrix products that it needs if the logits are not stored: of the logits, twice, of
grad_hidden and of grad_weight. Each provider's results are compared with float64 before it is
timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_xent

from . import linear, loss
from .cases import DTYPES, MODES, SparseCase, dense_labels
from .check import CHUNK
from .command import Job, Parser, at_least, measure_all, names_of
from .linear import Found
from .providers import Provider, Request, Unsupported
from .results import Result
from .timing import Loss

CASES = {  # shapes: of the logits; of hidden states: rows, features, classes
    "cpu": {
        "labels": (256, 151936),
        "selected": (256, 151936),
        "hidden": (1024, 512, 151936),
    },
    "cuda": {
        "labels": (8192, 151936),
        "selected": (8192, 151936),
        "hidden": (4096, 4096, 151936),
    },
}
QUICK = {"labels": (64, 32000), "selected": (64, 32000), "hidden": (256, 256, 32000)}
MOST_LABELS = 1024  # of this package


def torch_labels(logits: Tensor, classes: Tensor) -> Tensor:
    """Computes the loss from labels of all classes."""
    return F.cross_entropy(logits, dense_labels(logits, classes))


def torch_selected(logits: Tensor, classes: Tensor) -> Tensor:
    """Computes the log-probabilities of all classes."""
    return -logits.log_softmax(1).gather(1, classes).mean()


def our_labels(logits: Tensor, classes: Tensor, **options: bool) -> Tensor:
    """Computes the loss from the classes that have labels."""
    label = torch.full((), 1 / classes.size(1), device=logits.device)
    labels = label.expand(classes.shape)
    return fused_xent.cross_entropy(logits, labels, target_indices=classes, **options)


def our_selected(logits: Tensor, classes: Tensor, **options: bool) -> Tensor:
    """Computes the log-probabilities of these classes only."""
    return -fused_xent.selective_log_softmax(logits, classes, **options).mean()


# ---- of logits -----------------------------------------------------------------------------------


def by_torch(request: Request) -> Loss:
    """Returns the loss of a case by torch operations."""
    return torch_selected if request.case.selected else torch_labels


def torch_eager(request: Request) -> list[Provider]:
    """The baseline of all ratios."""
    return [Provider("torch eager", by_torch(request))]


def torch_compile(request: Request) -> list[Provider]:
    """Compiled for this case only: drops what was compiled for earlier cases."""
    torch.compiler.reset()
    return [Provider("torch.compile", torch.compile(by_torch(request), dynamic=False))]


def ours(request: Request) -> list[Provider]:
    """The default mode and the in-place modes; the fused one is of losses, and not in float16."""
    function = our_selected if request.case.selected else our_labels
    inplace = partial(function, inplace_backward=True)
    found = [
        Provider("fused_xent", function),
        Provider("fused_xent inplace", inplace, modes=("backward", "both")),
    ]
    if not request.case.selected and request.dtype != "float16":
        fused = partial(function, grad_in_forward=True)
        found.append(Provider("fused_xent fused", fused, modes=("both",), fused=True))
    return found


def trl(request: Request) -> list[Provider]:
    """One row after another in 16 bits, log-probabilities of all classes; torch operations."""
    if not request.case.selected:
        raise Unsupported("has no loss of sparse labels")
    from trl.trainer.utils import selective_log_softmax

    return [Provider("trl", lambda logits, classes: -selective_log_softmax(logits, classes).mean())]


ADAPTERS = {
    "torch eager": torch_eager,
    "torch.compile": torch_compile,
    "fused_xent": ours,
    "trl": trl,
}


# ---- of hidden states ----------------------------------------------------------------------------


def unfused(hidden: Tensor, linear_weight: Tensor, classes: Tensor) -> Tensor:
    """Computes all logits at once."""
    return torch_selected(F.linear(hidden, linear_weight), classes)


def our_linear(hidden: Tensor, linear_weight: Tensor, classes: Tensor) -> Tensor:
    """Computes the logits in chunks of rows, twice."""
    log_probs = fused_xent.linear_selective_log_softmax(hidden, linear_weight, classes)
    return -log_probs.mean()


def linear_compile(device: str) -> Found:
    """On a GPU only: on a CPU, torch.compile fuses nothing with the products."""
    linear.needs_gpu(device)
    torch.compiler.reset()
    return [("torch.compile", torch.compile(unfused, dynamic=False))]


def no_hidden_states(device: str) -> Found:
    """TRL computes the logits in the model."""
    raise Unsupported("takes logits only")


LINEAR_ADAPTERS = {
    "torch eager": lambda device: [("torch eager", unfused)],
    "torch.compile": linear_compile,
    "fused_xent": lambda device: [("fused_xent", our_linear)],
    "trl": no_hidden_states,
}


# ---- the command ---------------------------------------------------------------------------------


def job(name: str, shape: tuple[int, ...], dtype: str, options: argparse.Namespace) -> Job:
    """Makes the job that measures a case in a dtype."""
    count = {"k": options.k}
    if name == "hidden":
        result = Result("linear", name, shape, dtype, "selected", count)
        run: Callable = partial(
            linear.measure, options, adapters=LINEAR_ADAPTERS, n_labels=options.k
        )
        return Job(result, linear.bytes_needed(shape, dtype), run)
    selected = name == "selected"
    case = SparseCase(name, shape, n_labels=options.k, selected=selected)
    result = Result("loss", name, shape, dtype, "selected" if selected else "sparse", count)
    # Logits, their original and the gradient; labels of all classes, and torch's temporaries.
    size, n_logits = DTYPES[dtype].itemsize, prod(shape)
    needed = n_logits * (5 * size + 2 * loss.FLOAT32) + min(n_logits, CHUNK) * loss.FLOAT64
    return Job(result, needed, partial(loss.measure, case, options, adapters=ADAPTERS))


def main(arguments: list[str]) -> int:
    """`python -m bench sparse`."""
    command = Parser(prog="python -m bench sparse", description=__doc__)
    command.add_argument("case", nargs="*", help=names_of(CASES))
    classes = f"classes in each row, from 1 to {MOST_LABELS}; default 64"
    command.add_argument("--k", type=at_least(1), default=64, metavar="K", help=classes)
    modes = "may be repeated; default: all; not of hidden states"
    command.add_argument("--mode", action="append", choices=MODES, help=modes)
    command.add_common(list(ADAPTERS))
    options = command.parse_args(arguments)
    cases = QUICK if options.quick else CASES[options.device]
    if options.k > MOST_LABELS:
        command.error(f"--k must be at most {MOST_LABELS}, got {options.k}")
    for name in options.case:
        if name not in cases:
            command.error(f"case must be one of {', '.join(cases)}, got {name!r}")
    names = dict.fromkeys(options.case or cases)
    dtypes = dict.fromkeys(options.dtype or ["bfloat16"])
    jobs = [job(name, cases[name], dtype, options) for name in names for dtype in dtypes]
    return measure_all(command, options, jobs)[1]

"""Trains on rows that become certain, with torch's loss and fused_xent's, and plots both losses.

The task is modular addition: a + b mod 31 from one-hot a and b, in float32 without weight decay
("Grokking at the edge of numerical stability", https://arxiv.org/abs/2501.04697). A small network
soon fits the training set. From then on, the loss of a row is the sum of the other classes' small
probabilities. torch adds that sum to 1, which rounds it, and from 6e-8 on loses it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_xent import cross_entropy

from .command import Parser, at_least
from .plots import COLOURS
from .results import Run, environment

N_CLASSES = 31
HIDDEN = 128
LEARNING_RATE = 1e-2
SHOWN = 200  # points of a curve
LOSSES = {"torch eager": F.cross_entropy, "fused_xent": cross_entropy}


def problem() -> tuple[Tensor, Tensor]:
    """Returns the inputs and targets of 7 in 10 of all sums, the same for each loss."""
    a, b = torch.cartesian_prod(torch.arange(N_CLASSES), torch.arange(N_CLASSES)).T
    inputs = torch.cat([F.one_hot(a, N_CLASSES), F.one_hot(b, N_CLASSES)], 1).float()
    chosen = torch.randperm(len(a), generator=torch.Generator().manual_seed(0))[: len(a) * 7 // 10]
    return inputs[chosen], ((a + b) % N_CLASSES)[chosen]


def exact_loss(logits: Tensor, target: Tensor) -> float:
    """Returns the mean loss in float64, all digits of it: the target is in no sum."""
    shifted = logits.double() - logits.double().gather(1, target.unsqueeze(1))
    others = shifted.exp().scatter(1, target.unsqueeze(1), 0).sum(1)
    return others.log1p().mean().item()


def train(loss, steps: int) -> list[float]:
    """Returns the exact loss before some of the steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2 * N_CLASSES, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, N_CLASSES),
    )
    # Gradients become as small as the loss: the default eps of 1e-8 would end the training.
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, eps=1e-30)
    inputs, target = problem()
    curve = []
    for step in range(steps):
        logits = model(inputs)
        if step % max(steps // SHOWN, 1) == 0:
            curve.append(exact_loss(logits.detach(), target))
        optimizer.zero_grad()
        loss(logits, target).backward()
        optimizer.step()
    return curve


def plot(curves: dict[str, list[float]], steps: int, summary: str, path: Path) -> None:
    """Draws both curves on a logarithmic axis."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for name, curve in curves.items():
        at = range(0, steps, max(steps // SHOWN, 1))
        colour = COLOURS[name]
        axis.plot(at, curve, color=colour)
        axis.annotate(f" {name}", (at[-1], curve[-1]), color=colour, va="center", fontsize=9)
    axis.set_yscale("log")
    axis.set_xlim(0, steps * 1.22)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss, computed exactly")
    axis.set_title("Modular addition in float32, no weight decay", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, -0.07, summary, fontsize=6, color="#707070")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """`python -m bench confident`."""
    command = Parser(prog="python -m bench confident", description=__doc__)
    command.add_argument("--steps", type=at_least(1), default=30000, help="default: %(default)s")
    command.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="default: .")
    options = command.parse_args(arguments)
    if not options.out.is_dir():
        command.error(f"--out must be an existing folder, got {options.out}")
    curves = {}
    for name, loss in LOSSES.items():
        curves[name] = train(loss, options.steps)
        print(f"{name:12} loss {curves[name][0]:.2e} to {curves[name][-1]:.2e}", file=sys.stderr)
    run = Run(environment("cpu"))
    content = {"environment": run.environment, "steps": options.steps, "exact_loss": curves}
    path = options.out / "confident.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    plot(curves, options.steps, run.summary, path.with_suffix(".png"))
    print(path, path.with_suffix(".png"), sep="\n")
    return 0

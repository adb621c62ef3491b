"""Measures losses of a vocabulary that is split over processes, which this command starts.

Each process has one thread, an equal part of the classes, and all targets. `local part` is the loss
of a process's own classes alone, without communication, and `local part + gather` the same with one
all-gather of 12 bytes a row, whose result is not used: no loss of all classes is faster. A time is
that of the slowest process, in a step that follows another of the same loss. The logits are random,
so that their maximum may be in any part.

The case `linear` has hidden states and a linear layer whose classes are split. Its bare products
are the three of the layer, of all rows at once, and the sum of the gradient of the hidden states
over the processes, in float32: no loss is computed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fused_xent

from .cases import DTYPES
from .check import WrongResult
from .command import Job, Parser, at_least, measure_all, names_of
from .linear import BARE, STEP
from .results import EAGER, Result, Timing

# Rows and classes; of a linear layer rows, features and classes.
CASES = {"128k": (256, 128256), "8k": (2048, 8192), "linear": (1024, 512, 32000)}
QUICK_ROUNDS, ROUNDS = 3, 15
TIMEOUT = 600  # seconds
BOUNDS = ("local part", "local part + gather", BARE)  # they compute no loss of all classes
Loss = Callable[..., Tensor]


# ---- providers: losses of a process's logits (N, C / processes) and all targets (N,) ----------
# ---- or of hidden states (N, H), a process's weights (C / processes, H) and all targets --------


class _Gathered(torch.autograd.Function):
    """The logits of all processes; the gradient of a loss that all processes compute."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, logits)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()


class _ThreeReductions(torch.autograd.Function):
    """As in Megatron-LM: the maximum, the target's logit and the sum are reduced one by one."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        logits = logits.float()
        top = logits.max(1).values
        dist.all_reduce(top, dist.ReduceOp.MAX)
        shifted = logits - top.unsqueeze(1)
        n_own = logits.shape[1]
        index = target - dist.get_rank() * n_own
        is_other = (index < 0) | (index >= n_own)
        index = index.masked_fill(is_other, 0)
        target_logit = shifted.gather(1, index.unsqueeze(1)).squeeze(1).masked_fill(is_other, 0)
        dist.all_reduce(target_logit)
        exponentials = shifted.exp_()
        total = exponentials.sum(1)
        dist.all_reduce(total)
        exponentials.div_(total.unsqueeze(1))
        ctx.save_for_backward(exponentials, index, is_other)
        return (total.log() - target_logit).mean()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        gradient, index, is_other = ctx.saved_tensors
        rows = torch.arange(len(index))
        gradient[rows, index] -= (~is_other).float()
        return gradient.mul_(upstream / len(index)), None


def gathered(loss: Loss) -> Loss:
    """Returns a loss of the logits of all processes."""
    return lambda logits, target: loss(_Gathered.apply(logits), target)


def loss_parallel(logits: Tensor, target: Tensor) -> Tensor:
    """Torch's own: a loss of a DTensor. The backward must be inside of its context too."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = DTensor.from_local(logits, mesh, [Shard(1)], run_check=False)
    return F.cross_entropy(whole, target)


def split(logits: Tensor, target: Tensor, **options: bool) -> Tensor:
    """This package's loss."""
    group = dist.group.WORLD
    return fused_xent.cross_entropy(logits, target, process_group=group, **options)


def local_part(logits: Tensor, target: Tensor) -> Tensor:
    """The same as if a process's classes were all."""
    return fused_xent.cross_entropy(logits, target % logits.shape[1])


def local_part_and_gather(logits: Tensor, target: Tensor) -> Tensor:
    """The same, and the communication that each row needs: maximum, sum, and target's logit."""
    own = torch.zeros(len(target), 3)
    dist.all_gather_into_tensor(own.new_empty(dist.get_world_size() * len(own), 3), own)
    return local_part(logits, target)


class _Copied(torch.autograd.Function):
    """Hidden states that all processes have; the sum of their gradients, in at least float32."""

    @staticmethod
    def forward(ctx, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        dist.all_reduce(total)
        return total.to(gradient.dtype)


class _Products(torch.autograd.Function):
    """The products of a linear layer's forward and backward, with its logits as their gradient."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        ctx.gradients = logits @ weight, logits.t() @ hidden
        return logits[0, 0].clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor]:
        return ctx.gradients


def of_layer(loss: Loss) -> Loss:
    """Returns a loss of hidden states and a process's weights, which stores its logits."""
    return lambda hidden, weight, target: loss(_Copied.apply(hidden) @ weight.t(), target)


def split_layer(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """This package's loss of a linear layer."""
    group = dist.group.WORLD
    return fused_xent.linear_cross_entropy(hidden, weight, target, process_group=group)


PROVIDERS: dict[str, Loss] = {
    EAGER: gathered(F.cross_entropy),
    "torch loss_parallel": loss_parallel,
    "three all-reduces": lambda logits, target: _ThreeReductions.apply(logits, target),
    "gather + fused_xent": gathered(fused_xent.cross_entropy),
    "fused_xent": split,
    "fused_xent inplace": partial(split, inplace_backward=True),
    "local part": local_part,
    "local part + gather": local_part_and_gather,
}
LINEAR_PROVIDERS: dict[str, Loss] = {
    "three all-reduces": of_layer(PROVIDERS["three all-reduces"]),
    "linear, then fused_xent": of_layer(split),
    "fused_xent": split_layer,
    BARE: lambda hidden, weight, target: _Products.apply(_Copied.apply(hidden), weight),
}


def providers_of(shape: Sequence[int]) -> dict[str, Loss]:
    """Returns the providers of a case."""
    return PROVIDERS if len(shape) == 2 else LINEAR_PROVIDERS


# ---- one process -----------------------------------------------------------------------------


def run(loss_of: Loss, inputs: Sequence[Tensor], target: Tensor) -> tuple[Any, ...]:
    """Returns the loss, the gradients, and the seconds of the slowest process."""
    from torch.distributed.tensor.parallel import loss_parallel as context

    leaves = [x.clone().requires_grad_() for x in inputs]
    # In-place modes need logits that were computed.
    computed = [leaf * 1 for leaf in leaves] if len(leaves) == 1 else leaves
    dist.barrier()
    start = perf_counter()
    if loss_of is loss_parallel:
        with context():
            loss = loss_of(*computed, target)
            gradients = torch.autograd.grad(loss, computed)
        loss = loss.full_tensor()
    else:
        loss = loss_of(*computed, target)
        gradients = torch.autograd.grad(loss, computed)
    seconds = torch.tensor(perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return loss.detach(), gradients, seconds.item()


def check(loss_of: Loss, inputs: Sequence[Tensor], target: Tensor) -> None:
    """Compares a provider with the loss of all classes in float64.

    Raises:
        WrongResult: a result is wrong.
    """
    loss, found, _ = run(loss_of, inputs, target)
    leaves = [x.double().requires_grad_() for x in inputs]
    own = leaves[0] if len(leaves) == 1 else _Copied.apply(leaves[0]) @ leaves[1].t()
    right = F.cross_entropy(_Gathered.apply(own), target)
    wanted = torch.autograd.grad(right, leaves)
    tolerance = 2 * torch.finfo(inputs[0].dtype).eps
    pairs = [(loss, right), *zip(found, wanted, strict=True)]
    for name, pair in zip(["loss", *["gradient"] * len(found)], pairs, strict=True):
        error = ((pair[0].double() - pair[1]).abs().max() / pair[1].abs().max()).item()
        if not error < max(tolerance, 1e-5):
            raise WrongResult(f"{name} differs by {error:.1e}, relative to the largest")


def make_inputs(options: argparse.Namespace) -> tuple[list[Tensor], Tensor]:
    """Returns this process's inputs, and all targets."""
    torch.manual_seed(0)
    rows, *features, classes = options.shape
    target = torch.randint(classes, (rows,))
    n_own = classes // options.n
    hidden = [torch.randn(rows, size) for size in features]  # the same in all processes
    torch.manual_seed(1 + options.rank)
    own = [2 * torch.randn(n_own, size) / size**0.5 for size in features]
    inputs = [*hidden, *own] if features else [2 * torch.randn(rows, n_own)]
    return [x.to(DTYPES[options.dtype]) for x in inputs], target


def work(options: argparse.Namespace) -> None:
    """Measures in one process; the first one writes the samples."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{options.store}", rank=options.rank, world_size=options.n
    )
    inputs, target = make_inputs(options)
    losses = providers_of(options.shape)
    failures: dict[str, str] = {}
    for name in options.providers:
        try:
            if name not in BOUNDS:
                check(losses[name], inputs, target)
        except Exception as error:  # the others are still measured
            failures[name] = f"{type(error).__name__}: {error}"
    samples: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name in options.providers:
            if name not in failures:
                run(losses[name], inputs, target)  # the step before, as in a training loop
                samples.setdefault(name, []).append(run(losses[name], inputs, target)[2])
    if options.rank == 0:
        Path(options.out).write_text(json.dumps({"samples": samples, "failures": failures}))
    dist.barrier()
    dist.destroy_process_group()


# ---- the command -----------------------------------------------------------------------------


def measure(options: argparse.Namespace, result: Result, show: Callable[[str], None]) -> None:
    """Starts the processes, and takes the samples of the first."""
    n, size = options.processes, DTYPES[result.dtype].itemsize
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    chosen = [x for x in providers_of(result.shape) if x in (options.provider or [x])]
    show(f"{n} processes")
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "store": f"{folder}/store",
            "out": f"{folder}/out",
            "shape": result.shape,
            "dtype": result.dtype,
            "n": n,
            "rounds": rounds,
            "providers": chosen,
        }
        command = [sys.executable, "-W", "ignore", "-m", "bench.parallel"]
        processes = [
            subprocess.Popen([*command, json.dumps({**given, "rank": rank})]) for rank in range(n)
        ]
        try:
            end = perf_counter() + TIMEOUT
            for process in processes:
                if process.wait(max(end - perf_counter(), 0)) != 0:
                    raise RuntimeError("a process has failed")
        finally:
            for process in processes:
                process.kill()
        found = json.loads(Path(given["out"]).read_text())
    result.failures.update(found["failures"])
    rows, classes = result.shape[0], result.shape[-1]
    # Of each process: its logits are read twice and written, and its products are computed.
    traffic = 3 * rows * classes // n * size
    is_linear = len(result.shape) == 3
    mode, operations = (STEP, 3 * 2 * prod(result.shape) // n) if is_linear else ("both", 0)
    for name, seconds in found["samples"].items():
        result.timings.append(Timing(mode, name, traffic, operations, None, seconds))


def main(arguments: list[str]) -> int:
    """`python -m bench parallel`."""
    command = Parser(prog="python -m bench parallel", description=__doc__)
    command.add_argument("case", nargs="*", help=names_of({"cpu": CASES}))
    command.add_argument("--processes", type=at_least(2), default=2, metavar="N", help="default 2")
    command.add_common(list(dict.fromkeys([*PROVIDERS, *LINEAR_PROVIDERS])))
    options = command.parse_args(arguments)
    if options.device != "cpu":
        command.error("--device must be cpu: gloo does the communication")
    for name in options.case:
        if name not in CASES:
            command.error(f"case must be one of {', '.join(CASES)}, got {name!r}")
    jobs = []
    for name in dict.fromkeys(options.case or CASES):
        for dtype in dict.fromkeys(options.dtype or ["float32", "bfloat16"]):
            shape = CASES[name]
            kind = "loss" if len(shape) == 2 else "linear"
            result = Result(kind, name, shape, dtype, options={"processes": options.processes})
            needed = shape[0] * shape[-1] * (8 + 4 * 6)
            jobs.append(Job(result, needed, partial(measure, options)))
    return measure_all(command, options, jobs)[1]


if __name__ == "__main__":
    work(argparse.Namespace(**json.loads(sys.argv[1])))
    os._exit(0)  # a torch thread that waits for the GIL at exit would abort the process

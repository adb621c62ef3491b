"""Measures training steps of a small Llama of transformers, with its own loss and with ours.

A step is forward, backward, and an update by SGD. `setter` is `apply(model)`, `fuse_head` is
`apply(model, fuse_head=True)`, `drop_ignored` the same with that option. Every provider runs in
processes of its own, in turn, so that none uses memory that another one left. The memory is the
peak of a step beyond what the model needs between steps; it includes all gradients. The bare
products are the three of the head, of all rows at once: no loss is computed, and no other layer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, TypeVar

import torch

from .cases import DTYPES
from .command import Job, Parser, between, measure_all, names_of
from .device import PeakMemory
from .linear import BARE
from .results import EAGER, Result, Timing

CASES = {"128k": (2, 256, 128256)}  # sequences, tokens in each, classes
WIDTH, LAYERS = 64, 2
QUICK_ROUNDS, ROUNDS = 1, 3  # processes of each provider
STEPS = 4  # in each process; the first one is not timed
PROVIDERS: dict[str, dict[str, bool] | None] = {
    EAGER: None,  # the model as it is
    "setter": {},
    "fuse_head": {"fuse_head": True},
    "drop_ignored": {"fuse_head": True, "drop_ignored": True},
    BARE: None,
}

T = TypeVar("T")


# ---- one process -----------------------------------------------------------------------------


def make_model(n_classes: int, dtype: str, n_tokens: int) -> Any:
    """Makes a Llama in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=n_classes,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=n_tokens,
    )
    return LlamaForCausalLM(config).to(DTYPES[dtype]).train()


def work(provider: str, shape: list[int], dtype: str, ignored: float) -> dict[str, Any]:
    """Takes steps in this process. Returns their losses and seconds, and the peak of one."""
    if provider == BARE:
        return multiply(shape, dtype)
    n_sequences, n_tokens, n_classes = shape
    model = make_model(n_classes, dtype, n_tokens)
    options = PROVIDERS[provider]
    if options is not None:
        from fused_xent.integrations.transformers import apply

        apply(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(n_classes, (n_sequences, n_tokens))
    labels = tokens.clone()
    labels[:, : int(ignored * n_tokens)] = -100

    def step() -> float:
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses, seconds = timed(step)
    with PeakMemory("cpu") as memory:
        losses.append(step())
    return {"losses": losses, "seconds": seconds, "peak": memory.bytes}


def multiply(shape: list[int], dtype: str) -> dict[str, Any]:
    """Computes the products of the head alone, as often as a model would take a step."""
    n_sequences, n_tokens, n_classes = shape
    hidden = torch.randn(n_sequences * n_tokens, WIDTH).to(DTYPES[dtype])
    weight = torch.randn(n_classes, WIDTH).to(DTYPES[dtype])

    def products() -> None:
        logits = hidden @ weight.t()
        logits @ weight
        logits.t() @ hidden

    return {"losses": [], "seconds": timed(products)[1], "peak": None}


def timed(step: Callable[[], T]) -> tuple[list[T], list[float]]:
    """Takes STEPS steps; returns their results, and the seconds of all but the first."""
    results, seconds = [step()], []
    for _ in range(STEPS - 1):
        start = perf_counter()
        results.append(step())
        seconds.append(perf_counter() - start)
    return results, seconds


# ---- the command -----------------------------------------------------------------------------


def start(arguments: dict[str, Any]) -> dict[str, Any]:
    """Calls `work` in a new process."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-W", "ignore", "-m", "bench.transformers"]
        given = [json.dumps(arguments), str(out)]
        done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["the process has failed"]
            raise RuntimeError(lines[-1])
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def measure(options: argparse.Namespace, result: Result, show: Callable[[str], None]) -> None:
    """Takes the samples of all providers, and compares their losses with the model's own."""
    n_sequences, n_tokens, n_classes = CASES[result.case]
    names = list(dict.fromkeys([EAGER, *(options.provider or PROVIDERS)]))
    timings = {}
    expected: list[float] = []
    for _ in range(options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)):
        for name in names:
            if name in result.failures:
                continue
            show(name)
            given = {"shape": [n_sequences, n_tokens, n_classes], "ignored": options.ignored}
            try:
                found = start({"provider": name, "dtype": result.dtype, **given})
            except RuntimeError as error:
                result.failures[name] = str(error)
                continue
            expected = expected or found["losses"]
            if name != BARE and (reason := why_wrong(found["losses"], expected, result.dtype)):
                result.failures[name] = reason
                continue
            traffic = 3 * n_sequences * n_tokens * n_classes * DTYPES[result.dtype].itemsize
            timing = timings.setdefault(name, Timing("both", name, traffic, 0, found["peak"]))
            timing.seconds += found["seconds"]
            if found["peak"] is not None:
                timing.peak_bytes = max(timing.peak_bytes or 0, found["peak"])
    result.timings += [timing for name, timing in timings.items() if name not in result.failures]


def why_wrong(losses: list[float], expected: list[float], dtype: str) -> str:
    """Says which step's loss differs from the model's own; empty if none does."""
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for i, (found, wanted) in enumerate(zip(losses, expected, strict=True)):
        if not abs(found - wanted) <= tolerance * abs(wanted):
            return f"WrongResult: the loss of step {i} is {found:.6g}, expected {wanted:.6g}"
    return ""


def main(arguments: list[str]) -> int:
    """`python -m bench transformers`."""
    command = Parser(prog="python -m bench transformers", description=__doc__)
    command.add_argument("case", nargs="*", help=names_of({"cpu": CASES}))
    share = "share of labels at the start of each sequence that are ignored; default 0.25"
    command.add_argument("--ignored", type=between(0, 0.9), default=0.25, help=share)
    command.add_common(list(PROVIDERS))
    options = command.parse_args(arguments)
    if options.device != "cpu":
        command.error("--device must be cpu")
    for name in options.case:
        if name not in CASES:
            command.error(f"case must be one of {', '.join(CASES)}, got {name!r}")
    jobs = []
    for name in dict.fromkeys(options.case or CASES):
        for dtype in dict.fromkeys(options.dtype or ["float32", "bfloat16"]):
            n_sequences, n_tokens, n_classes = CASES[name]
            shape = (n_sequences * n_tokens, n_classes)
            of_labels = {"ignored": options.ignored} if options.ignored else {}
            result = Result("loss", name, shape, dtype, options=of_labels)
            needed = 16 * n_classes * (n_sequences * n_tokens + WIDTH)
            jobs.append(Job(result, needed, partial(measure, options)))
    return measure_all(command, options, jobs)[1]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(work(**json.loads(sys.argv[1]))))

"""One training run of the demo, in a process of its own: a step for each line on stdin.

A process has its own peak memory, and stdin lets the runs take turns. Each step, and the summary at
the end, is answered by a line of JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_xent

from .device import DEVICES, clock, default_device

BATCH, LENGTH, WIDTH, HEADS = 8, 128, 64, 4
LEARNING_RATE = 3e-3
LOSSES = {
    "torch": F.cross_entropy,
    "fused_xent": fused_xent.cross_entropy,
    "fused_xent fused": partial(fused_xent.cross_entropy, grad_in_forward=True),
}


class LanguageModel(nn.Module):
    """One causal transformer block between an embedding and a head."""

    def __init__(self, vocab_size: int) -> None:
        """Initializes the parameters from torch's global generator."""
        super().__init__()
        self.words = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.block = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch * length, vocab_size) of the words that follow `tokens` (batch, length)."""
        hidden = self.words(tokens) + self.positions.weight
        hidden = self.block(hidden, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(hidden).flatten(0, 1))


class Training:
    """A model, its optimizer and its batches. Runs differ only in the loss."""

    def __init__(self, loss: str, tokens: Tensor, vocab_size: int, device: str) -> None:
        """The text is `tokens` (n_tokens,): integers below `vocab_size`."""
        torch.manual_seed(0)
        self.loss_function = LOSSES[loss]
        self.clock = clock(device)
        self.tokens = tokens.to(device)
        self.model = LanguageModel(vocab_size).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Returns words (BATCH, LENGTH), and the next word of each, flattened."""
        starts = torch.randint(self.tokens.numel() - LENGTH, (BATCH, 1))
        positions = (starts + torch.arange(LENGTH + 1)).to(self.tokens.device)
        windows = self.tokens[positions].long()
        return windows[:, :-1], windows[:, 1:].flatten()

    def step(self) -> dict[str, float]:
        """Takes one step; returns its loss, its seconds, and the seconds spent in the loss."""
        inputs, target = self.batch()
        mark, seconds = self.clock.mark, self.clock.seconds
        start = mark()
        logits = self.model(inputs)
        head = logits.grad_fn  # read first: fused mode replaces it
        loss_start = mark()
        loss = self.loss_function(logits, target)
        loss_end = mark()
        arrivals = []
        head.register_prehook(lambda _: arrivals.append(mark()))
        backward_start = mark()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = mark()
        return {
            "loss": loss.item(),
            "loss_seconds": seconds(loss_start, loss_end) + seconds(backward_start, arrivals[0]),
            "step_seconds": seconds(start, end),
        }


def peak_bytes(device: str) -> int:
    """Returns the peak memory of this process or, on a GPU, of torch's GPU allocations."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def place(device: str) -> str:
    """Returns the name of the GPU, or the number of CPU threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads"


def main() -> None:
    """Takes steps until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("loss", choices=LOSSES)
    parser.add_argument("tokens", help="file of int32")
    parser.add_argument("n_tokens", type=int)
    parser.add_argument("vocab_size", type=int)
    parser.add_argument("--device", choices=DEVICES, default=default_device())
    options = parser.parse_args()
    tokens = torch.from_file(options.tokens, size=options.n_tokens, dtype=torch.int32)
    training = Training(options.loss, tokens, options.vocab_size, options.device)
    for _ in sys.stdin:
        print(json.dumps(training.step()), flush=True)
    summary = {"peak_bytes": peak_bytes(options.device), "place": place(options.device)}
    print(json.dumps({**summary, "device": options.device}), flush=True)


if __name__ == "__main__":
    main()

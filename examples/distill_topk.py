"""Distil a teacher's top-k log-probabilities into a student, without a log_softmax of all classes.

A teacher with a large vocabulary is stored as its 64 most probable classes for each token and their
log-probabilities. Four losses, by two functions, train a student on them:

- ``forward_kl``: KL(teacher || student) of the teacher's top-k, renormalised to sum to 1;
- ``divergence``: forward KL, reverse KL or Jensen-Shannon divergence of the top-k and the tail, one
  more class with the probability of all classes outside of the top-k.

Run it: ``python examples/distill_topk.py``. It takes a few seconds on a CPU.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fused_xent import cross_entropy, selective_log_softmax

VOCAB_SIZE, K, N_TOKENS, N_FEATURES = 8192, 64, 512, 64
PADDING = -100  # in top_indices, where a teacher has fewer classes than K
NEVER = -1e4  # the log-probability of padding: finite, so that 0 times it is 0


def forward_kl(logits: Tensor, top_log_probs: Tensor, top_indices: Tensor) -> Tensor:
    """Return the mean KL(teacher || student), with the teacher's top-k renormalised.

    ``logits`` (N, V) are the student's; ``top_log_probs`` and ``top_indices`` (N, K) the teacher's.
    """
    log_q = without_padding(top_log_probs, top_indices).log_softmax(-1)
    loss = cross_entropy(logits, log_q.exp(), target_indices=top_indices)
    return loss + (log_q.exp() * log_q).sum(-1).mean()


def without_padding(log_probs: Tensor, top_indices: Tensor) -> Tensor:
    """Return log-probabilities in float32, in which padding has none."""
    return log_probs.float().masked_fill(top_indices == PADDING, NEVER)


def with_tail(log_probs: Tensor) -> Tensor:
    """Add the log-probability of all other classes: (N, K) becomes (N, K + 1)."""
    inside = log_probs.logsumexp(-1, keepdim=True).clamp(max=-1e-6)  # else -inf, by rounding
    return torch.cat([log_probs, torch.log(-torch.expm1(inside))], -1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of each row."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def divergence(kind: str, logits: Tensor, top_log_probs: Tensor, top_indices: Tensor) -> Tensor:
    """Return the mean divergence between teacher and student over the top-k and the tail."""
    log_p = selective_log_softmax(logits, top_indices)
    log_p, log_q = (with_tail(without_padding(x, top_indices)) for x in (log_p, top_log_probs))
    if kind == "forward":
        return kl(log_q, log_p).mean()
    if kind == "reverse":
        return kl(log_p, log_q).mean()
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return (kl(log_p, log_m) + kl(log_q, log_m)).mean() / 2


LOSSES: dict[str, Callable[..., Tensor]] = {
    "forward, renormalised": forward_kl,
    "forward, with tail": partial(divergence, "forward"),
    "reverse, with tail": partial(divergence, "reverse"),
    "jsd, with tail": partial(divergence, "jsd"),
}


def train(loss_function: Callable[..., Tensor], steps: int = 60) -> tuple[float, float]:
    """Train a student; return KL(teacher || student) over all classes before and after."""
    torch.manual_seed(0)
    hidden = torch.randn(N_TOKENS, N_FEATURES)
    teacher, student = (torch.nn.Linear(N_FEATURES, VOCAB_SIZE, bias=False) for _ in range(2))
    all_log_probs = (6 * teacher(hidden)).log_softmax(-1).detach()
    top_log_probs, top_indices = all_log_probs.topk(K)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    values = []  # before and after
    for i in range(steps + 1):
        logits = student(hidden)
        if i in (0, steps):
            values.append(kl(all_log_probs, logits.detach().log_softmax(-1)).mean().item())
        optimizer.zero_grad()
        loss_function(logits, top_log_probs, top_indices).backward()
        optimizer.step()
    return values[0], values[1]


def main() -> None:
    """Train with each loss."""
    for name, loss_function in LOSSES.items():
        before, after = train(loss_function)
        print(f"{name:24} KL over all {VOCAB_SIZE} classes: {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()

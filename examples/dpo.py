"""Direct preference optimization (https://arxiv.org/abs/2305.18290) from hidden states.

``dpo_loss`` needs the summed log-probabilities of a chosen and a rejected answer, of a model and of
a reference model. They come from ``linear_selective_log_softmax``, which stores no logits of all
tokens. Prompt and padding have the label -100: log-probability 0 and no gradient.

The example prefers answers in which each token follows the one before it. Run it:
``python examples/dpo.py``. It takes a few seconds on a CPU.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_xent import linear_selective_log_softmax

VOCAB_SIZE, N_FEATURES, LENGTH, N_PAIRS, BETA = 1000, 32, 16, 64, 0.1
PADDING = -100


def sequence_log_probs(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of each sequence: hidden (B, T, H), head (V, H), labels (B, T)."""
    return linear_selective_log_softmax(hidden, head, labels).sum(-1)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor
) -> Tensor:
    """Return the loss of the log-probabilities (B,) of sequences."""
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -logsigmoid(BETA * margin).mean()


class Model(torch.nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB_SIZE, N_FEATURES)
        self.head = torch.nn.Linear(N_FEATURES, VOCAB_SIZE, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the log-probability of each sequence."""
        hidden = self.embedding(tokens[:, :-1]).tanh()
        return sequence_log_probs(hidden, self.head.weight, labels[:, 1:])


def pairs() -> tuple[Tensor, Tensor]:
    """Return chosen answers, which count up, and rejected ones, which do not."""
    first = torch.randint(VOCAB_SIZE - LENGTH, (N_PAIRS, 1))
    chosen = first + torch.arange(LENGTH)
    rejected = torch.randint(VOCAB_SIZE, (N_PAIRS, LENGTH))
    return chosen, rejected


def with_labels(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens and labels: the first two tokens are the prompt, some of the last padding."""
    labels = tokens.clone()
    labels[:, :2] = PADDING
    ends = torch.randint(LENGTH // 2, LENGTH + 1, (len(tokens), 1))
    return tokens, labels.masked_fill(torch.arange(LENGTH) >= ends, PADDING)


def main() -> tuple[float, float]:
    """Train; return the share of pairs that the model ranks rightly at first and at last."""
    torch.manual_seed(0)
    model, reference = Model(), Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    chosen, rejected = map(with_labels, pairs())
    with torch.no_grad():
        of_reference = reference(*chosen), reference(*rejected)
    shares = []
    for _ in range(40):
        of_model = model(*chosen), model(*rejected)
        loss = dpo_loss(*of_model, *of_reference)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        margin = (of_model[0] - of_reference[0]) - (of_model[1] - of_reference[1])
        shares.append((margin > 0).float().mean().item())
    print(f"pairs ranked rightly: {shares[0]:.2f} at first, {shares[-1]:.2f} at last")
    return shares[0], shares[-1]


if __name__ == "__main__":
    main()

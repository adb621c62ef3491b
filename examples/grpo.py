"""A GRPO-like policy loss from hidden states: no logits of all tokens are ever stored.

``policy_loss`` has the usual parts: a clipped ratio to the policy that sampled the tokens, a KL
penalty to a reference policy, an entropy bonus, and a sampling temperature. Log-probabilities and
entropies come from ``linear_selective_log_softmax`` in one call, in float32.

The example trains a policy whose reward is the share of even tokens in a sequence. Run it:
``python examples/grpo.py``. It takes a few seconds on a CPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_xent import linear_selective_log_softmax

VOCAB_SIZE, N_FEATURES, LENGTH, GROUP = 1000, 32, 12, 64
TEMPERATURE, CLIP, KL_WEIGHT, ENTROPY_WEIGHT = 0.9, 0.2, 0.02, 0.001
PADDING = -100


class Batch(NamedTuple):
    """Sampled tokens (B, T), PADDING where a sequence has ended, and what belongs to them."""

    tokens: Tensor
    advantages: Tensor  # (B,)
    old_log_probs: Tensor  # (B, T): of the policy that sampled them
    reference_log_probs: Tensor  # (B, T)


def policy_loss(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
    """Return the loss of a policy with hidden states (B, T, H) and a head (V, H)."""
    log_probs, entropy = linear_selective_log_softmax(
        hidden, head, batch.tokens, logit_scale=1 / TEMPERATURE, with_entropy=True
    )
    ratio = (log_probs - batch.old_log_probs).exp()
    advantages = batch.advantages.unsqueeze(1)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    difference = batch.reference_log_probs - log_probs
    kl = difference.exp() - difference - 1  # an estimate that is never negative
    mask = batch.tokens != PADDING
    return ((KL_WEIGHT * kl - gain - ENTROPY_WEIGHT * entropy) * mask).sum() / mask.sum()


class Policy(torch.nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB_SIZE, N_FEATURES)
        self.head = torch.nn.Linear(N_FEATURES, VOCAB_SIZE, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return hidden states (B, T, H) that predict ``tokens``; the first follows token 0."""
        return self.embedding(torch.nn.functional.pad(tokens.clamp(min=0)[:, :-1], (1, 0))).tanh()

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Return the log-probability of each token at the sampling temperature."""
        of_layer = self.hidden(tokens), self.head.weight
        return linear_selective_log_softmax(*of_layer, tokens, logit_scale=1 / TEMPERATURE)

    def sample(self) -> Tensor:
        """Return GROUP sequences of LENGTH tokens."""
        tokens = torch.zeros(GROUP, 0, dtype=torch.int64)
        last = torch.zeros(GROUP, 1, dtype=torch.int64)
        for _ in range(LENGTH):
            logits = self.head(self.embedding(last[:, 0]).tanh()) / TEMPERATURE
            last = logits.softmax(-1).multinomial(1)
            tokens = torch.cat([tokens, last], 1)
        return tokens


def main() -> tuple[float, float]:
    """Train; return the mean rewards of the first and the last step."""
    torch.manual_seed(0)
    policy, reference = Policy(), Policy()
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    rewards = []
    for _ in range(40):
        with torch.no_grad():
            tokens = policy.sample()
            reward = (tokens % 2 == 0).float().mean(1)
            advantages = (reward - reward.mean()) / (reward.std() + 1e-4)
            of_policies = policy.log_probs(tokens), reference.log_probs(tokens)
        batch = Batch(tokens, advantages, *of_policies)
        for _ in range(2):
            policy_loss(policy.hidden(tokens), policy.head.weight, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        rewards.append(reward.mean().item())
    print(f"share of even tokens: {rewards[0]:.2f} at first, {rewards[-1]:.2f} at last")
    return rewards[0], rewards[-1]


if __name__ == "__main__":
    main()

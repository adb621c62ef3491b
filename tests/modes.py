"""The modes of the loss, one way to run them all, and what tests of the overwriting ones share."""

import torch
from cases import make_logits
from torch import Tensor

import fused_xent

MODES = {
    "default": {},
    "inplace": {"inplace_backward": True},
    "fused": {"grad_in_forward": True},
}
OVERWRITING_MODES = ("inplace", "fused")
ARGUMENT = {"inplace": "inplace_backward", "fused": "grad_in_forward"}
N_ROWS, N_CLASSES = 6, 150


def has_mode(mode: str, dtype: torch.dtype) -> bool:
    """Whether the mode takes logits of dtype."""
    return mode != "fused" or dtype != torch.float16


def roundings(mode: str) -> int:
    """Return how often a gradient is rounded: the fused mode's once more when it is scaled."""
    return 2 if mode == "fused" else 1


def loss_and_gradient(
    logits: Tensor, target: Tensor, upstream=1.0, mode: str = "default", **options
) -> tuple[Tensor, Tensor]:
    """Return the loss, in float32 at least unless options say otherwise, and the logits' gradient.

    The default mode reads logits as they are; the others, which need a computed tensor, a clone.
    """
    leaf = logits.detach().requires_grad_()
    computed = leaf if mode == "default" else leaf.clone()
    if logits.dtype in (torch.bfloat16, torch.float16):
        options.setdefault("loss_dtype", torch.float32)
    loss = fused_xent.cross_entropy(computed, target, **options, **MODES[mode])
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype).expand(loss.shape))
    return loss.detach(), leaf.grad


def make_problem(dtype=torch.float32, n_classes=N_CLASSES) -> tuple[Tensor, Tensor]:
    """Return a leaf to compute logits from, and targets of which one is ignored."""
    target = torch.randint(0, n_classes, (N_ROWS,))
    target[1] = -100
    return make_logits((N_ROWS, n_classes), dtype).requires_grad_(), target


def gradient_of(model, leaf: Tensor) -> Tensor:
    """Return the leaf's gradient of what model() returns."""
    leaf.grad = None
    model().backward()
    return leaf.grad.clone()


def refused_or_right(model, leaf: Tensor, expected: Tensor) -> str | None:
    """Return the error where there is one, and then no gradient has arrived at the leaf."""
    try:
        actual = gradient_of(model, leaf)
    except (RuntimeError, ValueError) as error:
        refusal = str(error)
    else:
        torch.testing.assert_close(actual, expected)
        return None
    assert "modified by an inplace operation" in refusal or " must " in refusal
    assert leaf.grad is None
    return refusal

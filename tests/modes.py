"""The modes of the loss, a function that runs any of them, and helpers for overwriting ones."""

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
    """Return True if the mode supports logits of this dtype."""
    return mode != "fused" or dtype != torch.float16


def roundings(mode: str) -> int:
    """Return how often a gradient is rounded: twice in fused mode, which scales it afterwards."""
    return 2 if mode == "fused" else 1


def loss_and_gradient(
    logits: Tensor, target: Tensor, upstream=1.0, mode: str = "default", **options
) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of the logits; loss_dtype is float32 for 16-bit logits.

    The overwriting modes refuse leaves, so they get a clone of the logits.
    """
    leaf = logits.detach().requires_grad_()
    computed = leaf if mode == "default" else leaf.clone()
    if logits.dtype in (torch.bfloat16, torch.float16):
        options.setdefault("loss_dtype", torch.float32)
    loss = fused_xent.cross_entropy(computed, target, **options, **MODES[mode])
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype).expand(loss.shape))
    return loss.detach(), leaf.grad


def make_problem(dtype=torch.float32, n_classes=N_CLASSES) -> tuple[Tensor, Tensor]:
    """Return a leaf to compute logits from, and a target with one ignored row."""
    target = torch.randint(0, n_classes, (N_ROWS,))
    target[1] = -100
    return make_logits((N_ROWS, n_classes), dtype).requires_grad_(), target


def gradient_of(model, leaf: Tensor) -> Tensor:
    """Return the gradient of model() with respect to the leaf."""
    leaf.grad = None
    model().backward()
    return leaf.grad.clone()


def refused_or_right(model, leaf: Tensor, expected: Tensor) -> str | None:
    """Check that model() raises and leaves no gradient, or gives this one; return the error."""
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

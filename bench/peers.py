"""Other implementations for GPUs, which are measured where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch import Tensor

from .providers import Provider

LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states, weight and indices
Found = TypeVar("Found")


def liger() -> list[Provider]:
    """The forward writes the gradient over the logits, after a second read of them."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return [Provider("liger", liger_cross_entropy, ("forward", "both"), indices_only=True)]


def quack() -> list[Provider]:
    """With a fresh gradient and in place."""
    from quack.cross_entropy import cross_entropy

    inplace = partial(cross_entropy, inplace_backward=True)
    return [
        Provider("quack", cross_entropy, indices_only=True),
        Provider("quack inplace", inplace, ("backward", "both"), indices_only=True),
    ]


def liger_linear() -> list[tuple[str, LinearLoss]]:
    """In chunks of rows, with the gradients in its forward."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return [("liger", liger_fused_linear_cross_entropy)]


def quack_linear() -> list[tuple[str, LinearLoss]]:
    """In chunks of rows, with products of its own."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return [("quack", chunked_linear_cross_entropy)]


def cut_linear() -> list[tuple[str, LinearLoss]]:
    """Logits computed twice. By default it leaves out what is too small for 16 bits to show."""
    from cut_cross_entropy import linear_cross_entropy

    return [
        ("cut-cross-entropy", linear_cross_entropy),
        ("cut-cross-entropy, exact", partial(linear_cross_entropy, filter_eps=None)),
    ]


PEERS: dict[str, Callable[[], list[Provider]]] = {"liger-kernel": liger, "quack-kernels": quack}
LINEAR_PEERS: dict[str, Callable[[], list[tuple[str, LinearLoss]]]] = {
    "liger-kernel": liger_linear,
    "quack-kernels": quack_linear,
    "cut-cross-entropy": cut_linear,
}


def peers(known: dict[str, Callable[[], list[Found]]]) -> tuple[list[Found], dict[str, str]]:
    """Those that are installed, and why the others are not here."""
    found, missing = [], {}
    for name, load in known.items():
        try:
            found += load()
        except Exception as error:  # a package may be there and still not load
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing

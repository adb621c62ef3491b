"""Other implementations for GPUs, which are measured where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .providers import Provider


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


PEERS: dict[str, Callable[[], list[Provider]]] = {"liger-kernel": liger, "quack-kernels": quack}


def peers() -> tuple[list[Provider], dict[str, str]]:
    """Those that are installed, and why the others are not here."""
    found, missing = [], {}
    for name, load in PEERS.items():
        try:
            found += load()
        except Exception as error:  # a package may be there and still not load
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing

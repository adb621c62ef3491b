"""``python -m fused_xent``: what is installed, which kernels run here, and are they right here."""

import argparse
import itertools
import platform
import signal
import sys
from typing import NamedTuple

import torch

from . import __version__, _ops, cross_entropy, cross_entropy_with_statistics, reference

SHAPES = ((64, 10), (8, 1000), (4, 50257), (2, 21, 40, 40))
OPTIONS = {
    "plain": {},
    "all options": {
        "label_smoothing": 0.1,
        "lse_square_scale": 1e-2,
        "softcap": 20.0,
        "logit_scale": 0.7,
        "focal_gamma": 1.5,
    },
}


class Errors(NamedTuple):
    """The largest errors against float64 on the same logits."""

    loss: float
    gradient: float
    statistics: float


def largest_errors(dtype: torch.dtype, soft: bool, device: str, options: dict) -> Errors:
    """Compare with the readable specification on the CPU: by row, and relative above 1."""
    errors = Errors(0.0, 0.0, 0.0)
    for shape in SHAPES:
        logits = (torch.randn(shape) * 3).to(dtype)
        rows = shape[:1] + shape[2:]
        target = torch.randn(shape).softmax(1).to(dtype) if soft else torch.randint(shape[1], rows)
        here = logits.to(device, copy=True).requires_grad_()
        arguments = {"reduction": "none", "loss_dtype": torch.float64, **options}
        loss = cross_entropy(here, target.to(device), **arguments)
        loss.sum().backward()
        results = cross_entropy_with_statistics(here.detach(), target.to(device), **arguments)
        exact = logits.double().requires_grad_()
        expected = reference.cross_entropy_with_statistics(
            exact, target.double() if soft else target, reduction="none", **options
        )
        expected.loss.sum().backward()
        pairs = (
            (loss, expected.loss),
            (here.grad, exact.grad),
            (torch.stack(results[1:4]), torch.stack(expected[1:4])),
        )
        errors = Errors(*map(max, errors, (error(*pair) for pair in pairs)))
    return errors


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest error, relative to what is above 1."""
    return ((actual.cpu() - exact).abs() / exact.abs().clamp(min=1)).max().item()


def is_right(errors: Errors, dtype: torch.dtype, device: str) -> bool:
    """Whether errors are within what is promised, or within torch's own where it computes."""
    slack = 1 if _ops.has_kernels(torch.device(device)) else 1000
    loss = 5e-6 if dtype != torch.float64 else 1e-12
    rounding = max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)
    gradient = rounding if dtype != torch.float64 else 1e-12
    limits = (loss, gradient, 4 * loss)
    return all(error <= limit * slack for error, limit in zip(errors, limits, strict=True))


def cuda_kernels() -> str:
    """Return whether the CUDA kernels are loaded, and why not."""
    if _ops.CUDA_LOAD_ERROR is None:
        return "native kernels"
    if _ops.CUDA_LOAD_ERROR == _ops.LOAD_ERROR:
        return "torch operations, as on the CPU"
    return f"torch operations, because {_ops.CUDA_LOAD_ERROR}"


def gpus() -> list[str]:
    """Return a line for each GPU: its name, and which kernels it gets."""
    lines = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        kernels = cuda_kernels().split(",")[0]
        if (properties.major, properties.minor) < (8, 0):
            kernels = "no kernels: compute capability 8.0 is the least"
        elif kernels == "native kernels" and properties.major >= 9:
            kernels += ", clusters of blocks for long rows in fused mode"
        capability = f"compute capability {properties.major}.{properties.minor}"
        lines.append(f"  GPU {index}: {properties.name}, {capability}: {kernels}")
    return lines


def print_report() -> None:
    """Print what is installed, and what will run. Raises ValueError for an unknown capability."""
    torchs = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"fused_xent {__version__}, {torchs}, {platform.machine()}")
    if _ops.LOAD_ERROR is None:
        capability, threads = _ops.cpu_capability(), torch.get_num_threads()
        print(f"CPU: native kernels, instruction set {capability}, {threads} threads")
    else:
        print(f"CPU: torch operations, because {_ops.LOAD_ERROR}")
    print("\n".join([f"CUDA: {cuda_kernels()}", *gpus()]))
    print("MPS and other devices: torch operations")


def print_checks(device: str) -> bool:
    """Print a table of errors on a device; return whether all are right."""
    print(f"\n{f'on {device} against float64':38}{'loss':>10}{'gradient':>12}{'statistics':>12}")
    right = True
    for name, dtype, soft in itertools.product(OPTIONS, _ops.DTYPES, (False, True)):
        errors = largest_errors(dtype, soft, device, OPTIONS[name])
        is_well = is_right(errors, dtype, device)
        right &= is_well
        kind = f"{str(dtype)[6:]}, {'probabilities' if soft else 'indices'}, {name}"
        numbers = f"{errors.loss:10.1e}{errors.gradient:12.1e}{errors.statistics:12.1e}"
        print(f"{kind:38}{numbers}{'' if is_well else '  WRONG'}")
    return right


def main(arguments: list[str] | None = None) -> int:
    """Print the report and the checks; return 1 where a kernel is wrong or none can be had."""
    argparse.ArgumentParser(prog="python -m fused_xent", description=__doc__).parse_args(arguments)
    try:
        print_report()
    except ValueError as error:
        print(f"CPU: no kernels, because {error}")
        return 1
    devices = ["cpu"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        devices.append("cuda")
    results = [print_checks(device) for device in devices]  # all of them, though one be wrong
    return 0 if all(results) else 1


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader may have seen enough
    sys.exit(main())

"""``python -m fused_xent``: reports what is installed, which kernels run here, and checks them."""

import argparse
import itertools
import os
import platform
import re
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import __version__, _ops, cross_entropy, cross_entropy_with_statistics, reference
from ._options import DTYPES

SHAPES = ((64, 10), (8, 1000), (4, 50257), (2, 21, 40, 40))
NUMBERS = {
    "label_smoothing": 0.1,
    "lse_square_scale": 1e-2,
    "softcap": 20.0,
    "logit_scale": 0.7,
    "focal_gamma": 1.5,
}
MODES: tuple[dict[str, bool], ...] = ({}, {"inplace_backward": True}, {"grad_in_forward": True})
# They change the kernels that run or the number of threads, beside those of this package.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OMP_PROC_BIND")
EPILOG = (
    "Each error is the largest of three modes, relative to values above 1. WRONG means more than "
    "5e-6 for the loss, or the dtype's rounding for a gradient (float64: 1e-12); a thousand times "
    "that where torch's operations compute. The exit status is 1 if something is wrong, else 0. "
    "FUSED_XENT_CPU_CAPABILITY (avx512_bf16, avx512, avx2, portable) lowers the instruction set."
)


class Errors(NamedTuple):
    """The largest errors against float64 on the same logits."""

    loss: float
    gradient: float
    statistics: float


def make_options(logits: torch.Tensor, soft: bool) -> dict[str, Any]:
    """Return all options, with some weights of 0 and an ignored class."""
    rows = logits.select(1, 0)
    options = {"weight": torch.rand(logits.shape[1]).to(logits.dtype)}
    options["token_weight"] = torch.rand(rows.shape).round(decimals=1)
    return options | NUMBERS | ({} if soft else {"ignore_index": 3})


def largest_errors(dtype: torch.dtype, soft: bool, device: str, has_options: bool) -> Errors:
    """Compare each row with fused_xent.reference on the CPU, in every mode."""
    found = Errors(0.0, 0.0, 0.0)
    for shape in SHAPES:
        logits = (torch.randn(shape) * 3).to(dtype)
        rows = shape[:1] + shape[2:]
        target = torch.randn(shape).softmax(1).to(dtype) if soft else torch.randint(shape[1], rows)
        options: dict[str, Any]
        options = {"reduction": "none"} | (make_options(logits, soft) if has_options else {})
        exact = logits.to(torch.float64, copy=True).requires_grad_()
        in_float64: dict[str, Any]
        in_float64 = {n: x.double() if torch.is_tensor(x) else x for n, x in options.items()}
        expected = reference.cross_entropy_with_statistics(
            exact,
            target.double() if soft else target,
            **in_float64,
        )
        expected.loss.sum().backward()
        options = {n: x.to(device) if torch.is_tensor(x) else x for n, x in options.items()}
        for mode in MODES[: 2 if dtype == torch.float16 else 3]:  # float16 has no grad_in_forward
            arguments = {"loss_dtype": torch.float64, **options, **mode}
            leaf = logits.to(device, copy=True).requires_grad_()
            loss = cross_entropy(leaf * 1 if mode else leaf, target.to(device), **arguments)
            loss.sum().backward()
            results = cross_entropy_with_statistics(leaf.detach(), target.to(device), **arguments)
            pairs: tuple[tuple[Any, Any], ...] = (
                (loss, expected.loss),
                (leaf.grad, exact.grad),
                (torch.stack(results[1:4]), torch.stack(expected[1:4])),
            )
            found = Errors(*map(max, found, (error(*pair) for pair in pairs)))
    return found


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest error, relative above 1; infinity for NaN, which max() loses."""
    errors = (actual.cpu() - exact).abs() / exact.abs().clamp(min=1)
    return errors.nan_to_num(nan=torch.inf).max().item()


def is_right(errors: Errors, dtype: torch.dtype, device: str) -> bool:
    """Return True if the errors are within the limits, which are wider for torch operations."""
    slack = 1 if _ops.has_kernels(torch.empty(0, device=device)) else 1000
    loss = 5e-6 if dtype != torch.float64 else 1e-12
    rounding = max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)
    gradient = rounding if dtype != torch.float64 else 1e-12
    limits = (loss, gradient, 4 * loss)
    return all(error <= limit * slack for error, limit in zip(errors, limits, strict=True))


def cuda_kernels() -> str:
    """Return what computes on CUDA devices, and why."""
    if _ops.CUDA_LOAD_ERROR is None:
        return "native kernels" if torch.cuda.is_available() else "no GPU is visible to torch"
    if _ops.CUDA_LOAD_ERROR == _ops.LOAD_ERROR:
        return "torch operations, as on the CPU"
    return f"torch operations, because {_ops.CUDA_LOAD_ERROR}"


def gpus() -> list[str]:
    """Return a line for each GPU: its name and its kernels."""
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


def first_match(pattern: str, path: str, otherwise: str) -> str:
    """Return the first match in a file of the system, or something else if it is not there."""
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return otherwise
    return found[1].strip() if found else otherwise


def processor() -> str:
    """Return the name of the processor and the number of its logical cores."""
    name = first_match(r"model name\s*:(.*)", "/proc/cpuinfo", platform.processor())
    return f"{name or platform.machine()}, {os.cpu_count()} logical cores"


def libraries() -> list[str]:
    """Return a line for each native library: its name and compiler, which compilers write there."""
    lines = []
    for path in sorted(Path(__file__).parent.glob("_C*")):
        pattern = rb"(?:GCC: \([^)\0]*\)|clang version) \d[\d.]*"
        found = re.search(pattern, path.read_bytes())
        compiler = found[0].decode(errors="replace") if found else "unknown compiler"
        lines.append(f"  {path.name}: {path.stat().st_size} bytes, {compiler}")
    return lines


def print_system() -> None:
    """Print the versions of all below this package, and the environment variables that matter."""
    system = first_match(r'PRETTY_NAME="(.*)"', "/etc/os-release", platform.system())
    print(f"{system}, {platform.platform()}")
    driver = first_match(r"Module.*?(\d+\.[\d.]+)", "/proc/driver/nvidia/version", "none")
    print(f"torch {torch.__version__}, its CUDA {torch.version.cuda}, NVIDIA driver {driver}")
    print(f"processor: {processor()}")
    names = [name for name in sorted(os.environ) if name.startswith("FUSED_XENT_")]
    names += [name for name in VARIABLES if name in os.environ]
    variables = [f"{name}={os.environ[name]}" for name in names]
    print("environment:", ", ".join(variables) or "no variables set")


def print_report() -> None:
    """Print what is installed and what will run. Raises ValueError for an unknown capability."""
    python = f"Python {platform.python_version()}"
    print(f"fused_xent {__version__} in {Path(__file__).parent}, {python}")
    print("\n".join(libraries()) or "  no native libraries")
    print_system()
    if _ops.LOAD_ERROR is None:
        capability, threads = _ops.cpu_capability(), torch.get_num_threads()
        print(f"CPU: native kernels, instruction set {capability}, {threads} threads")
    else:
        print(f"CPU: torch operations, because {_ops.LOAD_ERROR}")
    print("\n".join([f"CUDA: {cuda_kernels()}", *gpus()]))
    print("MPS and other devices: torch operations")


def print_checks(device: str) -> int:
    """Print a table of errors on a device; return how many lines of it are wrong."""
    print(f"\n{f'on {device} against float64':38}{'loss':>10}{'gradient':>12}{'statistics':>12}")
    n_wrong = 0
    for has_options, dtype, soft in itertools.product((False, True), DTYPES, (False, True)):
        errors = largest_errors(dtype, soft, device, has_options)
        is_well = is_right(errors, dtype, device)
        n_wrong += not is_well
        labels, name = "probabilities" if soft else "indices", "all options"
        kind = f"{str(dtype)[6:]}, {labels}, {name if has_options else 'plain'}"
        numbers = f"{errors.loss:10.1e}{errors.gradient:12.1e}{errors.statistics:12.1e}"
        print(f"{kind:38}{numbers}{'' if is_well else '  WRONG'}")
    return n_wrong


def main(arguments: list[str] | None = None) -> int:
    """Print the report and the checks; return 1 if a kernel is wrong or cannot be loaded."""
    command = argparse.ArgumentParser(
        prog="python -m fused_xent", description=__doc__.partition(": ")[2], epilog=EPILOG
    )
    command.add_argument("--version", action="version", version=__version__)
    command.parse_args(arguments)
    try:
        print_report()
    except ValueError as error:
        print(f"CPU: no kernels, because {error}")
        return 1
    devices = ["cpu"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        devices.append("cuda")
    n_wrong = sum(print_checks(device) for device in devices)
    print(f"\n{n_wrong} lines are WRONG" if n_wrong else "\nall errors are within the limits")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback if the reader closes the pipe
    sys.exit(main())

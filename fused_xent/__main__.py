"""``python -m fused_xent``: what is installed, which kernels run here, and are they right here."""

import itertools
import platform
import sys

import torch

from . import __version__, _ops, cross_entropy, reference

SHAPES = ((64, 10), (8, 1000), (4, 50257), (2, 21, 40, 40))


def largest_errors(dtype: torch.dtype, soft: bool) -> tuple[float, float]:
    """Return the largest errors of loss and gradient against float64 on the same logits."""
    loss_error = gradient_error = 0.0
    for shape, label_smoothing in itertools.product(SHAPES, (0.0, 0.1)):
        logits = (torch.randn(shape) * 3).to(dtype).requires_grad_()
        if soft:
            target = torch.randn(shape).softmax(1).to(dtype)
        else:
            target = torch.randint(shape[1], shape[:1] + shape[2:])
        options = {"reduction": "sum", "label_smoothing": label_smoothing}
        loss = cross_entropy(logits, target, loss_dtype=torch.float64, **options)
        (gradient,) = torch.autograd.grad(loss, logits)
        exact = logits.detach().double().requires_grad_()
        exact_loss = reference.cross_entropy(exact, target.double() if soft else target, **options)
        (exact_gradient,) = torch.autograd.grad(exact_loss, exact)
        rows = logits.numel() // shape[1]
        loss_error = max(loss_error, (loss - exact_loss).abs().item() / rows)
        gradient_error = max(gradient_error, (gradient - exact_gradient).abs().max().item())
    return loss_error, gradient_error


def cuda_kernels() -> str:
    """Return whether the CUDA kernels are loaded, and why not."""
    if _ops.CUDA_LOAD_ERROR is None:
        return "native kernels"
    return f"torch operations, because {_ops.CUDA_LOAD_ERROR}"


def gpu() -> str:
    """Return the current GPU's name and compute capability, empty where there is none."""
    if not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties()
    return f"; {properties.name}, compute capability {properties.major}.{properties.minor}"


def main() -> int:
    """Print the report; return 1 where a kernel is wrong."""
    print(
        f"fused_xent {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    if _ops.LOAD_ERROR is None:
        try:
            capability = _ops.cpu_capability()
        except ValueError as error:
            print(f"CPU: no kernels, because {error}")
            return 1
        threads = torch.get_num_threads()
        print(f"CPU: native kernels, instruction set {capability}, {threads} threads")
    else:
        print(f"CPU: torch operations, because {_ops.LOAD_ERROR}")
    print(f"CUDA: {cuda_kernels()}{gpu()}")
    print("MPS and other devices: torch operations\n")
    print(f"{'on the CPU against float64':28}{'loss, a row':>14}{'gradient':>14}")
    wrong = False
    for dtype, soft in itertools.product(_ops.DTYPES, (False, True)):
        loss_error, gradient_error = largest_errors(dtype, soft)
        limit = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
        limit = limit if dtype != torch.float64 else 1e-12
        slack = 1 if _ops.LOAD_ERROR is None else 1000  # of torch's own float32 sums
        bad = not (loss_error <= 5e-6 * slack and gradient_error <= limit * slack)
        wrong |= bad
        name = f"{str(dtype)[6:]}, {'probabilities' if soft else 'class indices'}"
        print(f"{name:28}{loss_error:14.1e}{gradient_error:14.1e}{'  WRONG' if bad else ''}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())

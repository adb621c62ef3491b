"""The native operators: loading their library, what each means, and their meta implementations.

``forward`` returns the loss, and what ``backward`` needs of it: ``total_weight`` (float64 scalar,
by what ``mean`` divides) and one value a row of ``row_max`` and ``log_sum`` (the logarithm of the
sum of ``exp(logits - row_max)``, of the logits as the softmax sees them); then, of no elements
where they are not wanted, of ``label_mass`` (the sum of the row's smoothed and weighted
probabilities; not for class indices), ``loss_slope`` (the derivative of the focal loss by the
cross-entropy), and the statistics ``entropy`` and ``argmax``. Rows have the shape of the unreduced
loss and, but for ``argmax``, the accumulation type: float64 for float64 logits, float32 for all
others. ``numbers`` are label_smoothing, lse_square_scale, focal_gamma, softcap (0: none) and
logit_scale.
"""

import importlib.machinery
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as in torch.nn._reduction
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _load(name: str, missing: str) -> str | None:
    """Load a native library of this folder; return why that failed, or None."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"{name}{suffix}")
        if path.exists():
            try:
                torch.ops.load_library(path)
            except OSError as error:
                return str(error)
            return None
    return missing


def _load_cuda() -> str | None:
    """Load the library of CUDA kernels where torch has CUDA, which the library needs."""
    if LOAD_ERROR is not None:  # without the schemas there is nothing to implement
        return LOAD_ERROR
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    return _load("_C_cuda", missing="built without CUDA kernels (no nvcc at build time)")


LOAD_ERROR = _load(
    "_C",
    missing=f"there is no native library in {Path(__file__).parent}: built without one, or it is "
    "a source folder that hides the installed package (then run from another folder)",
)
CUDA_LOAD_ERROR = _load_cuda()
_ops = torch.ops.fused_xent


def has_kernels(device: torch.device) -> bool:
    """Whether native kernels serve tensors of this device; otherwise torch's operations do."""
    if device.type == "cuda":
        return CUDA_LOAD_ERROR is None
    return LOAD_ERROR is None and device.type in ("cpu", "meta")


def cpu_capability() -> str | None:
    """Return the instruction set whose CPU kernels run here.

    One of ``"avx512_bf16"``, ``"avx512"``, ``"avx2"`` and ``"portable"``: the best that the
    processor has, or that the environment variable ``FUSED_XENT_CPU_CAPABILITY`` allows. None where
    there is no native library.
    """
    return _ops.cpu_capability() if LOAD_ERROR is None else None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which the kernels keep sums for logits of this type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_shape(logits: Tensor, dim: int) -> list:
    return [*logits.shape[:dim], *logits.shape[dim + 1 :]]


def _fake_loss(logits: Tensor, dim: int, reduction: int, loss_dtype: torch.dtype) -> Tensor:
    shape = _row_shape(logits, dim) if reduction == REDUCTIONS["none"] else []
    return logits.new_empty(shape, dtype=loss_dtype)


def _fake_forward(
    logits,
    target,
    weight,
    token_weight,
    normalizer,
    dim,
    ignore_index,
    numbers,
    reduction,
    loss_dtype,
    statistics,
):
    acc = accumulation_dtype(logits.dtype)

    def rows(is_wanted: bool = True, dtype: torch.dtype = acc) -> Tensor:
        return logits.new_empty(_row_shape(logits, dim) if is_wanted else [0], dtype=dtype)

    return (
        _fake_loss(logits, dim, reduction, loss_dtype),
        logits.new_empty([], dtype=torch.float64),
        rows(),
        rows(),
        rows(target.is_floating_point()),
        rows(numbers[2] != 0),
        rows(statistics),
        rows(statistics, torch.int64),
    )


def _fake_backward(grad_loss, grad_lse, grad_entropy, logits, *_):
    return torch.empty_like(logits)


def _fake_forward_backward(*arguments):
    loss, _, row_max, log_sum, *_, entropy, argmax = _fake_forward(*arguments)
    return loss, row_max, log_sum, entropy, argmax


def _in_turn(operator):
    """Return the rule of vmap for an operator: sample by sample."""

    def rule(info, in_dims, *arguments):
        def sample(i: int):
            return operator(
                *(
                    argument.select(dim, i) if isinstance(dim, int) else argument
                    for argument, dim in zip(arguments, in_dims, strict=True)
                )
            )

        samples = [sample(i) for i in range(info.batch_size)]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        results = tuple(torch.stack(results) for results in zip(*samples, strict=True))
        return results, (0,) * len(results)

    return rule


def _count_version(name: str, index: int) -> None:
    """Let an operator raise the version of its argument that it overwrites, also in compiled code.

    By that autograd knows, wherever it needs the old values, that they are gone.
    """
    operator = getattr(_ops, name).default

    def counted(keyset, *arguments):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            below = keyset & torch._C._after_ADInplaceOrView_keyset
            results = operator.redispatch(below, *arguments)
        increment_version(arguments[index])  # not before: what is refused stays as it was
        return results

    _library.impl(name, counted, "ADInplaceOrView", with_keyset=True)


if LOAD_ERROR is None:
    _library = torch.library.Library("fused_xent", "IMPL")
    for _name, _index in (("backward_", 3), ("forward_backward_", 0), ("scale_gradient_", 0)):
        _count_version(_name, _index)
    torch.library.register_fake("fused_xent::forward", _fake_forward)
    torch.library.register_fake("fused_xent::backward", _fake_backward)
    torch.library.register_fake("fused_xent::backward_", lambda *_: None)
    torch.library.register_fake("fused_xent::forward_backward_", _fake_forward_backward)
    torch.library.register_fake("fused_xent::scale_gradient_", lambda *_: None)
    torch.library.register_vmap("fused_xent::backward", _in_turn(_ops.backward.default))

    forward = _ops.forward.default
    backward = _ops.backward.default
    backward_ = _ops.backward_.default
    forward_backward_ = _ops.forward_backward_.default
    scale_gradient_ = _ops.scale_gradient_.default

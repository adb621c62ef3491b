"""The options of a loss, each declared once: its name, type, range and default.

To add one, add a line to ``Options`` and to ``LossOptions``, a parameter with its meaning
to ``functional.cross_entropy`` and ``linear.linear_cross_entropy``, and, if the kernels compute it,
a line to ``csrc/xent_params.h``. Modules, the variants with statistics, checks and operators follow
by name.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, SupportsIndex, get_type_hints

import torch
from torch import Tensor
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as ProcessGroup
    from torch.nn import LinearCrossEntropyOptions as LinearCrossEntropyOptions
else:  # typing.get_type_hints needs the names; some builds of torch do not have the classes
    ProcessGroup = getattr(torch.distributed, "ProcessGroup", object)
    LinearCrossEntropyOptions = getattr(torch.nn, "LinearCrossEntropyOptions", object)

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as in torch.nn._reduction
REDUCTION_NAMES = {code: name for name, code in REDUCTIONS.items()}
# Raised by options and operators for arguments that do not fit.
CALL_ERRORS = (ValueError, TypeError, IndexError, RuntimeError)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Check = Callable[[str, Any], Any]


class Number(NamedTuple):
    """A number in [least, most]."""

    least: float
    most: float

    def __call__(self, name: str, value: Any) -> float:
        """Return it as a float. Takes numpy's numbers and 0-d tensors too."""
        if isinstance(value, Tensor) and value.dim() == 0 and value.dtype != torch.bool:
            if value.requires_grad and torch.is_grad_enabled():
                raise TypeError(
                    f"{name} must be a number or a tensor without a gradient, got one that "
                    "requires a gradient: none flows to options. To learn a scale, multiply the "
                    "logits by it"
                )
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (float, Real)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        number = float(value)  # before comparing: numpy's float16 warns about 1e30
        if not self.least <= number <= self.most:
            raise ValueError(f"{name} must be in [{self.least:g}, {self.most:g}], got {value}")
        return number


def check_index(name: str, value: object) -> int:
    """Return an integer of any type as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, SupportsIndex)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    value = operator.index(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    return value


def check_reduction(name: str, value: Any) -> str:
    """Return the name of a reduction."""
    if not isinstance(value, str) or value not in REDUCTIONS:
        raise ValueError(f"{name} must be 'none', 'mean' or 'sum', got {value!r}")
    return value


def check_dtype(name: str, value: torch.dtype) -> torch.dtype:
    """Return a floating-point dtype."""
    if value not in DTYPES:
        raise ValueError(
            f"{name} must be torch.float32, torch.float64, torch.bfloat16 or torch.float16, got "
            f"{value!r}"
        )
    return value


def check_flag(name: str, value: Any) -> bool:
    """Return a bool. No other type is converted."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


# The limits of 1e30 keep the kernels' float32 numbers finite.
class Options(NamedTuple):
    """The options of a loss, without its tensors. A default of None is not checked."""

    ignore_index: Annotated[int, check_index] = -100
    reduction: Annotated[str, check_reduction] = "mean"
    label_smoothing: Annotated[float, Number(0, 1)] = 0.0
    dim: Annotated[int | None, check_index] = None
    lse_square_scale: Annotated[float, Number(0, 1e30)] = 0.0
    softcap: Annotated[float | None, Number(1e-30, 1e30)] = None
    logit_scale: Annotated[float, Number(1e-30, 1e30)] = 1.0
    focal_gamma: Annotated[float, Number(0, 1e30)] = 0.0
    loss_dtype: Annotated[torch.dtype | None, check_dtype] = None
    inplace_backward: Annotated[bool, check_flag] = False
    grad_in_forward: Annotated[bool, check_flag] = False


DEFAULTS = Options._field_defaults
# Options that the operators do not take, or take as positional arguments of another type.
OF_PYTHON = ("reduction", "dim", "loss_dtype", "inplace_backward", "grad_in_forward")
OF_SHARD = ("process_group", "vocab_start", "num_classes")  # arguments that say which classes
CHECKS: dict[str, Check] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Options, include_extras=True).items()
}


class LogitsOptions(TypedDict, total=False):
    """The keyword arguments of all functions and modules."""

    softcap: float | None
    logit_scale: float
    process_group: ProcessGroup | None
    vocab_start: int | None


class LossOptions(LogitsOptions, total=False):
    """The keyword arguments of both losses and their modules."""

    lse_square_scale: float
    focal_gamma: float
    loss_dtype: torch.dtype | None


class CrossEntropyOptions(LossOptions, total=False):
    """The arguments of ``fused_xent.CrossEntropyLoss`` that torch's class does not have."""

    dim: int | None
    inplace_backward: bool
    grad_in_forward: bool
    num_classes: int | None


class StatisticsOptions(CrossEntropyOptions, total=False):
    """The options of ``fused_xent.cross_entropy_with_statistics``."""

    size_average: bool | None
    ignore_index: int
    reduce: bool | None
    reduction: str
    label_smoothing: float


class LayerOptions(TypedDict, total=False):
    """The keyword arguments of all functions of a linear layer."""

    logits_dtype: torch.dtype | None
    chunk_rows: int | None
    sequence_parallel: bool
    reduce_grad_hidden: bool


class LinearLossOptions(LossOptions, LayerOptions, total=False):
    """The options of ``fused_xent.LinearCrossEntropyLoss``."""

    reduction: str
    ignore_index: int | None
    label_smoothing: float
    options: LinearCrossEntropyOptions | None
    shift: int
    drop_ignored: bool


class LinearOptions(LinearLossOptions, total=False):
    """The options of ``fused_xent.linear_cross_entropy``."""

    num_classes: int | None


class SelectedOptions(LogitsOptions, total=False):
    """The options of ``fused_xent.selective_log_softmax`` besides ``with_entropy``."""

    dim: int
    inplace_backward: bool
    num_classes: int | None


class LinearSelectedOptions(LogitsOptions, LayerOptions, total=False):
    """The options of ``fused_xent.linear_selective_log_softmax`` besides ``with_entropy``."""

    linear_bias: Tensor | None
    num_classes: int | None


class Settings(NamedTuple):
    """The checked options of a loss."""

    dim: int  # of the classes, not negative
    reduction: int  # its code in REDUCTIONS
    loss_dtype: torch.dtype | None  # None: that of the logits
    statistics: bool
    ignore_index: int
    inplace_backward: bool
    grad_in_forward: bool
    of_operators: dict[str, Any]  # keyword arguments of the operators that are not defaults


def resolve(n_dims: int, statistics: bool, given: dict[str, Any]) -> Settings:
    """Check the options of a loss. Options that are not given have their defaults."""
    if not torch.compiler.is_compiling():
        try:
            return resolve_once(n_dims, statistics, tuple(given), *given.values())
        except TypeError:  # an error, or a value that cannot be a key, such as a tensor
            pass
    return _resolve(n_dims, statistics, given)


@functools.lru_cache(maxsize=256, typed=True)
def resolve_once(n_dims: int, statistics: bool, names: tuple[str, ...], *values: Any) -> Settings:
    """Do what ``resolve`` does, cached. Raises TypeError for a value that cannot be a key."""
    if any(isinstance(value, Tensor) for value in values):
        raise TypeError("a tensor cannot be a key: its value may change")
    return _resolve(n_dims, statistics, dict(zip(names, values, strict=True)))


def _resolve(n_dims: int, statistics: bool, given: dict[str, Any]) -> Settings:
    checked: dict[str, Any] = {
        name: value if value is None and DEFAULTS[name] is None else CHECKS[name](name, value)
        for name, value in given.items()
    }
    options = Options(**checked)
    if options.softcap is not None:
        _check_softcap(options.softcap, options.logit_scale)
    if options.inplace_backward and options.grad_in_forward:
        raise ValueError("inplace_backward must be False where grad_in_forward is True, got True")
    return Settings(
        _class_dim(options.dim, n_dims),
        REDUCTIONS[options.reduction],
        options.loss_dtype,
        statistics,
        options.ignore_index,
        options.inplace_backward,
        options.grad_in_forward,
        {
            name: value
            for name, value in checked.items()
            if value != DEFAULTS[name] and name not in OF_PYTHON
        },
    )


def _class_dim(dim: int | None, n_dims: int) -> int:
    if n_dims == 0:
        raise ValueError("input must have a class dimension, got a tensor of shape ()")
    if dim is None:  # torch's rule: 0 of (C,), 1 of (N, C, d1, ...)
        return 0 if n_dims == 1 else 1
    if not -n_dims <= dim < n_dims:
        raise IndexError(f"dim must be in [{-n_dims}, {n_dims}), got {dim}")
    return dim % n_dims


def _check_softcap(softcap: float, logit_scale: float) -> None:
    """Check the factor of a logit inside the tanh."""
    ratio = logit_scale / softcap
    if not 1e-30 <= ratio <= 1e30:
        raise ValueError(
            "logit_scale / softcap must be in [1e-30, 1e+30], got "
            f"{logit_scale} / {softcap} = {ratio}"
        )


def check_names(function: str, given: Any, known: Any) -> None:
    """Check the names of keyword arguments."""
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")

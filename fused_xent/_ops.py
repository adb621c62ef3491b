"""The native operators: loading their library, what each means, and calling them.

``loss`` returns the loss; ``forward`` returns it and what ``backward`` needs: ``total_weight`` (a
float64 scalar, the divisor of ``mean``; for ``none``, GPUs write 0) and ``state``, a few numbers
a row, stacked before the rows' dimensions: ``row_max``, ``log_sum`` (the logarithm of the sum of
``exp(logits - row_max)``, of the logits as the softmax sees them), for probabilities of all classes
``label_mass`` (the sum of the row's smoothed and weighted probabilities), and for the focal loss
``loss_slope`` (its derivative by the cross-entropy).
``forward_with_statistics`` returns ``lse``, ``entropy`` and ``argmax`` as well. ``backward`` takes
``total_weight`` where ``forward`` takes a normalizer, then ``state``, the entropy, and the upstream
gradients of loss, lse and entropy. ``forward_backward_`` writes the gradient over the logits.
``scale_gradient_`` multiplies that by an upstream gradient, and leaves ignored rows 0;
``multiply_`` multiplies a whole tensor. Rows have the shape of the unreduced loss and, but for
``argmax``, the accumulation type: float64 for float64 logits, float32 for all others.

Sparse labels are probabilities in ``target`` and their classes in ``target_indices``, the last
positional argument of the operators that take a weight.

The operators have autograd formulas, in ``_autograd``: those that overwrite raise where a gradient
is recorded. Options are those of ``csrc/xent_params.h``, by name.

``selected_log_probs`` returns log-probabilities of selected classes, then ``state``, token weights
(0 for rows of padding) and the entropy. For their gradient ``backward`` takes upstream gradients as
sparse labels: see ``_selected``.

``add_up_shards`` adds up what the ranks of a split vocabulary have sent of each row: see
``csrc/xent_shards.h`` and ``_parallel``.
"""

from __future__ import annotations

import importlib.machinery
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _meta
from ._meta import AddedUp
from ._options import Settings
from ._problem import Problem, Saved, Upstream
from ._torch_private import below_autograd, has_tangent, kernels_of, redispatch_below_inplace

T = TypeVar("T")


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
    """Load the library of CUDA kernels; return why they cannot run, or None.

    It needs a torch with CUDA. Its kernels run on a driver of the CUDA that it was built with, or a
    newer one; an older driver would fail at the first call.
    """
    if LOAD_ERROR is not None:  # the schemas are in the other library
        return LOAD_ERROR
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    missing = _load("_C_cuda", missing="built without CUDA kernels (no nvcc at build time)")
    return missing or torch.ops.fused_xent.cuda_driver_problem() or None


LOAD_ERROR = _load(
    "_C",
    missing=f"there is no native library in {Path(__file__).parent}: built without one, or it is "
    "a source folder that hides the installed package (then run from another folder)",
)
CUDA_LOAD_ERROR = _load_cuda()
_ops = torch.ops.fused_xent


def has_kernels(tensor: Tensor) -> bool:
    """Return True if there are native kernels for a tensor's device."""
    if tensor.is_cuda:
        return CUDA_LOAD_ERROR is None
    return LOAD_ERROR is None and (tensor.is_cpu or tensor.is_meta)


def cpu_capability() -> str | None:
    """Return the instruction set whose CPU kernels run here.

    One of ``"avx512_bf16"``, ``"avx512"``, ``"avx2"`` and ``"portable"``: the best that the
    processor has, or that the environment variable ``FUSED_XENT_CPU_CAPABILITY`` allows. None if
    there is no native library.
    """
    return _ops.cpu_capability() if LOAD_ERROR is None else None


def empty_cache() -> int:
    """Free the CPU memory that is kept for the next gradient, and return its size in bytes.

    The memory of the last gradient of at least 4 MiB that has been freed is kept, because the first
    touch of new memory takes longer than the backward. At most one is kept, and none that a tensor
    still uses. The environment variable ``FUSED_XENT_KEEP_GRADIENT=0`` turns this off; so does
    torch 2.10. CUDA devices have torch's own cache.
    """
    return _ops.empty_cache() if LOAD_ERROR is None else 0


OPERATORS = (
    *("loss", "forward", "forward_with_statistics", "backward", "backward_", "forward_backward_"),
    *("forward_backward_with_statistics_", "selected_log_probs", "scale_gradient_", "multiply_"),
    "add_up_shards",
)
# What ranks send of each row: the first arguments of add_up_shards.
SENT = (
    *("max", "log_sum", "part", "label_mass", "entropy", "argmax"),
    *("first_class", "end_class"),
)
OVERWRITING = tuple(name for name in OPERATORS if name.endswith("_"))  # their first argument


def saved_of(results: Sequence[Tensor]) -> Saved:
    """Return what is saved of the results of ``forward``."""
    _, total_weight, state, *statistics = results
    return Saved(total_weight, state, statistics[1] if statistics else None)


def _in_turn(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Return the vmap rule of an operator that returns one tensor: one call per sample."""

    def rule(
        info: Any, in_dims: Sequence[int | None], *arguments: Any, **options: Any
    ) -> tuple[Tensor, int]:
        samples = [
            operator(
                *(
                    argument.select(dim, i) if isinstance(dim, int) else argument
                    for argument, dim in zip(arguments, in_dims, strict=True)
                ),
                **options,
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(samples), 0

    return rule


def _count_version(name: str) -> None:
    """Make an operator increment the version of the tensor it overwrites, also in compiled code.

    Autograd raises an error from it if it needs the old values.
    """
    operator = getattr(_ops, name).default

    def counted(keyset: Any, overwritten: Tensor, *arguments: Any, **options: Any) -> Any:
        results = redispatch_below_inplace(operator, keyset, (overwritten, *arguments), options)
        increment_version(overwritten)  # after the call: a refused tensor is unchanged
        return results

    _library.impl(name, counted, "ADInplaceOrView", with_keyset=True)


# Operators as torch operations, by name: see _decompositions.
by_torch_operations: dict[str, Callable[..., Any]] = {}


def register_formula(name: str, formula: Callable[..., Any]) -> None:
    """Register the autograd formula of an operator. It takes the operator's arguments.

    Torch operations compute tangents, of forward-mode differentiation: the kernels have none.
    """

    def of_all_modes(*arguments: Any, **options: Any) -> Any:
        if not has_tangent(arguments):
            return formula(*arguments, **options)
        if name not in by_torch_operations:
            raise RuntimeError(
                f"fused_xent::{name} has no forward-mode derivative: use the functions of "
                "fused_xent without in-place modes"
            )
        return by_torch_operations[name](*arguments, **options)

    _library.impl(name, of_all_modes, "Autograd")


def _schema(name: str) -> torch.FunctionSchema:
    return getattr(_ops, name).default._schema  # type: ignore[no-any-return]


def options_schema() -> str:
    """Return the options of a loss as a schema has them."""
    options = [x for x in _schema("backward").arguments if x.kwarg_only]
    return ", ".join(f"{x.type} {x.name}={x.default_value}" for x in options)


def define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator that is written in Python, and return it."""
    _definitions.define(name + schema)
    _definitions.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_xent::{name}", fake)
    return getattr(_ops, name).default


def _refusal(name: str) -> Callable[..., Any]:
    """Return the formula of an operator that has no derivative."""
    operator = getattr(_ops, name).default

    def formula(*arguments: Any, **options: Any) -> Any:
        recorded = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        if recorded and torch.is_grad_enabled():
            raise RuntimeError(
                f"fused_xent::{name} has no derivative: call it under torch.no_grad(), or use "
                "fused_xent.cross_entropy"
            )
        with below_autograd():
            return operator(*arguments, **options)

    return formula


if LOAD_ERROR is None:
    _library = torch.library.Library("fused_xent", "IMPL")
    _definitions = torch.library.Library("fused_xent", "FRAGMENT")
    _metas: dict[str, Callable[..., Any]]
    _metas = {"selected_log_probs": _meta.selected_meta, "add_up_shards": _meta.shards_meta}
    for _name in OPERATORS:
        _fake = _metas.get(_name) or _meta.meta_of(_schema(_name))
        torch.library.register_fake(f"fused_xent::{_name}", _fake)
    for _name in OVERWRITING:
        _count_version(_name)
    for _name in (*OVERWRITING, "add_up_shards"):
        register_formula(_name, _refusal(_name))
    torch.library.register_vmap("fused_xent::backward", _in_turn(_ops.backward.default))

    scale_gradient_ = _ops.scale_gradient_.default
    multiply_ = _ops.multiply_.default
    # Without statistics, and with them.
    _of_loss = _ops.forward.default, _ops.forward_with_statistics.default
    _fused = _ops.forward_backward_.default, _ops.forward_backward_with_statistics_.default
    _backward: Callable[..., Tensor]
    _backward, _backward_ = _ops.backward.default, _ops.backward_.default
    # On CPUs and on GPUs.
    _plain_loss: tuple[Callable[..., Tensor], ...]
    _plain_forward: tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], ...]
    _plain_backward: tuple[Callable[..., Tensor], ...]
    _plain_selected: tuple[Callable[..., tuple[Tensor, ...]], ...]
    _plain_loss, _plain_forward, _plain_backward, _plain_selected = map(
        kernels_of, (_ops.loss, _ops.forward, _ops.backward, _ops.selected_log_probs)
    )


def _call(operator: Callable[..., T], problem: Problem, **inplace: bool) -> T:
    # Written out here and below: to build lists of arguments takes time that a small loss notices.
    logits, target, weight, token_weight, normalizer, target_indices, settings = problem
    return operator(
        logits,
        target,
        weight,
        token_weight,
        normalizer,
        settings.dim,
        settings.reduction,
        settings.loss_dtype,
        *(() if target_indices is None else (target_indices,)),
        **inplace,
        **settings.of_operators,
    )


def forward(problem: Problem, **inplace: bool) -> tuple[Tensor, ...]:
    """Return loss, total_weight and state; with statistics, after them lse, entropy and argmax."""
    return _call(_of_loss[problem.settings.statistics], problem, **inplace)


def forward_backward_(problem: Problem) -> tuple[Tensor, ...]:
    """Return the loss; with statistics, after it lse, entropy and argmax."""
    results = _call(_fused[problem.settings.statistics], problem)
    return results if problem.settings.statistics else (results,)


def _call_backward(
    operator: Callable[..., T], problem: Problem, saved: Saved, upstream: Upstream
) -> T:
    logits, target, weight, token_weight, _, target_indices, settings = problem
    total_weight, state, entropy = saved
    return operator(
        logits,
        target,
        weight,
        token_weight,
        total_weight,
        settings.dim,
        settings.reduction,
        state,
        entropy,
        *upstream,
        *(() if target_indices is None else (target_indices,)),
        **settings.of_operators,
    )


def backward(problem: Problem, saved: Saved, upstream: Upstream) -> Tensor:
    """Return the gradient of the logits."""
    return _call_backward(_backward, problem, saved, upstream)


def backward_(problem: Problem, saved: Saved, upstream: Upstream) -> None:
    """Write the gradient over the logits."""
    _call_backward(_backward_, problem, saved, upstream)


def selected_log_probs(
    logits: Tensor, index: Tensor, settings: Settings, **inplace: bool
) -> tuple[Tensor, ...]:
    """Return log-probabilities, state, token weights and entropy, which is empty if not wanted."""
    return _call_selected(_ops.selected_log_probs.default, logits, index, settings, **inplace)


def _call_selected(
    operator: Callable[..., T], logits: Tensor, index: Tensor, settings: Settings, **inplace: bool
) -> T:
    dim, with_entropy = settings.dim, settings.statistics
    return operator(logits, index, dim, with_entropy, **inplace, **settings.of_operators)


def add_up_shards(
    rows: dict[str, Tensor],
    n_classes: int,
    rank: int,
    token_weight: Tensor | None = None,
    is_bad: Tensor | None = None,
    keeps_mass: bool = False,
    **options: float,
) -> AddedUp:
    """Add up the rows that the ranks have sent, each (n_ranks, rows), for this rank."""
    sent = [rows.get(name) for name in SENT]
    known = (token_weight, is_bad, rank, n_classes, keeps_mass)
    return AddedUp._make(_ops.add_up_shards.default(*sent, *known, **options))


# ---- class indices beside logits, and nothing else: most calls, see _autograd.is_plain -----------


def plain_loss(logits: Tensor, target: Tensor, settings: Settings) -> Tensor:
    """Return the loss alone."""
    return _call_plain(_plain_loss, logits, target, settings)


def plain_forward(
    logits: Tensor, target: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, total_weight and state."""
    return _call_plain(_plain_forward, logits, target, settings)


def _call_plain(
    operators: tuple[Callable[..., T], ...], logits: Tensor, target: Tensor, settings: Settings
) -> T:
    dim, reduction, loss_dtype, _, _, _, _, options = settings
    none = (None, None, None)
    operator = operators[logits.is_cuda]
    return operator(logits, target, *none, dim, reduction, loss_dtype, **options)


def plain_backward(
    logits: Tensor,
    target: Tensor,
    total_weight: Tensor | None,
    state: Tensor,
    grad_loss: Tensor,
    settings: Settings,
    token_weight: Tensor | None = None,
    target_indices: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the logits; the last two arguments are those of sparse labels."""
    return _plain_backward[logits.is_cuda](
        logits,
        target,
        None,
        token_weight,
        total_weight,
        settings.dim,
        settings.reduction,
        state,
        None,
        grad_loss,
        None,
        None,
        *(() if target_indices is None else (target_indices,)),
        **settings.of_operators,
    )


def plain_selected(logits: Tensor, index: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    """Return log-probabilities, state and token weights, and an empty tensor."""
    return _call_selected(_plain_selected[logits.is_cuda], logits, index, settings)

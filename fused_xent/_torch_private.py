"""All uses of torch's private API, each with the reason why a public one does not do.

tests/test_torch_private.py tests each on the installed torch.
"""

import functools
import operator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import _reduction
from torch.nn.modules.loss import _WeightedLoss as WeightedLoss  # as torch.nn's own losses

__all__ = [
    "WeightedLoss",
    "apply_at_this_level",
    "apply_in_eager",
    "are_ordinary",
    "below_autograd",
    "has_tangent",
    "has_values",
    "is_batched_by_autograd",
    "is_eager",
    "is_jit_tracing",
    "is_one_of_several_views",
    "is_under_torch_func",
    "is_under_vmap_or_jvp",
    "kernels_of",
    "legacy_reduction",
    "memory_of",
    "mkldnn_has",
    "overwritable",
    "redispatch_below_inplace",
    "share_memory",
    "unwrap_dead_wrappers",
]

# Calls an operator without its autograd formula. torch.no_grad() does not: the formula's Python
# function would still be called.
below_autograd = torch._C._AutoDispatchBelowAutograd

# None, or the state of torch.jit.trace. torch.jit.is_tracing() is slower.
is_jit_tracing = torch._C._get_tracing_state

_dispatch_keys = torch._C._dispatch_keys
_n_dispatch_modes = torch._C._len_torch_dispatch_stack
_innermost_transform = torch._C._functorch.peek_interpreter_stack


def _key_sets(backend: str) -> tuple[Any, int]:
    keys = (f"{backend}", "ADInplaceOrView", f"Autograd{backend}", f"Autocast{backend}")
    sets = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in keys]
    return sets[0], functools.reduce(operator.or_, sets).raw_repr()


# The key of each backend's kernels, and all keys of an ordinary tensor there.
_BACKENDS, _ORDINARY = zip(*map(_key_sets, ("CPU", "CUDA")), strict=True)

# Translates the deprecated size_average and reduce, with torch's own warning. Not public.
legacy_reduction = _reduction.legacy_get_string


def kernels_of(op: Any) -> tuple[Any, Any]:
    """Return the kernels of an operator, on CPUs and on GPUs, to call with ordinary tensors.

    The dispatcher would look for autograd, autocast and modes. The caller has checked that there
    are none, by ``is_eager`` and ``are_ordinary``. Dispatch takes as long as the kernel of
    a small loss.
    """
    redispatch = op.default._handle.redispatch_boxed
    cpu, cuda = (functools.partial(redispatch, keys) for keys in _BACKENDS)
    return cpu, cuda


def apply_in_eager(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Apply a Function where no transform of torch.func is active.

    ``Function.apply`` asks for transforms, and inspects the signature of ``forward`` for defaults:
    that takes longer than a small loss. It also unwraps tensors that a finished transform has left
    behind: here the caller does (``unwrap_dead_wrappers``), unless ``are_ordinary`` is True.
    """
    return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


def apply_at_this_level(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Apply a Function inside an operator's formula, where torch.func has already chosen the level.

    ``Function.apply`` would start at the outermost level again.
    """
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


def is_under_torch_func() -> bool:
    """Return True under a transform of torch.func, which has no public function for this."""
    return _innermost_transform() is not None


def is_eager() -> bool:
    """Return True in eager mode: no compiler, tracer, dispatch mode or transform is active."""
    return (
        not is_compiling()  # first: the compiler cannot trace the others
        and _innermost_transform() is None
        and _n_dispatch_modes() == 0
        and is_jit_tracing() is None
        and forward_ad._current_level < 0
    )


def are_ordinary(one: Tensor, other: Tensor) -> bool:
    """Return True if a kernel can take two tensors as they are, both on the CPU or both on a GPU.

    False for sparse, nested, fake and batched tensors, lazily negated views, and subclasses with
    ``__torch_dispatch__``: for these the dispatcher does something first.
    """
    keys = _dispatch_keys(one).raw_repr()
    return keys in _ORDINARY and _dispatch_keys(other).raw_repr() == keys


def is_under_vmap_or_jvp() -> bool:
    """Return True under torch.func.vmap or forward-mode differentiation, of either kind."""
    if _innermost_transform() is None and forward_ad._current_level < 0:
        return False
    is_dual = forward_ad._current_level >= 0
    if is_compiling():  # the compiler traces vmap by itself, but finds no tangents of operators
        return is_dual
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds = torch._C._functorch.TransformType
    return is_dual or any(layer.key() in (kinds.Vmap, kinds.Jvp) for layer in stack)


def has_tangent(arguments: Any) -> bool:
    """Return True if one of an operator's arguments is a dual tensor of forward-mode AD."""
    if forward_ad._current_level < 0:
        return False
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_batched_by_autograd(tensor: Tensor | None) -> bool:
    """Return True for the batched tensors of ``is_grads_batched=True``; torch.func has others."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def has_values(tensor: Tensor) -> bool:
    """Return False on the meta device and under a compiler, tracer or transform."""
    if is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return not is_under_vmap_or_jvp() and get_proxy_mode() is None


def memory_of(tensor: Tensor) -> Tensor:
    """Return the tensor that a view is of, or the tensor itself."""
    return tensor if tensor._base is None else tensor._base


def is_one_of_several_views(tensor: Tensor) -> bool:
    """Return True for outputs of chunk, split and unbind: autograd forbids overwriting them."""
    several = torch._C._autograd.CreationMeta.MULTI_OUTPUT_NODE
    return tensor._is_view() and torch._C._autograd._get_creation_meta(tensor) == several


def overwritable(tensor: Tensor) -> Tensor | None:
    """Return a tensor of the same value and memory that a backward may overwrite, or None.

    An eager tensor is returned as it is. In a traced graph the result is a tensor of its own: if
    the given one is an output of the graph too, the compiler sees both uses, and copies. For inputs
    of the graph and for parts of a tensor the result is None: the compiler of torch 2.13 moves
    other reads of these after the write, which makes gradients wrong.
    """
    if not isinstance(tensor, FunctionalTensor):
        return tensor
    memory = memory_of(tensor)
    is_input = memory.grad_fn is None or memory.grad_fn.name() == "torch::autograd::Error"
    if is_input or not statically_known_true(memory.numel() == tensor.numel()):
        return None
    return FunctionalTensor.to_functional(tensor.from_functional())


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Return True if both have one storage. Fake tensors have no ``data_ptr`` to compare."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata  # type: ignore[no-any-return]


def mkldnn_has(dtype: torch.dtype) -> bool:
    """Return True if this CPU has instructions for matrix products in a 16-bit dtype."""
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return is_supported is not None and is_supported()


def redispatch_below_inplace(op: Any, keyset: Any, arguments: tuple[Any, ...], options: Any) -> Any:
    """Call an operator below ADInplaceOrView, the dispatch key that increments versions."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        below = keyset & torch._C._after_ADInplaceOrView_keyset
        return op.redispatch(below, *arguments, **options)

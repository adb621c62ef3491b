"""The private API of the installed torch behaves as _torch_private.py expects."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fused_xent import _ops, _torch_private

pytestmark = pytest.mark.cpu("independent of the device")

LOGITS, TARGET = torch.randn(4, 9), torch.arange(4)


def test_all_names_exist():
    for name in _torch_private.__all__:
        assert getattr(_torch_private, name) is not None


def test_below_autograd_skips_formulas():
    logits = LOGITS.clone().requires_grad_()
    arguments = (logits, TARGET, None, None, None, 1, 1)
    assert torch.ops.fused_xent.loss(*arguments).requires_grad
    with _torch_private.below_autograd():
        assert not torch.ops.fused_xent.loss(*arguments).requires_grad


def test_kernels_are_called_directly():
    arguments = (LOGITS, TARGET, None, None, None, 1, 1)
    on_cpu, _ = _torch_private.kernels_of(torch.ops.fused_xent.loss)
    assert torch.equal(on_cpu(*arguments), torch.ops.fused_xent.loss(*arguments))


def test_legacy_reduction_names():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch
        names = [
            _torch_private.legacy_reduction(*given) for given in ((None, False), (False, None))
        ]
    assert names == ["none", "sum"]


def test_detects_transforms():
    seen = []

    def look(x):
        asked = (_torch_private.is_under_torch_func, _torch_private.is_under_vmap_or_jvp)
        seen.append(tuple(question() for question in asked))
        return x.sum()

    look(LOGITS)
    torch.func.grad(look)(LOGITS)
    torch.func.vmap(look)(LOGITS)
    torch.func.grad(lambda x: torch.func.vmap(look)(x).sum())(LOGITS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's forward-mode formulas
        torch.func.jvp(look, (LOGITS,), (LOGITS,))
        with forward_ad.dual_level():
            look(LOGITS)
    vmap_or_jvp = (True, True)
    assert seen == [(False, False), (True, False), *[vmap_or_jvp] * 3, (False, True)]


def test_is_eager():
    seen = []

    def look(x):
        seen.append(_torch_private.is_eager())
        return x.sum()

    look(LOGITS)
    torch.func.grad(look)(LOGITS)
    make_fx(look)(LOGITS)
    with FakeTensorMode():
        look(torch.empty(3))
    with forward_ad.dual_level():
        look(LOGITS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(look, (LOGITS,), check_trace=False)
    assert seen == [True, *[False] * 5]


def test_ordinary_tensors():
    ordinary = {
        "dense": LOGITS,
        "a parameter": torch.nn.Parameter(LOGITS),
        "a view": LOGITS[::2, 1:],
        "indices": TARGET,
    }
    others = {
        "sparse": LOGITS.to_sparse(),
        "meta": LOGITS.to("meta"),
        "fake": FakeTensorMode().from_tensor(LOGITS),
        "lazily negated": torch._neg_view(LOGITS),
    }
    for name, tensor in ordinary.items():
        assert _torch_private.are_ordinary(tensor, LOGITS), name
        assert _torch_private.are_ordinary(LOGITS, tensor), name
    for name, tensor in others.items():
        assert not _torch_private.are_ordinary(tensor, LOGITS), name
        assert not _torch_private.are_ordinary(LOGITS, tensor), name


def test_detects_batched_gradients():
    seen = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(_torch_private.is_batched_by_autograd(grad))
            return grad

    leaf = LOGITS.clone().requires_grad_()
    torch.autograd.grad(Identity.apply(leaf).sum(), leaf)
    loss = Identity.apply(leaf).sum()
    torch.autograd.grad(loss, leaf, torch.ones(2), is_grads_batched=True)
    assert seen == [False, True]
    assert not _torch_private.is_batched_by_autograd(None)


def test_has_values():
    seen = []

    def look(x):
        seen.append(_torch_private.has_values(x))
        return x.sum()

    look(LOGITS)
    torch.func.vmap(look)(LOGITS)
    make_fx(look)(LOGITS)
    look(LOGITS.to("meta"))
    look(FakeTensorMode().from_tensor(LOGITS))
    assert seen == [True, *[False] * 4]


def test_views_and_memory():
    whole = LOGITS.clone().requires_grad_() * 1
    view = whole[1:]
    assert _torch_private.memory_of(view) is whole
    assert _torch_private.memory_of(whole) is whole
    assert _torch_private.share_memory(view, whole)
    assert not _torch_private.share_memory(whole, whole.clone())
    assert _torch_private.is_one_of_several_views(whole.chunk(2)[0])
    assert not _torch_private.is_one_of_several_views(view)
    assert not _torch_private.is_one_of_several_views(whole)


def test_mkldnn_has():
    for dtype in (torch.bfloat16, torch.float16):
        assert isinstance(_torch_private.mkldnn_has(dtype), bool)


def test_multiply_raises_the_version_once():
    gradient = LOGITS.clone()
    version = gradient._version
    _ops.multiply_(gradient, torch.tensor(2.0))
    assert gradient._version == version + 1
    assert torch.equal(gradient, 2 * LOGITS)

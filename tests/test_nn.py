"""The module: torch's own samples of torch.nn.CrossEntropyLoss, and what a module is asked for."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from cases import DTYPES
from modes import MODES

import fused_xent

HALF = (torch.bfloat16, torch.float16)


@functools.cache
def torchs_module():
    """Return torch's own description of its CrossEntropyLoss."""
    pytest.importorskip("expecttest", reason="torch's samples need expecttest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on import
        from torch.testing._internal.common_modules import module_db
    return next(info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)


def run(module_class, sample, dtype):
    """Return loss and gradients of a module of a class, its weight and inputs cast to dtype."""
    made, given = sample.constructor_input, sample.forward_input
    options = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in made.kwargs.items()}
    module = module_class(*made.args, **options)
    inputs = [
        x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in given.args
    ]
    loss = module(*inputs)
    loss.sum().backward()
    return loss.detach(), *(x.grad for x in inputs if x.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_samples(dtype, device):
    """In 16 bits the error is at most torch's own, plus two units in the last place."""
    info = torchs_module()
    samples = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=True
    )
    assert len(samples) > 60
    for sample in samples:
        actual = run(fused_xent.CrossEntropyLoss, sample, dtype)
        expected = run(torch.nn.CrossEntropyLoss, sample, dtype)
        if dtype not in HALF:
            torch.testing.assert_close(actual, expected, equal_nan=True)
            continue
        exact = run(torch.nn.CrossEntropyLoss, sample, torch.float64)
        for right, theirs, our in zip(exact, expected, actual, strict=True):
            assert (our.dtype, our.shape) == (theirs.dtype, theirs.shape)
            error, bound = (our.double() - right).abs(), (theirs.double() - right).abs()
            close = error <= bound + 2 * torch.finfo(dtype).eps * right.abs() + 1e-7
            assert (close | (our.isnan() & theirs.isnan())).all()


def test_replaces_torchs():
    module = fused_xent.CrossEntropyLoss(torch.rand(5), ignore_index=3, label_smoothing=0.1)
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    theirs = torch.nn.CrossEntropyLoss(torch.rand(5), ignore_index=3, label_smoothing=0.1)
    assert repr(fused_xent.CrossEntropyLoss(torch.rand(5))) == repr(theirs)
    module.load_state_dict(theirs.state_dict())
    logits, target = torch.randn(4, 5), torch.arange(4)
    torch.testing.assert_close(module(logits, target), theirs(logits, target))


def test_positional_arguments_are_torchs():
    weight = torch.rand(5)
    with pytest.warns(UserWarning, match="size_average"):
        ours = fused_xent.CrossEntropyLoss(weight, False, 2, None, "mean", 0.1)
    assert ours.reduction == "sum"
    assert (ours.ignore_index, ours.label_smoothing) == (2, 0.1)
    assert torch.equal(ours.weight, weight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_all_options(duplicate, mode):
    weight = torch.rand(5)
    module = duplicate(
        fused_xent.CrossEntropyLoss(
            weight, reduction="sum", loss_dtype=torch.float64, ignore_index=1, **MODES[mode]
        )
    )
    logits, target = torch.randn(4, 5), torch.arange(4)
    expected = fused_xent.cross_entropy(
        logits, target, weight, reduction="sum", loss_dtype=torch.float64, ignore_index=1
    )
    assert torch.equal(module(logits, target), expected)
    assert expected.dtype == torch.float64
    leaf = logits.requires_grad_()
    computed = leaf * 1
    module(computed, target).backward()
    assert torch.equal(computed.detach(), leaf.grad) == (mode != "default")


def test_shows_its_options():
    module = fused_xent.CrossEntropyLoss(torch.rand(5), softcap=30.0, grad_in_forward=True)
    assert repr(module) == "CrossEntropyLoss(softcap=30.0, grad_in_forward=True)"


def test_state_of_torchs_module_is_enough():
    module = fused_xent.CrossEntropyLoss.__new__(fused_xent.CrossEntropyLoss)
    module.__setstate__(torch.nn.CrossEntropyLoss(reduction="sum").__dict__)
    logits, target = torch.randn(4, 5), torch.arange(4)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    torch.testing.assert_close(module(logits, target), expected)


def test_takes_all_options_and_a_batchs_tensors():
    options = {
        "dim": -1,
        "lse_square_scale": 0.1,
        "softcap": 3.0,
        "logit_scale": 0.5,
        "focal_gamma": 2.0,
    }
    module = copy.deepcopy(fused_xent.CrossEntropyLoss(label_smoothing=0.1, **options))
    logits, target = torch.randn(2, 4, 5), torch.randint(5, (2, 4))
    batch = {"token_weight": torch.rand(2, 4), "normalizer": 3}
    expected = fused_xent.cross_entropy(logits, target, label_smoothing=0.1, **options, **batch)
    assert torch.equal(module(logits, target, **batch), expected)


def test_moves_its_weight():
    module = fused_xent.CrossEntropyLoss(torch.rand(5)).double()
    assert module.weight.dtype == torch.float64
    assert module(torch.randn(4, 5).double(), torch.arange(4)).dtype == torch.float64
    assert not list(module.parameters())

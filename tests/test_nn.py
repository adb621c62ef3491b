"""The modules: torch's samples of CrossEntropyLoss, options, copies, repr and state."""

import copy
import functools
import inspect
import pickle
import warnings

import pytest
import torch
from cases import DTYPES
from modes import MODES

import fused_xent
import fused_xent.nn

HALF = (torch.bfloat16, torch.float16)


@functools.cache
def torchs_module():
    """Return the ModuleInfo of torch.nn.CrossEntropyLoss."""
    pytest.importorskip("expecttest", reason="torch's samples need expecttest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on import
        from torch.testing._internal.common_modules import module_db
    return next(info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)


def run(module_class, sample, dtype):
    """Return loss and gradients of a new module, with weight and inputs cast to dtype."""
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
    """In 16 bits the error is at most that of torch plus two units in the last place."""
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


def test_replaces_torch_module():
    module = fused_xent.CrossEntropyLoss(torch.rand(5), ignore_index=3, label_smoothing=0.1)
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    theirs = torch.nn.CrossEntropyLoss(torch.rand(5), ignore_index=3, label_smoothing=0.1)
    assert repr(fused_xent.CrossEntropyLoss(torch.rand(5))) == repr(theirs)
    module.load_state_dict(theirs.state_dict())
    logits, target = torch.randn(4, 5), torch.arange(4)
    torch.testing.assert_close(module(logits, target), theirs(logits, target))


def test_positional_arguments_match_torch():
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


def test_repr_shows_options():
    module = fused_xent.CrossEntropyLoss(torch.rand(5), softcap=30.0, grad_in_forward=True)
    assert repr(module) == "CrossEntropyLoss(softcap=30.0, grad_in_forward=True)"
    equal = fused_xent.CrossEntropyLoss(ignore_index=int("-100"), label_smoothing=float("0"))
    assert repr(equal) == "CrossEntropyLoss()"


@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_unknown_options(function):
    name = type(MODULES[function]()).__name__
    for option in ("z_loss", "token_weight", "normalizer"):
        rule = rf"{name}\(\) got an unexpected keyword argument '{option}'"
        with pytest.raises(TypeError, match=rule):
            MODULES[function](**{option: None})


@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_signatures_name_all_options(function):
    """Defaults are those of the function; torch's arguments keep their positions."""
    of_function = inspect.signature(getattr(fused_xent, function)).parameters
    module = type(MODULES[function]())
    found = inspect.signature(module).parameters
    for name in OPTIONS:
        if name == "num_classes" and function == "linear_cross_entropy":  # of the layer
            continue
        assert (name in found) == (name in of_function)
        if name in found:
            assert found[name].default == of_function[name].default
    torchs = inspect.signature(torch.nn.CrossEntropyLoss).parameters
    positional = [
        name for name, x in found.items() if x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    first = list(torchs) if function == "cross_entropy" else ["in_features", "num_classes"]
    assert positional == first


def test_setstate_from_torch_module():
    module = fused_xent.CrossEntropyLoss.__new__(fused_xent.CrossEntropyLoss)
    module.__setstate__(torch.nn.CrossEntropyLoss(reduction="sum").__dict__)
    logits, target = torch.randn(4, 5), torch.arange(4)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    torch.testing.assert_close(module(logits, target), expected)


def test_all_options_and_batch_tensors():
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


OPTIONS = {  # values that differ from the defaults
    "ignore_index": 2,
    "reduction": "sum",
    "label_smoothing": 0.1,
    "lse_square_scale": 0.1,
    "softcap": 3.0,
    "logit_scale": 0.5,
    "focal_gamma": 2.0,
    "loss_dtype": torch.float64,
    "dim": -1,
    "inplace_backward": True,
    "grad_in_forward": True,
    "options": object(),
    "shift": 1,
    "drop_ignored": True,
    "chunk_rows": 3,
    "logits_dtype": torch.float32,
    "process_group": object(),
    "vocab_start": 1,
    "num_classes": 5,
    "sequence_parallel": True,
    "reduce_grad_hidden": False,
}
MODULES = {
    "cross_entropy": lambda **options: fused_xent.CrossEntropyLoss(**options),
    "linear_cross_entropy": lambda **options: fused_xent.LinearCrossEntropyLoss(9, 5, **options),
}


@pytest.mark.parametrize("function", MODULES)
def test_every_option_reaches_the_function(function, monkeypatch):
    """Each option alone is passed on unchanged, and repr shows it."""
    seen = {}
    monkeypatch.setattr(fused_xent.nn, function, lambda *_, **options: seen.update(options))
    monkeypatch.setattr(fused_xent.nn, "_n_ranks", lambda process_group: 1)
    parameters = dict(inspect.signature(getattr(fused_xent, function)).parameters)
    if function == "linear_cross_entropy":
        del parameters["num_classes"]  # of the layer: see test_parallel_linear.py
    names = [name for name in OPTIONS if name in parameters]
    assert set(names) == set(parameters) - NOT_OPTIONS
    weight, batch = torch.rand(5), {"token_weight": torch.rand(4), "normalizer": 3}
    batch["target_indices"] = torch.arange(4)
    for name in names:
        module = MODULES[function](weight=weight, **{name: OPTIONS[name]})
        module(torch.rand(4, 9), torch.arange(4), **batch)
        changed = {n for n in names if seen[n] != parameters[n].default}
        assert changed == {name}
        assert seen[name] is OPTIONS[name] or seen[name] == OPTIONS[name]
        assert torch.equal(seen["weight"], weight)
        assert seen["token_weight"] is batch["token_weight"]
        assert seen["normalizer"] == 3
        assert seen["target_indices"] is batch["target_indices"]
        assert f"{name}={OPTIONS[name]!r}" in repr(module)
        MODULES[function]()(torch.rand(4, 9), torch.arange(4))
        assert all(seen[n] == parameters[n].default for n in names)
        assert all(seen[n] is None for n in ("weight", *batch))


NOT_OPTIONS = {  # tensors, and the deprecated arguments that set reduction
    *("input", "target", "weight", "token_weight", "normalizer", "target_indices"),
    *("linear_weight", "linear_bias", "size_average", "reduce"),
}


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_of_the_linear_module(bias):
    options = {"out_features": [2, 3], "bias": bias, "dtype": torch.float64, "device": "meta"}
    module = fused_xent.LinearCrossEntropyLoss(9, 5, weight=torch.rand(5), **options)
    layer = {"linear.weight": (30, 9)} | ({"linear.bias": (30,)} if bias else {})
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == layer
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.float64, "meta")}
    assert set(module.state_dict()) == {*layer, "weight"}
    assert module.out_features == (2, 3)
    assert isinstance(module, torch.nn.modules.loss._WeightedLoss)


def test_repr_of_a_subclass_with_tensor_attributes():
    class Scaled(fused_xent.CrossEntropyLoss):
        def __init__(self, scale):
            super().__init__(softcap=3.0)
            self.scale, self.label_smoothing = scale, torch.rand(3)

    assert "softcap=3.0" in repr(Scaled(torch.rand(4)))


def test_old_modules_without_newer_options():
    module = fused_xent.CrossEntropyLoss()
    for name in ("dim", "softcap", "loss_dtype", "lse_square_scale", "focal_gamma", "logit_scale"):
        del module.__dict__[name]
    del module.__dict__["inplace_backward"], module.__dict__["grad_in_forward"]
    logits, target = torch.randn(4, 5, requires_grad=True) * 1, torch.arange(4)
    before = logits.detach().clone()
    loss = module(logits, target)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(before, target))
    loss.backward()
    assert torch.equal(logits, before)
    assert repr(module) == "CrossEntropyLoss()"


def test_double_casts_the_weight():
    module = fused_xent.CrossEntropyLoss(torch.rand(5)).double()
    assert module.weight.dtype == torch.float64
    assert module(torch.randn(4, 5).double(), torch.arange(4)).dtype == torch.float64
    assert not list(module.parameters())

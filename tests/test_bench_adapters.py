"""The adapters of other implementations: the options they pass on, and why some are absent."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

import fused_xent
from bench import linear, providers
from bench.cases import Case, Options
from bench.check import Check, torch_loss
from bench.providers import ADAPTERS, Request, Unsupported, gather
from bench.timing import Workload

pytestmark = pytest.mark.cpu("the providers of a GPU are stand-ins")


def module(monkeypatch, name, **contents):
    """Put a module with these contents into sys.modules, for this test."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


class FlashAttentionLoss:
    """Has the signature of flash-attention's module."""

    def __init__(
        self, ignore_index=-100, label_smoothing=0.0, lse_square_scale=0.0, inplace_backward=False
    ):
        self.options = Options(label_smoothing, 0.0, lse_square_scale)

    def __call__(self, input, target):
        return torch_loss(input, target, self.options)


class ApexLoss:
    """Has the signature of apex's function."""

    @staticmethod
    def apply(logits, labels, smoothing, padding_idx, half_to_float):
        assert padding_idx == -100
        return F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")


def liger_cross_entropy(input, target, label_smoothing=0.0, lse_square_scale=0.0, softcap=None):
    return torch_loss(input, target, Options(label_smoothing, 0.0, lse_square_scale, softcap or 0))


def quack_cross_entropy(x, target, ignore_index=-100, reduction="mean", inplace_backward=False):
    return F.cross_entropy(x, target, ignore_index=ignore_index, reduction=reduction)


def parallel_cross_entropy(inp, target, label_smoothing=0.0, reduce_loss=False):
    assert inp.ndim == 3
    assert reduce_loss
    return F.cross_entropy(inp[0], target[0], label_smoothing=label_smoothing)


PEERS = {  # name: the module that the adapter imports, its contents, the supported options
    "liger-kernel": (
        "liger_kernel.transformers.functional",
        {"liger_cross_entropy": liger_cross_entropy},
        {"ignored", "label_smoothing", "lse_square_scale", "softcap"},
    ),
    "quack-kernels": (
        "quack.cross_entropy",
        {"cross_entropy": quack_cross_entropy},
        {"ignored"},
    ),
    "flash-attn": (
        "flash_attn.losses.cross_entropy",
        {"CrossEntropyLoss": FlashAttentionLoss},
        {"ignored", "label_smoothing", "lse_square_scale"},
    ),
    "apex": (
        "apex.contrib.xentropy",
        {"SoftmaxCrossEntropyLoss": ApexLoss},
        {"label_smoothing"},
    ),
    "transformer-engine": (
        "transformer_engine.pytorch.cross_entropy",
        {"parallel_cross_entropy": parallel_cross_entropy},
        {"ignored", "label_smoothing"},
    ),
}


@pytest.mark.parametrize("peer", PEERS)
def test_adapters_of_peers(peer, monkeypatch):
    """Stand-ins have the peers' signatures, and their results show which options arrive."""
    name, contents, known = PEERS[peer]
    values = {"ignored": 0.4, "label_smoothing": 0.1, "lse_square_scale": 0.1, "softcap": 2.0}
    plain = Case("own", (24, 50))
    with pytest.raises(ModuleNotFoundError):
        ADAPTERS[peer](Request(plain, "float32", "cuda"))
    module(monkeypatch, name, **contents)
    for option, value in values.items():
        case = Case("own", (24, 50), options=Options(**{option: value}))
        request = Request(case, "float32", "cuda")
        if option not in known:
            with pytest.raises(Unsupported, match=f"has no {option}"):
                ADAPTERS[peer](request)
            continue
        check = Check(Workload(*case.tensors(torch.float32, "cpu")), case.options)
        for provider in ADAPTERS[peer](request):
            check(provider.loss)
    for case, reason in (
        (Case("own", (24, 50), soft=True), "takes no soft labels"),
        (Case("own", (2, 24, 5, 5)), "takes logits"),
    ):
        with pytest.raises(Unsupported, match=reason):
            ADAPTERS[peer](Request(case, "float32", "cuda"))


def test_absent_providers_have_a_reason(monkeypatch):
    module(monkeypatch, "liger_kernel.transformers.functional")  # a version without the function
    request = Request(Case("own", (24, 50)), "float32", "cuda")
    found, absent = gather(ADAPTERS, request, ["fused_xent", "liger-kernel", "apex"])
    assert next(one.name for one in found) == "fused_xent"
    assert absent["apex"] == "not installed: no module apex"
    assert absent["liger-kernel"].startswith("does not load: ImportError: cannot import name")
    _, absent = gather(ADAPTERS, Request(Case("own", (24, 50)), "float32", "cpu"), ["apex"])
    assert absent == {"apex": "needs a GPU"}


def recorded(calls, function=F.cross_entropy):
    """Return a stand-in for a loss that appends the options of each call to `calls`."""

    def loss(*inputs, **options):
        calls.append(options)
        return function(*inputs[:2])

    return loss


WANTED = Options(label_smoothing=0.1, ignored=0.4, lse_square_scale=0.2, softcap=3.0)


def test_options_passed_to_this_package(monkeypatch):
    """Each form gets the options of the case, and the flag that selects the form."""
    calls = []
    monkeypatch.setattr(fused_xent, "cross_entropy", recorded(calls))
    found = providers.ours(Request(Case("own", (24, 50), options=WANTED), "float32", "cpu"))
    for provider in found:
        provider.loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    common = {"label_smoothing": 0.1, "lse_square_scale": 0.2, "softcap": 3.0}
    forms = {"": {}, " inplace": {"inplace_backward": True}, " fused": {"grad_in_forward": True}}
    assert [provider.name for provider in found] == [f"fused_xent{form}" for form in forms]
    assert calls == [common | form for form in forms.values()]
    assert [one.fused for one in found] == [False, False, True]
    assert [one.modes for one in found] == [
        ("forward", "backward", "both"),
        ("backward", "both"),
        ("both",),
    ]


def test_torch_compile_compiles_for_each_case(monkeypatch):
    """Code compiled for the previous case is dropped, and no dimension is dynamic."""
    done = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda loss, **options: done.append(options) or loss)
    case = Case("own", (24, 50), options=WANTED)
    (found,) = providers.torch_compile(Request(case, "float32", "cpu"))
    assert done == ["reset", {"dynamic": False}]
    Check(Workload(*case.tensors(torch.float32, "cpu")), WANTED)(found.loss)
    done.clear()
    ((_, loss),) = linear.torch_compile("cuda")
    assert done == ["reset", {"dynamic": False}]
    assert loss is linear.unfused


@pytest.mark.parametrize("peer", ["quack-kernels", "flash-attn"])
def test_peers_are_measured_in_place_too(peer, monkeypatch):
    name, contents, _ = PEERS[peer]
    calls = []
    ((known, _),) = contents.items()

    def loss_of(**options):  # flash-attention has a module, made with options
        calls.append(options)
        return F.cross_entropy

    module(monkeypatch, name, **{known: loss_of if peer == "flash-attn" else recorded(calls)})
    found = ADAPTERS[peer](Request(Case("own", (24, 50)), "float32", "cuda"))
    for provider in found:
        provider.loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    assert sorted(calls, key=len) == [{}, {"inplace_backward": True}]
    assert [one.name for one in found] == [peer, f"{peer} inplace"]
    assert found[1].modes == ("backward", "both")


def test_transformer_engine_has_no_float16():
    with pytest.raises(Unsupported, match="takes no float16"):
        ADAPTERS["transformer-engine"](Request(Case("own", (24, 50)), "float16", "cuda"))


LINEAR_PEERS = {  # name: the module that the adapter imports, its function, options by provider
    "liger-kernel": (
        "liger_kernel.transformers.functional",
        "liger_fused_linear_cross_entropy",
        {"liger-kernel": {}},
    ),
    "quack-kernels": (
        "quack.linear_cross_entropy",
        "chunked_linear_cross_entropy",
        {"quack-kernels": {}},
    ),
    "cut-cross-entropy": (
        "cut_cross_entropy",
        "linear_cross_entropy",
        {"cut-cross-entropy": {}, "cut-cross-entropy, exact": {"filter_eps": None}},
    ),
}


@pytest.mark.parametrize("peer", LINEAR_PEERS)
def test_adapters_of_linear_peers(peer, monkeypatch):
    name, function, expected = LINEAR_PEERS[peer]
    with pytest.raises(Unsupported, match="needs a GPU"):
        linear.ADAPTERS[peer]("cpu")
    calls = []
    module(monkeypatch, name, **{function: recorded(calls, lambda hidden, weight: weight.sum())})
    found = dict(linear.ADAPTERS[peer]("cuda"))
    for loss_function in found.values():
        loss_function(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2))
    assert dict(zip(found, calls, strict=True)) == expected


def test_linear_providers_of_torch(monkeypatch):
    """torch has a chunked loss from 2.13 on."""
    with pytest.raises(Unsupported, match="is the same as eager on a CPU"):
        linear.torch_compile("cpu")
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", lambda: "chunks", raising=False)
    calls = []
    stand_in = recorded(calls, lambda hidden, weight: weight.sum())
    monkeypatch.setattr(F, "linear_cross_entropy", stand_in, raising=False)
    ((name, loss_function),) = linear.torch_chunked("cpu")
    loss_function(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2))
    assert (name, calls) == ("torch chunked", [{"options": "chunks"}])
    monkeypatch.delattr(F, "linear_cross_entropy")
    with pytest.raises(Unsupported, match=r"needs torch 2\.13"):
        linear.torch_chunked("cpu")


def breaks(request):
    raise RuntimeError("no such kernel\nand more")


def test_providers_are_selected_by_name():
    adapters = {"a": lambda _: ["1", "2"], "b": lambda _: ["3"], "c": breaks}
    assert gather(adapters, None, None) == (
        ["1", "2", "3"],
        {"c": "does not load: RuntimeError: no such kernel\nand more"},
    )
    assert gather(adapters, None, ["b", "a"]) == (["1", "2", "3"], {})
    assert gather(adapters, None, ["b"]) == (["3"], {})


def test_float16_has_no_fused_mode():
    found = providers.ours(Request(Case("own", (24, 50)), "float16", "cpu"))
    assert [provider.fused for provider in found] == [False, False]

"""Errors: each names argument, rule and value, and no tensor is written to."""

import contextlib
import re

import numpy as np
import pytest
import torch
from cases import make_logits
from modes import MODES

import fused_xent

INPUT, TARGET = torch.zeros(4, 9), torch.arange(4)
PROBABILITIES = torch.full((4, 9), 1 / 9)

# (arguments beyond a valid input and target, error, what its message says)
REFUSED = {
    "input not a tensor": ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
    "target not a tensor": ({"target": 3}, TypeError, "target must be a tensor, got int"),
    "target None": ({"target": None}, TypeError, "target must be a tensor, got NoneType"),
    "weight not a tensor": ({"weight": 1.0}, TypeError, "weight must be a tensor, got float"),
    "weight of probabilities not a tensor": (
        {"target": PROBABILITIES, "weight": [1.0] * 9},
        TypeError,
        "weight must be a tensor, got list",
    ),
    "integer input": (
        {"input": INPUT.long()},
        ValueError,
        "input must be .*got torch.int64",
    ),
    "complex input": ({"input": INPUT * 1j}, ValueError, "input must be .*got torch.complex64"),
    "scalar input": (
        {"input": torch.tensor(1.0), "target": torch.tensor(0)},
        ValueError,
        r"input must have a class dimension, got .*\(\)",
    ),
    "too few targets": (
        {"target": TARGET[1:]},
        ValueError,
        r"target must have shape \(4,\).*or \(4, 9\).*got \(3,\)",
    ),
    "targets of shape (N, 1)": (
        {"target": TARGET[:, None]},
        ValueError,
        r"target must have shape \(4,\).*got \(4, 1\)",
    ),
    "target without batch": (
        {"input": INPUT[0]},
        ValueError,
        r"target must have shape \(\).*or \(9,\).*got \(4,\)",
    ),
    "image target of other size": (
        {"input": torch.zeros(2, 3, 4, 5), "target": torch.zeros(2, 5, 4, dtype=torch.long)},
        ValueError,
        r"target must have shape \(2, 4, 5\).*got \(2, 5, 4\)",
    ),
    "floating class indices": (
        {"target": TARGET.float()},
        ValueError,
        "target must be int64, int32 or uint8.*got torch.float32",
    ),
    "int16 class indices": ({"target": TARGET.short()}, ValueError, "target must be.*torch.int16"),
    "bool class indices": ({"target": TARGET > 1}, ValueError, "target must be .*torch.bool"),
    "integer probabilities": (
        {"target": PROBABILITIES.long()},
        ValueError,
        r"target must .*floating-point.*\(4, 9\).*got torch.int64",
    ),
    "class ignored with probabilities": (
        {"target": PROBABILITIES, "ignore_index": 3},
        ValueError,
        "ignore_index must be negative.*got 3",
    ),
    "scale far above the cap": (
        {"softcap": 1e-20, "logit_scale": 1e20},
        ValueError,
        r"logit_scale / softcap must be in \[1e-30, 1e\+30\], got 1e\+20 / 1e-20",
    ),
    "cap below float32, not far below the scale": (
        {"softcap": 1e-31, "logit_scale": 1e-30},
        ValueError,
        r"^softcap must be in \[1e-30, 1e\+30\], got 1e-31",
    ),
    "bool for a number": (
        {"focal_gamma": True},
        TypeError,
        "focal_gamma must be a number, got bool",
    ),
    "bool for a normalizer": (
        {"normalizer": True},
        TypeError,
        "normalizer must be a number or a tensor, got bool",
    ),
    "weight of other size": (
        {"weight": torch.ones(4)},
        ValueError,
        r"weight must have shape \(9,\), got \(4,\)",
    ),
    "weight of two dimensions": (
        {"weight": torch.ones(9, 1)},
        ValueError,
        r"weight must have shape \(9,\), got \(9, 1\)",
    ),
    "integer weight": (
        {"weight": torch.ones(9).long()},
        ValueError,
        "weight must be float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "bool weight": ({"weight": torch.ones(9).bool()}, ValueError, "weight must .*got torch.bool"),
    "numpy's zero for a scale": (
        {"logit_scale": np.float16(0)},
        ValueError,
        r"logit_scale must be in \[1e-30, 1e\+30\], got 0.0",
    ),
    "numpy's infinity for a cap": ({"softcap": np.float16("inf")}, ValueError, "softcap .*got inf"),
    "numpy's NaN for a scale": ({"logit_scale": np.float16("nan")}, ValueError, "logit_.*got nan"),
    "tensor of True for a number": (
        {"focal_gamma": torch.tensor(True)},
        TypeError,
        "focal_gamma must be a number, got Tensor",
    ),
    "vector for a smoothing": (
        {"label_smoothing": torch.ones(2)},
        TypeError,
        "label_smoothing must be a number, got Tensor",
    ),
    "class indices with a dimension of 1": (
        {"input": torch.zeros(2, 9, 3, 4), "target": torch.zeros(2, 1, 3, 4).long()},
        ValueError,
        r"got \(2, 1, 3, 4\): target.squeeze\(1\) has the shape of class indices",
    ),
    "target of other device": (
        {"target": TARGET.to("meta")},
        ValueError,
        f"target must be on input's device {INPUT.device}, got meta",
    ),
    "weight of other device": (
        {"weight": torch.ones(9, device="meta")},
        ValueError,
        f"weight must be on input's device {INPUT.device}, got meta",
    ),
    "unknown reduction": (
        {"reduction": "average"},
        ValueError,
        "reduction must be 'none', 'mean' or 'sum', got 'average'",
    ),
    "reduction None": ({"reduction": None}, ValueError, "reduction must be .*got None"),
    "negative smoothing": (
        {"label_smoothing": -0.1},
        ValueError,
        r"label_smoothing must be in \[0, 1\], got -0.1",
    ),
    "smoothing above 1": ({"label_smoothing": 1.5}, ValueError, "label_smoothing must .*got 1.5"),
    "smoothing NaN": ({"label_smoothing": float("nan")}, ValueError, "label_smoothing .*got nan"),
    "str for a smoothing": (
        {"label_smoothing": "0.1"},
        TypeError,
        "label_smoothing must be a number, got str",
    ),
    "floating ignore_index": (
        {"ignore_index": 1.0},
        TypeError,
        "ignore_index must be an int, got float",
    ),
    "integer loss": ({"loss_dtype": torch.int64}, ValueError, "loss_dtype must .*got torch.int64"),
    "str for loss_dtype": (
        {"loss_dtype": "float32"},
        ValueError,
        "loss_dtype must be torch.float32, .*got 'float32'",
    ),
    "list of reductions": ({"reduction": ["mean"]}, ValueError, r"reduction must .*got \['mean'\]"),
    "str for a flag": ({"grad_in_forward": "no"}, TypeError, "grad_in_forward must be a bool"),
    "int for a flag": ({"inplace_backward": 1}, TypeError, "inplace_backward must be a bool"),
    "dim too high": ({"dim": 2}, IndexError, r"dim must be in \[-2, 2\), got 2"),
    "dim too low": ({"dim": -3}, IndexError, r"dim must be in \[-2, 2\), got -3"),
    "floating dim": ({"dim": 1.0}, TypeError, "dim must be an int, got float"),
    "list of token weights": ({"token_weight": [1]}, TypeError, "token_weight must be a tensor"),
    "token weight per class": (
        {"token_weight": torch.ones(9)},
        ValueError,
        r"token_weight must have the unreduced loss's shape \(4,\), got \(9,\)",
    ),
    "transposed token weights": (
        {
            "input": torch.randn(2, 9, 3),
            "target": TARGET.new_zeros(2, 3),
            "token_weight": torch.ones(3, 2),
        },
        ValueError,
        r"token_weight must have the unreduced loss's shape \(2, 3\), got \(3, 2\)",
    ),
    "complex token weights": (
        {"token_weight": torch.ones(4) * 1j},
        ValueError,
        "token_weight must hold real numbers, got torch.complex64",
    ),
    "token weight of other device": (
        {"token_weight": torch.ones(4, device="meta")},
        ValueError,
        f"token_weight must be on input's device {INPUT.device}, got meta",
    ),
    "infinite normalizer": ({"normalizer": float("inf")}, ValueError, "normalizer .*got inf"),
    "normalizer with reduction sum": (
        {"normalizer": 3, "reduction": "sum"},
        ValueError,
        "normalizer must be None unless reduction is 'mean', got 3 and 'sum'",
    ),
    "vector for a normalizer": (
        {"normalizer": torch.ones(4)},
        ValueError,
        r"normalizer must be a number or a tensor of one real number, got .*\(4,\)",
    ),
    "str for a normalizer": ({"normalizer": "3"}, TypeError, "normalizer must be .*got str"),
    **{
        f"{name} {value}": ({name: value}, ValueError, rf"{name} must be in \[.*\], got")
        for name, values in {
            "softcap": (0.0, -1.0, float("inf"), float("nan")),
            "logit_scale": (0.0, -1.0, float("inf"), float("nan")),
            "focal_gamma": (-0.5, float("inf"), float("nan")),
            "lse_square_scale": (-1e-4, float("inf"), float("nan")),
        }.items()
        for value in values
    },
    "str for a softcap": ({"softcap": "30"}, TypeError, "softcap must be a number, got str"),
    **{
        f"sparse {name}": (
            {name: values.to_sparse()},
            ValueError,
            f"{name} must be a dense tensor, got layout torch.sparse_coo",
        )
        for name, values in {
            "input": INPUT,
            "target": TARGET,
            "weight": torch.ones(9),
            "token_weight": torch.ones(4),
        }.items()
    },
    **{
        f"bool for {name}": ({name: True}, TypeError, f"{name} must be an int, got bool")
        for name in ("ignore_index", "dim")
    },
    "ignore_index just beyond int64": (
        {"ignore_index": 2**63},
        ValueError,
        f"ignore_index must fit in 64 bits, got {2**63}",
    ),
    "ignore_index just below int64": (
        {"ignore_index": -(2**63) - 1},
        ValueError,
        "ignore_index must fit in 64 bits, got -",
    ),
    "class 0 ignored with probabilities": (
        {"target": PROBABILITIES, "ignore_index": 0},
        ValueError,
        "ignore_index must be negative.*got 0",
    ),
    "integer weight beside probabilities": (
        {"target": PROBABILITIES, "weight": torch.ones(9).long()},
        ValueError,
        "weight must .*got torch.int64",
    ),
    "complex normalizer": (
        {"normalizer": torch.tensor(1j)},
        ValueError,
        r"normalizer must be .* of one real number, got torch.complex64 of shape \(\)",
    ),
    "NaN for a normalizer": (
        {"normalizer": float("nan")},
        ValueError,
        "normalizer must be finite, got nan",
    ),
    "normalizer of minus infinity": (
        {"normalizer": -float("inf")},
        ValueError,
        "normalizer must be finite, got -inf",
    ),
    "scale far below the cap": (
        {"softcap": 1e20, "logit_scale": 1e-20},
        ValueError,
        r"logit_scale / softcap must be in \[1e-30, 1e\+30\], got 1e-20 / 1e\+20 = 1e-40",
    ),
    **{
        f"{name} just outside": ({name: value}, ValueError, rf"{name} must be in \[.*\], got")
        for name, value in {
            "softcap": 0.9e-30,
            "logit_scale": 1.1e30,
            "focal_gamma": 1.1e30,
            "lse_square_scale": 1.1e30,
        }.items()
    },
    "both overwriting modes": (
        {"inplace_backward": True, "grad_in_forward": True},
        ValueError,
        "inplace_backward must be False where grad_in_forward is True",
    ),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_refused(refused):
    arguments, error, message = REFUSED[refused]
    with pytest.raises(error, match=message):
        fused_xent.cross_entropy(**{"input": INPUT, "target": TARGET, **arguments})


LEAF = torch.randn(4, 9, requires_grad=True)
SIX_DIMENSIONS = torch.randn(2, 9, 2, 2, 2, 2).permute(5, 1, 4, 3, 2, 0)
IN_FULL = {  # with the remedy
    "target must have shape (4,) (class indices) or (4, 9) (probabilities) for logits of shape "
    "(4, 9) with their classes in dimension 1, got (4, 3): for the probabilities of K classes in "
    "each row, pass their classes by name, as target_indices": {"target": torch.ones(4, 3)},
    "target must have shape (4,) (class indices) or (4, 9) (probabilities) for logits of shape "
    "(4, 9) with their classes in dimension 1, got (9,): if the classes are in another "
    "dimension, pass dim": {"target": torch.arange(9)},
    "target must have shape (9,) (class indices) or (4, 9) (probabilities) for logits of shape "
    "(4, 9) with their classes in dimension 0, got (4,): if the classes are in another "
    "dimension, pass dim": {"dim": -2},
    "target must hold floating-point probabilities where it has input's shape (4, 9), got "
    "torch.int64": {"target": PROBABILITIES.long()},
    "ignore_index must be negative (without effect) where target holds probabilities, got 3: to "
    "leave rows out, give them a token_weight of 0": {
        "target": PROBABILITIES,
        "ignore_index": 3,
    },
    "logit_scale / softcap must be in [1e-30, 1e+30], got 1e+20 / 1e-20 = 1e+40": {
        "softcap": 1e-20,
        "logit_scale": 1e20,
    },
    "normalizer must be a number or a tensor of one real number, got torch.float32 of shape (4,)": {
        "normalizer": torch.ones(4)
    },
    "normalizer must be None unless reduction is 'mean', got 3 and 'none'": {
        "normalizer": 3,
        "reduction": "none",
    },
    "loss_dtype must be torch.float32, torch.float64, torch.bfloat16 or torch.float16, got "
    "torch.int64": {"loss_dtype": torch.int64},
    "inplace_backward must be False where grad_in_forward is True, got True": {
        "inplace_backward": True,
        "grad_in_forward": True,
    },
    "inplace_backward must be False where input is a leaf of the graph, or a view of "
    "one: its values are the caller's, and would be overwritten by their gradient": {
        "input": LEAF,
        "inplace_backward": True,
    },
    "grad_in_forward must be False where several elements of input share memory, got strides "
    "(0, 1) of shape (4, 9): clone it": {
        "input": INPUT[:1].expand(4, 9),
        "grad_in_forward": True,
    },
    "inplace_backward must be False where input has more than 4 row dimensions that cannot be "
    f"merged, got strides {SIX_DIMENSIONS.stride()} of shape (2, 9, 2, 2, 2, 2): clone it": {
        "input": SIX_DIMENSIONS,
        "target": torch.zeros(2, 2, 2, 2, 2, dtype=torch.int64),
        "inplace_backward": True,
    },
    "grad_in_forward must be False where target requires a gradient: the logits that it would be "
    "computed from are overwritten; use inplace_backward": {
        "input": INPUT.clone().requires_grad_() * 1,
        "target": PROBABILITIES.clone().requires_grad_(),
        "grad_in_forward": True,
    },
    "grad_in_forward must be False for float16 input: what the forward writes, not yet multiplied "
    "by a loss scale, falls below float16's range; use inplace_backward": {
        "input": INPUT.half(),
        "grad_in_forward": True,
    },
    "grad_in_forward must be False where input is a view of a part of another tensor, got shape "
    "(4, 9) of (5, 9): use inplace_backward, or clone it": {
        "input": torch.zeros(5, 9)[1:],
        "grad_in_forward": True,
    },
}


@pytest.mark.parametrize("message", IN_FULL)
def test_messages_in_full(message):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        fused_xent.cross_entropy(**{"input": INPUT, "target": TARGET, **IN_FULL[message]})
    assert str(error.value) == message


TAKEN = {  # the limits of the allowed values
    "ignore_index": (-(2**63), 2**63 - 1),
    "dim": (-1, 1),
    "label_smoothing": (0, 1, 1.0),
    "lse_square_scale": (0, 1e30),
    "softcap": (1e-30, 9e29),
    "logit_scale": (1e-30, 1e30),
    "focal_gamma": (0, 1e30),
    "normalizer": (-3, 1e-300, torch.tensor(3), torch.tensor([3.0]), torch.ones(1, 1)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_accepted(name):
    """Limits are accepted, and so are numpy numbers."""
    for value in TAKEN[name]:
        loss = fused_xent.cross_entropy(INPUT, TARGET, **{name: value})
        assert not loss.isnan()
    value = TAKEN[name][0]
    number = np.int64(value) if isinstance(value, int) else np.float32(1)
    plain = fused_xent.cross_entropy(INPUT, TARGET, **{name: number.item()})
    assert torch.equal(fused_xent.cross_entropy(INPUT, TARGET, **{name: number}), plain)


@pytest.mark.parametrize("number", [np.float16(0.25), np.float64(0.25), torch.tensor(0.25)])
@pytest.mark.parametrize("name", ["label_smoothing", "softcap", "logit_scale", "focal_gamma"])
def test_numpy_numbers_and_scalar_tensors(name, number):
    """The value of a tensor is read in each call, since it may have changed."""
    loss = fused_xent.cross_entropy(INPUT, TARGET, **{name: number})
    assert torch.equal(loss, fused_xent.cross_entropy(INPUT, TARGET, **{name: 0.25}))
    if torch.is_tensor(number):
        changed = number.clone()
        fused_xent.cross_entropy(INPUT, TARGET, **{name: changed})
        loss = fused_xent.cross_entropy(INPUT, TARGET, **{name: changed.fill_(0.5)})
        assert torch.equal(loss, fused_xent.cross_entropy(INPUT, TARGET, **{name: 0.5}))


@pytest.mark.parametrize("name", ["logit_scale", "softcap", "focal_gamma", "label_smoothing"])
def test_options_that_require_a_gradient_are_refused(name):
    option = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match=f"{name} must be .* To learn a scale, multiply the logits"):
        fused_xent.cross_entropy(INPUT, TARGET, **{name: option})
    with torch.no_grad():
        loss = fused_xent.cross_entropy(INPUT, TARGET, **{name: option})
    assert torch.equal(loss, fused_xent.cross_entropy(INPUT, TARGET, **{name: 0.5}))


@pytest.mark.parametrize("name", ["ignore_index", "label_smoothing", "focal_gamma"])
def test_a_bool_is_refused_after_an_equal_number(name):
    """True == 1, but the cache of checked options must tell them apart."""
    for number in (1, 0):
        loss = fused_xent.cross_entropy(INPUT, TARGET, **{name: number, "reduction": "none"}).sum()
        assert not loss.isnan()
        with pytest.raises(TypeError, match=f"{name} must be an? (int|number), got bool"):
            fused_xent.cross_entropy(INPUT, TARGET, **{name: bool(number), "reduction": "none"})
    fused_xent.cross_entropy(INPUT, TARGET, inplace_backward=False)
    with pytest.raises(TypeError, match="inplace_backward must be a bool, got int"):
        fused_xent.cross_entropy(INPUT, TARGET, inplace_backward=0)


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), torch.tensor(0), torch.tensor([0.0])])
def test_a_mean_by_0_is_nan(zero):
    """A zero normalizer, number or tensor, makes loss and gradient NaN."""
    input = INPUT.clone().requires_grad_()
    loss = fused_xent.cross_entropy(input, TARGET, normalizer=zero)
    loss.backward()
    assert loss.isnan()
    assert input.grad[0].isnan().all()


@pytest.mark.parametrize("mode", ["inplace_backward", "grad_in_forward"])
def test_overwriting_modes_refuse_batched_gradients(mode):
    leaf = INPUT.clone().requires_grad_()
    loss = fused_xent.cross_entropy(leaf * 1, TARGET, **{mode: True})
    with pytest.raises(RuntimeError, match=f"{mode} must be False for is_grads_batched=True"):
        torch.autograd.grad(loss, leaf, torch.ones(2), is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*prototype")
def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(2, 9), torch.randn(3, 9)])
    with pytest.raises(ValueError, match=r"input must be a dense tensor, .*pass its values\(\)"):
        fused_xent.cross_entropy(nested, TARGET)


def test_objects_with_index_are_integers():
    """Any object with __index__ is accepted as an integer."""

    class Last:
        def __index__(self):
            return -1

    loss = fused_xent.cross_entropy(INPUT, TARGET, dim=Last(), ignore_index=Last())
    assert torch.equal(loss, fused_xent.cross_entropy(INPUT, TARGET, dim=-1, ignore_index=-1))


def test_ignore_index_beyond_int64():
    with pytest.raises((ValueError, RuntimeError), match="ignore_index"):
        fused_xent.cross_entropy(INPUT, TARGET, ignore_index=2**70)


OUT_OF_RANGE = {
    "too high": (9, torch.int64),
    "negative": (-1, torch.int64),
    "far too high": (2**40, torch.int64),
    "lowest": (-(2**63), torch.int64),
    "as int32": (9, torch.int32),
    "as negative int32": (-(2**31), torch.int32),
    "as uint8": (255, torch.uint8),
}


@pytest.mark.cpu("a GPU gives NaN for such rows: test_cuda.py")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", OUT_OF_RANGE)
@pytest.mark.parametrize(
    ("shape", "position", "text"),
    [
        ((9,), (), "()"),
        ((6, 9), (4,), "(4,)"),
        ((2, 9, 3, 4), (0, 2, 1), "(0, 2, 1)"),
        ((70000, 9), (66000,), "(66000,)"),
    ],
    ids=str,
)
def test_target_out_of_range(shape, position, text, bad, mode):
    """IndexError names value, position and range, before anything is written."""
    value, dtype = OUT_OF_RANGE[bad]
    leaf = make_logits(shape, torch.float32).requires_grad_()
    input = leaf * 1
    target = torch.zeros(input.select(min(1, input.dim() - 1), 0).shape, dtype=dtype)
    target[position] = value
    before, version = input.detach().clone(), input._version
    message = f"target must be in [0, 9) or equal to ignore_index (-100), got {value} at position"
    with pytest.raises(IndexError, match=re.escape(f"{message} {text}")):
        fused_xent.cross_entropy(input, target, **MODES[mode])
    assert torch.equal(input, before)
    assert input._version == version
    assert input.grad_fn is not None


@pytest.mark.cpu("a GPU gives NaN for such rows: test_cuda.py")
@pytest.mark.parametrize("option", [None, "weight", "token_weight"])
@pytest.mark.parametrize("later", [6, 17000, 19999])
@pytest.mark.parametrize("first", [0, 5, 8191, 8192, 19998])
def test_first_of_several_targets_out_of_range(first, later, option):
    """The first one is reported, in any block of rows; rows with token weight 0 are skipped."""
    target = torch.full((20000,), 3)
    target[max(first, later)] = -7
    target[first] = 9
    arguments = {}
    if option == "weight":
        arguments["weight"] = torch.rand(9)
    if option == "token_weight":
        target[:first] = 10
        arguments["token_weight"] = (torch.arange(20000) >= first).float()
    with pytest.raises(IndexError, match=rf"got 9 at position \({first},\)"):
        fused_xent.cross_entropy(torch.zeros(20000, 9), target, **arguments)


def test_target_changed_between_forward_and_backward():
    input, target = INPUT.clone().requires_grad_(), TARGET.clone()
    loss = fused_xent.cross_entropy(input, target)
    target[0] = 10**6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.cpu("a GPU gives NaN for such rows: test_cuda.py")
def test_target_changed_through_data():
    input, target = INPUT.clone().requires_grad_(), TARGET.clone()
    loss = fused_xent.cross_entropy(input, target)
    target.data[0] = 10**6
    with pytest.raises(IndexError, match="got 1000000"):
        loss.backward()
    assert input.grad is None


CALLS = {
    "index": {},
    "image": {"input": torch.randn(2, 9, 3), "target": torch.randint(0, 9, (2, 3))},
    "long": {"input": torch.randn(4, 20000)},
    "weighted": {"weight": torch.rand(9), "label_smoothing": 0.1},
    "probabilities": {"target": PROBABILITIES},
    "int32": {"target": TARGET.int()},
    "target out of range": {"target": TARGET + 7},
    "target of other shape": {"target": TARGET[1:]},
    "weight of other shape": {"weight": torch.rand(8)},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_arguments_are_never_modified(call, dtype, mode, device):
    """After success and failure. Overwriting modes get a clone, except under no_grad."""
    if call == "target out of range" and device != "cpu":
        pytest.skip("a GPU gives NaN for such rows: test_cuda.py")
    arguments = {"input": INPUT, "target": TARGET, **CALLS[call]}
    tensors = {name: x.clone() for name, x in arguments.items() if torch.is_tensor(x)}
    for name in ("input", "weight"):
        if name in tensors and tensors[name].dtype == torch.float32:
            tensors[name] = tensors[name].to(dtype)
    before = {name: (x.clone(), x._version) for name, x in tensors.items()}
    arguments.update(tensors)

    fails = pytest.raises((ValueError, IndexError)) if " of " in call else contextlib.nullcontext()
    with fails:
        fused_xent.cross_entropy(**arguments, **MODES[mode])
    leaf = tensors["input"].requires_grad_()
    with fails, torch.no_grad():
        fused_xent.cross_entropy(**arguments, **MODES[mode])
    arguments["input"] = leaf if mode == "default" else leaf.clone()
    with fails:
        fused_xent.cross_entropy(**arguments, **MODES[mode]).backward()
    for name, (values, version) in before.items():
        assert torch.equal(tensors[name], values), name
        assert tensors[name]._version == version, name


@pytest.mark.parametrize("mode", ["inplace", "fused"])
def test_overlapping_logits_are_refused(mode):
    """Logits that share an element need several gradients, but there is room for one."""
    leaf = torch.randn(9, requires_grad=True)
    for share in (lambda row: row.expand(4, 9), lambda row: row.as_strided((4, 6), (1, 1))):
        row = leaf * 1
        before = row.detach().clone()
        with pytest.raises((ValueError, RuntimeError), match="must"):
            fused_xent.cross_entropy(share(row), TARGET, **MODES[mode]).backward()
        assert torch.equal(row, before)
        assert leaf.grad is None


def test_grad_in_forward_refuses_float16():
    """Without a loss scale, most of the gradient would underflow to 0."""
    logits = torch.randn(4, 9, dtype=torch.float16, requires_grad=True) * 1
    before = logits.detach().clone()
    with pytest.raises(ValueError, match="grad_in_forward must be False"):
        fused_xent.cross_entropy(logits, TARGET, grad_in_forward=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("mode", ["inplace", "fused"])
def test_more_than_four_row_dimensions(mode):
    """The default mode copies such logits; overwriting modes refuse them."""
    leaf = torch.randn(2, 9, 2, 2, 2, 2, 2).double().requires_grad_()
    apart = (leaf * 1).permute(6, 1, 4, 2, 0, 5, 3)
    target = torch.randint(9, apart.select(1, 0).shape)
    with pytest.raises(RuntimeError, match=r"must be False .*more than 4 row dimensions.*strides"):
        fused_xent.cross_entropy(apart, target, **MODES[mode])
    soft = torch.rand(2, 9, 2, 2, 2, 2, 2).double().permute(3, 1, 6, 0, 5, 2, 4)
    for labels in (target, soft):
        loss = fused_xent.cross_entropy(apart, labels)
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        copy = apart.detach().contiguous().requires_grad_()
        expected = torch.nn.functional.cross_entropy(copy, labels)
        (expected,) = torch.autograd.grad(expected, copy)
        torch.testing.assert_close(gradient.permute(6, 1, 4, 2, 0, 5, 3), expected)
    together = (leaf * 1).flatten(2).mT  # the same elements, with two row dimensions
    target = target.flatten().new_zeros(2, 32)
    fused_xent.cross_entropy(together, target, dim=-1, **MODES[mode]).backward()


@pytest.mark.parametrize("mode", ["inplace", "fused"])
def test_four_row_dimensions(mode):
    """Four unmergeable dimensions work, beside size 1 dimensions and in any order."""
    leaf = torch.randn(2, 9, 2, 2, 2, 1).double().requires_grad_()
    for order in ((4, 1, 3, 0, 2, 5), (5, 1, 4, 3, 2, 0), (2, 1, 0, 5, 4, 3)):
        target = torch.randint(9, leaf.permute(order).select(1, 0).shape)
        logits = (leaf * 1).permute(order)
        loss = fused_xent.cross_entropy(logits, target, **MODES[mode])
        (gradient,) = torch.autograd.grad(loss, leaf)
        exact = torch.nn.functional.cross_entropy(leaf.permute(order), target)
        torch.testing.assert_close(gradient, torch.autograd.grad(exact, leaf)[0])


@pytest.mark.parametrize("mode", ["inplace", "fused"])
def test_five_row_dimensions_are_refused(mode):
    leaf = torch.randn(2, 9, 2, 2, 2, 2, requires_grad=True)
    logits = (leaf * 1).permute(5, 1, 4, 3, 2, 0)
    target = torch.randint(9, logits.select(1, 0).shape)
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match=r"must be False .*more than 4 row dimensions.*strides"):
        fused_xent.cross_entropy(logits, target, **MODES[mode])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("mode", ["inplace", "fused"])
def test_many_row_dimensions_that_merge(mode):
    """More than four dimensions work if they merge into one, or into two."""
    for order in ((0, 1, 2, 3, 4, 5, 6), (3, 4, 5, 0, 1, 2, 6)):
        leaf = torch.randn(2, 1, 2, 2, 3, 2, 9).double().requires_grad_()
        logits = (leaf * 1).permute(order)
        target = torch.randint(9, logits.shape[:-1])
        loss = fused_xent.cross_entropy(logits, target, dim=-1, **MODES[mode])
        (gradient,) = torch.autograd.grad(loss, leaf)
        flat = leaf.permute(order).flatten(0, -2)
        exact = torch.nn.functional.cross_entropy(flat, target.flatten())
        torch.testing.assert_close(gradient, torch.autograd.grad(exact, leaf)[0])


@pytest.mark.parametrize("mode", ["inplace", "fused"])
def test_a_dimension_of_size_1_shares_no_memory(mode):
    """Its stride does not matter; here it is 0, as after expand."""
    leaf = torch.randn(4, 9, requires_grad=True)
    logits = (leaf * 1).as_strided((4, 9, 1), (9, 1, 0))
    fused_xent.cross_entropy(logits, TARGET[:, None], **MODES[mode]).backward()
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(leaf, TARGET), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected)


def test_unknown_arguments():
    for function in (fused_xent.cross_entropy, fused_xent.cross_entropy_with_statistics):
        rule = rf"{function.__name__}\(\) got an unexpected keyword argument 'z_loss'"
        with pytest.raises(TypeError, match=rule):
            function(INPUT, TARGET, z_loss=1e-4)


@pytest.mark.parametrize("mode", ["inplace", "fused"])
def test_overwriting_modes_refuse_torch_func(mode):
    def loss(x):
        return fused_xent.cross_entropy(x * 1, TARGET, **MODES[mode])

    with pytest.raises(RuntimeError, match=r"must be False under the transforms of torch\.func"):
        torch.func.grad(loss)(INPUT)


@pytest.mark.parametrize("mode", ["inplace", "fused"])
def test_overwriting_modes_refuse_negated_views(mode):
    leaf = torch.randn(4, 9, requires_grad=True)
    view = torch.complex(leaf, leaf).conj().imag
    assert view.is_neg()
    with pytest.raises(RuntimeError, match="must be False where input is a view with its signs"):
        fused_xent.cross_entropy(view, TARGET, **MODES[mode])
    fused_xent.cross_entropy(view, TARGET).backward()
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(-leaf, TARGET), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected)

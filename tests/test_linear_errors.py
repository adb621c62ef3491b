"""Errors of linear_cross_entropy: each names the argument, the rule and the value."""

import pytest
import torch
from layers import C, fused, make_layer

import fused_xent
from fused_xent import linear_cross_entropy

X, W = torch.ones(4, 3), torch.ones(5, 3)
Y = torch.zeros(4, dtype=torch.int64)
HAS_CHUNK_SIZE = type("Options", (), {"batch_chunk_size": 3})
WRONG = {
    "input must be a tensor, got list": ([[1.0]], W, Y, {}),
    "input must be float32, float64, bfloat16 or float16, got torch.int64": (X.long(), W, Y, {}),
    "input must have a dimension of features, got a tensor of shape ()": (X[0, 0], W, Y, {}),
    "linear_weight must have shape (C, *D, H) for C classes and H features, got (3,)": (
        *(X, W[0], Y),
        {},
    ),
    "linear_weight must have input's 3 features in its last dimension, got shape (5, 2)": (
        *(X, W[:, :2], Y),
        {},
    ),
    "linear_weight must have input's dtype torch.float32, got torch.float64": (
        *(X, W.double(), Y),
        {},
    ),
    "linear_bias must have shape (5,), got (4,)": (X, W, Y, {"linear_bias": torch.ones(4)}),
    "linear_bias must have input's dtype torch.float32, got torch.bfloat16": (
        *(X, W, Y),
        {"linear_bias": torch.ones(5).bfloat16()},
    ),
    "target must have shape (4,) (class indices) or (4, 5) (probabilities)": (X, W, Y[:3], {}),
    "ignore_index must be None where target holds probabilities, got -1": (
        *(X, W, torch.ones(4, 5)),
        {"ignore_index": -1},
    ),
    "target must be in [0, 5) or equal to ignore_index (-100), got 5 at position (3,)": (
        *(X, W, Y + torch.tensor([0, 0, 0, 5])),
        {},
    ),
    "target must have shape (4,) (class indices) or (4, 5) (probabilities) for input's rows and "
    "linear_weight's classes, got (4, 3)": (X, W, torch.ones(4, 3), {}),
    "target must hold floating-point probabilities where it has the shape of input's rows and "
    "linear_weight's classes (4, 5), got torch.int64": (X, W, torch.ones(4, 5).long(), {}),
    "options must be None or a LinearCrossEntropyOptions, got type": (
        X,
        W,
        Y,
        {"options": HAS_CHUNK_SIZE},
    ),
    "weight must have shape (5,), got (3,)": (X, W, Y, {"weight": torch.ones(3)}),
    "shift must not be negative, got -1": (X, W, Y, {"shift": -1}),
    "shift must be an int, got float": (X, W, Y, {"shift": 1.0}),
    "shift must be 0 unless input has a dimension of positions": (X[0], W, Y[0], {"shift": 1}),
    "shift must be less than the length 4 of input's sequences, or no row has a label, got 4": (
        *(X, W, Y),
        {"shift": 4},
    ),
    "target must have shape (4,) (class indices) or (4, 5) (probabilities) for input's rows and "
    "linear_weight's classes, got (3,): with shift=1, pass the labels of all rows, not shifted": (
        *(X, W, Y[:3]),
        {"shift": 1},
    ),
    "target must have shape (4, 2) (class indices) or (4, 5, 2) (probabilities) for input's rows "
    "and linear_weight's classes, got (2, 2): with shift=2, pass the labels of all rows": (
        *(X, torch.ones(5, 2, 3), Y.view(2, 2)),
        {"shift": 2},
    ),
    "logits_dtype must be None, torch.float32 or input's dtype torch.float32, and not narrower "
    "than that, got torch.bfloat16": (X, W, Y, {"logits_dtype": torch.bfloat16}),
    "logits_dtype must be None, torch.float32 or input's dtype torch.bfloat16, and not narrower "
    "than that, got torch.float64": (
        *(X.bfloat16(), W.bfloat16(), Y),
        {"logits_dtype": torch.float64},
    ),
    "logits_dtype must be None, torch.float32 or input's dtype torch.float64, and not narrower "
    "than that, got torch.float32": (
        *(X.double(), W.double(), Y),
        {"logits_dtype": torch.float32},
    ),
    "linear_bias must have shape (5,), got (1,)": (X, W, Y, {"linear_bias": torch.ones(1)}),
    "linear_bias must be a dense tensor, got layout torch.sparse_coo": (
        *(X, W, Y),
        {"linear_bias": torch.ones(5).to_sparse()},
    ),
    "drop_ignored must be a bool, got int": (X, W, Y, {"drop_ignored": 1}),
    "chunk_rows must be at least 1, got 0": (X, W, Y, {"chunk_rows": 0}),
    "chunk_rows must be an int, got str": (X, W, Y, {"chunk_rows": "all"}),
    "options must be None or a LinearCrossEntropyOptions, got dict": (X, W, Y, {"options": {}}),
    "input must be a dense tensor, got layout torch.sparse_coo": (X.to_sparse(), W, Y, {}),
    "linear_weight must be a dense tensor, got layout torch.sparse_coo": (X, W.to_sparse(), Y, {}),
    "linear_weight must be a tensor, got list": (X, [[1.0]], Y, {}),
    "linear_bias must be a tensor, got float": (X, W, Y, {"linear_bias": 1.0}),
    f"linear_weight must be on input's device {X.device}, got meta": (X, W.to("meta"), Y, {}),
    f"linear_bias must be on input's device {X.device}, got meta": (
        *(X, W, Y),
        {"linear_bias": torch.ones(5, device="meta")},
    ),
    f"target must be on input's device {X.device}, got meta": (X, W, Y.to("meta"), {}),
    "target must be a tensor, got list": (X, W, [1], {}),
    "target must be int64, int32 or uint8 where it holds class indices": (X, W, Y.short(), {}),
    "ignore_index must be an int, got float": (X, W, Y, {"ignore_index": 1.0}),
    "softcap must be in [1e-30, 1e+30], got 0": (X, W, Y, {"softcap": 0}),
    "reduction must be 'none', 'mean' or 'sum', got 'avg'": (X, W, Y, {"reduction": "avg"}),
    "token_weight must have the unreduced loss's shape (4,), got (5,)": (
        *(X, W, Y),
        {"token_weight": torch.ones(5)},
    ),
}


@pytest.mark.cpu("a GPU raises no error for targets out of range; tensors are on the CPU")
@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    *arguments, options = WRONG[message]
    for function in (linear_cross_entropy, fused_xent.linear_cross_entropy_with_statistics):
        with pytest.raises((ValueError, TypeError, IndexError)) as error:
            function(*arguments, **options)
        assert str(error.value).startswith(message)


@pytest.mark.cpu("a GPU raises no error for targets out of range")
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("drop", [False, True])
def test_position_of_a_target_out_of_range(drop, shift):
    layer, target = make_layer(rows=(2, 4)), torch.randint(C, (2, 4))
    target[:, 0] = 99 if shift else 0  # not the label of any row
    target[1, 2] = C
    with pytest.raises(IndexError, match=rf"got {C} at position \(1, 2\)"):
        fused(layer, target, shift=shift, drop_ignored=drop)


def test_unknown_arguments_of_the_layer():
    for name in ("dim", "inplace_backward", "grad_in_forward", "size_average"):
        for function in (linear_cross_entropy, fused_xent.linear_cross_entropy_with_statistics):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                function(X, W, Y, **{name: True})

"""Forward-mode derivatives of compiled functions and of the operators: right, or refused."""

import pytest
import torch
import torch.nn.functional as F

import fused_xent

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")

TARGET = torch.tensor([1, 0, -100, 4])
INDEX = torch.tensor([[1, 3], [0, -100], [2, 2], [4, 0]])
P = torch.tensor([[0.5, 0.25], [1.0, 2.0], [0.125, 0.5], [0.75, 0.25]])


def dense(p, index):
    return torch.zeros(4, 5).scatter_add(1, index.clamp(min=0), p * (index >= 0))


def log_probs(x):
    return torch.where(INDEX < 0, 0, x.log_softmax(1).gather(1, INDEX.clamp(min=0)))


FUNCTIONS = {  # ours, and torch's
    "loss": (lambda x: fused_xent.cross_entropy(x, TARGET), lambda x: F.cross_entropy(x, TARGET)),
    "rows": (
        lambda x: fused_xent.cross_entropy(x, TARGET, reduction="none"),
        lambda x: F.cross_entropy(x, TARGET, reduction="none"),
    ),
    "sparse labels": (
        lambda x: fused_xent.cross_entropy(x, P, target_indices=INDEX),
        lambda x: F.cross_entropy(x, dense(P, INDEX)),
    ),
    "selected": (lambda x: fused_xent.selective_log_softmax(x, INDEX), log_probs),
    "linear": (
        lambda x: fused_xent.linear_cross_entropy(x, torch.eye(5), TARGET),
        lambda x: F.cross_entropy(x, TARGET),
    ),
}


def inputs():
    return torch.randn(4, 5), torch.randn(4, 5)


def jvp(function, x, tangent):
    return torch.func.jvp(function, (x,), (tangent,))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_a_compiled_function(name):
    ours, of_torch = FUNCTIONS[name]
    found = torch.compile(lambda x, v: jvp(ours, x, v), backend="aot_eager")(*(xv := inputs()))
    torch.testing.assert_close(found, jvp(of_torch, *xv))
    assert found[1].abs().max() > 0


ops = torch.ops.fused_xent
NONE = (None, None, None, 1)  # no weights and no normalizer; the dimension of the classes
OPERATORS = {  # an operator's differentiable result, and torch's
    "loss": (lambda x: ops.loss(x, TARGET, *NONE, 1), FUNCTIONS["loss"][1]),
    "forward": (
        lambda x: ops.forward(x, TARGET, *NONE, 2)[0],
        lambda x: 3 * FUNCTIONS["loss"][1](x),
    ),
    "forward_with_statistics": (
        lambda x: ops.forward_with_statistics(x, TARGET, *NONE, 0)[3],
        lambda x: x.logsumexp(1) * (TARGET >= 0),
    ),
    "selected_log_probs": (lambda x: ops.selected_log_probs(x, INDEX, 1, False)[0], log_probs),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_of_an_operator(name):
    ours, of_torch = OPERATORS[name]
    xv = inputs()
    found = jvp(ours, *xv)
    torch.testing.assert_close(found, jvp(of_torch, *xv))
    assert found[1].abs().max() > 0


def test_operators_that_overwrite_refuse_tangents():
    def overwrite(x):
        return ops.forward_backward_(x * 1, TARGET, *NONE, 1)

    with pytest.raises(RuntimeError, match="forward_backward_ has no forward-mode derivative"):
        jvp(overwrite, *inputs())

"""Overwritten logits with other uses: the right gradient, or an error."""

import pytest
import torch
import torch.nn.functional as F
from modes import MODES, N_ROWS, OVERWRITING_MODES, gradient_of, make_problem, refused_or_right

import fused_xent

by_mode = pytest.mark.parametrize("mode", OVERWRITING_MODES)


# Other uses of the logits, or of the memory around them. Each returns logits and a second loss.
def _before_by_value(leaf):
    logits = leaf * 1
    return logits, (logits**2).sum()


def _before_through_a_view(leaf):
    logits = leaf * 1
    return logits, (logits.view(-1)[::3] ** 2).sum()


def _before_through_the_base(leaf):
    memory = leaf * 1
    return memory.view(N_ROWS, -1), (memory**2).sum()


def _saved_by_the_operation_before(leaf):
    return leaf.exp(), 0.0


def _before_without_need_of_values(leaf):
    logits = leaf * 1
    return logits, logits.sum()


def _base_before_without_need_of_values(leaf):
    memory = leaf * 1
    return memory.view(N_ROWS, -1), 2 * memory.sum()


@by_mode
@pytest.mark.parametrize(
    "use",
    [
        _before_by_value,
        _before_through_a_view,
        _before_through_the_base,
        _saved_by_the_operation_before,
        _before_without_need_of_values,
        _base_before_without_need_of_values,
    ],
)
def test_logits_used_before_the_loss(use, mode):
    """autograd raises an error if the use needs the old values; else the gradient is right."""
    leaf, target = make_problem()
    logits, other = use(leaf)
    expected = gradient_of(lambda: F.cross_entropy(logits, target) + other, leaf)
    leaf.grad = None
    logits, other = use(leaf)
    total = fused_xent.cross_entropy(logits, target, **MODES[mode]) + other
    if "without" in use.__name__:
        total.backward()
        torch.testing.assert_close(leaf.grad, expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
        assert leaf.grad is None


AFTER = {
    "by value": lambda logits, memory: (logits**2).sum(),
    "without need of values": lambda logits, memory: logits.sum(),
    "through a view": lambda logits, memory: (logits[1:, ::2] * 3).sum(),
    "through the base": lambda logits, memory: (memory * 3).sum(),
    "through the base, by value": lambda logits, memory: memory.exp().sum(),
    "through another view of the base": lambda logits, memory: memory.view(-1)[::7].tanh().sum(),
    "another loss": lambda logits, memory: F.cross_entropy(logits, torch.arange(N_ROWS)),
    "another loss of ours": lambda logits, memory: fused_xent.cross_entropy(
        logits, torch.arange(N_ROWS)
    ),
    "the same loss again, inplace": lambda logits, memory: fused_xent.cross_entropy(
        logits, torch.arange(N_ROWS), inplace_backward=True
    ),
    "the same loss again, fused": lambda logits, memory: fused_xent.cross_entropy(
        logits, torch.arange(N_ROWS), grad_in_forward=True
    ),
}


@by_mode
@pytest.mark.parametrize("is_view", [False, True], ids=["whole", "view"])
@pytest.mark.parametrize("use", AFTER)
def test_logits_used_after_the_loss(use, is_view, mode):
    """Fused mode raises an error; inplace mode too, or its gradient is right."""
    leaf, target = make_problem()

    def total_of(loss_function, **kwargs):
        memory = leaf * 1
        logits = memory.view(N_ROWS, -1) if is_view else memory
        loss = loss_function(logits, target, **kwargs)
        return 2 * loss + AFTER[use](logits, memory)

    expected = gradient_of(lambda: total_of(F.cross_entropy), leaf)
    refusal = refused_or_right(
        lambda: total_of(fused_xent.cross_entropy, **MODES[mode]), leaf, expected
    )
    assert refusal or mode == "inplace"


PARTS = {
    "shifted tokens": lambda logits: logits[:-1],
    "rows with a step": lambda logits: logits[::2],
    "some classes": lambda logits: logits[:, 5:100],
    "classes with a step": lambda logits: logits[:, ::2],
}
SEVERAL_VIEWS = {
    "a chunk": lambda logits: logits.chunk(2)[1],
    "a part of a split": lambda logits: logits.split(2)[0],
    "an unbound row": lambda logits: logits.unbind()[2],
    "a view of a chunk": lambda logits: logits.chunk(2)[1].view(-1, logits.shape[-1]),
}


@by_mode
@pytest.mark.parametrize("view", SEVERAL_VIEWS)
def test_one_of_several_views(view, mode):
    """Refused in forward, since autograd would raise in backward; clone() helps, as advised."""
    leaf, _ = make_problem()
    logits = SEVERAL_VIEWS[view](leaf * 1)
    target = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    with pytest.raises(RuntimeError, match=r"must be False .*chunk, split or unbind.*: clone it"):
        fused_xent.cross_entropy(logits, target, **MODES[mode])
    expected = gradient_of(lambda: F.cross_entropy(SEVERAL_VIEWS[view](leaf * 1), target), leaf)
    loss = fused_xent.cross_entropy(logits.clone(), target, **MODES[mode])
    torch.testing.assert_close(gradient_of(lambda: loss, leaf), expected)


@pytest.mark.parametrize("part", PARTS)
def test_part_of_a_tensor_inplace(part):
    """Only the part is overwritten, and the other loss has the right gradient."""
    take = PARTS[part]
    leaf, _ = make_problem()
    target = torch.randint(0, take(leaf).shape[-1], take(leaf).shape[:-1])
    expected = gradient_of(lambda: F.cross_entropy(take(leaf * 1), target) + leaf.sum(), leaf)
    memory = leaf * 1
    loss = fused_xent.cross_entropy(take(memory), target, inplace_backward=True)
    torch.testing.assert_close(gradient_of(lambda: loss + leaf.sum(), leaf), expected)
    outside = torch.ones_like(memory, dtype=torch.bool)
    take(outside).fill_(False)
    assert torch.equal(memory[outside], leaf[outside])
    assert not torch.equal(memory, leaf)


@pytest.mark.parametrize("part", PARTS)
def test_grad_in_forward_refuses_parts_of_a_tensor(part):
    leaf, _ = make_problem()
    memory = leaf * 1
    rows = PARTS[part](memory)
    target = torch.zeros(rows.shape[:-1], dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"must be False .*part of another tensor"):
        fused_xent.cross_entropy(rows, target, grad_in_forward=True)
    assert torch.equal(memory, leaf)


@by_mode
def test_probabilities_that_share_the_logits_memory(mode):
    """Overwriting the logits would overwrite them too."""
    leaf, _ = make_problem()
    expected = gradient_of(lambda: F.cross_entropy(leaf * 1, leaf.detach().clone()), leaf)

    def model():
        logits = leaf * 1
        return fused_xent.cross_entropy(logits, logits.detach(), **MODES[mode])

    refused_or_right(model, leaf, expected)


def test_grad_in_forward_refuses_real_parts():
    """The base has as many elements as the logits, but another dtype."""
    leaf, target = make_problem()
    logits = torch.complex(leaf, 2 * leaf).real
    assert logits._base.numel() == logits.numel()
    with pytest.raises(RuntimeError, match=r"must be False .*part of another tensor"):
        fused_xent.cross_entropy(logits, target, grad_in_forward=True)
    expected = gradient_of(lambda: F.cross_entropy(leaf, target), leaf)
    actual = gradient_of(
        lambda: fused_xent.cross_entropy(
            torch.complex(leaf, 2 * leaf).real, target, inplace_backward=True
        ),
        leaf,
    )
    torch.testing.assert_close(actual, expected)


@by_mode
@pytest.mark.parametrize("soft", [False, True], ids=["index", "probabilities"])
def test_target_in_the_memory_of_the_logits(soft, mode):
    """The call is refused before anything is written."""
    leaf = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    logits = leaf * 1
    before = logits.detach().clone()
    target = logits.detach() if soft else logits.detach().view(torch.int64)[:, 0]
    with pytest.raises(RuntimeError, match=r"must be False where target shares input's memory"):
        fused_xent.cross_entropy(logits, target, **MODES[mode])
    assert torch.equal(logits, before)


def test_target_in_the_storage_of_the_logits():
    """Sharing a storage is enough to be refused, even without overlap."""
    memory = torch.randn(8, 9, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match=r"must be False where target shares input's memory"):
        fused_xent.cross_entropy(memory[:4], memory[4:].detach(), inplace_backward=True)


@by_mode
def test_view_of_an_unrecorded_tensor(mode):
    """As from DTensor.full_tensor: not a leaf, so the message must not call it one."""

    class Gathered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, local):
            return local.clone().view(N_ROWS, -1)

        @staticmethod
        def backward(ctx, grad):
            return grad

    leaf, target = make_problem()
    logits = Gathered.apply(leaf)
    with pytest.raises(RuntimeError, match=r"of a tensor that autograd has not .*: clone it"):
        fused_xent.cross_entropy(logits, target, **MODES[mode])
    expected = gradient_of(lambda: F.cross_entropy(leaf * 1, target), leaf)
    loss = fused_xent.cross_entropy(Gathered.apply(leaf).clone(), target, **MODES[mode])
    torch.testing.assert_close(gradient_of(lambda: loss, leaf), expected)


@pytest.mark.parametrize("mode", ["inplace_backward", "grad_in_forward"])
@pytest.mark.parametrize("name", ["weight", "token_weight", "normalizer"])
def test_other_tensors_in_the_memory_of_the_logits(name, mode):
    """Kernels may read them after the logits have been overwritten."""
    logits = torch.rand(4, 4, dtype=torch.float64)
    part = logits[0, 0] if name == "normalizer" else logits[0]
    message = f"{mode} must be False where {name} shares input's memory, .*: clone {name}"
    with pytest.raises(RuntimeError, match=message):
        fused_xent.cross_entropy(logits, torch.arange(4), **{name: part, mode: True})

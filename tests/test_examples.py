"""The examples run and learn, and their losses are those of unfused torch operations."""

import importlib.util
import sys
from pathlib import Path

import processes
import pytest
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).parents[1] / "examples"


def load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def check(loss, of_torch, tensors, wide):
    """Compare a loss and its gradients with those of torch in float64."""
    torch.testing.assert_close(loss.double(), of_torch, rtol=1e-5, atol=1e-6)
    found, wanted = gradients(loss, *tensors), gradients(of_torch, *wide)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-7)


def wide_copies(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


# ---- distillation ------------------------------------------------------------------------------


@pytest.fixture
def teacher_and_student():
    torch.manual_seed(0)
    teacher = (3 * torch.randn(6, 50)).log_softmax(-1)
    top_log_probs, top_indices = teacher.topk(7)
    top_indices[1, 4:] = top_indices[2, 1:] = -100
    top_log_probs[1, 4:], top_log_probs[2, 1:] = -torch.inf, 0
    return torch.randn(6, 50, requires_grad=True), top_log_probs, top_indices


def test_forward_kl_is_that_of_dense_probabilities(teacher_and_student):
    logits, top_log_probs, top_indices = teacher_and_student
    (wide,) = wide_copies(logits)
    is_padding = top_indices == -100
    top = top_log_probs.double().masked_fill(is_padding, -torch.inf).softmax(-1)
    dense = torch.zeros_like(wide).scatter_add(-1, top_indices.clamp(min=0), top)
    wanted = F.kl_div(wide.log_softmax(-1), dense, reduction="batchmean")
    loss = load("distill_topk").forward_kl(logits, top_log_probs, top_indices)
    check(loss, wanted, [logits], [wide])


def dense_divergence(kind, logits, top_log_probs, top_indices):
    """Return the divergence of distributions over the top-k and one class for all others."""
    is_padding = top_indices == -100
    q = top_log_probs.double().exp().masked_fill(is_padding, 0)
    p = logits.softmax(-1).gather(-1, top_indices.clamp(min=0)).masked_fill(is_padding, 0)
    q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (q, p))

    def kl(p, q):
        return torch.special.xlogy(p, p / torch.where(q == 0, 1, q)).sum(-1).mean()

    m = (p + q) / 2
    values = {"forward": kl(q, p), "reverse": kl(p, q), "jsd": (kl(p, m) + kl(q, m)) / 2}
    return values[kind]


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_divergences_with_a_tail(teacher_and_student, kind):
    logits, top_log_probs, top_indices = teacher_and_student
    (wide,) = wide_copies(logits)
    loss = load("distill_topk").divergence(kind, logits, top_log_probs, top_indices)
    check(loss, dense_divergence(kind, wide, top_log_probs, top_indices), [logits], [wide])


def test_students_learn():
    distill = load("distill_topk")
    for name, loss in distill.LOSSES.items():
        before, after = distill.train(loss)
        assert after < 0.5 * before, (name, before, after)


# ---- policies ------------------------------------------------------------------------------------


def test_policy_loss_is_the_unfused_one():
    grpo = load("grpo")
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    head = torch.randn(40, 8, requires_grad=True)
    tokens = torch.randint(40, (3, 5))
    tokens[0, 3:] = grpo.PADDING
    old, reference = (-4 + 0.3 * torch.randn(3, 5) for _ in range(2))
    batch = grpo.Batch(tokens, torch.tensor([1.0, -1.0, 0.5]), old, reference)

    wide_hidden, wide_head = wide_copies(hidden, head)
    all_log_probs = (wide_hidden @ wide_head.t() / grpo.TEMPERATURE).log_softmax(-1)
    mask = tokens != grpo.PADDING
    log_probs = all_log_probs.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    log_probs = torch.where(mask, log_probs, 0)
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
    ratio = (log_probs - old).exp()
    advantages = batch.advantages[:, None].double()
    clipped = ratio.clamp(1 - grpo.CLIP, 1 + grpo.CLIP)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    kl = (reference - log_probs).exp() - (reference - log_probs) - 1
    of_tokens = grpo.KL_WEIGHT * kl - gain - grpo.ENTROPY_WEIGHT * entropy
    wanted = of_tokens[mask].mean()
    loss = grpo.policy_loss(hidden, head, batch)
    check(loss, wanted, [hidden, head], [wide_hidden, wide_head])


def test_the_policy_learns():
    first, last = load("grpo").main()
    assert first < 0.6
    assert last > 0.8


def test_dpo_loss_is_the_unfused_one():
    dpo = load("dpo")
    torch.manual_seed(0)
    hidden = torch.randn(4, 5, 8, requires_grad=True)  # two chosen answers and two rejected ones
    head = torch.randn(40, 8, requires_grad=True)
    labels = torch.randint(40, (4, 5))
    labels[:, 0] = labels[1, 3:] = dpo.PADDING
    of_reference = torch.tensor([-14.0, -10.0, -15.0, -13.0])
    wide_hidden, wide_head = wide_copies(hidden, head)
    losses = F.cross_entropy(
        (wide_hidden @ wide_head.t()).transpose(1, 2), labels, reduction="none"
    )
    chosen, rejected = (-losses.sum(1) - of_reference).chunk(2)
    wanted = -F.logsigmoid(dpo.BETA * (chosen - rejected)).mean()
    found = dpo.sequence_log_probs(hidden, head, labels)
    loss = dpo.dpo_loss(*found.chunk(2), *of_reference.chunk(2))
    check(loss, wanted, [hidden, head], [wide_hidden, wide_head])


def test_preferences_are_learned():
    first, last = load("dpo").main()
    assert first < 0.7
    assert last > 0.95


# ---- segmentation --------------------------------------------------------------------------------


def test_segmentation_learns():
    before, after = load("segmentation").main()
    assert before < 0.5
    assert after > 0.8


def test_mean_iou():
    segmentation = load("segmentation")
    labels = torch.tensor([[[0, 0, 1], [1, 2, segmentation.UNLABELLED]]])
    found = torch.tensor([[[0, 1, 1], [1, 2, 2]]])
    logits = F.one_hot(found, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(segmentation.mean_iou(logits, labels), (1 / 2 + 2 / 3 + 1) / 3)
    images, labels = segmentation.make_batch(2)
    assert images.shape == (2, 1, 32, 32)
    assert set(labels.unique().tolist()) == {0, 1, 2, segmentation.UNLABELLED}


# ---- several processes ---------------------------------------------------------------------------


def check_tensor_parallel():
    """The curve is that of one process with torch's loss."""
    example = load("train_tp_fsdp")
    losses = example.main()
    torch.manual_seed(0)
    model = example.Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wanted = []
    for _ in losses:
        tokens = torch.randint(example.VOCAB_SIZE, (example.BATCH, 1))
        tokens = tokens + 3 * torch.arange(example.LENGTH + 1)
        labels = tokens[:, 1:] % example.VOCAB_SIZE
        is_padding = (torch.rand(example.BATCH, 1) < 0.5) & (torch.arange(example.LENGTH) >= 20)
        labels = labels.masked_fill(is_padding, example.PADDING)
        logits = model(tokens[:, :-1] % example.VOCAB_SIZE)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=1e-2, atol=1e-2)
    assert losses[-1] < losses[0] / 10


def test_tensor_parallel_and_fsdp():
    processes.run(check_tensor_parallel, 4)

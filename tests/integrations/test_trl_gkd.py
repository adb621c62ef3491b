"""GKDTrainer with apply(): the forward KL by fused_xent."""

import pytest
import torch
import trl_runs as runs
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer

from fused_xent.integrations._trl_gkd import fused_jsd_loss
from fused_xent.integrations.trl import apply

pytestmark = [
    pytest.mark.cpu("trains on the CPU"),
    pytest.mark.filterwarnings("ignore"),  # of the frameworks
]
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"


def gkd(folder, **options):
    tokenizer = runs.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(runs.sentences(24, 6, 1), runs.sentences(24, 8, 2), strict=True)
    ]
    options = {"beta": 0.0, "lmbda": 0.5, "max_new_tokens": 5, "max_length": 32, **options}
    return GKDTrainer(
        runs.make_model(),
        teacher_model=runs.make_model(seed=1),
        args=GKDConfig(**runs.base_options(folder, **options)),
        train_dataset=Dataset.from_dict({"messages": messages}),
        processing_class=tokenizer,
    )


def test_runs_are_equal(tmp_path):
    wanted = runs.train(gkd(tmp_path, gradient_accumulation_steps=2))
    trainer = gkd(tmp_path, gradient_accumulation_steps=2)
    handle = apply(trainer)
    assert "KL(teacher || student)" in str(handle)
    runs.assert_same(runs.train(trainer), wanted)
    handle.undo()
    assert "generalized_jsd_loss" not in vars(trainer)


def test_other_divergences_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer.beta must be 0 .*, got 0.5"):
        apply(gkd(tmp_path, beta=0.5))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(5)},
        {"reduction": "sum"},
        {"reduction": "mean"},
        {"reduction": "none"},
        {"beta": 0.5},
        {"beta": 1},
    ],
    ids=str,
)
def test_loss(masked, options):
    student, teacher = 3 * torch.randn(2, 5, 40), 3 * torch.randn(2, 5, 40)
    labels = torch.randint(40, (2, 5)) if masked else None
    if masked:
        labels[0, :3] = -100
    options = {"beta": 0, **options}
    of_trl = GKDTrainer.generalized_jsd_loss
    results = []
    for loss, dtype in ((of_trl, torch.float64), (fused_jsd_loss(of_trl), torch.float32)):
        leaf = student.to(dtype).requires_grad_()
        value = loss(leaf, teacher.to(dtype), labels, **options)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), leaf)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other.double(), one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_temperature_does_not_round(dtype):
    """16-bit logits are scaled in float32, those of the teacher too: equal models have KL 0."""
    teacher = (4 * torch.randn(16, 1000)).to(dtype)
    student = (teacher + 0.1 * torch.randn(16, 1000)).to(dtype)
    loss = fused_jsd_loss(None)
    assert abs(loss(teacher, teacher, beta=0, temperature=0.9).item()) < 1e-5
    results = []
    for function, of_dtype in ((loss, dtype), (GKDTrainer.generalized_jsd_loss, torch.float64)):
        leaf = student.to(of_dtype).requires_grad_()
        value = function(leaf, teacher.to(of_dtype), beta=0, temperature=0.9)
        results.append((value.double(), torch.autograd.grad(value, leaf)[0].double()))
    (value, gradient), (exact, exact_gradient) = results
    torch.testing.assert_close(value, exact, rtol=1e-3, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, exact_gradient, rtol=eps, atol=1e-5)


def test_nothing_to_learn_from():
    labels = torch.full((2, 5), -100)
    student = torch.randn(2, 5, 40, requires_grad=True)
    loss = fused_jsd_loss(None)(student, torch.randn(2, 5, 40), labels, beta=0)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_a_teacher_with_gradients():
    """TRL computes the loss then."""
    teacher = torch.randn(2, 5, 40, requires_grad=True)
    loss = fused_jsd_loss(GKDTrainer.generalized_jsd_loss)(torch.randn(2, 5, 40), teacher, beta=0)
    loss.backward()
    assert teacher.grad.any()

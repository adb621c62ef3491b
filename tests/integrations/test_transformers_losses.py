"""Losses and gradients of transformers models, against the same models without this package."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import LANGUAGE, N_CLASSES, batch, compare, make, step

from fused_xent.integrations.transformers import apply, compute_loss_func

pytestmark = pytest.mark.cpu("models are made on the CPU")
HEADS = pytest.mark.parametrize("fuse_head", [False, True])
IS_STATE = {"cache", "past_key_values"}  # objects that cannot be compared


@HEADS
@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name, fuse_head):
    model = make(name)
    inputs = batch()
    wanted = step(model, inputs)
    handle = apply(model, fuse_head=fuse_head)
    found = step(model, inputs)
    compare(found, wanted)
    output, right = found[0], wanted[0]
    assert type(output) is type(right)
    assert set(right) - set(output) == ({"logits"} if fuse_head else set())
    if not fuse_head:
        assert torch.equal(output.logits, right.logits)
    for key in set(output) - {"loss", *IS_STATE}:
        torch.testing.assert_close(output[key], right[key])
    assert (output.logits is None) == fuse_head
    handle.undo()
    again = step(model, inputs)
    assert torch.equal(again[0].logits, right.logits)
    assert torch.equal(again[0].loss, right.loss)


ARGUMENTS = {
    "int": {"num_items_in_batch": 5},
    "float": {"num_items_in_batch": torch.tensor(7.0)},
    "scalar": {"num_items_in_batch": torch.tensor(5)},
    "one number": {"num_items_in_batch": torch.tensor([5])},
    "matrix": {"num_items_in_batch": torch.tensor([[5.0]])},
    "shift_labels": {"shift_labels": torch.arange(18).view(2, 9)},
    "flat shift_labels": {"shift_labels": torch.arange(18)},
    "ignore_index": {"labels": torch.arange(18).view(2, 9) % 7, "ignore_index": 3},
    "logits_to_keep": {"logits_to_keep": 4, "labels": torch.arange(8).view(2, 4)},
    "hidden states": {"output_hidden_states": True, "output_attentions": True},
    "one token": {
        "input_ids": torch.tensor([[5]]),
        "labels": torch.tensor([[5]]),
        "num_items_in_batch": 3,
    },
    "all ignored": {"labels": torch.full((2, 9), -100), "num_items_in_batch": 3},
}


@HEADS
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, fuse_head):
    model = make("mixtral")
    inputs = {**batch(), **ARGUMENTS[case]}
    wanted = step(model, inputs)
    apply(model, fuse_head=fuse_head)
    found = step(model, inputs)
    assert found[0].loss.shape == wanted[0].loss.shape
    compare(found, wanted)


@HEADS
def test_no_labels_to_learn_from(fuse_head):
    model = make("llama")
    inputs = {**batch(), "labels": torch.full((2, 9), -100)}
    assert model(**inputs).loss.isnan()
    apply(model, fuse_head=fuse_head)
    assert model(**inputs).loss.isnan()


@HEADS
def test_embeddings_and_tuples(fuse_head):
    model = make("gemma2")
    inputs = {**batch(), "input_ids": None, "inputs_embeds": torch.randn(2, 9, 16)}
    inputs["return_dict"] = False
    wanted = step(model, inputs)
    apply(model, fuse_head=fuse_head)
    found = step(model, inputs)
    compare(found, wanted)
    assert len(found[0]) == len(wanted[0]) - fuse_head


@HEADS
def test_labels_without_a_row(fuse_head):
    model = make("llama")
    apply(model, fuse_head=fuse_head)
    with pytest.raises(ValueError, match=r"each of the 8 rows of logits, got 18: with logits_to_k"):
        model(**batch(), logits_to_keep=4)
    model(**batch(), logits_to_keep=4, shift_labels=torch.ones(2, 4, dtype=torch.int64))


def test_logits_of_another_size():
    model = make("llama")
    apply(model)
    model.config.vocab_size += 1
    with pytest.raises(ValueError, match="logits must have vocab_size = 132 classes, got shape"):
        model(**batch())


@HEADS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, fuse_head):
    model = make("gemma2")
    inputs = batch()
    with torch.autocast("cpu", dtype):
        wanted = step(model, inputs)
        apply(model, fuse_head=fuse_head)
        found = step(model, inputs)
    assert found[0].loss.dtype == torch.float32
    compare(found, wanted, 3e-2)


@HEADS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_of_models(dtype, fuse_head):
    model = make("granite").to(dtype)
    inputs = batch()
    wanted = step(model, inputs)
    apply(model, fuse_head=fuse_head)
    found = step(model, inputs)
    assert found[0].loss.dtype == torch.float32
    compare(found, wanted, 3e-2 if dtype == torch.bfloat16 else 1e-6)


@HEADS
def test_options(fuse_head):
    """Against the loss of the model's own logits, in float64."""
    model = make("gemma2")
    inputs = batch()
    logits = model(**inputs).logits[:, :-1].double()
    labels = inputs["labels"][:, 1:]
    lse = logits.logsumexp(-1)[labels != -100]
    wanted = F.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=0.1)
    wanted = wanted + 0.01 * lse.square().mean()
    of_head = {"drop_ignored": True, "chunk_rows": 4, "logits_dtype": torch.float32}
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.01}
    apply(model, fuse_head=fuse_head, **options, **(of_head if fuse_head else {}))
    found = model(**inputs).loss
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    model.eval()
    torch.testing.assert_close(model(**inputs).loss.double(), wanted, rtol=1e-5, atol=1e-6)


def test_inplace_backward():
    model = make("llama")
    inputs = batch()
    wanted = step(model, inputs)
    apply(model, inplace_backward=True)
    found = step(model, inputs)
    compare(found, wanted)
    assert not torch.equal(found[0].logits, wanted[0].logits)


CLASSES = {
    "sequences": torch.tensor([2, 1]),
    "tokens": torch.tensor([[2, 1, -100, 0, 1, 1, 2, 0, -100], [0, 2, 1, 0, 0, 2, 1, 1, 2]]),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classification(name):
    model = make(name)
    inputs = {**batch(), "labels": CLASSES[name]}
    wanted = step(model, inputs)
    apply(model)
    found = step(model, inputs)
    compare(found, wanted)
    assert "NllLoss" in str(wanted[0].loss.grad_fn)
    assert "NllLoss" not in str(found[0].loss.grad_fn)  # torch's own loss has not been used
    apply(model, label_smoothing=0.5)
    assert abs(step(model, inputs)[0].loss - wanted[0].loss) > 1e-3


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", None])
def test_other_problems_stay_those_of_transformers(problem):
    model = make("sequences", problem_type=problem)
    inputs = {**batch(), "labels": torch.rand(2, 3)}
    wanted = step(model, inputs)
    model.config.problem_type = problem
    apply(model)
    compare(step(model, inputs), wanted, 0)
    assert model.config.problem_type == (problem or "multi_label_classification")


# ---- compute_loss_func ---------------------------------------------------------------------------

OUTPUTS = ("llama", "bert", "bert_mlm", "bert_classes", "tokens", "t5", "mixtral")


@pytest.mark.parametrize("name", OUTPUTS)
def test_loss_of_outputs(name):
    """The loss of the model itself, from its logits; mixtral adds another loss to it."""
    model = make(name)
    inputs = batch()
    if "classes" in name or name == "tokens":
        inputs["labels"] = CLASSES["tokens" if name == "tokens" else "sequences"]
    if name == "mixtral":
        inputs["output_router_logits"] = False
    wanted = step(model, inputs)
    labels = inputs["labels"]
    is_shifted = name in ("llama", "bert", "mixtral")
    n_items = (labels[..., 1:] if is_shifted else labels).ne(-100).sum()
    for number in (None, n_items, n_items.item()):
        loss = compute_loss_func()(
            step_output := model(**inputs), labels, num_items_in_batch=number
        )
        torch.testing.assert_close(loss, wanted[0].loss)
        model.zero_grad()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        compare(({0: loss}, gradients), ({0: wanted[0].loss}, wanted[1]))
    half = compute_loss_func()(step_output, labels, num_items_in_batch=2 * n_items)
    torch.testing.assert_close(2 * half, wanted[0].loss)


@pytest.mark.parametrize("name", ["llama", "t5", "bert_mlm"])
def test_label_smoothing_of_outputs(name):
    model = make(name)
    inputs = batch()
    labels = inputs["labels"].clone()
    output = model(**inputs)
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.2)
    wanted = smoother(output, labels, shift_labels=name == "llama", num_items_in_batch=20)
    found = compute_loss_func(label_smoothing=0.2)(output, labels, num_items_in_batch=20)
    torch.testing.assert_close(found, wanted)


def test_options_of_outputs():
    model = make("llama")
    output = model(**batch())
    labels = torch.arange(18).view(2, 9)
    logits = output.logits.double().transpose(1, 2)
    aligned = compute_loss_func(shift=False, ignore_index=4)
    wanted = F.cross_entropy(logits, labels, ignore_index=4)
    torch.testing.assert_close(aligned(output, labels).double(), wanted)
    torch.testing.assert_close(aligned(output.to_tuple()[1:], labels).double(), wanted)
    focal = compute_loss_func(shift=False, focal_gamma=2.0, lse_square_scale=0.1)
    p = logits.softmax(1).gather(1, labels.unsqueeze(1))
    z_loss = 0.1 * logits.logsumexp(1).square()
    wanted = (-((1 - p) ** 2) * p.log()).mean() + z_loss.mean()
    torch.testing.assert_close(focal(output, labels).double(), wanted)


def test_errors_of_outputs():
    model = make("llama")
    output = model(**batch())
    loss = compute_loss_func()
    with pytest.raises(ValueError, match="labels must be a tensor, got None"):
        loss(output, None)
    with pytest.raises(ValueError, match=r"shift must be True .* for outputs of class tuple"):
        loss(output.to_tuple()[1:], torch.ones(2, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"class indices of at least 2 classes, got torch.float32"):
        loss(output, torch.ones(2, 9))
    with pytest.raises(TypeError, match="shift must be a bool or None, got int"):
        compute_loss_func(shift=1)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        compute_loss_func(label_smoothing=2.0)


def test_losses_can_be_copied():
    model = make("llama")
    apply(model)
    other = copy.deepcopy(model)
    assert other.loss_function is not model.loss_function
    assert other(**batch()).logits.shape[-1] == N_CLASSES

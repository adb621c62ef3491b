"""Runs of transformers.Trainer: the losses of every step are those without this package."""

import pytest
import torch
import transformers
from tiny_models import N_CLASSES, make

from fused_xent.integrations.transformers import apply, compute_loss_func

pytestmark = [
    pytest.mark.cpu("models are made on the CPU"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # no pinned memory without a GPU
]


def rows(name):
    """Return examples whose labels are ignored in different numbers."""
    torch.manual_seed(0)
    examples = []
    for i in range(24):
        tokens = torch.randint(3, N_CLASSES, (8,))
        labels = tokens.clone()
        labels[: i % 5] = -100
        if name == "bert_classes":
            labels = torch.tensor(i % 3)
        examples.append({"input_ids": tokens, "labels": labels})
        if name == "t5":  # Trainer keeps labels from the model, which makes these of them
            shifted = torch.nn.functional.pad(labels.clamp(min=0), (1, -1))
            examples[-1]["decoder_input_ids"] = shifted
    return examples


def train(name, folder, prepare=None, **arguments):
    """Train, and return the losses of the steps and of the evaluation."""
    model = make(name)
    if prepare is not None:
        prepare(model)
    of_trainer = {"compute_loss_func": arguments.pop("compute_loss_func", None)}
    settings = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 0,
            **arguments,
        }
    )
    examples = rows(name)
    trainer = transformers.Trainer(
        model, settings, train_dataset=examples, eval_dataset=examples, **of_trainer
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == settings.max_steps
    return torch.tensor([*losses, trainer.evaluate()["eval_loss"]])


SETTINGS = {
    "float32": {},
    "bfloat16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "mean of each batch": {"gradient_accumulation_steps": 1},
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_curves(name, case, tmp_path):
    given = SETTINGS[case]
    wanted = train(name, tmp_path, **given)
    tolerance = 2e-2 if case == "bfloat16" else 2e-4
    for fuse_head in (False, True):
        found = train(name, tmp_path, lambda m, f=fuse_head: apply(m, fuse_head=f), **given)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_evaluation_without_logits(tmp_path):
    wanted = train("llama", tmp_path, prediction_loss_only=True)
    found = train(
        "llama",
        tmp_path,
        lambda model: apply(model, fuse_head=True, skip_eval_logits=True),
        prediction_loss_only=True,
    )
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "t5", "bert_mlm"])
def test_curves_with_label_smoothing(name, tmp_path):
    wanted = train(name, tmp_path, label_smoothing_factor=0.2)
    found = train(name, tmp_path, compute_loss_func=compute_loss_func(label_smoothing=0.2))
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["t5", "bert_mlm", "bert_classes"])
def test_curves_of_models_with_a_loss_of_their_own(name, tmp_path):
    """Without accumulation: these models do not use the number of labels of all batches."""
    given = {"gradient_accumulation_steps": 1}
    wanted = train(name, tmp_path, **given)
    found = train(name, tmp_path, compute_loss_func=compute_loss_func(), **given)
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)

"""Trains a small Llama of Hugging Face transformers with this package's loss: one line.

``apply(model, fuse_head=True)`` makes the training steps of ``Trainer`` compute the loss from
hidden states: the logits, here of 20000 classes, are never stored. Evaluation and generation are
those of transformers. The model learns to count: each token is the one before it plus a step.

Run it: ``python examples/train_transformers.py``. It needs ``pip install transformers accelerate``,
downloads nothing, and takes about half a minute on a CPU.
"""

import tempfile

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fused_xent.integrations.transformers import apply

VOCAB_SIZE, LENGTH, N_SEQUENCES, PROMPT = 20000, 24, 256, 4


def make_model() -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_sequences() -> list[dict[str, Tensor]]:
    """Return sequences that count up; the loss leaves out their first tokens, a prompt."""
    first = torch.randint(3, 200, (N_SEQUENCES, 1))
    tokens = first + torch.arange(LENGTH)
    labels = tokens.clone()
    labels[:, :PROMPT] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def main(fuse_head: bool = True, max_steps: int = 60) -> list[float]:
    """Train; return the losses of the steps, and the loss of an evaluation."""
    model = make_model()
    handle = apply(model, fuse_head=fuse_head)  # the one line
    print(handle)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=max_steps,
            per_device_train_batch_size=16,
            learning_rate=0.01,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        sequences = make_sequences()
        trainer = Trainer(model, arguments, train_dataset=sequences, eval_dataset=sequences[:32])
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        evaluation = trainer.evaluate()["eval_loss"]
    print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} at last, {evaluation:.2f} evaluated")
    handle.undo()  # the model is one of transformers alone again
    return [*losses, evaluation]


if __name__ == "__main__":
    main()

"""Supervised fine-tuning by TRL's SFTTrainer, with its log-probabilities computed by fused_xent.

One line changes the trainer: ``apply(trainer)``. The losses and metrics that it logs stay the same.
The example makes a small random Llama, a tokenizer and a dataset of sums, "3 + 4 =" -> " 7", and
trains on the answers only. Nothing is downloaded.

Run it: ``pip install trl``, then ``python examples/sft_trl.py``. It takes half a minute on a CPU.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fused_xent.integrations.trl import apply

WORDS = ["<pad>", "<eos>", "<unk>", "+", "=", *map(str, range(19))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model() -> LlamaForCausalLM:
    """Return a small Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def make_sums() -> Dataset:
    """Return all sums of two digits: prompts, and completions that the loss is computed of."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    prompts, answers = [f"{a} + {b} =" for a, b in pairs], [f" {a + b}" for a, b in pairs]
    return Dataset.from_dict({"prompt": prompts, "completion": answers})


def main(uses_fused_xent: bool = True, steps: int = 120) -> list[dict[str, float]]:
    """Train; return what the trainer has logged."""
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=25,
            learning_rate=3e-3,
            logging_steps=5,
            completion_only_loss=True,
            max_length=16,
            bf16=False,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        trainer = SFTTrainer(
            make_model(), args, train_dataset=make_sums(), processing_class=make_tokenizer()
        )
        if uses_fused_xent:
            print(apply(trainer))
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in (logs[0], logs[-1]):
        accuracy = entry["mean_token_accuracy"]
        print(f"step {entry['step']}: loss {entry['loss']:.3f}, token accuracy {accuracy:.0%}")
    return logs


if __name__ == "__main__":
    main()

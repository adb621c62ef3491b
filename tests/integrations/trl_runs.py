"""Tiny models, a tokenizer and datasets for runs of TRL's trainers; nothing is downloaded."""

import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
VOCAB_SIZE = len(WORDS) + len(SPECIAL)

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 0.5}),
    "granite": (GraniteConfig, {"logits_scaling": 0.3}),
    "cohere": (CohereConfig, {"logit_scale": 3.0}),
}


def make_tokenizer():
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(kind="llama", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    cls, options = CONFIGS[kind]
    config = cls(**{**SIZES, **options}, initializer_range=0.2, attn_implementation="eager")
    return AutoModelForCausalLM.from_config(config).to(dtype)


def sentences(n, length, seed):
    numbers = random.Random(seed)
    return [
        " ".join(numbers.choice(WORDS[:12]) for _ in range(numbers.randint(3, length)))
        for _ in range(n)
    ]


def texts(n=24):
    return Dataset.from_dict({"text": sentences(n, 14, 0)})


def completions(n=24):
    pairs = {"prompt": sentences(n, 6, 1), "completion": [" " + x for x in sentences(n, 8, 2)]}
    return Dataset.from_dict(pairs)


def preferences(n=24):
    prompts, *answers = (sentences(n, 7, i) for i in (3, 4, 5))
    chosen, rejected = ([" " + text for text in texts] for texts in answers)
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def labelled(n=24):
    answers = {"prompt": sentences(n, 6, 6), "completion": [" " + x for x in sentences(n, 8, 7)]}
    return Dataset.from_dict({**answers, "label": [i % 2 == 0 for i in range(n)]})


def prompts(n=24):
    return Dataset.from_dict({"prompt": sentences(n, 6, 8)})


def base_options(folder, **options):
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 7,
        **options,
    }


IGNORED = ("runtime", "per_second", "step_time", "total_flos", "mfu")  # times


def train(trainer, evaluates=False):
    """Train; return the logs, without times, and the parameters."""
    trainer.train()
    if evaluates:
        trainer.evaluate()
    logs = [
        {key: value for key, value in entry.items() if not any(word in key for word in IGNORED)}
        for entry in trainer.state.log_history
    ]
    return logs, {name: x.detach().clone() for name, x in trainer.model.named_parameters()}


def assert_same(found, wanted, tolerance=2e-4):
    """Compare logs and parameters of two runs."""
    (logs, parameters), (wanted_logs, wanted_parameters) = found, wanted
    assert len(logs) == len(wanted_logs) > 0
    for entry, right in zip(logs, wanted_logs, strict=True):
        assert entry.keys() == right.keys()
        for key, value in right.items():
            message = f"{key}: {entry[key]} instead of {value}"
            assert abs(entry[key] - value) <= tolerance * (1 + abs(value)), message
    for name, value in wanted_parameters.items():
        error = (parameters[name] - value).abs().max().item()
        assert error <= 20 * tolerance * (1 + value.abs().max().item()), (name, error)

"""Tiny random models, made from configs."""

import torch
import transformers

transformers.logging.set_verbosity_error()

N_CLASSES = 131
SIZES = {
    "vocab_size": N_CLASSES,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
# Models that call loss_function: their class, config, and what differs from SIZES.
LANGUAGE = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"final_logit_softcapping": 1.5}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 3.0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.3}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "attn_pdrop": 0, "embd_pdrop": 0}
        | {"resid_pdrop": 0},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", {"num_key_value_heads": 2}),  # its head has a bias
    "bert": ("BertLMHeadModel", "BertConfig", {"is_decoder": True, **NO_DROPOUT}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4, **EXPERTS}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 8, **EXPERTS},
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {"lm_head_multiplier": 0.7, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8}
        | {"mamba_d_state": 4, "mamba_chunk_size": 8},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {"decoder_bias": True, "cls_token_id": 1, "sep_token_id": 2},
    ),
}
ALL = LANGUAGE | {
    "bert_mlm": ("BertForMaskedLM", "BertConfig", NO_DROPOUT),
    "bert_classes": (
        "BertForSequenceClassification",
        "BertConfig",
        {"num_labels": 3, **NO_DROPOUT},
    ),
    "sequences": ("LlamaForSequenceClassification", "LlamaConfig", {"num_labels": 3}),
    "tokens": (
        "LlamaForTokenClassification",
        "LlamaConfig",
        {"num_labels": 3, "classifier_dropout": 0.0},
    ),
    "questions": ("LlamaForQuestionAnswering", "LlamaConfig", {}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0},
    ),
}


def make(name, **others):
    """Return a model in training mode, with weights far enough from 0 for logits that differ."""
    model_name, config_name, differing = ALL[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**SIZES, **differing, **others})
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            elif parameter.shape == (N_CLASSES,):
                parameter.normal_()  # biases of heads
    model.tie_weights()
    return model.train()


def batch(n_rows=2, n_tokens=9):
    """Return tokens and labels, some of which are ignored."""
    tokens = torch.randint(3, N_CLASSES, (n_rows, n_tokens))
    labels = tokens.clone()
    labels[0, :3] = -100
    return {"input_ids": tokens, "labels": labels}


def step(model, inputs):
    """Return the output of a model, and the gradients of its parameters."""
    model.zero_grad()
    output = model(**inputs)
    loss = output[0]
    loss.sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return output, gradients


def compare(found, wanted, tolerance=1e-5):
    """Compare losses and gradients of two steps."""
    (output, gradients), (right, right_gradients) = found, wanted
    torch.testing.assert_close(output[0], right[0], rtol=tolerance, atol=tolerance)
    assert gradients.keys() == right_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in right_gradients.values())
    for name, gradient in gradients.items():
        # Some gradients are 0 but for rounding, such as those of keys' biases.
        scale = max(right_gradients[name].abs().max().item(), 1e-2 * largest)
        torch.testing.assert_close(
            gradient, right_gradients[name], rtol=0, atol=tolerance * scale, msg=name
        )

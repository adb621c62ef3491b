"""Runs of TRL's trainers with apply() have the logs and parameters of runs without."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import trl
import trl_runs as runs
from peft import LoraConfig, inject_adapter_in_model
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer import utils

from fused_xent.integrations import _trl_head
from fused_xent.integrations.trl import apply, is_applied

pytestmark = [
    pytest.mark.cpu("trains on the CPU"),
    pytest.mark.filterwarnings("ignore"),  # of the frameworks
]


def lora(**options):
    modules = {"target_modules": ["q_proj", "v_proj"], **options}
    return LoraConfig(r=4, task_type="CAUSAL_LM", **modules)


def sft(folder, kind="llama", peft=None, data=None, dtype=torch.float32, **options):
    data = runs.texts() if data is None else data
    return SFTTrainer(
        runs.make_model(kind, dtype=dtype),
        SFTConfig(**runs.base_options(folder, **{"max_length": 32, **options})),
        train_dataset=data,
        eval_dataset=data,
        processing_class=runs.make_tokenizer(),
        peft_config=peft,
    )


def dpo(folder, kind="llama", peft=None, **options):
    return DPOTrainer(
        runs.make_model(kind),
        ref_model=None if peft else runs.make_model(kind, seed=1),
        args=DPOConfig(**runs.base_options(folder, max_length=32, **options)),
        train_dataset=runs.preferences(),
        eval_dataset=runs.preferences(),
        processing_class=runs.make_tokenizer(),
        peft_config=peft,
    )


def kto(folder, kind="llama", **options):
    return KTOTrainer(
        runs.make_model(kind),
        ref_model=runs.make_model(kind, seed=1),
        args=KTOConfig(**runs.base_options(folder, max_length=32, **options)),
        train_dataset=runs.labelled(),
        processing_class=runs.make_tokenizer(),
    )


def reward(completions, **_):
    return [text.count("w1") + 0.1 * len(text) for text in completions]


def online(trainer, config):
    def make(folder, kind="llama", peft=None, **options):
        sizes = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "temperature": 0.7}
        runs.make_model(kind).save_pretrained(folder / kind)  # the reference is loaded from there
        return trainer(
            str(folder / kind),
            reward_funcs=reward,
            args=config(**runs.base_options(folder, **{**sizes, **options})),
            train_dataset=runs.prompts(),
            processing_class=runs.make_tokenizer(),
            peft_config=peft,
        )

    return make


grpo, rloo = online(GRPOTrainer, GRPOConfig), online(RLOOTrainer, RLOOConfig)
ANSWERS = {"data": runs.completions()}
CASES = {
    "sft": (sft, {}),
    "sft of completions": (sft, {**ANSWERS, "completion_only_loss": True}),
    "sft of all": (sft, {**ANSWERS, "completion_only_loss": False}),
    "sft, packing": (sft, {"packing": True}),
    "sft, padding-free": (sft, {"padding_free": True, "max_length": None}),
    "sft, dft": (sft, {"loss_type": "dft"}),
    "sft, label smoothing": (sft, {"label_smoothing_factor": 0.1}),
    "sft, accumulation": (sft, {**ANSWERS, "gradient_accumulation_steps": 3}),
    "sft, checkpointing": (sft, {"gradient_checkpointing": True}),
    "sft, LoRA": (sft, {"peft": lora()}),
    "sft, trained head": (sft, {"peft": lora(modules_to_save=["lm_head"])}),
    "sft, tied": (sft, {"kind": "qwen3"}),
    "sft, gemma2": (sft, {"kind": "gemma2"}),
    "sft, granite": (sft, {"kind": "granite"}),
    "sft, cohere": (sft, {"kind": "cohere"}),
    "dpo": (dpo, {}),
    "dpo, LoRA": (dpo, {"peft": lora()}),
    "dpo, weighting": (dpo, {"use_weighting": True, "gradient_accumulation_steps": 2}),
    "dpo, gemma2": (dpo, {"kind": "gemma2", "use_weighting": True}),
    "dpo, reference first": (dpo, {"precompute_ref_log_probs": True}),
    "kto": (kto, {"kind": "cohere"}),
    "grpo": (grpo, {"gradient_accumulation_steps": 2, "num_iterations": 2}),
    "grpo, entropy": (grpo, {"top_entropy_quantile": 0.5, "kind": "gemma2"}),
    "grpo, LoRA": (grpo, {"peft": lora()}),
    "grpo, float32 head": (grpo, {"cast_lm_head_to_fp32": True, "kind": "granite"}),
    "rloo": (rloo, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_runs_are_equal(name, tmp_path, few_logits_in_chunks):
    make, options = CASES[name]
    wanted = runs.train(make(tmp_path, **copy.deepcopy(options)), evaluates=make is sft)
    trainer = make(tmp_path, **copy.deepcopy(options))
    handle = apply(trainer)
    assert handle.done
    runs.assert_same(runs.train(trainer, evaluates=make is sft), wanted)


def test_mixed_precision(tmp_path):
    """Under autocast, log-probabilities come from the same rounded logits."""
    for make in (sft, dpo):
        wanted = runs.train(make(tmp_path, bf16=True))
        trainer = make(tmp_path, bf16=True)
        apply(trainer)
        runs.assert_same(runs.train(trainer), wanted, 1e-2)


def test_bfloat16_model(tmp_path):
    wanted = runs.train(sft(tmp_path, dtype=torch.bfloat16))
    trainer = sft(tmp_path, dtype=torch.bfloat16)
    apply(trainer)
    runs.assert_same(runs.train(trainer), wanted, 2e-2)


# ---- the values of the fused head ----------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(softcap, bias, few_logits_in_chunks):
    """Of all outputs, against float64, with a temperature and a scale."""
    hidden, weight = torch.randn(7, 5), torch.randn(50, 5)
    offset = torch.randn(50) if bias else None
    targets = torch.randint(50, (7,))
    scale, temperature = 1.5, 0.6

    def wanted(hidden, weight, offset):
        z = scale * F.linear(hidden, weight, offset)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        log_p = (z / temperature).log_softmax(-1)
        p, one = log_p.exp(), targets.unsqueeze(1)
        return (
            log_p.gather(1, one).squeeze(1),
            -(p * log_p).sum(1),
            p.square().sum(1).log(),
            (z / temperature).mean(1),
            log_p.argmax(1) == targets,
        )

    targets[0] = (
        wanted(hidden, weight, offset)[4].shape[0] and F.linear(hidden, weight, offset)[0].argmax()
    )
    leaves = [x.double().requires_grad_() for x in (hidden, weight, offset) if x is not None]
    right = wanted(*leaves, *[None] * (not bias))
    for outputs in (("log_probs",), ("log_probs", "entropy"), _trl_head.OUTPUTS):
        own = [x.clone().requires_grad_() for x in (hidden, weight, offset) if x is not None]
        of_layer = (*own, *[None] * (not bias))
        found = _trl_head.LogProbs.apply(
            *of_layer, targets, temperature, 8, softcap, scale, outputs
        )
        total, of_right = 0, 0
        for name, value, truth in zip(_trl_head.OUTPUTS, found, right, strict=True):
            assert (value is None) == (name not in outputs), name
            if value is None:
                continue
            torch.testing.assert_close(value.to(truth), truth, rtol=1e-5, atol=1e-5)
            assert value.requires_grad == (name in ("log_probs", "entropy")), name
            if value.requires_grad:
                factors = torch.linspace(1, 2, 7)
                total, of_right = (
                    total + (value * factors).sum(),
                    of_right + (truth * factors).sum(),
                )
        gradients = torch.autograd.grad(total, own)
        for one, other in zip(
            gradients, torch.autograd.grad(of_right, leaves, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_logits_under_autocast(dtype):
    """They are float32, as TRL's, and not rounded."""
    hidden, weight, offset = torch.randn(7, 64).to(dtype), torch.rand(50, 64), torch.rand(50)
    outputs = ("log_probs", "mean_logits")
    given = (torch.zeros(7, dtype=torch.int64), 0.5, 8, None, 1.0, outputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = _trl_head.LogProbs.apply(hidden, weight, offset, *given)[3]
    exact = 2 * F.linear(hidden.double(), weight.double(), offset.double()).mean(1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def fused(model, tokens, labels, **options):
    return model(input_ids=tokens, labels=labels, fused_lm_head=True, **options)


def test_labels(tmp_path):
    """Positions without a label are zero; none at all, and shift_labels, work as in TRL."""
    model = runs.make_model()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    trainer = sft(tmp_path)
    trainer.model = model
    tokens = torch.randint(runs.VOCAB_SIZE, (2, 9))
    labels = tokens.clone()
    labels[0, :4] = labels[1, 6:] = -100
    none = torch.full_like(labels, -100)
    calls = [{"labels": labels}, {"labels": none}, {"labels": None, "shift_labels": labels}]
    calls += [{"labels": labels, "num_items_in_batch": torch.tensor(5)}]
    results = []
    for is_ours in (False, True):
        if is_ours:
            apply(trainer)
        assert is_applied(model) == is_ours
        for call in calls:
            found = fused(model, tokens, **call)
            gradients = torch.autograd.grad(found.loss, list(model.parameters()))
            results.append([found.loss, found.log_probs, found.entropy, found.is_top1, *gradients])
    for one, other in zip(results[4:], results[:4], strict=True):
        for value, right in zip(one, other, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)


# ---- the handle ----------------------------------------------------------------------------------


def test_undo(tmp_path):
    trainer = dpo(tmp_path)
    forwards = trainer.model.forward, trainer.ref_model.forward
    own = utils._ChunkedLogProbFunction
    handle = apply(trainer)
    assert apply(trainer) is handle
    assert is_applied(trainer.model)
    assert is_applied(trainer.ref_model)
    assert utils._ChunkedLogProbFunction is own  # for everybody else
    other = sft(tmp_path)
    assert not is_applied(other.model)
    handle.undo()
    handle.undo()
    assert (trainer.model.forward, trainer.ref_model.forward) == forwards
    assert not is_applied(trainer.model)
    assert "undone" in str(handle)
    again = apply(trainer)
    assert again is not handle
    assert is_applied(trainer.model)


def test_one_model_in_both_roles(tmp_path):
    trainer = dpo(tmp_path)
    trainer.ref_model = trainer.model
    handle = apply(trainer)
    assert is_applied(trainer.model)
    assert apply(trainer) is handle
    handle.undo()
    assert not is_applied(trainer.model)


def test_another_model(tmp_path):
    """A trainer that gets another model needs another apply()."""
    trainer = sft(tmp_path)
    handle = apply(trainer)
    trainer.model = runs.make_model()
    utils.add_fused_lm_head(trainer.model)
    assert apply(trainer) is not handle
    assert is_applied(trainer.model)


def test_another_reference(tmp_path):
    """The model has had apply() before then; one undo() restores all."""
    for reference in (runs.make_model(), None):
        trainer = dpo(tmp_path)
        forwards = trainer.model.forward, trainer.ref_model.forward
        first, models = apply(trainer), (trainer.model, trainer.ref_model)
        if reference is not None:
            utils.add_fused_lm_head(reference)
        trainer.ref_model = reference
        handle = apply(trainer)
        assert handle is not first
        assert reference is None or is_applied(reference)
        handle.undo()
        assert tuple(model.forward for model in models) == forwards
        assert reference is None or not is_applied(reference)
        first.undo()


def test_undo_after_training_in_mixed_precision(tmp_path):
    """accelerate's forward lies over that of the model then, and stays."""
    trainer = dpo(tmp_path, bf16=True, max_steps=1)
    handle = apply(trainer)
    runs.train(trainer)
    for model in (trainer.model, trainer.ref_model):
        assert is_applied(model)
    tokens = torch.randint(runs.VOCAB_SIZE, (2, 5))
    ours = fused(trainer.model, tokens, tokens).log_probs
    handle.undo()
    for model in (trainer.model, trainer.ref_model):
        assert not is_applied(model)
        assert model._original_forward.__func__.__globals__ is vars(utils)
    theirs = fused(trainer.model, tokens, tokens)
    assert theirs.log_probs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs.log_probs, rtol=1e-2, atol=1e-2)
    apply(trainer)
    assert is_applied(trainer.model)
    torch.testing.assert_close(fused(trainer.model, tokens, tokens).log_probs, ours)


def test_undo_refuses_where_the_forward_was_replaced(tmp_path):
    trainer = sft(tmp_path)
    handle = apply(trainer)
    own = trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"forward of trainer.model must be TRL's fused head"):
        handle.undo()
    trainer.model.forward = own
    handle.undo()
    assert not is_applied(trainer.model)


def test_generation_and_logits_are_unchanged(tmp_path):
    trainer = sft(tmp_path)
    tokens = torch.randint(3, runs.VOCAB_SIZE, (2, 5))
    options = {"max_new_tokens": 5, "do_sample": False}
    before = trainer.model.generate(tokens, **options), trainer.model(tokens).logits
    apply(trainer)
    after = trainer.model.generate(tokens, **options), trainer.model(tokens).logits
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_text_of_the_handle(tmp_path):
    text = str(apply(grpo(tmp_path, kind="gemma2")))
    assert text.startswith(f"fused_xent in GRPOTrainer of TRL {trl.__version__}\n")
    options = "(temperature=0.7, softcap=0.5)"
    assert f"trainer.model: log_probs, entropy by linear_selective_log_softmax {options}" in text
    assert f"trainer.ref_model: log_probs by linear_selective_log_softmax {options}" in text
    assert "not fused: generation" in text
    text = str(apply(dpo(tmp_path, use_weighting=True)))
    assert "is_top1 by linear_cross_entropy_with_statistics; log_sum_sq_probs, mean_logits" in text
    text = str(apply(sft(tmp_path, label_smoothing_factor=0.1)))
    assert "not fused: the loss: label smoothing" in text

    class Own(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    trainer = sft(tmp_path)
    trainer.__class__ = Own
    assert "what Own.compute_loss computes without fused_lm_head" in str(apply(trainer))


# ---- what is refused -----------------------------------------------------------------------------


def refuse(trainer, error, message):
    models = [trainer.model] if hasattr(trainer, "model") else []
    with pytest.raises(error, match=message):
        apply(trainer)
    assert not any(is_applied(model) for model in models)


def test_liger(tmp_path):
    for option in ("use_liger_kernel", "use_liger_loss"):
        trainer = sft(tmp_path)
        setattr(trainer.args, option, True)
        refuse(trainer, ValueError, f"trainer.args.{option} must be False for fused_xent in SFT")


def test_other_trainers():
    def made(cls):
        return cls.__new__(cls)

    class Other:
        pass

    refuse(Other(), TypeError, "trainer must be one of SFTTrainer, .* of TRL, got Other")
    refuse(None, TypeError, "trainer must be one of SFTTrainer, .* of TRL, got NoneType")
    refuse(made(trl.RewardTrainer), TypeError, "got RewardTrainer, which does not train")
    refuse(made(trl.DistillationTrainer), TypeError, "its divergence compares all classes of two")
    from trl.experimental.gold import GOLDTrainer

    refuse(made(GOLDTrainer), TypeError, "must not be an experimental GOLDTrainer")


def test_heads(tmp_path):
    message = "head of trainer.model must be a torch.nn.Linear, got a "
    trainer = sft(tmp_path)
    inject_adapter_in_model(lora(target_modules=["lm_head"]), trainer.model)
    assert type(trainer.model.lm_head) is not torch.nn.Linear
    refuse(trainer, ValueError, message + "Linear:")
    trainer = sft(tmp_path)
    torch.nn.utils.parametrizations.weight_norm(trainer.model.lm_head)
    refuse(trainer, ValueError, message + "ParametrizedLinear")
    trainer = sft(tmp_path)
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    refuse(trainer, ValueError, message + "Linear with forward hooks")
    trainer = sft(tmp_path)
    trainer.model.lm_head.forward = lambda hidden: hidden @ trainer.model.lm_head.weight.T
    refuse(trainer, ValueError, message + "Linear with a forward of its own")


def test_logits_that_are_not_the_models_own(tmp_path):
    """A model whose forward scales its logits in a way that the fused head does not know."""
    trainer = sft(tmp_path)
    own = trainer.model.forward.__func__.__closure__
    original = dict(zip(trainer.model.forward.__func__.__code__.co_freevars, own, strict=True))
    forward = original["original_forward"].cell_contents

    def scaled(*args, **kwargs):
        results = forward(*args, **kwargs)
        results.logits = results.logits * 1.5
        return results

    original["original_forward"].cell_contents = scaled
    refuse(trainer, ValueError, "log-probabilities of trainer.model must be those of its logits")


def test_models_that_cannot_be_compared(tmp_path):
    trainer = sft(tmp_path)
    cells = trainer.model.forward.__func__
    original = dict(zip(cells.__code__.co_freevars, cells.__closure__, strict=True))

    def fails(*args, **kwargs):
        raise KeyError("pixel_values")

    original["original_forward"].cell_contents = fails
    assert "token ids alone (KeyError: 'pixel_values')" in str(apply(trainer))


def test_replaced_forward(tmp_path):
    trainer = sft(tmp_path)
    trainer.model.forward = lambda *args, **kwargs: None
    refuse(trainer, RuntimeError, "forward of trainer.model must be TRL's fused head, got <func")


def test_replaced_forward_in_mixed_precision(tmp_path):
    """A forward over that of accelerate is not lost, neither by apply() nor by undo()."""
    trainer = sft(tmp_path, bf16=True, max_steps=1)
    runs.train(trainer)
    own = trainer.model.forward

    @functools.wraps(own)
    def over(*args, **kwargs):
        return own(*args, **kwargs)

    trainer.model.forward = over
    refuse(trainer, RuntimeError, "forward of trainer.model must be TRL's fused head, got <func")
    assert trainer.model.forward is over
    trainer.model.forward = own
    handle = apply(trainer)
    trainer.model.forward = over
    with pytest.raises(RuntimeError, match=r"forward of trainer.model must be TRL's fused head"):
        handle.undo()
    assert trainer.model.forward is over


def test_other_release(tmp_path, monkeypatch):
    trainer = sft(tmp_path)
    monkeypatch.setattr("trl.kernels.chunked_logprob.OPTIONAL_OUTPUTS", ("entropy",))
    refuse(trainer, RuntimeError, f"does not know how TRL {trl.__version__} computes")

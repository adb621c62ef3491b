"""What apply changes of a model, what it refuses, and what works together with it."""

import copy
import inspect
import io
import pickle
import threading
import types

import peft
import pytest
import torch
import transformers
from tiny_models import LANGUAGE, N_CLASSES, SIZES, batch, compare, make, step

from fused_xent.integrations.transformers import apply

pytestmark = [
    pytest.mark.cpu("models are made on the CPU"),
    # transformers and PEFT call what they have deprecated, as does torch.ao.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
HEADS = pytest.mark.parametrize("fuse_head", [False, True])


def traces(model):
    """Return what apply leaves on a model."""
    return [
        *(name for name in model.__dict__ if "fused" in name or name == "forward"),
        *(name for name in ("_loss_function",) if name in model.__dict__),
        *(module for module in model.modules() if "forward" in module.__dict__),
        *(hook for module in model.modules() for hook in module._forward_pre_hooks),
    ]


# ---- handles -------------------------------------------------------------------------------------


@HEADS
def test_undo_restores_everything(fuse_head):
    model = make("gemma2")
    stock = model.loss_function
    handle = apply(model, fuse_head=fuse_head)
    assert traces(model)
    handle.undo()
    assert not traces(model)
    assert model.loss_function is stock
    handle.undo()
    assert str(handle) == "fused_xent in Gemma2ForCausalLM: undone"


def test_the_second_call_replaces_the_first():
    model = make("gemma2")
    inputs = batch()
    first = apply(model, fuse_head=True, label_smoothing=0.5)
    second = apply(model, fuse_head=True)
    found = step(model, inputs)
    first.undo()  # does nothing
    compare(step(model, inputs), found, 0)
    apply(model, fuse_head=False)
    assert model(**inputs).logits is not None
    second.undo()
    apply(model).undo()
    assert not traces(model)
    compare(found, step(model, inputs))


def test_a_failed_call_leaves_the_model_as_it_was():
    model = make("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="its head has a hook"):
        apply(model, fuse_head=True)
    assert not traces(model)


def test_undo_under_another_wrapper():
    """As Accelerate does for mixed precision."""
    model = make("llama")
    inputs = batch()
    handle = apply(model, fuse_head=True)
    of_apply = model.forward
    model.forward = lambda **given: of_apply(**given)
    assert "the forward has been replaced or wrapped since" in str(handle)
    assert model(**inputs).logits is None
    handle.undo()
    assert model(**inputs).logits is not None


def test_forward_that_was_replaced_before():
    model = make("llama")
    own = model.forward
    model.forward = replaced = lambda **given: own(**given)
    handle = apply(model, fuse_head=True)
    assert model(**batch()).logits is None
    handle.undo()
    assert model.forward is replaced


def test_texts():
    text = str(apply(make("gemma2"), label_smoothing=0.1))
    assert "ForCausalLMLoss by fused_xent.cross_entropy, label_smoothing=0.1" in text
    assert "not done: the head; logits are computed" in text
    model = make("gemma2")
    handle = apply(model, fuse_head=True, drop_ignored=True)
    text = str(handle)
    assert "1.5 tanh(x / 1.5)" in text
    assert "linear_cross_entropy, drop_ignored=True" in text
    assert "not done: evaluation, training mode without gradients" in text
    assert "in evaluation with labels too" in str(
        apply(make("llama"), fuse_head=True, skip_eval_logits=True)
    )
    model.loss_function = print
    assert "NOT IN USE" in str(handle)
    assert "regression and several labels" in str(apply(make("sequences")))
    assert str(apply(make("granite"), fuse_head=True).fused.tail) == "0.333333 x"


# ---- when the head is fused ----------------------------------------------------------------------


def test_evaluation_and_generation_are_unchanged():
    model = make("llama").eval()
    inputs = batch()
    wanted = model(**inputs)
    generated = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
    handle = apply(model, fuse_head=True)
    found = model(**inputs)
    assert torch.equal(found.logits, wanted.logits)
    torch.testing.assert_close(found.loss, wanted.loss)
    again = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
    assert torch.equal(again, generated)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, wanted.logits)
    assert torch.equal(model(inputs["input_ids"]).logits, wanted.logits)
    assert model(inputs["input_ids"], None, None, None, None, inputs["labels"]).logits is None
    model.eval()
    assert model(**inputs).logits is not None  # between two steps of training
    apply(model, fuse_head=True, skip_eval_logits=True)
    with torch.no_grad():
        found = model(**inputs)
    assert found.logits is None
    torch.testing.assert_close(found.loss, wanted.loss)
    assert model(inputs["input_ids"]).logits is not None
    handle.undo()


def test_no_logits_are_computed(monkeypatch):
    model = make("llama")
    apply(model, fuse_head=True)
    shapes = []
    linear = torch.nn.functional.linear

    def spy(input, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return linear(input, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    monkeypatch.setattr("fused_xent.linear.FEW_LOGITS", 0)
    model(**batch())
    assert shapes
    assert (N_CLASSES, 16) not in shapes


# ---- what is refused -----------------------------------------------------------------------------


def sub_class(model):
    model.lm_head.__class__ = type("Custom", (torch.nn.Linear,), {})


def quantized(model):
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear(16, N_CLASSES)


def integers(model):
    model.lm_head.weight = torch.nn.Parameter(torch.ones(N_CLASSES, 16, dtype=torch.int8), False)


def lora(model):
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))


def saved(model):
    peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )


def weight_norm(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


HEADS_REFUSED = {
    "pre-hook": (lambda m: m.lm_head.register_forward_pre_hook(lambda *_: None), "has a hook"),
    "hook": (lambda m: m.lm_head.register_forward_hook(lambda *_: None), "has a hook"),
    "backward": (lambda m: m.lm_head.register_full_backward_hook(lambda *_: None), "has a hook"),
    "backward pre-hook": (
        lambda m: m.lm_head.register_full_backward_pre_hook(lambda *_: None),
        "has a backward hook",
    ),
    "sub-class": (sub_class, "Custom, not a nn.Linear"),
    "quantized": (quantized, "dynamic.modules.linear.Linear, not a nn.Linear"),
    "integers": (integers, "the weight of its head is torch.int8"),
    "lora": (lora, "peft.tuners.lora.layer.Linear, not a nn.Linear"),
    "modules_to_save": (saved, "ModulesToSaveWrapper, not a nn.Linear"),
    "weight norm": (weight_norm, "ParametrizedLinear, not a nn.Linear"),
    "forward": (
        lambda m: setattr(m.lm_head, "forward", lambda x: x),
        "the forward of its head has been replaced",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch has deprecated quantized tensors
@pytest.mark.parametrize("case", HEADS_REFUSED)
def test_heads_that_are_not_linear(case):
    change, message = HEADS_REFUSED[case]
    model = make("llama")
    change(model)
    with pytest.raises(ValueError, match=f"must be False for this LlamaForCausalLM.*{message}"):
        apply(model, fuse_head=True)
    model = make("llama")
    apply(model, fuse_head=True)
    change(model)
    with pytest.raises(ValueError, match=message):
        model(**batch())


@pytest.mark.filterwarnings("ignore")
def test_lora_on_the_head_without_fusing_is_right():
    model = make("llama")
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    inputs = batch()
    wanted = step(model, inputs)
    apply(model)
    compare(step(model, inputs), wanted)


def altered(change):
    """Return a Llama whose forward changes its logits."""

    class Altered(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **given):
            output = self.model(input_ids=input_ids, **given)
            logits = change(self, self.lm_head(output.last_hidden_state))
            loss = None
            if labels is not None:
                loss = self.loss_function(logits, labels, logits.shape[-1])
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    model = make("llama")
    model.__class__ = Altered
    model.scale = torch.nn.Parameter(torch.ones(()))
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda self, x: x + 1, "more to its logits than a scale"),
        (lambda self, x: x - 1e-3 * x.square(), "more to its logits than a scale"),
        (lambda self, x: -x, "more to its logits than a scale"),
        (lambda self, x: x[..., :-1], "one tensor of logits of the head's shape"),
        (lambda self, x: x[:, :-1], "one tensor of logits of the head's shape"),
        (lambda self, x: x.index_fill(-1, torch.tensor([7]), -1e4), "more to its logits than a sc"),
        (lambda self, x: x * self.scale, "multiplies its logits by a parameter"),
        (lambda self, x: x.no_such_method(), "could not be tried with stand-ins"),
        (lambda self, x: 0 * x, "more to its logits than a scale"),
    ],
)
def test_models_that_change_their_logits(change, message):
    model = altered(change)
    with pytest.raises(ValueError, match=f"fuse_head must be False for Altered.*{message}"):
        apply(model, fuse_head=True)
    assert type(model.model) is transformers.LlamaModel
    assert type(model.lm_head) is torch.nn.Linear
    assert not traces(model)


@pytest.mark.parametrize(
    ("change", "scale", "softcap"),
    [
        (lambda self, x: 7 * torch.tanh(x.float() * 0.3 / 7), 0.3, 7),
        (lambda self, x: x.float() / 3, 1 / 3, None),
        (lambda self, x: 1000 * torch.tanh(x / 1000), 1, 1000),
    ],
)
def test_measured_scale_and_cap(change, scale, softcap):
    model = altered(change)
    inputs = batch()
    del inputs["labels"]
    inputs["labels"] = inputs["input_ids"]
    wanted = step(model, inputs)
    tail = apply(model, fuse_head=True).fused.tail
    assert tail.logit_scale == pytest.approx(scale, rel=1e-6)
    assert tail.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    compare(step(model, inputs), wanted)


def test_other_terms_of_the_loss_that_need_logits():
    config = transformers.BambaConfig(
        **SIZES,
        **{"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8},
        mamba_n_groups=1,
        attn_layer_indices=[0],
        z_loss_coefficient=0.1,
    )
    model = transformers.BambaForCausalLM(config).train()
    inputs = batch()
    wanted = step(model, inputs)
    with pytest.raises(ValueError, match="adds a term to its loss that depends on logits"):
        apply(model, fuse_head=True)
    assert not traces(model)
    apply(model)
    compare(step(model, inputs), wanted)


def test_a_model_without_a_module_of_its_base_model_prefix():
    config = transformers.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=24, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.Llama4ForCausalLM(config).train()
    inputs = batch()
    wanted = step(model, inputs)
    apply(model, fuse_head=True)
    found = step(model, inputs)
    assert found[0].logits is None
    compare(found, wanted)


def test_a_head_of_two_models():
    model, other = make("llama"), make("llama")
    other.lm_head = model.lm_head
    handle = apply(model, fuse_head=True)
    with pytest.raises(ValueError, match="its head is fused into another LlamaForCausalLM already"):
        apply(other, fuse_head=True)
    assert model(**batch()).logits is None
    assert other(**batch()).logits is not None
    handle.undo()
    apply(other, fuse_head=True)
    assert other(**batch()).logits is None


def test_another_loss_function_after_apply():
    """It gets the logits."""
    model = make("llama")
    handle = apply(model, fuse_head=True)
    model.loss_function = lambda logits, labels, **given: logits.logsumexp(-1).mean()
    found = model(**batch())
    assert "NOT IN USE" in str(handle)
    torch.testing.assert_close(found.loss, found.logits.logsumexp(-1).mean())


def test_changed_softcap():
    """Of the config, after apply."""
    model, inputs = make("gemma2"), batch()
    wanted = copy.deepcopy(model)
    apply(model, fuse_head=True)
    step(model, inputs)
    model.config.final_logit_softcapping = wanted.config.final_logit_softcapping = 0.5
    compare(step(model, inputs), step(wanted, inputs))
    model.config.final_logit_softcapping = 1e-40
    for _ in range(2):
        with pytest.raises(ValueError, match="fuse_head must be False for Gemma2ForCausalLM"):
            model(**inputs)


@HEADS
def test_another_vocab_size_after_apply(fuse_head):
    model = make("llama")
    apply(model, fuse_head=fuse_head)
    model.vocab_size = model.config.vocab_size = 150
    with pytest.raises(ValueError, match=r"vocab_size = 150 classes, got shape \(2, 9, 131\)"):
        model(**batch())


def test_a_call_of_another_thread():
    """While a fused call runs, those of other threads run the model's own forward."""
    model = make("llama")
    inputs = batch()
    wanted = model(**inputs)
    apply(model, fuse_head=True)
    found = []

    def call_in_thread(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: found.append(model(**inputs)))
            thread.start()
            thread.join()

    model.model.register_forward_hook(call_in_thread)
    outer = model(**inputs)
    torch.testing.assert_close(found[0].logits, wanted.logits)
    torch.testing.assert_close(found[0].loss, wanted.loss)
    assert outer.logits is None
    torch.testing.assert_close(outer.loss, wanted.loss)


def test_continued_sequences():
    """Labels for the tokens after those in a cache."""
    model = make("llama")
    inputs = batch()

    def continued():
        start = model(inputs["input_ids"][:, :4], use_cache=True).to_tuple()[1]
        rest = {"past_key_values": start} if "past_key_values" in parameters else {"cache": start}
        rest |= {name: tensor[:, 4:] for name, tensor in inputs.items()}
        return step(model, rest)

    parameters = inspect.signature(model.forward).parameters
    wanted = continued()
    apply(model, fuse_head=True)
    assert inspect.signature(model.forward).parameters == parameters
    found = continued()
    assert found[0].logits is None
    compare(found, wanted)


def test_calls_that_cannot_be_fused():
    inputs = batch()
    two = altered(lambda self, x: x if self.lm_head is None or x.shape[-1] else self.lm_head(x))
    apply(two, fuse_head=True)
    with pytest.raises(RuntimeError, match="Altered calls its head twice"):
        two(**inputs)
    rows = altered(lambda self, x: x if x.shape[-1] else x[:, :-1])
    apply(rows, fuse_head=True)
    with pytest.raises(RuntimeError, match=r"from \(2, 8\) rows of logits.*got \(2, 9\)"):
        rows(**inputs)
    model = make("llama")
    apply(model, fuse_head=True)
    forward = type(model).forward
    model.forward.inner = lambda labels, **given: forward(model, **given)
    with pytest.raises(RuntimeError, match="called its head, but not loss_function"):
        model(**inputs)
    model.forward.inner = None
    assert model(**inputs).logits is None  # nothing is left of the failed call


@pytest.mark.parametrize("name", ["bert_mlm", "bert_classes", "t5"])
def test_models_with_a_loss_of_their_own(name):
    with pytest.raises(ValueError, match=r"must call its loss_function.*compute_loss_func\(\)"):
        apply(make(name))


def test_losses_that_are_not_ours():
    with pytest.raises(ValueError, match="LlamaForQuestionAnswering with ForQuestionAnsweringLoss"):
        apply(make("questions"))
    model = make("llama")
    model.loss_function = print
    with pytest.raises(ValueError, match="LlamaForCausalLM with print: its loss has not been cha"):
        apply(model)
    assert model.loss_function is print
    with pytest.raises(ValueError, match="it has no output embeddings"):
        apply(make("tokens"), fuse_head=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"smoothing": 0.1}, TypeError, "must be one of label_smoothing.*: 'smoothing'"),
        ({"drop_ignored": True}, TypeError, "with fuse_head=True also drop_ignored"),
        ({"grad_in_forward": True}, TypeError, "'grad_in_forward'"),
        ({"label_smoothing": 2}, ValueError, r"label_smoothing must be in \[0, 1\], got 2"),
        ({"fuse_head": True, "chunk_rows": -1}, ValueError, "chunk_rows must be"),
        ({"fuse_head": 1}, TypeError, "fuse_head must be a bool, got int"),
        ({"skip_eval_logits": True}, ValueError, "must be False without fuse_head=True"),
    ],
)
def test_options_that_are_refused(options, error, message):
    model = make("llama")
    with pytest.raises(error, match=message):
        apply(model, **options)
    assert not traces(model)


def test_other_objects():
    for other in (torch.nn.Linear(2, 2), None, "llama"):
        with pytest.raises(TypeError, match="model must be a PreTrainedModel"):
            apply(other)


# ---- Liger-Kernel --------------------------------------------------------------------------------


def liger_forward(model):
    """Return a forward as Liger-Kernel sets it on an instance."""

    def forward(self, **given):
        return type(self).forward(self, **given)

    forward.__module__ = "liger_kernel.transformers.model.llama"
    return types.MethodType(forward, model)


@HEADS
def test_liger_kernel_is_refused(fuse_head, monkeypatch):
    inputs = batch()
    model = make("llama")
    model.forward = liger_forward(model)
    with pytest.raises(ValueError, match="the forward of this model is Liger-Kernel's: leave out"):
        apply(model, fuse_head=fuse_head)
    model = make("llama")
    handle = apply(model, fuse_head=fuse_head)
    model.forward = liger_forward(model)  # as Trainer does, after apply
    with pytest.raises(ValueError, match="must not use Liger-Kernel's loss together"):
        model(**inputs)
    handle.undo()
    model(**inputs)
    model = make("llama")
    monkeypatch.setattr(torch.nn.functional.cross_entropy, "__module__", "liger_kernel.x")
    with pytest.raises(ValueError, match=r"but torch.nn.functional.cross_entropy is Liger"):
        apply(model, fuse_head=fuse_head)


# ---- together with others ------------------------------------------------------------------------


def test_copies_and_pickles():
    model = make("gemma2")
    inputs = batch()
    apply(model, fuse_head=True)
    wanted = step(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()  # a copy that used this model would notice
    for other in copies:
        compare(step(other, inputs), wanted, 0)
        assert other(**inputs).logits is None
        apply(other).undo()
        assert not traces(other)


def test_save_and_load(tmp_path):
    model = make("qwen3")
    inputs = batch()
    apply(model, fuse_head=True)
    wanted = step(model, inputs)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path).train()
    assert not traces(other)
    compare(step(other, inputs), wanted)


@pytest.mark.parametrize("is_tied", [False, True])
def test_new_embeddings_after_apply(is_tied):
    """The head of a tied model is resized, and that of another one is replaced."""
    model = make("gemma2", tie_word_embeddings=is_tied)
    inputs = batch()
    handle = apply(model, fuse_head=True)
    old = model.lm_head
    model.resize_token_embeddings(150, mean_resizing=False)
    assert (model.lm_head is old) == is_tied
    inputs["labels"][1, 3] = 149
    found = step(model, inputs)
    assert found[0].logits is None
    assert ("forward" in old.__dict__) == is_tied
    handle.undo()
    compare(found, step(model, inputs))
    assert not traces(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = make("llama")
    inputs = batch()
    wanted = step(model, inputs)
    apply(model, fuse_head=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = step(model, inputs)
    assert found[0].logits is None
    compare(found, wanted)


@pytest.mark.parametrize("frozen", ["head", "backbone"])
def test_frozen_parts(frozen):
    model = make("llama")
    (model.lm_head if frozen == "head" else model.model).requires_grad_(False)
    inputs = batch()
    wanted = step(model, inputs)
    apply(model, fuse_head=True)
    compare(step(model, inputs), wanted)


@pytest.mark.parametrize("is_first", [False, True])
def test_lora_elsewhere(is_first):
    inputs = batch()
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=2)
    model = peft.get_peft_model(make("llama"), config)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(p) for name, p in model.named_parameters() if "lora" in name}
    model.load_state_dict(weights, strict=False)
    wanted = step(model, inputs)
    other = make("llama")
    handle = apply(other, fuse_head=True) if is_first else None
    other = peft.get_peft_model(other, config)
    handle = handle or apply(other, fuse_head=True)
    other.load_state_dict(weights, strict=False)
    found = step(other.train(), inputs)
    assert found[0].logits is None
    compare(found, wanted)
    handle.undo()
    assert other(**inputs).logits is not None


@HEADS
@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_torch_compile(is_first, fuse_head):
    torch._dynamo.reset()
    model = make("gemma2")
    inputs = batch()
    wanted = step(model, inputs)
    if is_first:
        apply(model, fuse_head=fuse_head)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="aot_eager")
        compare((*step(compiled, inputs)[0:1], wanted[1]), wanted)
        apply(compiled, fuse_head=fuse_head)
    found = step(compiled, inputs)
    assert (found[0].logits is None) == fuse_head
    gradients = {name.removeprefix("_orig_mod."): g for name, g in found[1].items()}
    compare((found[0], gradients), wanted)
    n_items = torch.tensor(20)
    found = compiled(**inputs, num_items_in_batch=n_items)
    torch.testing.assert_close(found.loss, wanted[0].loss * 14 / 20)


@pytest.mark.filterwarnings("ignore")
def test_a_hook_between_apply_and_torch_compile():
    torch._dynamo.reset()
    model = make("llama")
    apply(model, fuse_head=True)
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(ValueError, match="its head has a hook"):
        compiled(**batch())


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_check_changes_nothing(name):
    """Neither random numbers nor modules nor modes."""
    model = make(name)
    model.eval()
    modules = [id(module) for module in model.modules()]
    state = torch.random.get_rng_state()
    apply(model, fuse_head=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert [id(module) for module in model.modules()] == modules
    assert not any(module.training for module in model.modules())

"""Faults of fused_xent/integrations, and the tests that find them."""

from .fault import Fault

TRANSFORMERS = "fused_xent/integrations/transformers.py"
LOSSES = "fused_xent/integrations/_transformers_losses.py"
HEAD = "fused_xent/integrations/_transformers_head.py"
TAIL = "fused_xent/integrations/_transformers_tail.py"
OF_LOSSES = "tests/integrations/test_transformers_losses.py::"
OF_APPLY = "tests/integrations/test_transformers_apply.py::"
ARGUMENTS = (f"{OF_LOSSES}test_arguments",)
MODELS = (f"{OF_LOSSES}test_language_models",)
CHANGED = (f"{OF_APPLY}test_models_that_change_their_logits",)
LINEAR = (f"{OF_APPLY}test_heads_that_are_not_linear",)
EVALUATION = (f"{OF_APPLY}test_evaluation_and_generation_are_unchanged",)
CALLS = (f"{OF_APPLY}test_calls_that_cannot_be_fused",)

FAULTS = {
    "a benchmark takes NaN for right": Fault(
        "bench/transformers.py",
        "if not abs(found - wanted) <= tolerance * abs(wanted):",
        "if abs(found - wanted) > tolerance * abs(wanted):",
        ("tests/integrations/test_transformers_bench.py::test_wrong_losses_are_told",),
    ),
    "a changed softcap is not seen": Fault(
        HEAD,
        "self.numbers == numbers_of(self.model)",
        "True",
        (f"{OF_APPLY}test_changed_softcap",),
    ),
    "labels are not shifted": Fault(
        LOSSES, "value=ignore_index)[..., 1:]", "value=ignore_index)[..., :-1]", MODELS
    ),
    "num_items_in_batch is not used": Fault(
        LOSSES, "        normalizer=num_items,\n", "        normalizer=None,\n", ARGUMENTS
    ),
    "a loss has no shape of its divisor": Fault(
        LOSSES,
        "loss.reshape(num_items.shape) if isinstance(num_items, Tensor) else loss",
        "loss",
        ARGUMENTS,
    ),
    "ignore_index is always -100": Fault(
        LOSSES, "        ignore_index=ignore_index,\n", "        ignore_index=-100,\n", ARGUMENTS
    ),
    "the loss has the dtype of the logits": Fault(
        LOSSES,
        "loss_dtype: torch.dtype | None = torch.float32,",
        "loss_dtype: torch.dtype | None = None,",
        (f"{OF_LOSSES}test_dtypes_of_models",),
    ),
    "rows and labels are not counted": Fault(
        LOSSES,
        "    if n_rows != n_labels:\n",
        "    if False:\n",
        (f"{OF_LOSSES}test_labels_without_a_row",),
    ),
    "vocab_size is not compared": Fault(
        LOSSES,
        "        if vocab_size not in (n_classes, logits.shape[-1]):",
        "        if False:",
        (f"{OF_LOSSES}test_logits_of_another_size",),
    ),
    "several labels are taken for one": Fault(
        LOSSES,
        'if config.problem_type != "single_label_classification":',
        'if config.problem_type == "regression":',
        (f"{OF_LOSSES}test_other_problems_stay_those_of_transformers",),
    ),
    "the scale is not used": Fault(
        HEAD, "logit_scale=self.tail.logit_scale", "logit_scale=1.0", MODELS
    ),
    "the cap is not used": Fault(HEAD, "softcap=self.tail.softcap,", "softcap=None,", MODELS),
    "the bias is not used": Fault(HEAD, "linear_bias=bias,", "linear_bias=None,", MODELS),
    "fused num_items_in_batch is not used": Fault(
        HEAD, "normalizer=num_items,", "normalizer=None,", ARGUMENTS
    ),
    "fused labels are shifted twice": Fault(
        HEAD, "labels, shift = next_labels(labels, ignore_index), 0", "labels = labels", ARGUMENTS
    ),
    "placeholders stay in outputs": Fault(
        HEAD,
        "isinstance(value, Tensor) and value.shape[-1:] == (0,)",
        "False",
        MODELS,
    ),
    "evaluation is fused": Fault(
        HEAD,
        "torch.is_grad_enabled() if self.model.training else self.in_evaluation",
        "True",
        EVALUATION,
    ),
    "training without gradients is fused": Fault(
        HEAD,
        "return torch.is_grad_enabled() if self.model",
        "return True if self.model",
        EVALUATION,
    ),
    "labels by position are not seen": Fault(
        HEAD, "            labels = args[self.labels_at]\n", "            pass\n", EVALUATION
    ),
    "hooks of a head are not seen": Fault(
        HEAD, "if not _is_of_fsdp(getattr(inspect", "if False and (getattr(inspect", LINEAR
    ),
    "sub-classes of Linear are taken": Fault(
        HEAD,
        "if type(head) is not nn.Linear and not",
        "if not isinstance(head, nn.Linear) and not",
        LINEAR,
    ),
    "a head is checked once": Fault(
        HEAD,
        "if head is self.module and is_same and not why_not_linear(head):",
        "if head is self.module:",
        LINEAR,
    ),
    "the tail is not compared": Fault(
        TAIL,
        "return tail if torch.allclose(found, tail(probe), rtol=1e-5, atol=1e-5) else None",
        "return tail",
        CHANGED,
    ),
    "a learned scale is taken": Fault(
        TAIL, "        if found.requires_grad:\n", "        if False:\n", CHANGED
    ),
    "stand-ins stay in a model": Fault(
        TAIL, "            parent._modules[name] = module\n", "            pass\n", CHANGED
    ),
    "a head may be called twice": Fault(
        HEAD, "        if self.hidden is not None:\n", "        if False:\n", CALLS
    ),
    "rows of other logits are taken": Fault(
        HEAD,
        "if hidden is None or logits.shape[:-1] != hidden.shape[:-1]:",
        "if hidden is None:",
        CALLS,
    ),
    "a loss of another function is taken": Fault(
        HEAD, "        if not self.is_computed:\n", "        if False:\n", CALLS
    ),
    "undo leaves the head": Fault(
        HEAD,
        '            del self.module.__dict__["forward"]\n',
        "            pass\n",
        (f"{OF_APPLY}test_undo_restores_everything",),
    ),
    "a head of two models is taken": Fault(
        HEAD,
        "if isinstance(forward, HeadForward) and forward.fused is not self:",
        "if False:",
        (f"{OF_APPLY}test_a_head_of_two_models",),
    ),
    "undo does not switch off": Fault(
        HEAD,
        "        self.is_enabled = False\n",
        "        pass\n",
        (f"{OF_APPLY}test_undo_under_another_wrapper",),
    ),
    "a second call adds to the first": Fault(
        TRANSFORMERS,
        "        previous.undo()\n",
        "        pass\n",
        (f"{OF_APPLY}test_the_second_call_replaces_the_first",),
    ),
    "a model that does not call its loss_function is taken": Fault(
        TRANSFORMERS,
        "    if not _calls_loss_function(type(model)):\n",
        "    if False:\n",
        (f"{OF_APPLY}test_models_with_a_loss_of_their_own",),
    ),
    "Liger-Kernel is not noticed after apply": Fault(
        TRANSFORMERS,
        "            refuse_liger(self.model)\n",
        "            pass\n",
        (f"{OF_APPLY}test_liger_kernel_is_refused",),
    ),
    "outputs of causal models are not shifted": Fault(
        TRANSFORMERS,
        '        if "CausalLM" in name:\n            return True\n',
        '        if "CausalLM" in name:\n            return False\n',
        (f"{OF_LOSSES}test_loss_of_outputs",),
    ),
    "num_items_in_batch of outputs is not used": Fault(
        TRANSFORMERS,
        "reduced(logits, labels, num_items_in_batch,",
        "reduced(logits, labels, None,",
        (f"{OF_LOSSES}test_loss_of_outputs",),
    ),
    "a loss with another term of logits is accepted": Fault(
        TAIL,
        "elif tail is not None and total.item() != 0:",
        "elif False:",
        (f"{OF_APPLY}test_other_terms_of_the_loss_that_need_logits",),
    ),
    "the head is not checked in compiled code": Fault(
        HEAD,
        "if head is self.module and is_same and not why_not_linear(head):",
        "if head is self.module and (torch.compiler.is_compiling() or not why_not_linear(head)):",
        (f"{OF_APPLY}test_a_hook_between_apply_and_torch_compile",),
    ),
    "another loss function gets no logits": Fault(
        HEAD,
        " or self.active or not self._is_of_loss():",
        " or self.active:",
        (f"{OF_APPLY}test_another_loss_function_after_apply",),
    ),
    "vocab_size is not compared with a fused head": Fault(
        HEAD,
        "        return self.module.out_features\n",
        "        return 150\n",
        (f"{OF_APPLY}test_another_vocab_size_after_apply",),
    ),
    "a call of another thread is fused too": Fault(
        HEAD,
        'return "thread" in self.active and self.active["thread"] in (_thread(), COMPILED)',
        'return "thread" in self.active',
        (f"{OF_APPLY}test_a_call_of_another_thread",),
    ),
}

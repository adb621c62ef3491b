"""Faults of the integrations of TRL and torchtitan, whose tests need these packages."""

from .fault import Fault

TRL = "fused_xent/integrations/trl.py"
HEAD = "fused_xent/integrations/_trl_head.py"
CHECKS = "fused_xent/integrations/_trl_checks.py"
GKD = "fused_xent/integrations/_trl_gkd.py"
TORCHTITAN = "fused_xent/integrations/torchtitan.py"

TRL_TESTS = "tests/integrations/test_trl.py::"
GKD_TESTS = "tests/integrations/test_trl_gkd.py::"
TITAN_TESTS = "tests/integrations/test_torchtitan.py::"

FAULTS = {
    "TRL: the softcap is not divided by the temperature": Fault(
        HEAD,
        '"softcap": None if cap is None else cap / temperature',
        '"softcap": cap',
        (TRL_TESTS + "test_values_and_gradients",),
    ),
    "TRL: squares of probabilities with the softcap of the logits": Fault(
        HEAD,
        '"softcap": None if cap is None else 2 * cap',
        '"softcap": cap',
        (TRL_TESTS + "test_values_and_gradients",),
    ),
    "TRL: mean logits without the bias": Fault(
        HEAD,
        "mean if bias is None else mean + bias.mean(dtype=dtype)",
        "mean",
        (TRL_TESTS + "test_values_and_gradients",),
    ),
    "TRL: every release is known": Fault(
        HEAD, "if not is_known:", "if False:", (TRL_TESTS + "test_other_release",)
    ),
    "TRL: TRL's module is changed for everybody": Fault(
        HEAD,
        "names = {**function.__globals__, KERNEL: LogProbs}",
        "(names := function.__globals__).update({KERNEL: LogProbs})",
        (TRL_TESTS + "test_undo",),
    ),
    "TRL: any head is taken": Fault(
        CHECKS,
        "if type(layer) is not nn.Linear:",
        "if not isinstance(layer, nn.Module):",
        (TRL_TESTS + "test_heads",),
    ),
    "TRL: any logits are taken": Fault(
        CHECKS,
        "if not error <= tolerance:",
        "if error < 0:",
        (TRL_TESTS + "test_logits_that_are_not_the_models_own",),
    ),
    "TRL: Liger kernels are taken": Fault(
        CHECKS,
        "if getattr(args, option, False):",
        "if getattr(args, option, False) is None:",
        (TRL_TESTS + "test_liger",),
    ),
    "TRL: the reference model keeps TRL's head": Fault(
        TRL,
        'for role in ("model", "ref_model"):',
        'for role in ("model",):',
        (TRL_TESTS + "test_undo",),
    ),
    "TRL: accelerate keeps another forward than it runs": Fault(
        TRL,
        "model._original_forward = new",
        "model._original_forward = old",
        (TRL_TESTS + "test_undo_after_training_in_mixed_precision",),
    ),
    "TRL: a replaced forward is overwritten by undo": Fault(
        CHECKS,
        "    if not _trl_head.is_fused_forward(forward):\n        raise",
        "    if forward is None:\n        raise",
        (TRL_TESTS + "test_undo_refuses_where_the_forward_was_replaced",),
    ),
    "TRL: autocast rounds mean logits": Fault(
        HEAD,
        "(hidden * weight.mean(0, dtype=dtype)).sum(-1)",
        "hidden.to(dtype) @ weight.mean(0, dtype=dtype)",
        (TRL_TESTS + "test_mean_logits_under_autocast",),
    ),
    "GKD: rows without a label count": Fault(
        GKD,
        "token_weight=(index == 0).to(dtype)",
        "token_weight=(index <= 0).to(dtype)",
        (GKD_TESTS + "test_loss",),
    ),
    "GKD: the teacher has no temperature": Fault(
        GKD,
        "teacher.new_full((1,), scale, dtype=dtype)",
        "teacher.new_full((1,), 1.0, dtype=dtype)",
        (GKD_TESTS + "test_loss",),
    ),
    "GKD: the teacher's logits are scaled in 16 bits": Fault(
        GKD,
        "(teacher * teacher.new_full((1,), scale, dtype=dtype)).softmax(-1)",
        "torch.softmax(teacher * scale, -1, dtype=dtype)",
        (GKD_TESTS + "test_the_temperature_does_not_round",),
    ),
    "GKD: all divergences are taken for the forward KL": Fault(
        GKD, "if beta != 0 or not is_sum", "if not is_sum", (GKD_TESTS + "test_loss",)
    ),
    "torchtitan: the gradient of a hidden DTensor is taken for that of all classes": Fault(
        TORCHTITAN,
        "[Partial() if split else placement for split, placement in",
        "[placement for _, placement in",
        (TITAN_TESTS + "test_llama[1-2]",),
    ),
    "torchtitan: gradients of hidden states are added up twice": Fault(
        TORCHTITAN,
        '{**split, "reduce_grad_hidden": False}',
        "split",
        (TITAN_TESTS + "test_llama[1-2]",),
    ),
    "torchtitan: lm_head keeps the forward of the loss": Fault(
        TORCHTITAN,
        "        del module.forward\n",
        "        pass\n",
        (TITAN_TESTS + "test_options",),
    ),
    "torchtitan: heads that cap their logits are taken": Fault(
        TORCHTITAN,
        "if type(lm_head).forward is not nn.Linear.forward or not",
        "if not isinstance(lm_head, nn.Linear) or not",
        (TITAN_TESTS + "test_heads_that_are_not_linear",),
    ),
}

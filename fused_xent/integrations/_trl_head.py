"""TRL's fused head with the log-probabilities of fused_xent.

``trl.trainer.utils.add_fused_lm_head`` gives a model a forward of its own. Called with
``fused_lm_head=True``, it runs the backbone and returns values of each label instead of logits: its
log-probability, the entropy, whether it is the most likely class. One class of TRL's computes these
from hidden states, and the forward looks it up by name in its module. ``with_fused_xent`` returns
the same forward with another meaning of this name, for one model. TRL's module, its classes and
other models keep theirs.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear import linear_cross_entropy_with_statistics
from ..selected import linear_selective_log_softmax

KERNEL, COMPACT = "_ChunkedLogProbFunction", "_use_triton"  # names in trl.trainer.utils
ARGUMENTS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in this order


class Head(NamedTuple):
    """The options of the fused head of one model."""

    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]
    final_logit_softcapping: float | None
    logit_scale: float


def check_version() -> None:
    """Raise RuntimeError if the installed TRL computes its log-probabilities in another way."""
    trl: Any = importlib.import_module("trl")
    try:
        utils: Any = importlib.import_module("trl.trainer.utils")
        kernels: Any = importlib.import_module("trl.kernels.chunked_logprob")
        arguments = tuple(inspect.signature(getattr(utils, KERNEL).forward).parameters)
        code = _code_of_fused_forward()
        is_known = (
            arguments == ARGUMENTS
            and ("log_probs", *kernels.OPTIONAL_OUTPUTS) == OUTPUTS
            and {KERNEL, COMPACT} <= set(code.co_names)
            and set(code.co_freevars) >= set(Head._fields)
        )
    except (ImportError, AttributeError, StopIteration):
        is_known = False
    if not is_known:
        raise RuntimeError(
            f"fused_xent.integrations.trl does not know how TRL {trl.__version__} computes "
            "log-probabilities: it is made for TRL 1.16. Install that version, or use the trainer "
            "without apply()"
        )


def _code_of_fused_forward() -> types.CodeType:
    """Return the code of the forward that add_fused_lm_head makes for each model."""
    utils: Any = importlib.import_module("trl.trainer.utils")
    constants = utils.add_fused_lm_head.__code__.co_consts
    codes = (x for x in constants if isinstance(x, types.CodeType))
    return next(code for code in codes if KERNEL in code.co_names)


def is_fused_forward(forward: Any) -> bool:
    """Return True for a forward that add_fused_lm_head has made, or with_fused_xent from it."""
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    return code is _code_of_fused_forward()


def is_ours(forward: Any) -> bool:
    """Return True for a forward of with_fused_xent."""
    return is_fused_forward(forward) and forward.__func__.__globals__[KERNEL] is LogProbs


def head_of(forward: Any) -> Head:
    """Return the options of a fused forward."""
    options = inspect.getclosurevars(forward.__func__).nonlocals
    return Head(*(options[name] for name in Head._fields))


def with_fused_xent(forward: Any) -> Any:
    """Return a method like TRL's fused forward, which calls LogProbs for its log-probabilities."""
    function = forward.__func__
    names = {**function.__globals__, KERNEL: LogProbs}
    names[COMPACT] = _leaves_out_rows(function.__globals__[COMPACT])
    ours = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    ours.__kwdefaults__ = function.__kwdefaults__
    ours.__dict__.update(function.__dict__)  # the signature that generate() reads
    ours.__module__, ours.__qualname__ = function.__module__, function.__qualname__
    ours.__doc__ = function.__doc__
    return types.MethodType(ours, forward.__self__)


def _leaves_out_rows(of_trl: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """Return what decides whether positions without a label are left out of the matrix products.

    TRL does so on GPUs only, but it is right on any device. In compiled code, the number of labels
    would be a shape that depends on data.
    """

    def leaves_out_rows(device: torch.device) -> bool:
        return not torch.compiler.is_compiling() or of_trl(device)

    return leaves_out_rows


class LogProbs:
    """Stands in for TRL's class of the same role: only ``apply`` is used."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,  # of classes; chunks of rows need none
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Return the values of OUTPUTS for each row of hidden; None where outputs lacks the name.

        hidden (N, H), weight (V, H), bias (V,), targets (N,). The logits are
        ``cap * tanh(logit_scale * x / cap) / temperature``: a cap and a scale that are both divided
        by the temperature.
        """
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(weight.dtype)
        layer = (hidden, weight, bias, targets)
        cap, scale = final_logit_softcapping, logit_scale / temperature
        logits = {"softcap": None if cap is None else cap / temperature, "logit_scale": scale}
        found = _differentiable(layer, logits, outputs)
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                found["log_sum_sq_probs"] = _log_sum_of_squares(layer, logits)
            if "mean_logits" in outputs:
                found["mean_logits"] = _mean_logits(layer, logits)
        return tuple(found.get(name) for name in OUTPUTS)


Layer = tuple[Tensor, Tensor, Tensor | None, Tensor]


def _differentiable(
    layer: Layer, logits: dict[str, Any], outputs: tuple[str, ...]
) -> dict[str, Tensor]:
    """Return log-probabilities and what comes from the same pass: entropy, is_top1."""
    hidden, weight, bias, targets = layer
    if "is_top1" in outputs:
        results = _statistics(layer, **logits)
        found = {"log_probs": -results.loss, "entropy": results.entropy, "is_top1": results.correct}
        return {name: value for name, value in found.items() if name in ("log_probs", *outputs)}
    if "entropy" in outputs:
        both = linear_selective_log_softmax(
            hidden, weight, targets, linear_bias=bias, with_entropy=True, **logits
        )
        return {"log_probs": both.log_probs, "entropy": both.entropy}
    log_probs = linear_selective_log_softmax(hidden, weight, targets, linear_bias=bias, **logits)
    return {"log_probs": log_probs}


def _statistics(layer: Layer, **options: Any) -> Any:
    hidden, weight, bias, targets = layer
    return linear_cross_entropy_with_statistics(
        *(hidden, weight, targets),
        linear_bias=bias,
        reduction="none",
        loss_dtype=torch.promote_types(hidden.dtype, torch.float32),
        **options,
    )


def _log_sum_of_squares(layer: Layer, logits: dict[str, Any]) -> Tensor:
    """Return log(sum(p^2)): the log-sum-exp of twice the logits, less twice that of the logits."""
    cap, scale = logits["softcap"], logits["logit_scale"]
    twice = {"softcap": None if cap is None else 2 * cap, "logit_scale": 2 * scale}
    lse: Tensor = _statistics(layer, **twice).lse - 2 * _statistics(layer, **logits).lse
    return lse


def _mean_logits(layer: Layer, logits: dict[str, Any]) -> Tensor:
    """Return the mean logit of each row."""
    hidden, weight, bias, _ = layer
    if logits["softcap"] is None:  # the mean of the layer's outputs is that of its weights
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # Not by a matrix product, which autocast would round to 16 bits.
        mean = (hidden * weight.mean(0, dtype=dtype)).sum(-1)
        mean = mean if bias is None else mean + bias.mean(dtype=dtype)
        return mean * float(logits["logit_scale"])
    # Labels that are all smoothing: the loss is the log-sum-exp less the mean.
    results = _statistics(layer, label_smoothing=1.0, **logits)
    mean_logits: Tensor = results.lse - results.loss
    return mean_logits

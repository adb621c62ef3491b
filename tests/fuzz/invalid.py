"""Arguments that every function must refuse, and the errors that it may raise."""

from collections.abc import Callable
from typing import Any

import torch

from .checks import Memory

REFUSALS = (ValueError, TypeError, IndexError)
Given = dict[str, Any]


def check(form, choose) -> None:
    """Break one argument of a call; the call must raise, and write nothing."""
    given = form.arguments()
    breakages = [one for one in BREAKAGES if one(given, None)]
    name, value, allowed = choose(breakages)(given, choose)
    given[name] = value
    memory = Memory(given)
    raised = None
    try:
        form.call(given)
    except allowed as error:
        raised = error
    finally:
        memory.check()
    assert raised is not None, f"{name}={_shown(value)} was not refused"
    assert type(raised) in allowed, f"raised {type(raised).__name__}"
    assert str(raised), "the message is empty"


def _shown(value: Any) -> str:
    if not torch.is_tensor(value):
        return repr(value)
    return f"{value.dtype} {tuple(value.shape)} on {value.device}"


# A breakage returns argument, value and allowed errors; or, without choose, whether it applies.
Breakage = Callable[[Given, Any], Any]
BREAKAGES: list[Breakage] = []


def breakage(applies: Callable[[Given], bool]) -> Callable[..., Breakage]:
    """Make a breakage for calls of which this is true."""

    def register(function: Callable) -> Breakage:
        def apply(given: Given, choose: Any) -> Any:
            if choose is None:
                return applies(given)
            name, value, *errors = function(given, choose)
            return name, value, tuple(errors) or REFUSALS

        BREAKAGES.append(apply)
        return apply

    return register


def _tensors(given: Given) -> list[str]:
    return [name for name, value in given.items() if torch.is_tensor(value)]


def _index(given: Given) -> str | None:
    """Return the argument that holds classes, if there is a row in it."""
    for name in ("target_indices", "index", "target"):
        value = given.get(name)
        if value is not None and not value.is_floating_point() and value.numel():
            return name
    return None


@breakage(lambda given: True)
def no_tensor(given: Given, choose):
    """Something else in the place of a tensor."""
    names = [name for name in _tensors(given) if name != "normalizer"]
    return choose(names), choose([3, [1.0], "text", 2.5])


@breakage(lambda given: True)
def wrong_dtype(given: Given, choose):
    """A dtype that the argument never has."""
    name = choose([x for x in _tensors(given) if x not in ("normalizer", "token_weight")])
    return name, given[name].detach().to(choose([torch.bool, torch.int16, torch.complex64]))


@breakage(lambda given: "token_weight" in given)
def complex_token_weight(given: Given, choose):
    """Weights that are not real."""
    return "token_weight", given["token_weight"].to(torch.complex64)


@breakage(lambda given: True)
def wrong_shape(given: Given, choose):
    """A dimension too many, or too large."""
    name = choose([x for x in _tensors(given) if x not in ("normalizer", "input")])
    value = given[name].detach()
    shape = [3, *value.shape, 2]
    return name, value[None, ..., None].expand(shape)


@breakage(lambda given: True)
def too_short(given: Given, choose):
    """One row, class or feature more in one tensor than in the others."""
    name = choose([x for x in ("weight", "token_weight", "linear_bias") if x in given] or ["input"])
    value = given[name].detach()
    if name == "input" or value.dim() == 0:
        return "input", given["input"].new_zeros(())
    return name, value.new_zeros([value.shape[0] + 1, *value.shape[1:]])


@breakage(lambda given: True)
def other_device(given: Given, choose):
    """A tensor on another device."""
    name = choose([x for x in _tensors(given) if x not in ("normalizer", "input")])
    return name, given[name].detach().to("meta")


@breakage(lambda given: True)
def not_dense(given: Given, choose):
    """A sparse tensor."""
    name = choose([x for x in _tensors(given) if x != "normalizer"])
    return name, given[name].detach().to_sparse()


@breakage(lambda given: _index(given) is not None and given["input"].is_cpu)
def out_of_range(given: Given, choose):
    """A class index out of range, in a row that counts."""
    name = _index(given)
    given.pop("token_weight", None)  # a row of weight 0 does not count
    index = given[name].clone()
    wrong = [255] if index.dtype == torch.uint8 else [-3, 2**31 - 1, -(2**31)]
    wrong += [2**62, -(2**63)] if index.dtype == torch.int64 else []
    if index.dtype == torch.uint8:
        given["ignore_index"] = -100
    index.view(-1)[choose(range(index.numel()))] = choose(wrong)
    return name, index, IndexError


@breakage(lambda given: "loss_dtype" in given)
def option(given: Given, choose):
    """An option out of its range, or of another type."""
    nan, inf = float("nan"), float("inf")
    numbers = [-1, nan, inf, 2e30, "1", True, 1j, [1.0], torch.ones(2)]
    values = {
        "label_smoothing": [1.5, *numbers, None],
        "lse_square_scale": [*numbers, None],
        "focal_gamma": [*numbers, None],
        "softcap": [0, *numbers],
        "logit_scale": [0, *numbers, None],
        "reduction": ["average", 1, None, b"mean"],
        "loss_dtype": [torch.int64, "float32", torch.complex64, 32],
        "ignore_index": [1.5, "0", 2**63, True],
        "token_weights": [None],
    }
    if "dim" in given:
        values["dim"] = [given["input"].dim(), -given["input"].dim() - 1, 1.0, "1", True]
        values["inplace_backward"] = [1, None, "yes"]
        values["grad_in_forward"] = [1, None, "yes"]
    else:
        values["shift"] = [-1, 1000, 1.5, "1"]
        values["chunk_rows"] = [0, -1, 1.5, "1"]
        values["drop_ignored"] = [1, None]
        values["logits_dtype"] = [torch.int64, "float32", torch.float64]
    if given["input"].dtype == torch.float64:
        values.pop("logits_dtype", None)
    name = choose(list(values))
    return name, choose(values[name])


@breakage(lambda given: "normalizer" in given)
def normalizer(given: Given, choose):
    """A divisor that is no finite number."""
    wrong = [
        float("nan"),
        float("inf"),
        "1",
        True,
        torch.ones(2),
        torch.ones((), dtype=torch.cfloat),
    ]
    return "normalizer", choose(wrong)


@breakage(lambda given: _is_overwritten(given))
def overwritten(given: Given, choose):
    """Logits that must not be overwritten: a leaf, or elements that share memory."""
    value = given["input"].detach()
    if value.dim() > 1 and value.shape[0] > 1 and choose([True, False]):
        return "input", value[:1].expand_as(value), RuntimeError
    return "input", value.clone().requires_grad_(), RuntimeError


def _is_overwritten(given: Given) -> bool:
    """Return True for an in-place mode, unless probabilities in float64 make a copy of logits."""
    is_in_place = "inplace_backward" in given or "grad_in_forward" in given
    return is_in_place and (_index(given) is not None or given["input"].dtype == torch.float64)


@breakage(lambda given: _is_overwritten(given) and _may_share(given))
def shared_memory(given: Given, choose):
    """Token weights in the memory of logits that are overwritten."""
    shape = given["token_weight"].shape
    shared = given["input"].detach().flatten()[: shape.numel()].view(shape)
    return "token_weight", shared, RuntimeError


def _may_share(given: Given) -> bool:
    value, tokens = given["input"], given.get("token_weight")
    is_used_as_it_is = value.dtype in (torch.float32, torch.float64) and value.is_contiguous()
    return is_used_as_it_is and tokens is not None and value.numel() > 0

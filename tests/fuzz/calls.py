"""One random call: a problem of ``problems.make_problem``, varied, and a public function."""

import contextlib
import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from problems import Problem, make_problem
from test_random import laid_out
from test_sparse_labels import make_labels, make_sparse

from . import checks, forms, invalid
from .forms import Shard

Choose = Callable[[list], Any]
RANKS = 16  # every 16th call runs in 2 processes, and a few in 3: see n_ranks
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """What a seed and a number describe."""

    problem: Problem
    form: str  # a name in forms.FORMS
    choose: Choose  # picks the rest
    device: str

    def __str__(self) -> str:
        """Describe the call in one line, without the numbers in its tensors."""
        logits, target, options, mode, *_ = self.problem
        shown = {k: _shown(v) for k, v in options.items()}
        labels = self.problem.labels
        target = target if labels is None else labels["target_indices"]
        return (
            f"{self.form} of {_shown(logits)}, strides {logits.stride()}, target {_shown(target)}, "
            f"mode {mode}, {shown}, {self.device}"
        )


def _shown(value: Any) -> str:
    if not torch.is_tensor(value):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def n_ranks(number: int) -> int:
    """Return in how many processes this call runs."""
    if number % RANKS:
        return 1
    return 3 if number % (8 * RANKS) == 7 * RANKS else 2


def check_call(seed: int, number: int, rank: int = 0) -> None:
    """Make a call, run and check it. Every rank makes the same call."""
    call = make_call(seed, number)
    try:
        with _default_device(call.device):
            _check(call, number, rank)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n  in {call}") from error


def _check(call: Call, number: int, rank: int) -> None:
    problem, choose = call.problem, call.choose
    torch.set_num_threads(choose([1] * 6 + [2, 3]))
    shard = None
    if n_ranks(number) > 1:
        problem = _without_float64_labels(problem)
        shard = Shard.make(problem.logits.shape[problem.dim], n_ranks(number), rank, choose)
    form = forms.FORMS[call.form](problem, shard, choose)
    if shard is None and form.is_function and choose(range(5)) == 0:
        invalid.check(form, choose)
    else:
        checks.check(form)


def _default_device(device: str) -> contextlib.AbstractContextManager:
    """Make tensors on a device. For the CPU no context, which would turn off plain calls."""
    return contextlib.nullcontext() if device == "cpu" else torch.device(device)


def make_call(seed: int, number: int) -> Call:
    """Return the call that this seed and number describe."""
    draw = random.Random(f"{seed} {number}")
    choose = draw.choice
    torch.manual_seed(choose(range(2**31)))
    devices = ["cpu", "cuda"] if torch.cuda.is_available() and n_ranks(number) == 1 else ["cpu"]
    device = choose(devices)
    with _default_device(device):
        problem = make_problem(choose, lambda values: _lay_out(values, choose))
        problem = _vary(problem, choose)
        is_split = n_ranks(number) > 1
        form = choose([name for name in forms.FORMS if forms.FORMS[name].takes(problem, is_split)])
    return Call(problem, form, choose, device)


def _lay_out(values: torch.Tensor, choose: Choose) -> torch.Tensor:
    """Return a copy in a random memory layout; half of them are contiguous."""
    if choose([True, False]):
        return values
    order = choose(list(itertools.permutations(range(values.dim()))))
    steps = [choose([1, 1, 1, 2, 3]) for _ in order]
    return laid_out(values, (order, steps, choose(range(18))))


# ---- variations of a problem ---------------------------------------------------------------------


def _vary(problem: Problem, choose: Choose) -> Problem:
    """Add what make_problem leaves out: kinds of labels, dtypes, empty and unusual tensors."""
    if choose(range(4)) == 0:
        problem = _with_sparse_labels(problem, choose)
    elif problem.target.is_floating_point():
        dtype = choose([problem.target.dtype, *DTYPES])
        problem = problem._replace(target=problem.target.to(dtype))
    else:
        problem = _with_indices(problem, choose)
    options = dict(problem.options)
    if "weight" in options:
        options["weight"] = options["weight"].to(choose([options["weight"].dtype, *DTYPES]))
    default = torch.promote_types(problem.logits.dtype, torch.float32)
    options["loss_dtype"] = choose([default] * 5 + list(DTYPES))
    problem = problem._replace(options=options)
    rare = (_without_rows, _of_one_row, _expanded, _with_left_out_rows, _masked, _aliased)
    change = dict(enumerate(rare)).get(choose(range(20)))
    return problem if change is None else change(problem, choose)


def _with_sparse_labels(problem: Problem, choose: Choose) -> Problem:
    n_labels, ignored = choose([1, 2, 5, 64]), choose([-100, -100, -1, 2**40])
    index_dtype = torch.int64 if ignored == 2**40 else choose([torch.int64, torch.int32])
    labels = make_labels(problem.logits, n_labels, problem.dim, choose(DTYPES), index_dtype)
    labels.target_indices[labels.target_indices == -100] = ignored
    options = problem.options | {"ignore_index": ignored}
    return make_sparse(problem.logits, labels, options, problem.mode, problem.statistics)


def _with_indices(problem: Problem, choose: Choose) -> Problem:
    n_classes = problem.logits.shape[problem.dim]
    dtype = choose([torch.int64, torch.int32] + [torch.uint8] * (n_classes < 256))
    usual = [255, 0] if dtype == torch.uint8 else [-100, -100, -1, n_classes, 0]
    ignored = choose(usual)
    target = problem.target.masked_fill(problem.target == -100, ignored).to(dtype)
    return problem._replace(target=target, options=problem.options | {"ignore_index": ignored})


def _of_rows(problem: Problem, pick: Callable[[torch.Tensor], torch.Tensor], **more) -> Problem:
    """Apply a function of the first dimension to all tensors of rows."""
    options = problem.options | more
    if "token_weight" in options:
        options["token_weight"] = pick(options["token_weight"])
    labels = problem.labels and {name: pick(x) for name, x in problem.labels.items()}
    return problem._replace(
        logits=pick(problem.logits), target=pick(problem.target), options=options, labels=labels
    )


def _without_rows(problem: Problem, choose: Choose) -> Problem:
    return _of_rows(problem, lambda x: x[:0])


def _of_one_row(problem: Problem, choose: Choose) -> Problem:
    """Logits of shape (C,)."""
    if problem.logits.dim() > 2:
        return problem
    return _of_rows(problem, lambda x: x[0], dim=0)


def _expanded(problem: Problem, choose: Choose) -> Problem:
    """All rows in the memory of the first."""
    problem = problem._replace(mode="default")
    return _of_rows(problem, lambda x: x[:1].expand(len(x), *x.shape[1:]))


def _aliased(problem: Problem, choose: Choose) -> Problem:
    """Logits and probabilities in one memory, one beside the other or as the same elements."""
    if problem.labels is not None or not problem.target.is_floating_point():
        return problem
    logits = problem.logits
    memory = torch.stack([logits, problem.target.to(logits.dtype)])
    if choose([True, False]):
        memory[0] = memory[1]
        memory = memory[:1]
    return problem._replace(logits=memory[0], target=memory[-1], mode="default")


def _with_left_out_rows(problem: Problem, choose: Choose) -> Problem:
    """Rows of token weight 0, and ignored ones, may hold anything."""
    kept = problem.options.get("token_weight", torch.ones(()))
    left_out = (kept == 0).expand(problem.logits.select(problem.dim, 0).shape)
    if not problem.target.is_floating_point():
        left_out = left_out | (problem.target == problem.options["ignore_index"])
    value = choose([torch.nan, torch.inf, -torch.inf])
    problem.logits.masked_fill_(left_out.unsqueeze(problem.dim), value)
    return problem


def _without_float64_labels(problem: Problem) -> Problem:
    """Labels and weights of a shard must not be float64 beside narrower logits."""
    dtype = problem.logits.dtype
    options = dict(problem.options)
    if "weight" in options and dtype != torch.float64:
        options["weight"] = options["weight"].to(torch.float32)
    if problem.labels is None and problem.target.dtype == torch.float64 != dtype:
        problem = problem._replace(target=problem.target.to(torch.float32))
    return problem._replace(options=options)


def _masked(problem: Problem, choose: Choose) -> Problem:
    """Some logits are not finite."""
    value = choose([-torch.inf, -torch.inf, torch.inf, torch.nan])
    problem.logits.masked_fill_(torch.rand(problem.logits.shape) < 0.05, value)
    return problem

"""The public functions as forms of one problem: their arguments, their leaves, their gradients.

A layer's hidden states, weight and bias are multiples of 1/8 whose products are exact in every
dtype. So its logits are those of the problem, and only its gradients need a form of their own.
"""

from typing import Any, NamedTuple

import torch
from compare import half_ulp, smallest
from modes import MODES
from problems import Problem
from torch import Tensor

import fused_xent


class Shard(NamedTuple):
    """The classes of this process."""

    start: int
    size: int
    given: dict[str, Any]

    @staticmethod
    def make(n_classes: int, n_ranks: int, rank: int, choose) -> "Shard":
        """Split the classes evenly where that is possible, or anywhere."""
        group = {"process_group": torch.distributed.group.WORLD}
        if n_classes % n_ranks == 0 and choose([True, False]):
            size = n_classes // n_ranks
            return Shard(rank * size, size, group)
        cuts = sorted(choose(range(n_classes + 1)) for _ in range(n_ranks - 1))
        start, end = ([0, *cuts, n_classes][i] for i in (rank, rank + 1))
        return Shard(start, end - start, group | {"vocab_start": start, "num_classes": n_classes})

    def own(self, values: Tensor, dim: int) -> Tensor:
        """Return this process's part of values of all classes."""
        return values.narrow(dim, self.start, self.size)


class Form:
    """A call of a public function."""

    is_layer = False
    is_selective = False
    is_function = True  # a module checks some arguments when it is made

    def __init__(self, problem: Problem, shard: Shard | None, choose) -> None:
        """Make the arguments of a call, by name."""
        self.problem, self.shard, self.choose = problem, shard, choose
        self.has_gradient = choose(range(12)) != 0
        self.leaves = self.make_leaves()
        self.extra = self._choose_extra()

    def _choose_extra(self) -> str | None:
        """Return an argument whose gradient torch operations compute; None: no such gradient."""
        names = [name for name in ("weight", "token_weight") if name in self.problem.options]
        if self.problem.labels is None and self.problem.target.is_floating_point():
            names.append("target")
        is_possible = self.has_gradient and self.shard is None and self.problem.mode == "default"
        is_wanted = is_possible and not self.is_selective and self.choose(range(4)) == 0
        return self.choose(names) if is_wanted and names else None

    @classmethod
    def takes(cls, problem: Problem, is_split: bool) -> bool:
        """Return True if the function can compute this problem."""
        return True

    def own(self, values: Tensor, dim: int) -> Tensor:
        """Return the part of values of all classes that this process has."""
        return values if self.shard is None else self.shard.own(values, dim)

    def make_leaves(self) -> dict[str, Tensor]:
        """Return the tensors that get a gradient, by argument."""
        own = self.own(self.problem.logits, self.problem.dim)
        return {"input": own.detach().requires_grad_(self.has_gradient)}

    def gradients(self, exact: Tensor, tolerance: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return exact gradient and tolerance of each leaf, from those of all logits."""
        return {"input": tuple(self.own(x, self.problem.dim) for x in (exact, tolerance))}

    def arguments(self) -> dict[str, Any]:
        """Return all arguments by name, the leaves among them."""
        given = {**self.labels(), **self.options(), **self.leaves}
        if self.problem.mode != "default":  # which refuse leaves
            given["input"] = given["input"].clone()
        return given | (self.shard.given if self.shard else {})

    def labels(self) -> dict[str, Tensor]:
        """Return target, and target_indices of sparse labels."""
        if self.problem.labels is not None:
            return dict(self.problem.labels)
        target = self.problem.target
        is_dense = target.is_floating_point()
        return {"target": self.own(target, self.problem.dim) if is_dense else target}

    def options(self) -> dict[str, Any]:
        """Return the options of the loss."""
        options = self.problem.options | MODES[self.problem.mode]
        if "weight" in options:
            options["weight"] = self.own(options["weight"], 0)
        return options

    def call(self, given: dict[str, Any]) -> Any:
        """Call the function; return the loss or all statistics."""
        raise NotImplementedError


class CrossEntropy(Form):
    """fused_xent.cross_entropy, or with statistics."""

    def call(self, given):
        name = "cross_entropy_with_statistics" if self.problem.statistics else "cross_entropy"
        return getattr(fused_xent, name)(**given)


class Module(Form):
    """fused_xent.CrossEntropyLoss."""

    OF_BATCH = ("input", "target", "token_weight", "normalizer", "target_indices")

    @classmethod
    def takes(cls, problem, is_split):
        return not problem.statistics

    def call(self, given):
        of_batch = {name: given[name] for name in self.OF_BATCH if name in given}
        others = {name: value for name, value in given.items() if name not in of_batch}
        return fused_xent.CrossEntropyLoss(**others)(**of_batch)


class Linear(Form):
    """fused_xent.linear_cross_entropy, or with statistics."""

    is_layer = True

    def __init__(self, problem, shard, choose):
        """Exchange the logits for those of a layer."""
        self.exact_layer = self._make_layer(problem, choose)
        hidden, weight, *bias = self.exact_layer
        flat = torch.nn.functional.linear(
            hidden, weight.flatten(0, -2), *(b.flatten() for b in bias)
        )
        logits = flat.reshape(problem.logits.shape).to(problem.logits.dtype)
        super().__init__(problem._replace(logits=logits, mode="default"), shard, choose)

    @classmethod
    def takes(cls, problem, is_split):
        """Several positions in a row are refused where the classes are split."""
        return not is_split or problem.dim == problem.logits.dim() - 1

    def _make_layer(self, problem, choose) -> list[Tensor]:
        dim, n_features = problem.dim, choose([1, 3, 8])
        rows, classes = problem.logits.shape[:dim], problem.logits.shape[dim:]
        layer = [torch.randint(-1, 2, (*rows, n_features)).double()]
        shapes = [(*classes, n_features)] + [classes] * choose([0, 1])
        return layer + [torch.randint(-8, 9, shape).double() / 8 for shape in shapes]

    def make_leaves(self):
        names = ("input", "linear_weight", "linear_bias")
        parts = [self.exact_layer[0], *(self.own(x, 0) for x in self.exact_layer[1:])]
        return {
            name: x.to(self.problem.logits.dtype).requires_grad_(self.has_gradient)
            for name, x in zip(names, parts, strict=False)
        }

    def gradients(self, exact, tolerance):
        """Carry the errors of the logits' gradient through the products, and add their own."""
        hidden, weight = (x.reshape(-1, x.shape[-1]) for x in self.exact_layer[:2])
        n_rows = len(hidden)
        values = [x.reshape(n_rows, len(weight)) for x in (exact, exact.abs(), tolerance)]
        grads, sums, errors = (
            (g @ w, g.T @ h, g.sum(0))
            for g, w, h in zip(
                values,
                (weight, weight.abs(), weight.abs()),
                (hidden, hidden.abs(), hidden.abs()),
                strict=True,
            )
        )
        dtype = self.problem.logits.dtype
        unit = 1e-15 if dtype == torch.float64 else 3e-7
        found = {}
        for i, name in enumerate(self.leaves):
            n_terms = len(weight) if i == 0 else n_rows
            # torch may add terms one after another, and the roundings of equal ones have one sign.
            allowed = errors[i] + unit * (max(n_terms, 1) ** 0.5 + n_terms / 20) * sums[i]
            allowed = allowed + 3 * half_ulp(dtype) * grads[i].abs() + 3 * smallest(dtype)
            shape = self.exact_layer[i].shape
            pair = (x.reshape(shape) for x in (grads[i], allowed))
            found[name] = tuple(pair if i == 0 else (self.own(x, 0) for x in pair))
        return found

    def options(self):
        options = super().options()
        del options["dim"]
        if self.problem.labels is None and self.problem.target.is_floating_point():
            options.pop("ignore_index", None)  # must be None for probabilities of all classes
        options["chunk_rows"] = self.choose(
            [None, None, 1 + self.exact_layer[0].numel() // 50, 3000]
        )
        options["drop_ignored"] = self.choose([False, False, True])
        return options

    def call(self, given):
        name = "linear_cross_entropy"
        name += "_with_statistics" if self.problem.statistics else ""
        return getattr(fused_xent, name)(**given)


class LinearModule(Linear):
    """fused_xent.LinearCrossEntropyLoss."""

    is_function = False

    @classmethod
    def takes(cls, problem, is_split):
        return Linear.takes(problem, is_split) and not problem.statistics

    def call(self, given):
        given = dict(given)
        layer = [given.pop(name, None) for name in ("linear_weight", "linear_bias")]
        of_batch = {name: given.pop(name) for name in Module.OF_BATCH if name in given}
        n_classes, *positions, n_features = layer[0].shape
        n_classes = given.pop("num_classes", self.problem.logits.shape[self.problem.dim])
        module = fused_xent.LinearCrossEntropyLoss(
            n_features, n_classes, out_features=positions, bias=layer[1] is not None, **given
        )
        for name, value in zip(("weight", "bias"), layer, strict=True):
            if value is not None:
                delattr(module.linear, name)
                setattr(module.linear, name, value.flatten(0, len(positions)))
        return module(**of_batch)


class Selective(Form):
    """fused_xent.selective_log_softmax: the labels are the selected classes."""

    is_selective = True

    @classmethod
    def takes(cls, problem, is_split):
        return problem.labels is not None or not problem.target.is_floating_point()

    def labels(self):
        index = self.problem.target
        if self.problem.labels is not None:
            index = self.problem.labels["target_indices"]
        index = index.to(torch.int32 if index.dtype == torch.uint8 else index.dtype)
        return {"index": index.masked_fill(index == self.problem.options["ignore_index"], -100)}

    def options(self):
        names = ("dim", "softcap", "logit_scale")
        options = {name: x for name, x in self.problem.options.items() if name in names}
        options["with_entropy"] = self.problem.statistics
        return options | ({} if self.problem.mode == "default" else {"inplace_backward": True})

    def call(self, given):
        return fused_xent.selective_log_softmax(**given)


class LinearSelective(Selective, Linear):
    """fused_xent.linear_selective_log_softmax."""

    @classmethod
    def takes(cls, problem, is_split):
        return Selective.takes(problem, is_split) and problem.dim == problem.logits.dim() - 1

    def options(self):
        options = Selective.options(self)
        del options["dim"]
        return options | {
            "chunk_rows": self.choose([None, None, 1 + self.exact_layer[0].numel() // 50, 3000])
        }

    def call(self, given):
        return fused_xent.linear_selective_log_softmax(**given)


FORMS = {
    "cross_entropy": CrossEntropy,
    "CrossEntropyLoss": Module,
    "linear_cross_entropy": Linear,
    "LinearCrossEntropyLoss": LinearModule,
    "selective_log_softmax": Selective,
    "linear_selective_log_softmax": LinearSelective,
}

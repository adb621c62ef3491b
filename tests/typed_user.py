"""Type-checking test for `make lint`: mypy must accept right calls and reject wrong ones.

Nothing runs this file. Each wrong call has a `type: ignore` with its error code. If mypy misses the
error, the comment is unused, which `mypy --strict` reports.
"""

import torch
from torch import Tensor
from typing_extensions import assert_type

from fused_xent import (
    CrossEntropyLoss,
    CrossEntropyStatistics,
    LinearCrossEntropyLoss,
    SelectedLogProbs,
    cpu_capability,
    cross_entropy,
    cross_entropy_with_statistics,
    empty_cache,
    linear_cross_entropy,
    linear_cross_entropy_with_statistics,
    linear_selective_log_softmax,
    selective_log_softmax,
)

logits = torch.randn(4, 9, requires_grad=True)
hidden, weight = torch.randn(4, 8), torch.randn(9, 8)
target = torch.tensor([0, 1, 2, 3])

assert_type(cross_entropy(logits, target, label_smoothing=0.1, softcap=30.0), Tensor)
assert_type(CrossEntropyLoss(reduction="sum", dim=-1).forward(logits, target), Tensor)
statistics = cross_entropy_with_statistics(logits, target, lse_square_scale=1e-4)
assert_type(statistics, CrossEntropyStatistics)
assert_type(statistics.loss, Tensor)
assert_type(statistics.correct, Tensor)

assert_type(linear_cross_entropy(hidden, weight, target, logit_scale=0.5), Tensor)
assert_type(LinearCrossEntropyLoss(8, 9, bias=True).forward(hidden, target), Tensor)
of_linear = linear_cross_entropy_with_statistics(hidden, weight, target, shift=1)
assert_type(of_linear, CrossEntropyStatistics)
assert_type(selective_log_softmax(logits, target, softcap=30.0), Tensor)
selected = selective_log_softmax(logits, target, with_entropy=True)
assert_type(selected, SelectedLogProbs)
assert_type(selected.entropy, Tensor)
is_wanted = bool(target.sum())
assert_type(
    selective_log_softmax(logits, target, with_entropy=is_wanted), Tensor | SelectedLogProbs
)
assert_type(linear_selective_log_softmax(hidden, weight, target, chunk_rows=2), Tensor)
of_layer = linear_selective_log_softmax(hidden, weight, target, with_entropy=True)
assert_type(of_layer, SelectedLogProbs)
assert_type(cpu_capability(), str | None)
assert_type(empty_cache(), int)

cross_entropy(logits, target, soft_cap=30.0)  # type: ignore[call-arg]
cross_entropy(logits, target, softcap="30")  # type: ignore[arg-type]
selective_log_softmax(logits, target, soft_cap=30.0)  # type: ignore[call-overload]
cross_entropy_with_statistics(logits, target, soft_cap=30.0)  # type: ignore[call-arg]
CrossEntropyLoss(label_smooth=0.1)  # type: ignore[call-arg]
linear_cross_entropy(hidden, weight, target, shifts=1)  # type: ignore[call-arg]
linear_cross_entropy_with_statistics(hidden, weight, target, shifts=1)  # type: ignore[call-arg]
LinearCrossEntropyLoss(8, 9, chunk=4)  # type: ignore[call-arg]

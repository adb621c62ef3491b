"""The forward KL of TRL's GKDTrainer, from logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import cross_entropy
from ..selected import selective_log_softmax


def fused_jsd_loss(of_trl: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``generalized_jsd_loss`` with KL(teacher || student) by fused_xent.

    That is the case of ``beta=0``. For other values, for other reductions than sums, and for a
    teacher that needs gradients, ``of_trl`` computes the loss.
    """

    def generalized_jsd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: Any = None,
    ) -> Tensor:
        is_sum = num_items_in_batch is not None or reduction in ("batchmean", "sum")
        if beta != 0 or not is_sum or (teacher_logits.requires_grad and torch.is_grad_enabled()):
            return of_trl(
                *(student_logits, teacher_logits, labels, beta, temperature, reduction),
                num_items_in_batch=num_items_in_batch,
            )
        total = _sum_of_kl(student_logits, teacher_logits, labels, 1 / temperature)
        if num_items_in_batch is not None:
            return total.div(num_items_in_batch)
        if reduction == "sum":
            return total
        n_rows = max(len(student_logits), 1) if labels is None else (labels != -100).sum()
        return total / torch.as_tensor(n_rows, device=total.device).clamp(min=1)

    return generalized_jsd_loss


def _sum_of_kl(student: Tensor, teacher: Tensor, labels: Tensor | None, scale: float) -> Tensor:
    """Return the sum of KL(teacher || student) over the rows whose label is not -100."""
    index = torch.zeros(student.shape[:-1], dtype=torch.int64, device=student.device)
    if labels is not None:
        index = index.masked_fill(labels == -100, -100)
    dtype = torch.promote_types(student.dtype, torch.float32)
    with torch.no_grad():
        _, entropy = selective_log_softmax(teacher, index, logit_scale=scale, with_entropy=True)
        # A factor with a dimension promotes 16-bit logits. Scaled in 16 bits they would be rounded,
        # those of the entropy not, and the KL of equal models would not be 0.
        probabilities = (teacher * teacher.new_full((1,), scale, dtype=dtype)).softmax(-1)
    of_student = cross_entropy(
        student,
        probabilities,
        dim=-1,
        token_weight=(index == 0).to(dtype),
        reduction="sum",
        logit_scale=scale,
        loss_dtype=dtype,
    )
    return of_student - entropy.sum()

"""Softmax cross-entropy of large vocabularies in one pass over memory, a drop-in for torch's."""

from ._ops import cpu_capability
from .functional import cross_entropy
from .nn import CrossEntropyLoss

__version__ = "0.1.0"
__all__ = ["CrossEntropyLoss", "cpu_capability", "cross_entropy"]

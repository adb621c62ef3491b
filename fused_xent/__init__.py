"""Softmax cross-entropy of large vocabularies in one pass over memory, a drop-in for torch's."""

from ._decompositions import decompositions
from ._ops import cpu_capability, empty_cache
from .functional import cross_entropy, cross_entropy_with_statistics
from .linear import linear_cross_entropy, linear_cross_entropy_with_statistics
from .nn import CrossEntropyLoss, LinearCrossEntropyLoss
from .reference import CrossEntropyStatistics, SelectedLogProbs
from .selected import linear_selective_log_softmax, selective_log_softmax

__version__ = "0.1.0"
__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyStatistics",
    "LinearCrossEntropyLoss",
    "SelectedLogProbs",
    "cpu_capability",
    "cross_entropy",
    "cross_entropy_with_statistics",
    "decompositions",
    "empty_cache",
    "linear_cross_entropy",
    "linear_cross_entropy_with_statistics",
    "linear_selective_log_softmax",
    "selective_log_softmax",
]

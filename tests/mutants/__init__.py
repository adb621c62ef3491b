"""Mutation tests: each fault of the tables, put into a copy of the project, must make a test fail.

A table is a module `<name>_faults` with FAULTS, which maps descriptions to a Fault.
"""

from . import (
    bench_faults,
    binding_faults,
    cpu_faults,
    cuda_faults,
    framework_faults,
    python_faults,
    transformers_faults,
)

TABLES = {
    "python": python_faults.FAULTS,
    "integrations": {**framework_faults.FAULTS, **transformers_faults.FAULTS},
    "bench": bench_faults.FAULTS,
    "binding": binding_faults.FAULTS,
    "cpu": cpu_faults.FAULTS,
    "cuda": cuda_faults.FAULTS,
}

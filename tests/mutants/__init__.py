"""Mutation tests: faults in tables, each put into a copy of the project to see that a test fails.

A table is a module `<name>_faults` with FAULTS, a Fault for each description of one.
"""

from . import bench_faults, binding_faults, cpu_faults, cuda_faults, python_faults

TABLES = {
    "python": python_faults.FAULTS,
    "bench": bench_faults.FAULTS,
    "binding": binding_faults.FAULTS,
    "cpu": cpu_faults.FAULTS,
    "cuda": cuda_faults.FAULTS,
}

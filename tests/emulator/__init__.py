"""Runs CUDA kernels and their launchers on the CPU: see README.md."""

from .build import Harness, missing_tools, preload_environment
from .ptx2cpp import translate_module
from .ptx_parser import PtxError

__all__ = ["Harness", "PtxError", "missing_tools", "preload_environment", "translate_module"]

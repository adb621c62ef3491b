"""Builds fused_xent._C: the operators' schemas and the CPU kernels, on LibTorch's stable ABI.

One binary serves every torch from 2.10 and every Python from 3.10. The instruction set is chosen
when it runs, so nothing here depends on the machine that builds.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

COMPILE_ARGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vector types are passed between inlined functions alone
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    *(f"-isystem{path}" for path in include_paths()),  # warnings are for our own files
]


def sources(*folders: str) -> list[str]:
    """All C++ files of these folders of csrc."""
    return sorted(str(path) for folder in folders for path in Path("csrc", folder).glob("*.cpp"))


def extensions() -> list:
    """The native library, where a compiler can build it: without one, torch's operations serve."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        print("fused_xent: no C++ compiler (c++ or $CXX): no native kernels", file=sys.stderr)
        return []
    return [
        CppExtension(
            "fused_xent._C",
            sources("cpu", "binding"),
            depends=[str(path) for path in Path("csrc").rglob("*.h")],
            extra_compile_args={"cxx": COMPILE_ARGS},
            py_limited_api=True,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

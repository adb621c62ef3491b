"""Builds the native libraries, on LibTorch's stable ABI: each serves every torch from 2.10.

fused_xent._C has the operators' schemas and the CPU kernels of all instruction sets: nothing in it
depends on the machine that builds. fused_xent._C_cuda has the CUDA kernels: built wherever nvcc is,
with a GPU or without, under any torch, and loaded where torch has CUDA.

FUSED_XENT_CPU_CAPABILITIES="avx2" builds the CPU kernels of these instruction sets only, which is
faster while they are edited: see `make build`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

CXX = os.environ.get("CXX", "c++")
# -Wno-psabi: vector types are passed between inlined functions alone.
HOST = ["-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden"]
BINDING = ["-O3", "-g0", "-std=c++20", *HOST, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
BINDING += [f"-isystem{path}" for path in cpp_extension.include_paths()]  # warns of our files alone
KERNELS = ["-O3", "-lineinfo", "-std=c++20", "-Xfatbin=-compress-all"]
KERNELS += ["-Xptxas=-warn-spills,-warn-lmem-usage"]
KERNELS += [f"-Xcompiler={flag}" for flag in HOST]
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")  # machine code of these, PTX of the last
CUDART = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
STUB = Path("build/libtorch_cuda.so")  # of torch's CUDA library, which a CPU torch lacks
CAPABILITIES = ("avx512_bf16", "avx512", "avx2", "portable")  # each a file of csrc/cpu


def cuda_home() -> Path | None:
    """The CUDA toolkit to build with, None for no CUDA kernels."""
    choice, given = (os.environ.get(name, "") for name in ("FUSED_XENT_CUDA", "CUDA_HOME"))
    if choice not in ("", "0", "1"):
        sys.exit(f"FUSED_XENT_CUDA must be 0 or 1, got {choice!r}")
    on_path = Path(shutil.which("nvcc") or "/usr/bin/nvcc").resolve().parents[1]
    places = [Path(given)] if given else [on_path, Path("/usr/local/cuda")]
    for home in places if choice != "0" else ():
        # The headers too: an nvcc on the path may be a script that calls one elsewhere.
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    if choice == "1":
        sys.exit(f"FUSED_XENT_CUDA=1 needs nvcc, there is none in {' or '.join(map(str, places))}")
    return None


def architecture_flags(nvcc: Path) -> list[str]:
    """For TORCH_CUDA_ARCH_LIST, by default those of ARCHITECTURES that this nvcc knows."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
        wanted = [name for name in ARCHITECTURES if f"sm_{name.replace('.', '')}" in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(wanted) + "+PTX"
    try:
        return cpp_extension._get_cuda_arch_flags()
    except (ValueError, IndexError):  # IndexError: "native" where there is no GPU
        names = os.environ["TORCH_CUDA_ARCH_LIST"]
        sys.exit(f"TORCH_CUDA_ARCH_LIST must be architectures like '8.0;9.0+PTX', got {names!r}")


def left_out_capabilities() -> list[str]:
    """The instruction sets that FUSED_XENT_CPU_CAPABILITIES, if set, does not name."""
    wanted = os.environ.get("FUSED_XENT_CPU_CAPABILITIES", "").replace(",", " ").split()
    if unknown := [name for name in wanted if name not in CAPABILITIES]:
        known = ", ".join(CAPABILITIES)
        sys.exit(f"FUSED_XENT_CPU_CAPABILITIES must be some of {known}, got {unknown[0]!r}")
    return [name for name in CAPABILITIES if wanted and name not in wanted]


def extension(name: str, patterns: list[str], link: list[str], **args: list[str]):
    """A native library of these files of csrc, with arguments for the linker and each compiler."""
    options = {"py_limited_api": True, "extra_compile_args": args, "extra_link_args": link}
    sources = sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))
    return cpp_extension.CppExtension(name, sources, **options)


def extensions() -> list:
    """The native libraries that the compilers here can build: without any, torch serves."""
    home = cuda_home()
    if shutil.which(CXX) is None:
        print("fused_xent: no C++ compiler (c++ or $CXX): no native kernels", file=sys.stderr)
        return []
    files = ["cpu/*.cpp", "binding/cpu.cpp", "binding/schemas.cpp", "binding/tensors.cpp"]
    left_out = left_out_capabilities()
    cxx = [*BINDING, *(f"-DFUSED_XENT_WITHOUT_{name.upper()}" for name in left_out)]
    native = extension("fused_xent._C", files, [], cxx=cxx)
    native.sources = [path for path in native.sources if Path(path).stem not in left_out]
    found = [native]
    if home is not None:
        cpp_extension.CUDA_HOME = str(home)  # torch looks for it only where it has CUDA itself
        cpp_extension._check_cuda_version = lambda *_: None  # nor needs it be torch's version
        files = ["cuda/*.cu", "cuda/*.cpp", "binding/cuda*.cpp", "binding/tensors.cpp"]
        cxx = [*BINDING, "-DUSE_CUDA", f"-isystem{home}/include"]
        nvcc = KERNELS + architecture_flags(home / "bin/nvcc")
        link = [f"-L{home}/lib64", f"-L{home}/lib", *CUDART, f"-Wl,--no-as-needed,{STUB}"]
        found += [extension("fused_xent._C_cuda", files, link, cxx=cxx, nvcc=nvcc)]
    return found


class Build(cpp_extension.BuildExtension):
    """Keeps each library's objects in a folder of its own: only what has changed is compiled."""

    def finalize_options(self) -> None:
        """Always link: ninja decides what to compile, and the library may be of other choices."""
        super().finalize_options()
        self.force = True
        # Builds with different flags share no objects, so each stays incremental.
        self.objects = Path("build/partial" if left_out_capabilities() else "build")

    def build_extension(self, ext) -> None:
        """Build one library, after the stub that it may need."""
        self.build_temp = str(self.objects / ext.name)
        if ext.name == "fused_xent._C_cuda":
            STUB.parent.mkdir(exist_ok=True)
            empty = ["-shared", "-nostdlib", f"-Wl,-soname,{STUB.name}", "-xc", "/dev/null"]
            subprocess.run([CXX, *empty, "-o", STUB], check=True)
        super().build_extension(ext)

    def run(self) -> None:
        """Build all, and write compile_commands.json for editors."""
        super().run()
        commands = []
        for file in sorted(self.objects.glob("fused_xent.*/build.ninja")):
            commands += json.loads(subprocess.check_output(["ninja", "-f", file, "-t", "compdb"]))
        Path("compile_commands.json").write_text(json.dumps(commands, indent=1) + "\n")


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

"""Builds the native libraries, on LibTorch's stable ABI: each one works with torch 2.10 and newer.

fused_xent._C has the operators' schemas and the CPU kernels of all instruction sets. Nothing in it
depends on the machine that builds it. fused_xent._C_cuda has the CUDA kernels. It is built if nvcc
is found, under any torch and even without a GPU, and it is loaded if torch has CUDA.

FUSED_XENT_CPU_CAPABILITIES="avx2" builds only the CPU kernels of these instruction sets, which is
faster while you edit them: see `make build`.
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
# -Wno-psabi: only inlined functions pass vector types, so their ABI does not matter.
HOST = ["-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden"]
BINDING = ["-O3", "-g0", "-std=c++20", *HOST, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
BINDING += [f"-isystem{path}" for path in cpp_extension.include_paths()]  # no warnings from torch
KERNELS = ["-O3", "-lineinfo", "-std=c++20", "-Xfatbin=-compress-all"]
KERNELS += ["-Xptxas=-warn-spills,-warn-lmem-usage"]
KERNELS += [f"-Xcompiler={flag}" for flag in HOST]
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")  # machine code for all
PTX = "10.0"  # which the driver compiles for 11.x, and for everything newer
CUDART = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
STUB = Path("build/libtorch_cuda.so")  # stands in for torch's CUDA library
CAPABILITIES = ("avx512_bf16", "avx512", "avx2", "portable")  # one file each in csrc/cpu


def cuda_home() -> Path | None:
    """Returns the CUDA toolkit to build with; None: build no CUDA kernels."""
    choice, given = (os.environ.get(name, "") for name in ("FUSED_XENT_CUDA", "CUDA_HOME"))
    if choice not in ("", "0", "1"):
        sys.exit(f"FUSED_XENT_CUDA must be 0 or 1, got {choice!r}")
    on_path = Path(shutil.which("nvcc") or "/usr/bin/nvcc").resolve().parents[1]
    places = [Path(given)] if given else [on_path, Path("/usr/local/cuda")]
    for home in places if choice != "0" else ():
        # Check the headers too: an nvcc on the PATH may be a script that calls another one.
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    if choice == "1":
        sys.exit(f"FUSED_XENT_CUDA=1 needs nvcc, there is none in {' or '.join(map(str, places))}")
    return None


def architecture_flags(nvcc: Path) -> list[str]:
    """Returns the flags for TORCH_CUDA_ARCH_LIST; default: ARCHITECTURES that nvcc supports."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
        wanted = [name for name in ARCHITECTURES if f"sm_{name.replace('.', '')}" in known]
        ptx = PTX if PTX in wanted else wanted[-1]
        names = [f"{name}+PTX" if name == ptx else name for name in wanted]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names)
    try:
        return cpp_extension._get_cuda_arch_flags()
    except (ValueError, IndexError):  # IndexError: "native" without a GPU
        names = os.environ["TORCH_CUDA_ARCH_LIST"]
        sys.exit(f"TORCH_CUDA_ARCH_LIST must be architectures like '8.0;9.0+PTX', got {names!r}")


def left_out_capabilities() -> list[str]:
    """Returns the instruction sets that FUSED_XENT_CPU_CAPABILITIES excludes."""
    wanted = os.environ.get("FUSED_XENT_CPU_CAPABILITIES", "").replace(",", " ").split()
    if unknown := [name for name in wanted if name not in CAPABILITIES]:
        known = ", ".join(CAPABILITIES)
        sys.exit(f"FUSED_XENT_CPU_CAPABILITIES must be some of {known}, got {unknown[0]!r}")
    return [name for name in CAPABILITIES if wanted and name not in wanted]


def extension(name: str, patterns: list[str], link: list[str], **args: list[str]):
    """Makes a native library of files in csrc, with arguments for the linker and each compiler."""
    options = {"py_limited_api": True, "extra_compile_args": args, "extra_link_args": link}
    sources = sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))
    return cpp_extension.CppExtension(name, sources, **options)


def extensions() -> list:
    """Returns the native libraries to build; none without a compiler: torch operations are used."""
    home = cuda_home()
    if shutil.which(CXX) is None:
        print("fused_xent: no C++ compiler (c++ or $CXX): no native kernels", file=sys.stderr)
        return []
    shared = ["binding/layout.cpp", "binding/tensors.cpp"]
    files = ["cpu/*.cpp", "binding/cpu.cpp", "binding/schemas.cpp", *shared]
    left_out = left_out_capabilities()
    cxx = [*BINDING, *(f"-DFUSED_XENT_WITHOUT_{name.upper()}" for name in left_out)]
    native = extension("fused_xent._C", files, [], cxx=cxx)
    native.sources = [path for path in native.sources if Path(path).stem not in left_out]
    found = [native]
    if home is not None:
        cpp_extension.CUDA_HOME = str(home)  # a torch without CUDA does not look for it
        cpp_extension._check_cuda_version = lambda *_: None  # its version may differ from torch's
        files = ["cuda/*.cu", "cuda/*.cpp", "binding/cuda*.cpp", *shared]
        cxx = [*BINDING, "-DUSE_CUDA", f"-isystem{home}/include"]
        nvcc = KERNELS + architecture_flags(home / "bin/nvcc")
        link = [f"-L{home}/lib64", f"-L{home}/lib", *CUDART, f"-Wl,--no-as-needed,{STUB}"]
        found += [extension("fused_xent._C_cuda", files, link, cxx=cxx, nvcc=nvcc)]
    return found


class Build(cpp_extension.BuildExtension):
    """Keeps the objects of each library in its own folder, so only changed files are compiled."""

    def finalize_options(self) -> None:
        """Always links: ninja decides what to compile; an old library may have other options."""
        super().finalize_options()
        self.force = True
        # Builds with different flags share no objects, so each stays incremental.
        self.objects = Path("build/partial" if left_out_capabilities() else "build")

    def build_extension(self, ext) -> None:
        """Builds one library, and before it the stub if it needs that."""
        self.build_temp = str(self.objects / ext.name)
        if ext.name == "fused_xent._C_cuda":
            STUB.parent.mkdir(exist_ok=True)
            empty = ["-shared", "-nostdlib", f"-Wl,-soname,{STUB.name}", "-xc", "/dev/null"]
            subprocess.run([CXX, *empty, "-o", STUB], check=True)
            self.remove_outdated_kernels()
        super().build_extension(ext)

    def remove_outdated_kernels(self) -> None:
        """Removes objects of CUDA files that are older than a header of csrc.

        If torch has no CUDA, its build rule does not tell ninja which headers they include.
        """
        headers = (path for path in Path("csrc").rglob("*.*") if path.suffix in (".h", ".cuh"))
        newest = max(path.stat().st_mtime for path in headers)
        for built in Path(self.build_temp, "csrc/cuda").glob("*.o"):
            if built.stat().st_mtime < newest:
                built.unlink()

    def run(self) -> None:
        """Builds all libraries, and writes compile_commands.json for editors."""
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

"""The built libraries: symbols, dependencies, GPU architectures; and the options of setup.py."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import setuptools
import torch
from torch.torch_version import TorchVersion
from torch.utils import cpp_extension

import fused_xent
from fused_xent import __main__

pytestmark = pytest.mark.cpu("the build is the same for all devices")

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
SHIM = re.compile(r"(aoti_)?torch_\w+")
SYSTEM = re.compile(r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
# Symbols of libstdc++ that libtorch exports too; the linker may bind to either.
STANDARD = re.compile(r"_Z(N[KRO]*)?S[to]\w+")
OPTIONAL = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
WEAK = {"_C": {"torch_from_blob"}, "_C_cuda": set()}  # may be missing when the library is loaded
CUDA_SHIM = {"_C": set(), "_C_cuda": {"aoti_torch_get_current_cuda_stream"}}
LIBRARIES = sorted(CUDA_SHIM)


def run(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def library(name):
    path = Path(fused_xent.__file__).with_name(f"{name}.abi3.so")
    if not path.exists():
        pytest.skip(f"{name} was not built: no {'nvcc' if 'cuda' in name else 'compiler'}")
    return path


def symbols(path, which):
    """Return the names of the dynamic symbols of a library, with their versions."""
    lines = run("nm", "-D", which, path).splitlines()
    return {line.split()[-1] for line in lines}


def shim_functions():
    """Return the functions of torch's C shim up to torch 2.10, and the later ones."""
    functions = {False: set(), True: set()}
    headers = TORCH / "include/torch/csrc"
    for path in [headers / "stable/c/shim.h", *headers.glob("inductor/aoti_torch/**/*.h")]:
        later = [False]  # one entry per open #if
        for line in path.read_text().splitlines():
            version = re.match(r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)_", line)
            if re.match(r"#\s*if", line):
                later.append(later[-1] or (version is not None and int(version[1]) > 10))
            elif re.match(r"#\s*endif", line):
                later.pop()
            elif not line.startswith("//"):
                functions[later[-1]] |= {match[0] for match in SHIM.finditer(line)}
    return functions[False], functions[True]


@pytest.mark.parametrize("name", LIBRARIES)
def test_undefined_symbols_are_torch_shim_or_system(name):
    """The library needs no symbols of CUDA, Python or torch's C++ API."""
    offered = symbols(TORCH / "lib/libtorch_cpu.so", "--defined-only")
    needed = symbols(library(name), "--undefined-only")
    needed -= OPTIONAL | CUDA_SHIM[name] | WEAK[name]
    unversioned = {symbol for symbol in needed if not SYSTEM.fullmatch(symbol)}
    ours = {symbol for symbol in unversioned if SHIM.fullmatch(symbol)}
    assert ours
    assert not [symbol for symbol in unversioned - ours if not STANDARD.fullmatch(symbol)]
    assert ours <= offered


@pytest.mark.parametrize("name", LIBRARIES)
def test_uses_only_the_shim_of_torch_2_10(name):
    early, late = shim_functions()
    assert "torch_call_dispatcher" in early - late
    needed = symbols(library(name), "--undefined-only")
    used = {symbol for symbol in needed if SHIM.fullmatch(symbol)}
    assert used & CUDA_SHIM[name] == CUDA_SHIM[name]
    assert used - early == WEAK[name]
    weak = re.findall(r"(?m)^ +w (torch_\w+)$", run("nm", "-D", library(name)))
    assert set(weak) == WEAK[name]


@pytest.mark.parametrize("name", LIBRARIES)
def test_exports_no_cuda_or_own_symbols(name):
    """It exports nothing of the statically linked CUDA runtime, nor of fused_xent."""
    offered = symbols(library(name), "--defined-only")
    assert not [symbol for symbol in offered if re.match(r"_*cu[A-Zdo]|.*fused_xent", symbol)]


@pytest.mark.parametrize("name", LIBRARIES)
def test_dynamic_dependencies(name):
    dynamic = run("readelf", "-d", library(name))
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    torchs = {f"lib{end}.so" for end in ("c10", "torch", "torch_cpu", "torch_cuda")} & set(needed)
    assert "libtorch_cpu.so" in torchs
    assert ("libtorch_cuda.so" in torchs) == (name == "_C_cuda")
    system = re.compile(r"lib(stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so\.\d|ld-linux.*")
    assert not [path for path in set(needed) - torchs if not system.fullmatch(path)]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def cuobjdump():
    for folder in sys.path:
        for path in Path(folder).glob("nvidia/**/bin/cuobjdump"):
            return path
    found = shutil.which("cuobjdump")
    return found or pytest.skip("cuobjdump is not installed")


def embedded(path, option, kind):
    """Count the embedded code files of the library by architecture."""
    listing = run(cuobjdump(), option, path)
    return Counter(re.findall(rf"\.sm_(\w+)\.{kind}", listing))


@pytest.fixture
def setup_with(monkeypatch):
    """Runs setup.py with these environment variables; returns its globals and its extensions."""
    monkeypatch.chdir(ROOT)
    for name in ("CUDA_HOME", "_check_cuda_version"):  # setup.py sets them; restored afterwards
        monkeypatch.setattr(cpp_extension, name, getattr(cpp_extension, name))

    def read(**environment):
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        monkeypatch.setattr(os, "environ", {**kept, **environment})
        asked = {}
        monkeypatch.setattr(setuptools, "setup", lambda **options: asked.update(options))
        names = runpy.run_path("setup.py")
        return names, {extension.name: extension for extension in asked["ext_modules"]}

    return read


def wanted_flags(extension):
    return [flag for flag in extension.extra_compile_args["nvcc"] if "-gencode" in flag]


def test_machine_code_of_every_architecture(setup_with):
    """Each kernel file is compiled for the architectures that the environment asks for."""
    path = library("_C_cuda")
    asked = {name: os.environ.get(name, "") for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST")}
    extension = setup_with(**asked)[1].get("fused_xent._C_cuda")
    if extension is None:
        pytest.skip("nvcc is no longer installed")
    flags = " ".join(wanted_flags(extension))
    n_files = sum(source.endswith(".cu") for source in extension.sources)
    for option, kind, code in (("--list-elf", "cubin", "sm"), ("--list-ptx", "ptx", "compute")):
        architectures = re.findall(rf"code={code}_(\w+)", flags)
        assert embedded(path, option, kind) == dict.fromkeys(architectures, n_files)


@pytest.fixture
def toolkit(tmp_path):
    """A fake CUDA toolkit, whose nvcc supports some architectures."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    for path in (nvcc, tmp_path / "cuda/include/cuda_runtime.h"):
        path.parent.mkdir(parents=True)
        path.touch()
    nvcc.write_text("#!/bin/sh\necho release 13.0, sm_75 sm_80 sm_90 sm_100 sm_120\n")
    nvcc.chmod(0o755)
    return tmp_path / "cuda"


def test_cuda_library_needs_nvcc(setup_with, toolkit, tmp_path):
    cpu, both = {"fused_xent._C"}, {"fused_xent._C", "fused_xent._C_cuda"}
    on_path = {"PATH": f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    for nvcc in ({"CUDA_HOME": str(toolkit)}, on_path):
        names, built = setup_with(**nvcc)
        assert names["cuda_home"]() == toolkit
        assert set(built) == both
        assert set(setup_with(**nvcc, FUSED_XENT_CUDA="1")[1]) == both
        assert set(setup_with(**nvcc, FUSED_XENT_CUDA="0")[1]) == cpu
    assert set(setup_with(CUDA_HOME=str(tmp_path))[1]) == cpu
    (toolkit / "include/cuda_runtime.h").unlink()  # as if its nvcc were a wrapper of another
    assert setup_with(**on_path)[0]["cuda_home"]() in (None, Path("/usr/local/cuda"))


@pytest.mark.parametrize("names", ["avx2", "portable", "avx512, avx512_bf16"])
def test_partial_build_of_instruction_sets(names, setup_with):
    """Other sets are neither compiled nor dispatched to; objects of a full build are kept."""
    read, built = setup_with(FUSED_XENT_CUDA="0", FUSED_XENT_CPU_CAPABILITIES=names)
    extension, wanted = built["fused_xent._C"], set(names.split(", "))
    others = set(read["CAPABILITIES"]) - wanted
    compiled = {Path(source).stem for source in extension.sources}
    assert compiled & {*read["CAPABILITIES"]} == wanted
    assert {"capability", "launch", "schemas"} <= compiled
    without = {flag for flag in extension.extra_compile_args["cxx"] if "WITHOUT" in flag}
    assert without == {f"-DFUSED_XENT_WITHOUT_{name.upper()}" for name in others}
    chosen = (ROOT / "csrc/cpu/capability.cpp").read_text()
    assert all(f"#ifndef {flag[2:]}\n" in chosen for flag in without)


def test_partial_build_has_its_own_objects(setup_with):
    folders = []
    for names in ("", "avx2"):
        build = setup_with(FUSED_XENT_CUDA="0", FUSED_XENT_CPU_CAPABILITIES=names)[0]["Build"]
        command = build(setuptools.Distribution({"name": "fused_xent"}))
        command.finalize_options()
        assert command.force  # the library in place may be from another build
        folders.append(command.objects)
    assert folders == [Path("build"), Path("build/partial")]


def test_cuda_files_are_compiled_again_after_a_change_of_a_header(setup_with, tmp_path):
    """With a torch without CUDA, ninja does not know their headers."""
    build = setup_with(FUSED_XENT_CUDA="0")[0]["Build"](setuptools.Distribution())
    build.build_temp = str(tmp_path)
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    headers = [path for path in Path("csrc").rglob("*.*") if path.suffix in (".h", ".cuh")]
    newest = max(path.stat().st_mtime for path in headers)
    for name, age in (("old", 1), ("new", -1)):
        (tmp_path / f"csrc/cuda/{name}.o").touch()
        os.utime(tmp_path / f"csrc/cuda/{name}.o", (newest - age, newest - age))
    build.remove_outdated_kernels()
    assert [path.stem for path in (tmp_path / "csrc/cuda").iterdir()] == ["new"]


def test_cuda_version_mismatch(setup_with, toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    setup_with(CUDA_HOME=str(toolkit))
    cpp_extension._check_cuda_version("g++", TorchVersion("12.2.0"))  # called by BuildExtension


def test_sources(setup_with, toolkit):
    """Each source file of csrc is built, into its own object file."""
    built = setup_with(CUDA_HOME=str(toolkit))[1]
    sources = {Path(source) for extension in built.values() for source in extension.sources}
    found = {path for path in Path("csrc").rglob("*.c*") if path.suffix in (".cpp", ".cu")}
    assert sources == found
    for extension in built.values():
        objects = [Path(source).with_suffix(".o") for source in extension.sources]
        assert len(objects) == len(set(objects))


ARCHITECTURES = {
    "": ("sm_80", "sm_90", "sm_100", "compute_100", "sm_120"),  # PTX: also for 11.0
    "8.0;9.0+PTX": ("sm_80", "sm_90", "compute_90"),
    "8.0 8.6": ("sm_80", "sm_86"),
    "9.0a": ("sm_90a",),
    "Hopper": ("sm_90", "compute_90"),
}


@pytest.mark.parametrize("names", ARCHITECTURES)
def test_architectures(names, setup_with, toolkit):
    built = setup_with(CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST=names)[1]
    flags = wanted_flags(built["fused_xent._C_cuda"])
    codes = [flag.split(",code=")[1] for flag in flags]
    assert sorted(codes) == sorted(ARCHITECTURES[names])


def test_architectures_of_an_older_toolkit(setup_with, toolkit):
    """Its newest architecture gets the PTX."""
    (toolkit / "bin/nvcc").write_text("#!/bin/sh\necho release 12.0, sm_80 sm_90\n")
    built = setup_with(CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST="")[1]
    flags = wanted_flags(built["fused_xent._C_cuda"])
    codes = [flag.split(",code=")[1] for flag in flags]
    assert sorted(codes) == ["compute_90", "sm_80", "sm_90"]


WRONG = {
    "choice": ({"FUSED_XENT_CUDA": "yes"}, "FUSED_XENT_CUDA must be 0 or 1, got 'yes'"),
    "capability": (
        {"FUSED_XENT_CPU_CAPABILITIES": "sse"},
        "FUSED_XENT_CPU_CAPABILITIES must be some of avx512_bf16, avx512, avx2, portable, "
        "got 'sse'",
    ),
    "nvcc": (
        {"FUSED_XENT_CUDA": "1", "CUDA_HOME": "/nowhere"},
        "FUSED_XENT_CUDA=1 needs nvcc, there is none in /nowhere",
    ),
    "architecture": (
        {"TORCH_CUDA_ARCH_LIST": "8.0;sm_90"},
        "TORCH_CUDA_ARCH_LIST must be architectures like '8.0;9.0+PTX', got '8.0;sm_90'",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_options_give_one_line_errors(wrong, toolkit, run_python):
    environment, message = WRONG[wrong]
    environment = {"FUSED_XENT_CUDA": "", "CUDA_HOME": str(toolkit), **environment}
    result = run_python("setup.py", "--name", **environment)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == message
    assert "Traceback" not in result.stderr


def test_report_has_what_a_bug_report_needs(monkeypatch, capsys):
    monkeypatch.setenv("FUSED_XENT_KEEP_GRADIENT", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("UNRELATED", "secret")
    __main__.print_report()
    report = capsys.readouterr().out
    versions = {fused_xent.__version__, torch.__version__, platform.python_version()}
    assert not [version for version in versions if version not in report]
    assert platform.platform() in report  # with the versions of kernel and glibc
    assert f"{os.cpu_count()} logical cores" in report
    assert "environment: FUSED_XENT_KEEP_GRADIENT=0, OMP_NUM_THREADS=7\n" in report
    for path in Path(fused_xent.__file__).parent.glob("_C*"):
        size = path.stat().st_size
        assert re.search(rf"\n  {path.name}: {size} bytes, .*(GCC|clang).* \d+\.\d", report)


DRIVERS = {
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Fri Jan 24 2025\n": "570.86.10",
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n": "580.65.06",
    "": "none",
}


@pytest.mark.parametrize("text", DRIVERS)
def test_driver_in_the_report(text, monkeypatch, capsys):
    real = Path.read_text

    def read_text(path):
        return text if str(path) == "/proc/driver/nvidia/version" else real(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    __main__.print_report()
    assert f", NVIDIA driver {DRIVERS[text]}\n" in capsys.readouterr().out

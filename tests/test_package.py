"""Project structure: layers, names; choice of instruction set, and kernel tests under each."""

import ast
import re
from pathlib import Path

import pytest
import torch

import fused_xent

pytestmark = pytest.mark.cpu("checks files and the instruction set of the CPU")
ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fused_xent"
CAPABILITIES = ("avx512_bf16", "avx512", "avx2", "portable")  # best first

# Each module, and the modules of the package that it may import: only those below it.
LAYERS = {
    "_torch_private": set(),
    "reference": set(),
    "_options": set(),
    "_problem": {"_options", "_torch_private"},
    "_overwriting": {"_problem", "_torch_private"},
    "_meta": {"_options", "_problem"},
    "_ops": {"_meta", "_options", "_problem", "_torch_private"},
    "_formulas": {"_options", "_problem", "reference"},
    "_grad_in_forward": {"_ops", "_problem", "_torch_private"},
    "_autograd": {
        *("_formulas", "_grad_in_forward", "_ops", "_options", "_overwriting", "_problem"),
        *("_torch_private", "reference"),
    },
    "_parallel_rows": {"_ops", "_options", "_problem", "_torch_private"},
    "_parallel": {
        *("_autograd", "_formulas", "_ops", "_options", "_overwriting", "_parallel_rows"),
        *("_problem", "_torch_private", "reference"),
    },
    "_dtensor_layout": {"_parallel_rows"},
    "_dtensor": {
        *("_autograd", "_dtensor_layout", "_formulas", "_options", "_parallel", "_problem"),
        *("_torch_private", "reference"),
    },
    "functional": {
        *("_autograd", "_dtensor", "_options", "_parallel", "_problem", "_torch_private"),
        "reference",
    },
    "_products": {"_torch_private"},
    "_linear": {"_formulas", "_ops", "_options", "_problem", "_products", "_torch_private"},
    "_linear_autograd": {
        *("_autograd", "_linear", "_ops", "_options", "_problem", "_torch_private", "reference"),
    },
    "_parallel_linear": {
        *("_autograd", "_formulas", "_linear", "_linear_autograd", "_options", "_parallel"),
        *("_parallel_rows", "_problem", "_products", "_torch_private", "reference"),
    },
    "_linear_checks": {"_linear_autograd", "_options", "_parallel", "_parallel_linear", "_problem"},
    "_linear_rows": {"_linear_autograd", "_options", "_problem", "reference"},
    "linear": {
        *("_autograd", "_dtensor", "_linear_autograd", "_linear_checks", "_linear_rows"),
        *("_options", "_parallel_linear", "_problem", "_torch_private", "reference"),
    },
    "_selected": {
        *("_autograd", "_linear", "_linear_autograd", "_ops", "_options", "_overwriting"),
        *("_problem", "_torch_private", "reference"),
    },
    "_parallel_selected": {
        *("_autograd", "_linear_autograd", "_ops", "_options", "_overwriting", "_parallel"),
        *("_parallel_linear", "_parallel_rows", "_problem", "_torch_private", "reference"),
    },
    "selected": {
        *("_autograd", "_linear_autograd", "_linear_checks", "_options", "_parallel"),
        *("_parallel_selected", "_problem", "_selected", "_torch_private", "linear", "reference"),
    },
    "_decompositions": {
        *("_autograd", "_formulas", "_linear", "_linear_autograd", "_meta", "_ops", "_options"),
        *("_problem", "_selected", "reference"),
    },
    "nn": {"_options", "_parallel", "_torch_private", "functional", "linear"},
    "__init__": {
        *("_decompositions", "_ops", "functional", "linear", "nn", "reference", "selected"),
    },
    "__main__": {"__init__", "_ops", "_options", "reference"},
    "integrations.__init__": set(),
    "integrations._transformers_losses": {"__init__"},
    "integrations._transformers_tail": set(),
    "integrations._transformers_head": {
        *("__init__", "integrations._transformers_losses", "integrations._transformers_tail"),
    },
    "integrations.transformers": {
        *("__init__", "integrations._transformers_head", "integrations._transformers_losses"),
    },
    "integrations._trl_head": {"linear", "selected"},
    "integrations._trl_checks": {"integrations._trl_head"},
    "integrations._trl_gkd": {"functional", "selected"},
    "integrations.trl": {
        *("integrations._trl_checks", "integrations._trl_gkd", "integrations._trl_head"),
    },
    "integrations.torchtitan": {"functional", "linear"},
}


def name_of(path):
    """Return the name of a module of the package, as in LAYERS."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = sorted(PACKAGE.rglob("*.py"))


def package_imports(path):
    """Return the modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").split(".")[0] == "fused_xent"
        ):
            module = (node.module or "").removeprefix("fused_xent").strip(".")
            folder = path.parents[node.level - 1] if node.level else PACKAGE
            prefix = ".".join(folder.relative_to(PACKAGE).parts)
            names = {module} if module else {alias.name for alias in node.names}
            found |= {f"{prefix}.{name}".strip(".") for name in names}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("fused_xent")]
            found |= {name.partition(".")[2] or "__init__" for name in names}
    return {name if name in LAYERS else "__init__" for name in found}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_import_only_lower_layers(path):
    assert package_imports(path) <= LAYERS[name_of(path)]


def test_layers_have_no_cycles():
    """Allowed imports come earlier in the table, so there are no cycles."""
    modules = list(LAYERS)
    assert sorted(modules) == sorted(map(name_of, FILES))
    for i, module in enumerate(modules):
        assert LAYERS[module] <= set(modules[:i]), module


def test_only_one_module_uses_private_names_of_torch():
    """Only _torch_private uses them, since torch changes them without notice."""
    private = re.compile(r"torch(\.\w+)*(\._[a-zA-Z]|\S* import _)")
    files = [path for path in FILES if path.stem != "_torch_private"]
    assert len(files) > 10
    code = {path.name: re.sub(r"#.*", "", path.read_text()) for path in files}
    assert not [name for name, text in code.items() if private.search(text)]


def test_only_the_binding_includes_torch():
    sources = [path for path in ROOT.glob("csrc/**/*") if path.is_file()]
    assert len(sources) > 10
    torch_include = re.compile(r"#include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)")
    found = {path.parent.name for path in sources if torch_include.search(path.read_text())}
    assert found == {"binding"}
    upwards = re.compile(r"#include\s*\"[^\"]*binding/")
    assert not [path for path in sources if upwards.search(path.read_text())]


def test_bench_uses_public_names_only():
    files = sorted((ROOT / "bench").rglob("*.py"))
    assert files
    private = re.compile(r"fused_xent\._[a-z]|fused_xent import .*\b_[a-z]|torch\.ops\.fused")
    assert not [path.name for path in files if private.search(path.read_text())]


def test_public_names():
    assert set(fused_xent.__all__) == {
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
    }
    assert all(getattr(fused_xent, name).__doc__ for name in fused_xent.__all__)


def test_version_matches_pyproject():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{fused_xent.__version__}"\n' in project


PRINT_CAPABILITY = "import fused_xent; print(fused_xent.cpu_capability())"


def capability_under(limit, run_python):
    result = run_python("-c", PRINT_CAPABILITY, FUSED_XENT_CPU_CAPABILITY=limit)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_capability_is_the_best_that_the_environment_allows(run_python):
    best = CAPABILITIES.index(capability_under("", run_python))
    torchs = {"AVX512": (0, 1), "AVX2": (2,)}.get(torch.backends.cpu.get_cpu_capability(), (3,))
    assert best in torchs
    for limit in ("avx512", "portable"):
        lowered = max(best, CAPABILITIES.index(limit))
        assert capability_under(limit, run_python) == CAPABILITIES[lowered]


USE_KERNELS = """
import torch, fused_xent
try:
    fused_xent.cpu_capability()
except ValueError as error:
    print(error)
fused_xent.cross_entropy(torch.ones(2, 3), torch.arange(2))
"""


@pytest.mark.parametrize("limit", ["sse", "AVX2"])
def test_unknown_capability(limit, run_python):
    """cpu_capability() raises, and so does each use of a kernel."""
    result = run_python("-c", USE_KERNELS, FUSED_XENT_CPU_CAPABILITY=limit)
    rule = "FUSED_XENT_CPU_CAPABILITY must be avx512_bf16, avx512, avx2 or portable"
    assert f"{rule}, got '{limit}'\n" in result.stdout
    assert f"ValueError: {rule}, got '{limit}'\n" in result.stderr
    assert result.returncode == 1


def lower_capabilities():
    """Return the instruction sets below the one in use."""
    return CAPABILITIES[CAPABILITIES.index(fused_xent.cpu_capability()) + 1 :]


@pytest.mark.timeout(900)  # thousands of tests: minutes on a busy machine
@pytest.mark.parametrize("capability", lower_capabilities())
def test_kernels_of_other_instruction_sets(capability, run_python):
    """Run the tests marked kernels again, in a process limited to this instruction set."""
    tests = Path(__file__).parent
    files = [str(path) for path in tests.glob("test_*.py") if "mark.kernels" in path.read_text()]
    command = ("-m", "pytest", "-q", "-x", "-m", "kernels", "-p", "no:cacheprovider", *files)
    result = run_python(*command, FUSED_XENT_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stdout[-5000:]
    assert re.search(r"[1-9]\d* passed", result.stdout)

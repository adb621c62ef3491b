"""The machine code of the CUDA kernels in the built library: registers, memory, loops."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import fused_xent

pytestmark = pytest.mark.cpu("the build is the same for all devices")

LIBRARY = Path(fused_xent.__file__).with_name("_C_cuda.abi3.so")


class Kernel(NamedTuple):
    """A kernel of one architecture: name, types of logits and labels, adjacency of rows."""

    arch: str
    name: str
    types: tuple[str, ...]
    code: str


def cuobjdump(*options: str) -> str:
    if not LIBRARY.exists():
        pytest.skip("the CUDA library was not built: no nvcc")
    tools = [path.parent for folder in sys.path for path in Path(folder).glob("nvidia/**/nvdisasm")]
    path = os.pathsep.join([*map(str, tools), os.environ["PATH"]])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("cuobjdump and nvdisasm are not installed: see requirements-dev.txt")
    command = [tool, *options, str(LIBRARY)]
    environment = {**os.environ, "PATH": path}
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout


def demangle(names: list[str]) -> list[str]:
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True
    ).stdout
    return [re.sub(r"\(anonymous namespace\)::", "", name) for name in text.splitlines()]


def kernels_of(disassembly: str) -> list[Kernel]:
    found = []
    for part in re.split(r"\n\s*arch = ", disassembly)[1:]:
        arch = part.split()[0]
        functions = re.split(r"\n\s*Function : ", part)[1:]
        names = demangle([function.split("\n", 1)[0] for function in functions])
        for name, function in zip(names, functions, strict=True):
            match = re.search(r"cuda::(\w+)(?:<(.*?)>)?\(", name)
            types = tuple(match[2].split(", ")) if match[2] else ()
            found.append(Kernel(arch, match[1], types, function))
    return found


class Instruction(NamedTuple):
    """One instruction: its address, whether it has a predicate, its text, where it may jump."""

    address: int
    predicated: bool
    text: str
    target: int | None


def instructions_of(code: str) -> list[Instruction]:
    found = []
    for address, predicate, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?(.*?);", code):
        target = re.match(r"BRA.*?\b0x([0-9a-f]+)", text)
        predicated = bool(predicate) or bool(re.match(r"BRA.*P\d", text))
        jump = int(target[1], 16) if target else None
        found.append(Instruction(int(address, 16), predicated, text, jump))
    return found


def loops_of(code: str) -> list[list[Instruction]]:
    """Return all loops, short ones first."""
    instructions = instructions_of(code)
    bounds = {
        (i.target, i.address) for i in instructions if i.target is not None and i.target < i.address
    }
    loops = [[i for i in instructions if begin <= i.address <= end] for begin, end in bounds]
    return sorted(loops, key=len)


def has(outer: list[Instruction], inner: list[Instruction]) -> bool:
    """Return True if one loop has another one inside."""
    begin, end = inner[0].address, inner[-1].address
    return outer != inner and outer[0].address <= begin and end <= outer[-1].address


def innermost(loops: list[list[Instruction]]) -> list[list[Instruction]]:
    return [loop for loop in loops if not any(has(loop, other) for other in loops)]


def counts(loop: list[Instruction]) -> Counter:
    return Counter(i.text.split()[0] for i in loop)


def inner_loops(code: str) -> list[Counter]:
    """Count the operations of each innermost loop."""
    return [counts(loop) for loop in innermost(loops_of(code))]


def group_loops(code: str) -> list[list[Instruction]]:
    """Return the loops that read a group of vectors and compute exponentials, maybe in a loop.

    A loop over rows has shuffles.
    """
    loops = loops_of(code)
    found = []
    for inner in innermost(loops):
        operations = counts(inner)
        if count(operations, "MUFU.EX2") < 8 or count(operations, "SHFL"):
            continue
        around = (loop for loop in loops if loop == inner or has(loop, inner))
        found += [next(x for x in around if count(counts(x), r"LD[GS].*\.128"))]
    return innermost(found)


def shortest_pass(loop: list[Instruction], n_exponentials: int, n_others: int) -> int | None:
    """Return the fewest instructions of a pass with so many MUFU.EX2 and other MUFU operations."""
    passes: dict[int, dict[tuple[int, int], int]] = {}  # from an address: by these numbers
    for i, instruction in reversed(list(enumerate(loop))):
        following = []
        if instruction.target == loop[0].address:
            following.append({(0, 0): 0})
        elif instruction.target is not None:
            following.append(passes.get(instruction.target, {}))
        if (instruction.target is None or instruction.predicated) and i + 1 < len(loop):
            following.append(passes[loop[i + 1].address])
        exponential = instruction.text.startswith("MUFU.EX2")
        other = instruction.text.startswith("MUFU") and not exponential
        best = passes[instruction.address] = {}
        for (n, m), length in (item for options in following for item in options.items()):
            numbers = n + exponential, m + other
            best[numbers] = min(length + 1, best.get(numbers, length + 1))
    return passes[loop[0].address].get((n_exponentials, n_others))


def count(loop: Counter, pattern: str) -> int:
    return sum(n for operation, n in loop.items() if re.match(pattern, operation))


@pytest.fixture(scope="module")
def kernels():
    """The kernels of one architecture without clusters and one with; others are alike."""
    found = [
        k for arch in ("sm_80", "sm_90") for k in kernels_of(cuobjdump("-sass", "-arch", arch))
    ]
    if not found:
        pytest.skip("the library has no code for sm_80 and sm_90: TORCH_CUDA_ARCH_LIST")
    return found


@pytest.fixture(scope="module")
def sm_100_kernels():
    found = kernels_of(cuobjdump("-sass", "-arch", "sm_100"))
    return found or pytest.skip("the library has no code for sm_100: TORCH_CUDA_ARCH_LIST")


def test_kernels_have_no_local_memory():
    usage = cuobjdump("--dump-resource-usage")
    rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(rows) > 60
    assert not [name for name, _, stack, local in rows if (stack, local) != ("0", "0")]
    assert max(int(registers) for _, registers, _, _ in rows) <= 255


def test_no_instruction_touches_local_memory(kernels):
    assert not [k[:3] for k in kernels if re.search(r"\b(LDL|STL)\b", k.code)]


@pytest.mark.parametrize(
    ("name", "n_loops"),
    [
        *(("forward_rows", 1), ("forward_lane_rows", 1), ("backward_rows", 1)),
        *(("backward_lane_rows", 1), ("forward_backward_rows", 3), ("columns", 2)),
    ],
)
def test_inner_loops_access_16_bytes(kernels, name, n_loops):
    """Logits, probabilities and gradients move 16 bytes at a time, class weights one by one.

    Fused mode has a loop that sweeps, one that writes the part in shared memory, and one that reads
    and writes the rest.
    """
    checked = 0
    for kernel in kernels:
        if kernel.name != name or kernel.types[0] == "double" or kernel.types[2:3] == ("1",):
            continue
        loops = [counts(loop) for loop in group_loops(kernel.code)]
        assert len(loops) == n_loops, kernel[:3]
        for loop in loops:
            at_once = 4 if kernel.types[1] == "void" else 2
            wide = count(loop, r"LDG.*\.128")
            assert wide + count(loop, r"LDS.*\.128") >= at_once, (kernel[:3], loop)
            assert count(loop, "ST(S|L)?\\b") == 0, (kernel[:3], loop)
            assert count(loop, "STG") == count(loop, r"STG.*\.128"), (kernel[:3], loop)
            if kernel.types[1] == "void":
                assert count(loop, "LDG") == wide, (kernel[:3], loop)
        checked += 1
    assert checked >= 8


def test_inner_loops_of_general_kernels_access_16_bytes(kernels):
    """One loop in forward and one in backward; other loops take single elements, of any layout."""
    checked = 0
    for kernel in kernels:
        if kernel.name != "general_rows" or kernel.types[0] == "double":
            continue
        loops = [loop for loop in inner_loops(kernel.code) if count(loop, r"LDG.*\.128")]
        assert sorted(count(loop, "STG") for loop in loops) == [0, 1], kernel[:3]
        for loop in loops:
            assert count(loop, "MUFU.EX2") >= 8, (kernel[:3], loop)
            assert count(loop, "STG") == count(loop, r"STG.*\.128"), (kernel[:3], loop)
            # Class weights, and labels that are not aligned, are read one by one.
            elements = 4 if kernel.types[0] == "float" else 8
            singles = count(loop, "LDG") - count(loop, r"LDG.*\.128")
            assert singles == 2 * elements, (kernel[:3], loop)
        checked += 1
    assert checked >= 8


def test_sums_request_a_batch_of_rows_before_they_add_it(kernels):
    """Losses, targets and class weights: one after the other, each would be a round trip to L2."""
    checked = 0
    for kernel in kernels:
        if kernel.name != "sum_blocks_of_rows":
            continue
        operations = re.findall(r"\b(LDG|DADD|F2F|DFMA|DMUL)\b", kernel.code)
        runs = "".join("L" if name == "LDG" else " " for name in operations).split()
        batch = 16 if kernel.types[0] == "float" else 8
        assert max(map(len, runs)) >= 2 * batch, kernel[:3]
        assert operations.count("LDG") >= 6 * batch, kernel[:3]
        checked += 1
    assert checked >= 2


def test_scaling_has_64_bytes_of_a_thread_in_flight(kernels):
    checked = 0
    for kernel in kernels:
        if kernel.name not in ("scale_rows", "scale_columns") or kernel.types[1:] == ("1",):
            continue
        loops = [loop for loop in inner_loops(kernel.code) if count(loop, r"LDG.*\.128")]
        for loop in loops:
            assert count(loop, r"LDG.*\.128") >= 4, kernel[:3]
            assert count(loop, "STG") == count(loop, r"STG.*\.128") >= 4, kernel[:3]
        checked += bool(loops)
    assert checked == 2 * 8


def test_only_the_warp_that_writes_to_other_blocks_releases(kernels):
    """A release is a fence, MEMBAR, which waits for all writes. The kernel begins with another."""
    checked = 0
    for kernel in kernels:
        if kernel.name == "forward_backward_rows" and kernel.arch == "sm_90":
            barriers = re.findall(r"\b(UCGABAR_ARV|MEMBAR|UCGABAR_WAIT)\b", kernel.code)
            assert Counter(barriers) == {"UCGABAR_ARV": 3, "MEMBAR": 2, "UCGABAR_WAIT": 2}
            checked += 1
    assert checked >= 4


def test_short_rows_are_staged_in_shared_memory(kernels):
    """They are copied by 16 bytes in each direction; no other loop accesses global memory."""
    checked = 0
    for kernel in kernels:
        if kernel.types[3:] != ("true",) or kernel.types[0] == "double":
            continue
        loops = inner_loops(kernel.code)
        wide = [count(loop, r"LDG.*\.128") + count(loop, r"STG.*\.128") for loop in loops]
        assert sorted(n for n in wide if n) == [1, 4], kernel[:3]
        for loop in loops:
            if count(loop, "MUFU.EX2"):
                assert count(loop, "LDG|STG") == 0, (kernel[:3], loop)
        checked += 1
    assert checked >= 3


def test_only_last_reads_need_not_stay_in_the_cache(kernels):
    """The sweeps of forward_backward precede a second read; labels have the default policy."""
    checked = 0
    for kernel in kernels:
        if kernel.name not in ("columns", "general_rows") or kernel.types[0] == "double":
            continue
        if kernel.types[3:] == ("true",):  # rows in shared memory
            continue
        for loop in inner_loops(kernel.code):
            writes, hints = count(loop, r"STG.*\.128"), count(loop, r"LDG.*\.EF\.128")
            if count(loop, r"LDG.*\.128"):
                assert (hints > 0) == (writes > 0), (kernel[:3], loop)
                checked += 1
        if kernel.name == "general_rows":
            assert len(re.findall(r"LDG.*\.EF\.128", kernel.code)) == 1
    for kernel in kernels:
        if kernel.name.endswith("backward_rows"):
            assert not re.search(r"LDG.*\.EF\b", kernel.code), kernel[:3]
    assert checked >= 20


@pytest.mark.parametrize(
    "name", ["forward_rows", "forward_lane_rows", "backward_rows", "backward_lane_rows"]
)
def test_one_exponential_per_element(kernels, name):
    """At most one more per group, for a new maximum; backward has more for the remainder."""
    checked = set()
    for kernel in kernels:
        if kernel.name == name and kernel.types[1:] == ("void",) and kernel.types[0] != "double":
            n = 16 if kernel.types[0] == "float" else 32
            (loop,) = map(counts, group_loops(kernel.code))
            more = 1 if name.startswith("forward") else n
            assert n <= count(loop, "MUFU.EX2") <= n + more, kernel[:3]
            checked.add(kernel.types[0])
    assert len(checked) == 3


# By kernel and what stands for labels: instructions and MUFU operations an element of a whole group
# without a new maximum, in bfloat16 and float32. bench/NOTES.md says what follows.
COSTS = {
    ("forward_rows", "void"): ((6.0, 1.0), (8.1, 1.0625)),
    ("forward_rows", "Uniform"): ((7.6, 1.0), (9.7, 1.0)),
    ("forward_rows", "Capped"): ((11.8, 1.0), (13.4, 1.0)),
    ("forward_rows", "UniformCapped"): ((13.4, 1.0), (15.5, 1.0)),
    ("forward_lane_rows", "void"): ((5.8, 1.0), (6.8, 1.0625)),
    ("forward_lane_rows", "Uniform"): ((7.4, 1.0), (8.5, 1.0)),
    ("backward_lane_rows", "void"): ((5.4, 1.0), (5.7, 1.0)),
    ("backward_lane_rows", "Uniform"): ((5.4, 1.0), (5.7, 1.0)),
    ("backward_rows", "void"): ((5.7, 1.0), (7.2, 1.0)),
    ("backward_rows", "Uniform"): ((5.7, 1.0), (7.2, 1.0)),
    ("backward_rows", "Capped"): ((14.6, 1.0), (14.8, 1.0)),
    ("backward_rows", "UniformCapped"): ((14.6, 1.0), (14.8, 1.0)),
}


# The same on sm_100, where one instruction computes two numbers.
COSTS_OF_PAIRS = {
    ("forward_rows", "void"): ((4.9, 1.0), (5.9, 1.0625)),
    ("forward_rows", "Uniform"): ((6.1, 1.0), (7.3, 1.0)),
    ("forward_rows", "Capped"): ((8.3, 1.0), (9.0, 1.0)),
    ("forward_rows", "UniformCapped"): ((9.4, 1.0), (10.7, 1.0)),
    ("backward_rows", "void"): ((4.5, 1.0), (4.3, 1.0)),
    ("backward_rows", "Uniform"): ((4.5, 1.0), (4.3, 1.0)),
    ("backward_rows", "Capped"): ((9.2, 1.0), (8.8, 1.0)),
    ("backward_rows", "UniformCapped"): ((9.2, 1.0), (8.8, 1.0)),
}

# Instructions an element of fused mode, which reads it twice, in bfloat16 and float32.
FUSED_COSTS = {
    "sm_90": {
        "void": (12.1, 14.9),
        "Uniform": (13.8, 16.6),
        "Capped": (26.4, 28.4),
        "UniformCapped": (28.0, 30.5),
    },
    "sm_100": {
        "void": (9.5, 10.6),
        "Uniform": (10.7, 12.0),
        "Capped": (17.3, 18.2),
        "UniformCapped": (18.5, 19.8),
    },
}


def elements_of_group(kernel: Kernel) -> int:
    return 16 if kernel.types[0] == "float" else 32


def group_loop_of(kernel: Kernel) -> tuple[list[Instruction], int]:
    """Return the loop of forward or backward over groups, and the elements of a group."""
    n = elements_of_group(kernel)
    found = [
        loop
        for loop in group_loops(kernel.code)
        if any(shortest_pass(loop, m, 0) is not None for m in (n, n + 1))
    ]
    assert len(found) == 1, (kernel[:3], len(found))
    return found[0], n


def of_types(kernels, name: str, labels: str, arch: str = "sm_90") -> list[Kernel]:
    return [
        k
        for k in kernels
        if k[:2] == (arch, name) and k.types[0] != "double" and k.types[1].split("::")[-1] == labels
    ]


def check_cost(found: list[Kernel], limits) -> None:
    assert len(found) == 3
    for kernel in found:
        loop, n = group_loop_of(kernel)
        limit = limits[kernel.types[0] == "float"]
        special, length = usual_pass(loop, n)
        assert length / n <= limit[0], (kernel[:3], length / n)
        assert special / n <= limit[1], (kernel[:3], special)


def usual_pass(loop: list[Instruction], n: int) -> tuple[int, int]:
    """Return the exponentials, n or one more for a new maximum, and instructions of a pass."""
    passes = {m: shortest_pass(loop, m, 0) for m in (n, n + 1)}
    return next((m, length) for m, length in passes.items() if length is not None)


def test_lanes_of_short_rows_are_merged_without_loops(kernels):
    """Each step is one shuffle of the maximum and one of each sum, of 5 for the largest team."""
    checked = 0
    for kernel in kernels:
        if kernel.name != "forward_lane_rows":
            continue
        n_sums = 1 if kernel.types[1] == "void" else 3
        assert len(re.findall(r"SHFL\.BFLY", kernel.code)) == 5 * (1 + n_sums), kernel[:3]
        assert not re.search(r"WARPSYNC|BAR\.SYNC", kernel.code), kernel[:3]
        checked += 1
    assert checked >= 6


@pytest.mark.parametrize(("name", "labels"), COSTS)
def test_cost_of_an_element(kernels, name, labels):
    """Softcap, logit scale and uniform label smoothing keep memory the bottleneck."""
    check_cost(of_types(kernels, name, labels), COSTS[name, labels])


@pytest.mark.parametrize(("name", "labels"), COSTS_OF_PAIRS)
def test_cost_of_an_element_in_pairs(sm_100_kernels, name, labels):
    found = of_types(sm_100_kernels, name, labels, "sm_100")
    check_cost(found, COSTS_OF_PAIRS[name, labels])


@pytest.mark.parametrize("labels", FUSED_COSTS["sm_90"])
@pytest.mark.parametrize("arch", FUSED_COSTS)
def test_cost_of_an_element_in_fused_mode(request, arch, labels):
    """The sweep, then the slower of the loops that write: from shared memory, and from L2."""
    fixture = "kernels" if arch == "sm_90" else "sm_100_kernels"
    found = of_types(request.getfixturevalue(fixture), "forward_backward_rows", labels, arch)
    assert len(found) == 3
    for kernel in found:
        n = elements_of_group(kernel)
        costs: dict[bool, list[float]] = {True: [], False: []}  # by whether the loop writes
        for loop in group_loops(kernel.code):
            costs[bool(count(counts(loop), r"STG"))].append(usual_pass(loop, n)[1] / n)
        assert [len(costs[writes]) for writes in (False, True)] == [1, 2], (kernel[:3], costs)
        limit = FUSED_COSTS[arch][labels][kernel.types[0] == "float"]
        assert costs[False][0] + max(costs[True]) <= limit, (kernel[:3], costs)


@pytest.mark.parametrize(
    ("name", "labels", "limit"),
    [
        ("forward_rows", "Capped", 16.9),
        ("forward_rows", "UniformCapped", 18.5),
        ("backward_rows", "Capped", 19.7),
        ("backward_rows", "UniformCapped", 19.7),
    ],
)
def test_cost_of_a_large_softcapped_logit(kernels, name, labels, limit):
    """Where the tanh takes an exponential: four vectors, one after the other."""
    found = [k for k in of_types(kernels, name, labels) if k.types[0] != "float"]
    assert len(found) == 2
    for kernel in found:
        loop, n = group_loop_of(kernel)
        (inner,) = (x for x in loops_of(kernel.code) if has(loop, x))
        once = shortest_pass(loop, 16, 2)  # with one vector
        assert (once + 3 * len(inner)) / n <= limit, (kernel[:3], once, len(inner))

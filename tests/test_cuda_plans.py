"""The plans of csrc/cuda/plan.h: regime and launch shape at every boundary of its table."""

import cuda_builds
import pytest

COLUMNS, WARP, BLOCK, SPLIT = range(4)
OPERATIONS = ("forward", "backward", "forward_backward")
MEMBERS = (*("regime", "threads", "team", "parts", "held", "workers", "row_vector", "max_groups"),)
KIB = 1024

pytestmark = pytest.mark.cpu("runs in the emulator")


@pytest.fixture(scope="module")
def emulated(emulator_builds):
    if cuda_builds.MISSING:
        pytest.skip(cuda_builds.MISSING)
    return cuda_builds.module(emulator_builds, "sm_100")


@pytest.fixture(scope="module")
def devices(emulated):
    """The properties that plans depend on, for an A100, an H100 or H200, a B200, an RTX 5090."""
    return {
        "sm_80": emulated.Device(80, 108, 163 * KIB),
        "sm_90": emulated.Device(90, 132, 227 * KIB),
        "sm_100": emulated.Device(100, 148, 227 * KIB),
        "sm_120": emulated.Device(120, 170, 99 * KIB),
    }


@pytest.fixture(scope="module")
def plan(emulated, devices):
    def plan(operation, n_rows, row_bytes, device="sm_90", element_size=2, **layout):
        shape = emulated.Shape(n_rows, row_bytes // element_size, element_size, **layout)
        members = emulated.plan_for(operation, shape, devices[device])
        return dict(zip(MEMBERS, members, strict=False))

    return plan


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("row_bytes", "regime"),
    [(2, COLUMNS), (128, COLUMNS), (130, WARP), (4 * KIB, WARP), (4 * KIB + 2, BLOCK)],
)
def test_regime_by_length(plan, operation, row_bytes, regime):
    assert plan(operation, 100_000, row_bytes)["regime"] == regime


@pytest.mark.parametrize("operation", OPERATIONS)
def test_strided_classes_use_columns(plan, operation):
    assert plan(operation, 100_000, 4 * KIB, adjacent_classes=False)["regime"] == COLUMNS


@pytest.mark.parametrize(
    ("row_bytes", "team"), [(130, 2), (256, 2), (258, 4), (512, 4), (2000, 16), (4 * KIB, 32)]
)
def test_team_of_a_warp(plan, row_bytes, team):
    """Each lane has at most eight vectors of 16 bytes, or sixteen if that leaves enough threads."""
    half = max(team // 2, 2)
    for operation in OPERATIONS:
        assert plan(operation, 1000, row_bytes)["team"] == team
        assert plan(operation, 480 * 132 // half - 1, row_bytes)["team"] == team
        assert plan(operation, 480 * 132 // half, row_bytes)["team"] == half
    assert plan("forward", 8192, 2000)["team"] == 8


def test_teams_of_a_warp_have_several_rows(plan):
    """As many as leave waves of blocks that are three quarters full."""
    for operation in ("forward", "backward"):
        for n_rows, device, rows_of_team in (
            *((8192, "sm_90", 0), (65_536, "sm_90", 4), (10**6, "sm_90", 8)),
            *((65_536, "sm_80", 2), (65_536, "sm_100", 4)),
        ):
            chosen = plan(operation, n_rows, 2000, device)
            assert chosen["team"] == 8
            blocks = -(-n_rows // (16 * rows_of_team)) if rows_of_team else 0  # 16 teams each
            assert chosen["max_groups"] == blocks, (n_rows, device)
        for kind in ("general", "spread", "capped"):
            assert plan(operation, 10**6, 2000, **{kind: True})["max_groups"] == 0
        assert plan(operation, 10**6, 2000, element_size=8)["max_groups"] == 0


def test_few_rows_are_split_in_forward(plan):
    v = 256_512  # bytes of 128256 classes
    assert plan("forward", 660, v)["regime"] == BLOCK  # five blocks a multiprocessor
    few = plan("forward", 330, v)
    assert (few["regime"], few["parts"]) == (SPLIT, 2)
    assert plan("forward", 1, v)["parts"] == v // 16 // (4 * 256)  # the least work per part


@pytest.mark.parametrize("row_bytes", [65_536, 256_512, 1_000_000])
@pytest.mark.parametrize("device", ["sm_80", "sm_90", "sm_100"])
def test_few_rows_fill_the_card(plan, devices, device, row_bytes):
    """The blocks of forward and backward make whole waves, if rows are long enough."""
    for operation, blocks_per_sm in (("forward", 5), ("backward", 4)):
        for n_rows in range(1, 265):
            parts = plan(operation, n_rows, row_bytes, device)["parts"]
            if parts == row_bytes // 16 // (4 * 256):
                continue
            slots = devices[device].sm_count * blocks_per_sm
            waves = -(-n_rows * parts // slots)
            assert n_rows * parts >= 0.8 * waves * slots, (operation, n_rows, parts)
    if device == "sm_90":
        assert plan("backward", 64, 256_512)["parts"] == 8


@pytest.mark.parametrize(
    ("n_rows", "device", "threads"),
    [
        *((1, "sm_90", 2048), (33, "sm_90", 2048), (34, "sm_90", 1024), (64, "sm_90", 1024)),
        *((66, "sm_90", 1024), (67, "sm_90", 512), (132, "sm_90", 512), (133, "sm_90", 1024)),
        *((199, "sm_90", 512), (264, "sm_90", 512), (37, "sm_100", 2048), (74, "sm_100", 1024)),
        *((75, "sm_100", 512), (64, "sm_80", 512)),
    ],
)
def test_few_rows_use_clusters_in_fused_mode(plan, n_rows, device, threads):
    """133 rows by blocks would take two rounds of 132; by clusters of two, one and a half."""
    chosen = plan("forward_backward", n_rows, 256_512, device)
    assert chosen["threads"] * chosen["parts"] == threads
    assert chosen["regime"] == (SPLIT if threads > 512 else BLOCK)


def test_few_shorter_rows_get_more_threads(plan):
    for n_rows, threads in ((528, 128), (264, 256), (132, 512), (1, 512)):
        chosen = plan("forward_backward", n_rows, 64_000)
        assert chosen["threads"] * chosen["parts"] == threads, n_rows


def test_long_rows_are_split_in_backward(plan):
    assert plan("backward", 100_000, 32 * KIB)["regime"] == BLOCK
    assert plan("backward", 100_000, 32 * KIB + 2)["parts"] == 2
    assert plan("backward", 8192, 256_512)["parts"] == 8
    assert plan("backward", 1, 64 * KIB)["parts"] == 4  # each thread has four vectors


@pytest.mark.parametrize(
    ("n_classes", "element_size", "parts"),
    [
        (128_256, 2, 1),
        (151_936, 2, 1),  # a small part of the row is read twice
        (160_000, 2, 2),
        (262_144, 2, 2),
        (262_144, 4, 4),
        (1_000_000, 4, 8),
        (128_256, 8, 8),
    ],
)
def test_clusters(plan, n_classes, element_size, parts):
    row_bytes = n_classes * element_size
    chosen = plan("forward_backward", 8192, row_bytes, element_size=element_size)
    assert chosen["parts"] == parts
    assert plan("forward_backward", 8192, row_bytes, "sm_80")["parts"] == 1


@pytest.mark.parametrize(
    ("row_bytes", "device", "threads", "held"),
    [
        (2000, "sm_90", 128, 8),  # sixteen vectors for each lane, eight of them in registers
        (8 * KIB, "sm_90", 32, 8),
        (64_000, "sm_90", 128, 24),  # 32000 classes of bfloat16, all held
        (128 * KIB, "sm_90", 256, 24),
        (128 * KIB + 2, "sm_90", 512, 12),
        (256_512, "sm_90", 512, 24),  # 128256 classes, one block per multiprocessor
        (303_872, "sm_90", 512, 28),  # 151936 classes: as much as fits
        (524_288, "sm_90", 512, 24),  # 262144 classes, a cluster of two blocks
        (256_512, "sm_80", 512, 20),
        (64_000, "sm_120", 128, 24),
        (256_512, "sm_120", 512, 8),
    ],
)
def test_held_vectors(plan, row_bytes, device, threads, held):
    chosen = plan("forward_backward", 8192, row_bytes, device)
    assert (chosen["threads"], chosen["held"]) == (threads, held)


def test_spread_labels_use_shared_memory(plan):
    """So the row is in shared memory, with twice the threads; 128256 classes take a cluster."""
    for row_bytes, threads, held in ((2000, 128, 16), (64_000, 256, 16), (256_512, 512, 16)):
        chosen = plan("forward_backward", 8192, row_bytes, spread=True)
        assert (chosen["threads"], chosen["held"]) == (threads, held)


def test_softcap_leaves_fewer_vectors_in_registers(plan):
    plain, capped = (plan("forward_backward", 8192, 32_000, capped=c) for c in (False, True))
    assert (plain["held"], capped["held"]) == (24, 28)


def test_number_of_groups(plan):
    assert plan("forward_backward", 8192, 256_512)["max_groups"] == 4096
    assert plan("forward_backward", 8192, 2000)["max_groups"] == 528  # sixteen teams per block
    assert plan("forward_backward", 200, 256_512)["max_groups"] == 132
    assert plan("forward_backward", 200, 524_288)["max_groups"] == 100


def test_workers_and_vectors_of_columns(plan):
    image = {"adjacent_classes": False, "adjacent_rows": True}
    many = plan("forward", 132 * 512 * 8, 42, **image)  # 21 classes
    assert (many["workers"], many["row_vector"]) == (1, 8)
    assert plan("forward", 8 * 256 * 256, 42, **image)["row_vector"] == 8
    assert plan("forward", 132 * 256 * 8, 42, **image)["row_vector"] == 8
    assert plan("forward", 132 * 256 * 8 - 8, 42, **image)["row_vector"] == 1
    by_workers = plan("forward", 132 * 256, 300, **image)  # 150 classes
    assert (by_workers["workers"], by_workers["row_vector"]) == (8, 8)
    assert plan("forward", 100, 42, **image)["workers"] == 1  # too few classes to share
    assert plan("forward", 100, 300, **image)["workers"] == 8
    assert plan("forward", 132 * 512, 300, adjacent_classes=False)["workers"] == 1
    assert plan("forward", 132 * 512 * 8, 42, adjacent_classes=False)["row_vector"] == 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_general_kernels_hold_no_vectors(plan, operation):
    """Except in fused mode, they have the same plans as the plain kernels."""
    for v in (1000, 128 * KIB, 256_512):
        chosen = plan(operation, 8192, v, general=True)
        assert (chosen["held"], chosen["threads"] <= 256) == (0, True)
        if operation != "forward_backward":
            assert chosen == plan(operation, 8192, v)
    for kind in ("general", "scaled", "capped"):
        image = {"adjacent_classes": False, "adjacent_rows": True, kind: True}
        assert plan(operation, 132 * 512 * 8, 42, **image)["row_vector"] == 1


@pytest.mark.parametrize("kinds", [[], ["spread"], ["general", "spread"], ["capped"]], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("device", ["sm_80", "sm_90", "sm_120"])
def test_chosen_plans_are_valid(emulated, devices, operation, element_size, device, kinds):
    """why_not accepts every chosen plan, for sizes from 0 to the largest."""
    for n_rows in (0, 1, 3, 500, 70_000, 2**31 - 1):
        for vocab_size in (0, 1, 2, 63, 65, 1000, 2049, 20_000, 131_072, 300_007, 2**31 - 1):
            for adjacent in (True, False):
                layout = dict.fromkeys(kinds, True)
                layout |= {"adjacent_classes": adjacent, "adjacent_rows": not adjacent}
                shape = emulated.Shape(n_rows, vocab_size, element_size, **layout)
                chosen = emulated.plan_for(operation, shape, devices[device])
                assert emulated.why_not(chosen, shape, devices[device]) is None, chosen


ROWS = {"regime": BLOCK, "threads": 64, "team": 64, "parts": 1, "held": 0}
ROWS |= {"workers": 1, "row_vector": 1, "max_groups": 0}
REFUSED = {
    "threads not a power of two": ({"threads": 96, "team": 96}, "threads must be a power of two"),
    "threads of half a warp": ({"threads": 16, "team": 16}, "threads must be a power of two"),
    "more threads than the launch bounds": ({"threads": 1024, "team": 1024}, "threads must be"),
    "more shared memory than available": ({"threads": 512, "team": 512, "held": 32}, "less shared"),
    "a team of two warps in a block of four": ({"threads": 128}, "team must be threads"),
    "parts of a block": ({"threads": 128, "team": 32, "parts": 2}, "parts must be of whole"),
    "no parts": ({"parts": 0}, "parts must be of whole"),
    "parts of a row that is not split": ({"parts": 2}, "parts must be those of a split"),
    "held vectors not a multiple of a group": ({"held": 6}, "held must be a multiple of 4"),
    "negative number of vectors": ({"held": -4}, "must not be negative"),
    "workers not a power of two": ({"regime": COLUMNS, "workers": 3}, "workers must be a power"),
    "more workers than warps": ({"regime": COLUMNS, "workers": 4}, "workers must be a power"),
    "parts by columns": ({"regime": COLUMNS, "parts": 2}, "parts must be 1 by columns"),
    "vectors of separate rows": ({"regime": COLUMNS, "row_vector": 4}, "row_vector must be"),
}


@pytest.mark.parametrize("plan", REFUSED)
def test_invalid_plans(emulated, devices, plan):
    changes, message = REFUSED[plan]
    shape = emulated.Shape(9, 5000, 4, True, False, False, False)
    assert emulated.why_not(list(ROWS.values()), shape, devices["sm_90"]) is None
    why = emulated.why_not(list((ROWS | changes).values()), shape, devices["sm_90"])
    assert message in str(why)

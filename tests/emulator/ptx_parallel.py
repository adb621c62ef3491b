"""Instructions that access memory or synchronize threads."""

from .ptx_instructions import elements, handles
from .ptx_operands import C_TYPES, FLOATS, bits

MEMORY_ORDERS = {
    "relaxed": "__ATOMIC_RELAXED",
    "acquire": "__ATOMIC_ACQUIRE",
    "release": "__ATOMIC_RELEASE",
    "acq_rel": "__ATOMIC_ACQ_REL",
}


def memory_order(i):
    return next((MEMORY_ORDERS[p] for p in i.parts if p in MEMORY_ORDERS), None)


# ---- loads, stores, atomics -------------------------------------------------------------------
@handles("ld", "ldu", "st")
def load_store(i):
    is_store = i.name == "st"
    where, what = (0, 1) if is_store else (1, 0)
    values = elements(i.arguments[what])
    size, c_type, order = bits(i.type) // 8, C_TYPES[i.type], memory_order(i)
    if order and len(values) > 1:
        return None
    if i.has("volatile") and len(values) == 1:  # PTX: like relaxed, so not a data race
        order = MEMORY_ORDERS["relaxed"]
    accesses = []
    for n, value in enumerate(values):
        place = f"p + {n * size}"
        if is_store:
            data = i.operands.read(value, i.type)
            plain = f"*({c_type}*)({place}) = {data};"
            accesses.append(f"atomic_store<{c_type}, {order}>(p, {data});" if order else plain)
        else:
            plain = f"*(const {c_type}*)({place})"
            data = f"atomic_load<{c_type}, {order}>(p)" if order else plain
            accesses.append(i.operands.write(value, i.type, data))
    polls = "spin_hint(HERE); " if order and not is_store else ""
    pointer = i.address(where)
    if i.space() == "global" and size * len(values) < 16:
        polls += "count_narrow_access(); "
    if i.space() != "param":  # parameters are copied from host variables, which are aligned
        pointer = f"aligned({pointer}, {size * len(values)}, HERE)"
    return f"{polls}char* p = {pointer}; {' '.join(accesses)}"


UPDATES = {
    "add": "a + b",
    "min": "min_of(a, b)",
    "max": "max_of(a, b)",
    "and": "a & b",
    "or": "a | b",
    "xor": "a ^ b",
    "exch": "b",
    "inc": "a >= b ? 0 : a + 1",
    "dec": "a == 0 || a > b ? b : a - 1",
    "cas": "a == b ? c : a",
}


@handles("atom", "red")
def atomic(i):
    operation = next((p for p in i.parts if p in UPDATES), None)
    if not operation or i.has("v2", "v4", "v8", "noftz"):
        return None
    c_type, where = C_TYPES[i.type], 1 if i.name == "atom" else 0
    inputs = [f"const {c_type} b = {i.operands.read(i.arguments[where + 1], i.type)};"]
    if operation == "cas":
        inputs.append(f"const {c_type} c = {i.operands.read(i.arguments[where + 2], i.type)};")
    update = (
        f"atomic_update<{c_type}, {memory_order(i) or '__ATOMIC_RELAXED'}>"
        f"(aligned({i.address(where)}, {bits(i.type) // 8}, HERE), "
        f"[&]({c_type} a) -> {c_type} {{ return {UPDATES[operation]}; }})"
    )
    result = i.operands.write(i.arguments[0], i.type, update) if where else f"{update};"
    polls = "spin_hint(HERE); " if operation in ("cas", "exch") else ""
    return f"{polls}{' '.join(inputs)} {result}"


@handles("mapa")
def map_address(i):
    rank = i.read(2, "u32")
    if i.has("shared::cluster"):
        return i.write(f"({i.read(1)} & 0xfffff) | ({rank} + 1) << kRankShift")
    return i.write(f"(uint64_t)map_to_rank((void*){i.read(1, 'u64')}, {rank}, HERE)")


# ---- barriers, fences -------------------------------------------------------------------------
REDUCTIONS = {"popc": "kCount", "and": "kAnd", "or": "kOr"}


@handles("bar", "barrier")
def barrier(i):
    if i.has("cluster"):
        if i.has("wait"):
            return "cluster_wait(HERE);"
        return f"cluster_arrive({'false' if i.has('relaxed') else 'true'}, HERE);"
    if i.has("warp"):
        return f"warp_collective(Collective::kSync, {i.read(0, 'u32')}, 0, 0, 32, HERE);"
    if i.has("red"):
        return barrier_reduction(i)
    identifier = i.read(0, "u32")
    threads = i.read(1, "u32") if len(i.arguments) > 1 else "kWholeBlock"
    if i.has("arrive"):
        return f"block_barrier_arrive({identifier}, {threads}, HERE);"
    return f"block_barrier({identifier}, {threads}, false, Reduction::kCount, HERE);"


def barrier_reduction(i):
    kind = next(REDUCTIONS[p] for p in i.parts if p in REDUCTIONS)
    threads = i.read(2, "u32") if len(i.arguments) > 3 else "kWholeBlock"
    predicate = i.read(-1, "pred")
    call = f"block_barrier({i.read(1, 'u32')}, {threads}, {predicate}, Reduction::{kind}, HERE)"
    return i.write(call, "pred" if i.type == "pred" else "u32")


@handles("membar", "fence")
def fence(i):
    return ";" if i.has("proxy", "mbarrier_init") else "memory_fence();"


# ---- warp collectives -------------------------------------------------------------------------
SHUFFLES = {"idx": "Index", "up": "Up", "down": "Down", "bfly": "Xor"}
VOTES = {"ballot": "kBallot", "any": "kAny", "all": "kAll"}
REDUX = {"add": "Add", "min": "Min", "max": "Max", "and": "And", "or": "Or", "xor": "Xor"}


@handles("shfl")
def shuffle(i):
    target, *in_range = (t.strip() for t in i.arguments[0].split("|"))
    kind = f"Collective::kShuffle{SHUFFLES[i.parts[2]]}"
    lane = f"{i.read(2, 'u32')}, 32 - ({i.read(3, 'u32')} >> 8 & 31)"
    before = f"const bool in_range = shuffle_in_range({kind}, {lane});"
    call = f"warp_collective({kind}, {i.read(4, 'u32')}, {i.read(1, 'b32')}, {lane}, HERE)"
    after = i.operands.write(in_range[0], "pred", "in_range") if in_range else ""
    return f"{before} {i.operands.write(target, 'b32', call)} {after}"


@handles("vote")
def vote(i):
    kind = VOTES.get(i.parts[2])
    if not kind:
        return None
    predicate = i.read(1, "pred")
    call = f"warp_collective(Collective::{kind}, {i.read(2, 'u32')}, {predicate}, 0, 32, HERE)"
    return i.write(call, "b32" if kind == "kBallot" else "pred")


@handles("redux")
def warp_reduction(i):
    if i.type in FLOATS:
        return None
    kind = REDUX[i.parts[2]]
    if i.type == "s32" and kind in ("Min", "Max"):
        kind += "Signed"
    mask = i.read(2, "u32")
    call = f"warp_collective(Collective::kReduce{kind}, {mask}, {i.read(1, 'u32')}, 0, 32, HERE)"
    return i.write(call, "u32")


# ---- asynchronous copies ----------------------------------------------------------------------
@handles("cp")
def copy(i):
    if not i.has("async") or i.has("tensor", "reduce", "mbarrier"):
        return None
    if i.has("bulk"):
        return bulk_copy(i)
    if i.has("commit_group"):
        return "async_commit();"
    if i.has("wait_all"):
        return "async_commit(); async_wait(0);"
    if i.has("wait_group"):
        return f"async_wait({i.arguments[0]});"
    bytes_ = i.arguments[2]
    source_bytes = i.read(3, "u32") if len(i.arguments) > 3 else bytes_
    target = f"aligned({i.address(0, 'shared')}, {bytes_}, HERE)"
    source = f"aligned({i.address(1, 'global')}, {bytes_}, HERE)"
    return f"async_copy({target}, {source}, {bytes_}, {source_bytes});"


def bulk_copy(i):
    if i.has("commit_group"):
        return "bulk_commit();"
    if i.has("wait_group"):
        return f"bulk_wait({i.arguments[0]});"
    direction = [p for p in i.parts if p == "global" or p.startswith("shared")]
    if i.has("multicast::cluster", "cp_mask") or len(direction) != 2:
        return None
    target, source = i.address(0, direction[0]), i.address(1, direction[1])
    size = i.read(2, "u32")
    if i.has("bulk_group"):
        return f"bulk_store({target}, {source}, {size}, HERE);"
    return f"bulk_load({target}, {source}, {size}, {i.address(3, 'shared::cluster')}, HERE);"


@handles("mbarrier")
def mbarrier(i):
    action = i.parts[1]
    where = 0 if action in ("init", "inval", "expect_tx") else 1
    address = i.address(where, i.space() or "shared")
    if action == "init":
        return f"mbarrier_init({address}, {i.read(1, 'u32')});"
    if action == "inval":
        return ";"
    if action == "expect_tx":
        return f"mbarrier_expect({address}, {i.read(1, 'u32')}, HERE);"
    if action == "arrive" and i.arguments[0] == "_":
        return mbarrier_arrival(i, address)
    if action in ("try_wait", "test_wait") and i.has("parity"):
        wait = f"mbarrier_wait({address}, {i.read(2, 'u32')}, HERE);"
        return wait + " " + i.operands.write(i.arguments[0], "pred", "true")
    return None  # waits on a phase token


def mbarrier_arrival(i, address):
    if i.has("expect_tx"):
        expect = f"mbarrier_expect({address}, {i.read(2, 'u32')}, HERE);"
        return f"{expect} mbarrier_arrive({address}, 1, HERE);"
    count = i.read(2, "u32") if len(i.arguments) > 2 else "1"
    return f"mbarrier_arrive({address}, {count}, HERE);"

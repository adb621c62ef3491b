"""Handlers that translate PTX instructions to C++ statements, one per instruction family.

A handler returns None for a variant that it does not know, which is reported as an error.
"""

from .ptx_operands import C_TYPES, FLOATS, bits
from .ptx_parser import PtxError

HANDLERS = {}
DIRECTED_ROUNDING = {"rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
HALF_TYPES = ("f16", "bf16")
LOGIC = {"and": "&", "or": "|", "xor": "^"}


def handles(*names):
    def register(function):
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


class Instruction:
    def __init__(self, text, operands):
        self.text, self.operands = text, operands
        opcode, _, rest = text.partition(" ")
        self.parts = opcode.split(".")
        self.name, self.type = self.parts[0], self.parts[-1]
        self.arguments = split_arguments(rest)

    def has(self, *modifiers):
        return any(m in self.parts for m in modifiers)

    def read(self, index, type_=None):
        type_ = type_ or self.type
        value = self.operands.read(self.arguments[index], type_)
        return f"flush({value})" if self.has("ftz") and type_ == "f32" else value

    def write(self, expression, type_=None, index=0):
        type_ = type_ or self.type
        if self.has("sat") and type_ in FLOATS:
            expression = f"saturate({expression})"
        if self.has("ftz") and type_ == "f32":
            expression = f"flush({expression})"
        return self.operands.write(self.arguments[index], type_, expression)

    def space(self):
        spaces = ("param", "global", "local", "const")
        found = [p for p in self.parts[1:] if p in spaces or p.startswith("shared")]
        return found[0] if found else ""

    def address(self, index, space=""):
        return self.operands.address(self.arguments[index], space or self.space())


def split_arguments(text):
    """Split at commas outside brackets and braces."""
    if "{" not in text and "[" not in text:
        return [argument.strip() for argument in text.split(",") if argument]
    arguments, depth, current = [], 0, ""
    for character in text:
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            arguments.append(current.strip())
            current = ""
        else:
            current += character
    return [*arguments, current.strip()] if current.strip() else arguments


def elements(argument):
    return [e.strip() for e in argument.strip("{}").split(",")]


def translate(text, operands):
    instruction = Instruction(text, operands)
    handler = HANDLERS.get(instruction.name)
    result = handler(instruction) if handler else None
    if result is None:
        raise PtxError(operands.line, f"unsupported instruction: {text}")
    return result


# ---- moves, comparisons, conversions ----------------------------------------------------------
@handles("mov")
def move(i):
    target, source = i.arguments
    if target.startswith("{"):
        names = elements(target)
        width = bits(i.type) // len(names)
        return " ".join(
            i.operands.write(name, f"b{width}", f"{i.read(1)} >> {n * width}")
            for n, name in enumerate(names)
        )
    if source.startswith("{"):
        names = elements(source)
        width = bits(i.type) // len(names)
        pieces = (i.operands.read(name, f"b{width}") for name in names)
        c_type = C_TYPES[i.type]
        return i.write(
            " | ".join(f"(({c_type}){piece} << {n * width})" for n, piece in enumerate(pieces))
        )
    return i.write(i.read(1))


@handles("cvta")
def convert_address(i):
    """Generic addresses are host addresses; shared ones are offsets from the block's arena."""
    if not i.has("shared", "shared::cta"):
        return i.write(i.read(1, "u64"), "u64")
    if i.has("to"):
        return i.write(f"(uint64_t)((char*){i.read(1, 'u64')} - arena)", "u64")
    return i.write(f"(uint64_t)(arena + (uint32_t){i.read(1, 'u64')})", "u64")


@handles("selp")
def select(i):
    return i.write(f"{i.read(3, 'pred')} ? {i.read(1)} : {i.read(2)}")


def comparison(i):
    kind, x, y = i.parts[1], i.read(1), i.read(2)
    is_float = i.type in FLOATS
    if kind in ("nan", "num"):
        return f"{'!' if kind == 'num' else ''}unordered({x}, {y})"
    if is_float and kind.endswith("u") and kind[:-1] in COMPARISONS:
        return f"(unordered({x}, {y}) || {x} {COMPARISONS[kind[:-1]]} {y})"
    if is_float and kind == "ne":  # the ordered comparison
        return f"({x} < {y} || {x} > {y})"
    return f"({x} {COMPARISONS[kind]} {y})" if kind in COMPARISONS else None


@handles("setp")
def set_predicate(i):
    result = comparison(i) if i.type.removesuffix("x2") not in HALF_TYPES else None
    if result is None:
        return None
    if i.has(*LOGIC):
        operator = LOGIC[next(p for p in i.parts if p in LOGIC)]
        result = f"({result} {operator} {i.read(3, 'pred')})"
    targets = i.arguments[0].split("|")
    text = i.operands.write(targets[0].strip(), "pred", result)
    if len(targets) > 1:
        text += " " + i.operands.write(targets[1].strip(), "pred", f"!{result}")
    return text


TO_INTEGRAL = {
    "rzi": "trunc",
    "rni": "nearbyint",
    "rmi": "floor",
    "rpi": "ceil",
}


@handles("cvt")
def convert(i):
    to, source = i.parts[-2], i.parts[-1]
    if i.has("relu", "satfinite", *DIRECTED_ROUNDING):
        return None
    if to in ("f16x2", "bf16x2") and source == "f32":
        one = f"to_{to[:-2]}"
        return i.write(f"(uint32_t){one}({i.read(1)}) << 16 | {one}({i.read(2)})", "b32")
    if to in HALF_TYPES:
        return i.write(f"to_{to}({i.read(1)})", to) if source in FLOATS else None
    if source in HALF_TYPES:
        return i.write(f"from_{source}({i.read(1)})", to) if to == "f32" else None
    if to not in C_TYPES or source not in C_TYPES or (i.has("sat") and to not in FLOATS):
        return None
    value = i.read(1)
    rounding = [TO_INTEGRAL[p] for p in i.parts if p in TO_INTEGRAL]
    if rounding:
        value = f"__builtin_{rounding[0]}{'f' if source == 'f32' else ''}({value})"
    if source in FLOATS and to not in FLOATS:
        value = f"to_integer<{C_TYPES[to]}>({value})"
    return i.write(f"({C_TYPES[to]}){value}", to)


# ---- control ----------------------------------------------------------------------------------
@handles("ret", "exit")
def leave(i):
    return "return;"


@handles("bra")
def branch(i):
    return f"goto {i.arguments[0].replace('$', '_')};"


@handles("trap")
def trap(i):
    return 'fail("trap", HERE);'


@handles("nanosleep")
def sleep(i):
    return "spin_hint(HERE);"


@handles("griddepcontrol", "prefetch", "prefetchu", "discard", "applypriority")
def no_effect(i):
    return ";"

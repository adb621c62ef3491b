"""Instruction families that compute: floating point, integers, bits."""

from .ptx_instructions import DIRECTED_ROUNDING, HALF_TYPES, LOGIC, handles
from .ptx_operands import C_TYPES, FLOATS, bits

# ---- arithmetic -------------------------------------------------------------------------------
HALF_OPERATIONS = {
    "add": "x + y",
    "sub": "x - y",
    "mul": "x * y",
    "fma": "std::fma(x, y, z)",
    "max": "std::fmax(x, y)",
    "min": "std::fmin(x, y)",
    "neg": "-x",
    "abs": "std::fabs(x)",
    "ex2": "approximate(std::exp2(x))",
    "tanh": "approximate(std::tanh(x))",
}


def half_arithmetic(i):
    """fp16, bf16 and their packed pairs: computed in fp32 (fma in fp64, so it rounds once)."""
    if i.has("sat", "relu", "ftz", *DIRECTED_ROUNDING) or i.name not in HALF_OPERATIONS:
        return None
    half = i.type.removesuffix("x2")
    number = "double" if i.name == "fma" else "float"
    formula = HALF_OPERATIONS[i.name]
    if i.has("NaN"):
        formula = f"{i.name}_nan(x, y)"

    def one(shift):
        inputs = zip("xyz", (i.read(n) for n in range(1, len(i.arguments))))
        loads = " ".join(
            f"{number} {name} = from_{half}((uint16_t)({value} >> {shift}));"
            for name, value in inputs
        )
        return f"to_{half}([&] {{ {loads} return (float)({formula}); }}())"

    return i.write(one(0) if half == i.type else f"(uint32_t){one(16)} << 16 | {one(0)}")


OPERATORS = {"add": "+", "sub": "-", "mul": "*", **LOGIC}


@handles("add", "sub", "mul", "and", "or", "xor")
def arithmetic(i):
    if i.type.removesuffix("x2") in HALF_TYPES:
        return half_arithmetic(i)
    if i.has("cc", "f32x2"):
        return None
    if i.name == "mul" and i.has("wide"):
        return wide(i, "")
    if i.name == "mul" and i.has("hi"):
        return high(i, "")
    if i.type in FLOATS:
        return float_operation(i, f"x {OPERATORS[i.name]} y")
    if i.type == "pred":
        return i.write(f"{i.read(1)} {OPERATORS[i.name]} {i.read(2)}")
    if i.has("sat"):
        return None
    unsigned = f"u{bits(i.type)}"  # overflow wraps
    return i.write(f"{i.read(1, unsigned)} {OPERATORS[i.name]} {i.read(2, unsigned)}", unsigned)


def float_operation(i, formula):
    """x, y and z are the instruction's inputs."""
    c_type = C_TYPES[i.type]
    inputs = [i.read(n) for n in range(1, len(i.arguments))]
    mode = next((DIRECTED_ROUNDING[p] for p in i.parts if p in DIRECTED_ROUNDING), None)
    if mode is None:
        loads = " ".join(f"{c_type} {n} = {value};" for n, value in zip("xyz", inputs))
        return f"{loads} {i.write(formula)}"
    values = ", ".join([*inputs, "0"][:3])
    names = f"{c_type} x, {c_type} y, {c_type} z"
    return i.write(f"rounded<{mode}, {c_type}>({values}, []({names}) {{ return {formula}; }})")


def wide(i, addend):
    double_width = i.type[0] + str(2 * bits(i.type))
    c_type = C_TYPES[double_width]
    return i.write(f"({c_type}){i.read(1)} * ({c_type}){i.read(2)}{addend}", double_width)


def high(i, addend):
    product_type = "s128" if i.type[0] == "s" else "u128"
    return i.write(f"(({product_type}){i.read(1)} * {i.read(2)} >> {bits(i.type)}){addend}")


@handles("mad", "fma")
def multiply_add(i):
    if i.type.removesuffix("x2") in HALF_TYPES:
        return half_arithmetic(i)
    if i.has("cc", "f32x2"):
        return None
    if i.type in FLOATS:
        return float_operation(i, "std::fma(x, y, z)")
    if i.has("wide"):
        return wide(i, f" + {i.read(3, i.type[0] + str(2 * bits(i.type)))}")
    if i.has("hi"):
        return high(i, f" + {i.read(3)}")
    unsigned = f"u{bits(i.type)}"
    product = f"{i.read(1, unsigned)} * {i.read(2, unsigned)}"
    return i.write(f"{product} + {i.read(3, unsigned)}", unsigned)


@handles("div", "rem")
def division(i):
    if i.type in HALF_TYPES or i.has(*DIRECTED_ROUNDING):
        return None
    if i.type not in FLOATS:
        function = "divide" if i.name == "div" else "remainder"
        return i.write(f"{function}({i.read(1)}, {i.read(2)}, HERE)")
    quotient = f"{i.read(1)} / {i.read(2)}"
    return i.write(f"approximate({quotient})" if i.has("full", "approx") else quotient)


@handles("min", "max")
def minimum_maximum(i):
    if i.type.removesuffix("x2") in HALF_TYPES:
        return half_arithmetic(i)
    if i.has("xorsign", "relu"):
        return None
    if i.type in FLOATS:
        function = f"{i.name}_nan" if i.has("NaN") else f"std::f{i.name}"
    else:
        function = f"std::{i.name}"
    result = i.read(1)
    for index in range(2, len(i.arguments)):  # sm_100 has a variant with three inputs
        result = f"{function}({result}, {i.read(index)})"
    return i.write(result)


@handles("neg", "abs", "not", "copysign")
def sign_and_complement(i):
    if i.type.removesuffix("x2") in HALF_TYPES:
        return half_arithmetic(i)
    if i.name == "copysign":
        return i.write(f"std::copysign({i.read(2)}, {i.read(1)})")
    if i.name == "not":
        return i.write(f"{'!' if i.type == 'pred' else '~'}{i.read(1)}")
    if i.type in FLOATS:
        return i.write(f"-{i.read(1)}" if i.name == "neg" else f"std::abs({i.read(1)})")
    negated = f"0 - {i.read(1, 'u' + str(bits(i.type)))}"
    return i.write(negated if i.name == "neg" else f"{i.read(1)} < 0 ? {negated} : {i.read(1)}")


FUNCTIONS = {
    "ex2": "std::exp2({})",
    "lg2": "std::log2({})",
    "rcp": "1 / {}",
    "sqrt": "std::sqrt({})",
    "rsqrt": "1 / std::sqrt({})",
    "tanh": "std::tanh({})",
    "sin": "std::sin({})",
    "cos": "std::cos({})",
}


@handles(*FUNCTIONS)
def transcendental(i):
    if i.type.removesuffix("x2") in HALF_TYPES:
        return half_arithmetic(i)
    if i.text.startswith("rcp.approx.ftz.f64"):
        return i.write(f"rough_reciprocal({i.read(1)})")
    if i.type not in FLOATS or i.has(*DIRECTED_ROUNDING) or (i.has("approx") and i.type == "f64"):
        return None
    value = FUNCTIONS[i.name].format(i.read(1))
    return i.write(f"approximate({value})" if i.has("approx") else value)


# ---- bits -------------------------------------------------------------------------------------
@handles("shl", "shr")
def shift(i):
    if i.name == "shl":
        return i.write(f"shift_left({i.read(1, f'u{bits(i.type)}')}, {i.read(2, 'u32')})")
    return i.write(f"shift_right({i.read(1)}, {i.read(2, 'u32')})")


@handles("popc", "clz")
def count_bits(i):
    value = i.read(1, f"u{bits(i.type)}")
    function = "__builtin_popcountll" if i.name == "popc" else "leading_zeros"
    return i.write(f"{function}({value})", "u32")


@handles("bfe", "bfi", "prmt", "shf", "lop3")
def bit_fields(i):
    if bits(i.type) != 32 or (i.name == "prmt" and len(i.parts) > 2):
        return None
    a, b, c = i.read(1), i.read(2, "u32"), i.read(3, "u32")
    if i.name == "bfe":
        return i.write(f"extract_bits({a}, {b} & 255, {c} & 255)")
    if i.name == "bfi":
        return i.write(f"insert_bits({a}, {b}, {c} & 255, {i.read(4, 'u32')} & 255)")
    if i.name == "prmt":
        return i.write(f"permute_bytes({a}, {b}, {c})")
    if i.name == "lop3":
        return i.write(f"logic3({a}, {b}, {c}, {i.read(4, 'u32')})")
    count = f"{c} & 31" if i.has("wrap") else f"std::min({c}, 32u)"
    return i.write(f"funnel_{'left' if i.has('l') else 'right'}({a}, {b}, {count})")

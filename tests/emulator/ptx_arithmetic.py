"""Arithmetic instructions: floating point, integers, bits."""

from .ptx_instructions import DIRECTED_ROUNDING, HALF_TYPES, LOGIC, handles
from .ptx_operands import C_TYPES, FLOATS, bits

# ---- arithmetic -------------------------------------------------------------------------------
HALF_OPERATIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "fma": "(float)__builtin_fma({0}, {1}, {2})",
    "max": "max_number({0}, {1})",
    "min": "min_number({0}, {1})",
    "neg": "-{0}",
    "abs": "__builtin_fabsf({0})",
    "ex2": "approximate(__builtin_exp2f({0}))",
    "tanh": "approximate(__builtin_tanhf({0}))",
}


def half_arithmetic(i):
    """fp16, bf16 and packed pairs are computed in fp32; fma in fp64, to round once."""
    if i.has("sat", "relu", "ftz", *DIRECTED_ROUNDING) or i.name not in HALF_OPERATIONS:
        return None
    half = i.type.removesuffix("x2")
    formula = f"{i.name}_nan({{0}}, {{1}})" if i.has("NaN") else HALF_OPERATIONS[i.name]
    inputs = [i.read(n) for n in range(1, len(i.arguments))]

    def one(shift):
        numbers = (f"from_{half}((uint16_t)({value} >> {shift}))" for value in inputs)
        return f"to_{half}({formula.format(*numbers)})"

    return i.write(one(0) if half == i.type else f"(uint32_t){one(16)} << 16 | {one(0)}")


PACKED_OPERATIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "fma": "__builtin_fmaf({0}, {1}, {2})",
}


def packed_arithmetic(i):
    """Two numbers of fp32 in a register of 64 bits, from sm_100 on."""
    if i.has("sat", "ftz", *DIRECTED_ROUNDING):
        return None
    inputs = [i.read(n, "b64") for n in range(1, len(i.arguments))]

    def one(function):
        numbers = (f"{function}({value})" for value in inputs)
        return PACKED_OPERATIONS[i.name].format(*numbers)

    return i.write(f"pair_of({one('low_of')}, {one('high_of')})", "b64")


OPERATORS = {"add": "+", "sub": "-", "mul": "*", **LOGIC}


@handles("add", "sub", "mul", "and", "or", "xor")
def arithmetic(i):
    if i.type.removesuffix("x2") in HALF_TYPES:
        return half_arithmetic(i)
    if i.type == "f32x2":
        return packed_arithmetic(i)
    if i.has("cc"):
        return None
    if i.name == "mul" and i.has("wide"):
        return wide(i, "")
    if i.name == "mul" and i.has("hi"):
        return high(i, "")
    if i.type in FLOATS:
        return float_operation(i, f"{{0}} {OPERATORS[i.name]} {{1}}")
    if i.type == "pred":
        return i.write(f"{i.read(1)} {OPERATORS[i.name]} {i.read(2)}")
    if i.has("sat"):
        return None
    unsigned = f"u{bits(i.type)}"  # overflow wraps
    return i.write(f"{i.read(1, unsigned)} {OPERATORS[i.name]} {i.read(2, unsigned)}", unsigned)


def builtin(i, name):
    """Return the builtin for the instruction's type; std:: overloads compile more slowly."""
    return f"__builtin_{name}{'f' if i.type == 'f32' else ''}"


def float_operation(i, formula):
    """Return the operation; {0}, {1} and {2} in the formula are the inputs."""
    c_type = C_TYPES[i.type]
    inputs = [i.read(n) for n in range(1, len(i.arguments))]
    mode = next((DIRECTED_ROUNDING[p] for p in i.parts if p in DIRECTED_ROUNDING), None)
    if mode is None:
        return i.write(formula.format(*inputs))
    values = ", ".join([*inputs, "0"][:3])
    names = f"{c_type} x, {c_type} y, {c_type} z"
    body = formula.format("x", "y", "z")
    return i.write(f"rounded<{mode}, {c_type}>({values}, []({names}) {{ return {body}; }})")


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
    if i.type == "f32x2":
        return packed_arithmetic(i)
    if i.has("cc"):
        return None
    if i.type in FLOATS:
        return float_operation(i, f"{builtin(i, 'fma')}({{0}}, {{1}}, {{2}})")
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
        function = f"{i.name}_{'nan' if i.has('NaN') else 'number'}"
    else:
        function = f"{i.name}_of"
    result = i.read(1)
    for index in range(2, len(i.arguments)):  # sm_100 has a variant with three inputs
        result = f"{function}({result}, {i.read(index)})"
    return i.write(result)


@handles("neg", "abs", "not", "copysign")
def sign_and_complement(i):
    if i.type.removesuffix("x2") in HALF_TYPES:
        return half_arithmetic(i)
    if i.name == "copysign":
        return i.write(f"{builtin(i, 'copysign')}({i.read(2)}, {i.read(1)})")
    if i.name == "not":
        return i.write(f"{'!' if i.type == 'pred' else '~'}{i.read(1)}")
    if i.type in FLOATS:
        return i.write(f"-{i.read(1)}" if i.name == "neg" else f"{builtin(i, 'fabs')}({i.read(1)})")
    negated = f"0 - {i.read(1, 'u' + str(bits(i.type)))}"
    return i.write(negated if i.name == "neg" else f"{i.read(1)} < 0 ? {negated} : {i.read(1)}")


FUNCTIONS = {"ex2": "exp2", "lg2": "log2", "rcp": "", "sqrt": "sqrt", "rsqrt": "sqrt"}
FUNCTIONS |= {name: name for name in ("tanh", "sin", "cos")}


@handles(*FUNCTIONS)
def transcendental(i):
    if i.type.removesuffix("x2") in HALF_TYPES:
        return half_arithmetic(i)
    if i.type not in FLOATS or i.has(*DIRECTED_ROUNDING):
        return None
    if i.has("approx") and i.type == "f64" and i.name not in ("rcp", "rsqrt"):
        return None
    is_coarse = i.has("ftz") and i.type == "f64"  # rsqrt.approx.f64 without ftz is exact to an ulp
    function = FUNCTIONS[i.name]
    argument = f"coarse({i.read(1)})" if is_coarse else i.read(1)
    value = f"{builtin(i, function)}({argument})" if function else argument
    if i.name in ("rcp", "rsqrt"):
        value = f"1 / {value}"
    if is_coarse:
        return i.write(f"coarse({value})")
    is_approximate = i.has("approx") and i.type == "f32"
    return i.write(f"approximate({value})" if is_approximate else value)


# ---- bits -------------------------------------------------------------------------------------
@handles("shl", "shr")
def shift(i):
    value = i.read(1, f"u{bits(i.type)}") if i.name == "shl" else i.read(1)
    count = i.arguments[2]
    if count.isdigit() and int(count) < bits(i.type):
        return i.write(f"{value} {'<<' if i.name == 'shl' else '>>'} {count}")
    direction = "left" if i.name == "shl" else "right"
    return i.write(f"shift_{direction}<{C_TYPES[i.type]}>({value}, {i.read(2, 'u32')})")


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
    count = f"{c} & 31" if i.has("wrap") else f"min_of({c}, 32u)"
    return i.write(f"funnel_{'left' if i.has('l') else 'right'}({a}, {b}, {count})")

// Instructions that CUDA C++ rarely generates, as inline PTX, compared with plain C++ written from
// the PTX manual. mismatches() runs one of them on many inputs.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Inputs {
  uint32_t a, b, c;
};
using Plain = uint32_t (*)(Inputs);

// The kernel of one instruction: %0 is its result, %1 to %3 are its inputs.
#define INSTRUCTION(name, text)                                                    \
  __global__ void name(const Inputs* inputs, uint32_t* outputs) {                  \
    const Inputs i = inputs[blockIdx.x];                                           \
    asm volatile(text : "=r"(outputs[blockIdx.x]) : "r"(i.a), "r"(i.b), "r"(i.c)); \
  }
INSTRUCTION(prmt, "prmt.b32 %0, %1, %2, %3;")
INSTRUCTION(shf_l_wrap, "shf.l.wrap.b32 %0, %1, %2, %3;")
INSTRUCTION(shf_l_clamp, "shf.l.clamp.b32 %0, %1, %2, %3;")
INSTRUCTION(shf_r_wrap, "shf.r.wrap.b32 %0, %1, %2, %3;")
INSTRUCTION(shf_r_clamp, "shf.r.clamp.b32 %0, %1, %2, %3;")
INSTRUCTION(lop3_majority, "lop3.b32 %0, %1, %2, %3, 0xe8;")
INSTRUCTION(lop3_select, "lop3.b32 %0, %1, %2, %3, 0xca;")
INSTRUCTION(lop3_lopsided, "lop3.b32 %0, %1, %2, %3, 0x1d;")
INSTRUCTION(bfe_u32, "bfe.u32 %0, %1, %2, %3;")
INSTRUCTION(bfe_s32, "bfe.s32 %0, %1, %2, %3;")
INSTRUCTION(bfi, "{.reg .u32 n; shr.u32 n, %3, 8; bfi.b32 %0, %1, %2, %3, n;}")
INSTRUCTION(max_bf16x2, "max.bf16x2 %0, %1, %2;")
INSTRUCTION(max_nan_bf16x2, "max.NaN.bf16x2 %0, %1, %2;")
INSTRUCTION(max_f32, "max.f32 %0, %1, %2;")
INSTRUCTION(bf16_of_f64,
            "{.reg .f64 d; .reg .b16 h; mov.b64 d, {%2, %1}; cvt.rn.bf16.f64 h, d;"
            " cvt.u32.u16 %0, h;}")

// The order of threads decides what each CAS finds, but not the sum.
__global__ void compare_and_swap(const Inputs* inputs, uint32_t* outputs) {
  const Inputs i = inputs[blockIdx.x];
  if (threadIdx.x == 0) outputs[blockIdx.x] = i.a;
  __syncthreads();
  uint32_t expected = outputs[blockIdx.x], found;
  while ((found = atomicCAS(&outputs[blockIdx.x], expected, expected + i.b)) != expected)
    expected = found;
}
// Bit 0: or; bit 1: and; from bit 8: count. Lanes' predicates are the bits of a and b.
__global__ void block_reduction(const Inputs* inputs, uint32_t* outputs) {
  const Inputs i = inputs[blockIdx.x];
  const bool mine = (threadIdx.x < 32 ? i.a : i.b) >> threadIdx.x % 32 & 1;
  const int any = __syncthreads_or(mine), all = __syncthreads_and(mine);
  const int count = __syncthreads_count(mine);
  if (threadIdx.x == 0) outputs[blockIdx.x] = (any != 0) | (all != 0) << 1 | count << 8;
}
__global__ void warp_reduction(const Inputs* inputs, uint32_t* outputs) {
  const Inputs i = inputs[blockIdx.x];
  const uint32_t value = i.a * (threadIdx.x % 32) ^ i.b;
  const uint32_t sum = __reduce_add_sync(~0u, value), largest = __reduce_max_sync(~0u, value);
  const int smallest = __reduce_min_sync(~0u, static_cast<int>(value));
  const uint32_t mixed = __reduce_xor_sync(~0u, value);
  if (threadIdx.x == 0)
    outputs[blockIdx.x] = sum + 3 * largest + 5 * static_cast<uint32_t>(smallest) + 7 * mixed;
}

// Double precision functions that nvcc computes by refining a coarse reciprocal: 1 if they agree.
__global__ void double_identities(const Inputs* inputs, uint32_t* outputs) {
  const double x = 1e-3 + inputs[blockIdx.x].a * 0x1p-29;  // up to 8
  const bool inverse = fabs(exp(log(x)) / x - 1) < 1e-14;
  const bool hyperbolic = fabs(tanh(x) - (1 - 2 / (exp(2 * x) + 1))) < 1e-15;
  outputs[blockIdx.x] = inverse && hyperbolic && fabs(rsqrt(x) * sqrt(x) - 1) < 1e-15;
}

bool bit(uint32_t value, uint32_t position) { return value >> position & 1; }

uint32_t plain_prmt(Inputs i) {
  uint8_t bytes[8], result[4];
  memcpy(bytes, &i.a, 4);
  memcpy(bytes + 4, &i.b, 4);
  for (uint32_t k = 0; k < 4; ++k) {
    const uint8_t byte = bytes[i.c >> 4 * k & 7];
    const uint8_t sign = byte >= 128 ? 255 : 0;
    result[k] = bit(i.c, 4 * k + 3) ? sign : byte;
  }
  uint32_t all;
  memcpy(&all, result, 4);
  return all;
}
template <bool kLeft, bool kWrap>
uint32_t plain_shf(Inputs i) {  // a is the low word
  const uint32_t n = kWrap ? i.c % 32 : i.c < 32 ? i.c : 32;
  uint32_t result = 0;
  for (uint32_t k = 0; k < 32; ++k) {
    const uint32_t from = kLeft ? 32 + k - n : k + n;
    if (bit(from < 32 ? i.a : i.b, from % 32)) result |= 1u << k;
  }
  return result;
}
template <uint32_t kTable>
uint32_t plain_lop3(Inputs i) {
  uint32_t result = 0;
  for (uint32_t k = 0; k < 32; ++k)
    if (bit(kTable, 4 * bit(i.a, k) + 2 * bit(i.b, k) + bit(i.c, k))) result |= 1u << k;
  return result;
}
template <bool kSigned>
uint32_t plain_bfe(Inputs i) {
  const uint32_t begin = i.b & 255, length = i.c & 255, end = begin + length;
  const bool fill = kSigned && length > 0 && bit(i.a, end <= 32 ? end - 1 : 31);
  uint32_t result = 0;
  for (uint32_t k = 0; k < 32; ++k)
    if (k < length && begin + k < 32 ? bit(i.a, begin + k) : fill) result |= 1u << k;
  return result;
}
uint32_t plain_bfi(Inputs i) {
  const uint32_t begin = i.c & 255, length = i.c >> 8 & 255;
  uint32_t result = i.b;
  for (uint32_t k = 0; k < length && begin + k < 32; ++k)
    result = (result & ~(1u << (begin + k))) | uint32_t{bit(i.a, k)} << (begin + k);
  return result;
}
float number(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
// The larger of two floats, as bits; a bf16 is the upper half of a float.
uint32_t larger(uint32_t a, uint32_t b, bool keeps_nan, uint32_t canonical_nan) {
  const bool nan_a = std::isnan(number(a)), nan_b = std::isnan(number(b));
  if (nan_a && nan_b) return canonical_nan;
  if (nan_a || nan_b) return keeps_nan ? canonical_nan : nan_a ? b : a;
  if (number(a) == number(b)) return a & b;  // of two zeros, +0
  return number(a) > number(b) ? a : b;
}
template <bool kKeepsNan>
uint32_t plain_max_bf16x2(Inputs i) {
  const uint32_t low = larger(i.a << 16, i.b << 16, kKeepsNan, 0x7fff0000);
  const uint32_t high = larger(i.a & 0xffff0000, i.b & 0xffff0000, kKeepsNan, 0x7fff0000);
  return high | low >> 16;
}
uint32_t plain_max_f32(Inputs i) {
  const uint32_t result = larger(i.a, i.b, false, 0x7fffffff);
  return result;
}
// Selects the nearer of the two enclosing bf16; a is the upper word of the double.
uint32_t plain_bf16_of_f64(Inputs i) {
  const uint64_t bits = uint64_t{i.a} << 32 | i.b;
  double value;
  memcpy(&value, &bits, sizeof value);
  if (std::isnan(value)) return 0x7fff;
  const uint32_t sign = i.a >> 31 << 15;
  value = std::fabs(value);
  uint32_t low = 0, high = 0x7f80;  // low <= value; high is greater, or infinity
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (number(middle << 16) <= value ? low : high) = middle;
  }
  const double above = high == 0x7f80 ? std::ldexp(1., 128) : number(high << 16);
  const double to_low = value - number(low << 16), to_high = above - value;
  return sign | (to_low < to_high || (to_low == to_high && low % 2 == 0) ? low : high);
}
uint32_t plain_one(Inputs) { return 1; }
uint32_t plain_cas(Inputs i) { return i.a + 64 * i.b; }
uint32_t plain_block_reduction(Inputs i) {
  const uint32_t any = (i.a | i.b) != 0, all = (i.a & i.b) == ~0u;
  return any | all << 1 |
         static_cast<uint32_t>(__builtin_popcount(i.a) + __builtin_popcount(i.b)) << 8;
}
uint32_t plain_warp_reduction(Inputs i) {
  uint32_t sum = 0, largest = 0, mixed = 0;
  int smallest = INT32_MAX;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t value = i.a * lane ^ i.b;
    sum += value;
    mixed ^= value;
    if (value > largest) largest = value;
    if (static_cast<int>(value) < smallest) smallest = static_cast<int>(value);
  }
  return sum + 3 * largest + 5 * static_cast<uint32_t>(smallest) + 7 * mixed;
}

struct Tested {
  const char* name;
  void (*kernel)(const Inputs*, uint32_t*);
  Plain plain;
  int threads;
};
const Tested kTested[] = {
    {"prmt", prmt, plain_prmt, 1},
    {"shf.l.wrap", shf_l_wrap, plain_shf<true, true>, 1},
    {"shf.l.clamp", shf_l_clamp, plain_shf<true, false>, 1},
    {"shf.r.wrap", shf_r_wrap, plain_shf<false, true>, 1},
    {"shf.r.clamp", shf_r_clamp, plain_shf<false, false>, 1},
    {"lop3.majority", lop3_majority, plain_lop3<0xe8>, 1},
    {"lop3.select", lop3_select, plain_lop3<0xca>, 1},
    {"lop3.lopsided", lop3_lopsided, plain_lop3<0x1d>, 1},
    {"bfe.u32", bfe_u32, plain_bfe<false>, 1},
    {"bfe.s32", bfe_s32, plain_bfe<true>, 1},
    {"bfi", bfi, plain_bfi, 1},
    {"max.bf16x2", max_bf16x2, plain_max_bf16x2<false>, 1},
    {"max.NaN.bf16x2", max_nan_bf16x2, plain_max_bf16x2<true>, 1},
    {"max.f32", max_f32, plain_max_f32, 1},
    {"cvt.bf16.f64", bf16_of_f64, plain_bf16_of_f64, 1},
    {"double", double_identities, plain_one, 1},
    {"atom.cas", compare_and_swap, plain_cas, 64},
    {"bar.red", block_reduction, plain_block_reduction, 64},
    {"redux", warp_reduction, plain_warp_reduction, 32},
};

// All pairs of corner cases: counts near 32 and 255, numbers, zeros, infinities, NaN; and noise.
std::vector<Inputs> make_inputs() {
  const uint32_t corners[] = {0,      1,          8,          31,         32,         33,
                              255,    0x0820,     0x1f08,     0xff1c,     0x80000000, 0x7f800000,
                              0xfedc, 0xffffffff, 0x3f80bf80, 0x7fc08000, 0xff80ffc0, 0x8000};
  std::vector<Inputs> all;
  for (uint32_t a : corners)
    for (uint32_t b : corners)
      for (uint32_t c : corners) all.push_back({a, b, c});
  uint32_t state = 1;
  const auto next = [&] { return (state = state * 1664525 + 1013904223) ^ state >> 16; };
  for (int n = 0; n < 1000; ++n) all.push_back({next(), next(), next() % 64});
  for (int n = 0; n < 1000; ++n) all.push_back({next(), next(), next()});
  for (uint32_t n = 0; n < 1000; ++n)  // doubles around a bf16, or halfway between two
    all.push_back({(0x3f7ffff0 ^ n << 20) + n * 0x1000, n % 3 ? n % 3 - 1 : ~0u, 0});
  return all;
}

}  // namespace

// The number of wrong outputs, or -1.
extern "C" int mismatches(const char* name) {
  const std::vector<Inputs> inputs = make_inputs();
  std::vector<uint32_t> outputs(inputs.size());
  for (const Tested& tested : kTested) {
    if (strcmp(name, tested.name) != 0) continue;
    const auto blocks = static_cast<unsigned>(inputs.size());
    tested.kernel<<<blocks, tested.threads>>>(inputs.data(), outputs.data());
    if (cudaGetLastError() != cudaSuccess) return -1;
    int wrong = 0;
    for (size_t n = 0; n < inputs.size(); ++n) wrong += outputs[n] != tested.plain(inputs[n]);
    return wrong;
  }
  return -1;
}

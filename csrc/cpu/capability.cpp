// Chooses the instruction set: the best that the processor has and that FUSED_XENT_CPU_CAPABILITY,
// if set, allows.
#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"
#include "launch.h"

namespace fused_xent::cpu {
namespace {

struct Capability {
  const char* name;
  Kernels (*kernels)(const Params&);
  bool (*is_supported)();
};

#if defined(__x86_64__)
// __builtin_cpu_supports has no f16c in clang 14.
[[maybe_unused]] bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
[[maybe_unused]] bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif

// Best first. setup.py leaves out those that a partial build has no kernels of.
const Capability kCapabilities[] = {
#if defined(__x86_64__)
#ifndef FUSED_XENT_WITHOUT_AVX512_BF16
    {"avx512_bf16", avx512_bf16_kernels, has_avx512_bf16},
#endif
#ifndef FUSED_XENT_WITHOUT_AVX512
    {"avx512", avx512_kernels, has_avx512},
#endif
#ifndef FUSED_XENT_WITHOUT_AVX2
    {"avx2", avx2_kernels, has_avx2},
#endif
#endif
#ifndef FUSED_XENT_WITHOUT_PORTABLE
    {"portable", portable_kernels, [] { return true; }},
#endif
};

const Capability& choose() {
  const char* limit = std::getenv("FUSED_XENT_CPU_CAPABILITY");
  bool allowed = limit == nullptr || *limit == '\0';
  for (const Capability& capability : kCapabilities) {
    allowed = allowed || capability.name == std::string(limit);
    if (allowed && capability.is_supported()) return capability;
  }
  throw std::invalid_argument(
      "FUSED_XENT_CPU_CAPABILITY must be avx512_bf16, avx512, avx2 or portable, got '" +
      std::string(limit == nullptr ? "" : limit) + "'");
}

const Capability& in_use() {
  static const Capability& capability = choose();
  return capability;
}

}  // namespace

Kernels kernels_in_use(const Params& p) { return in_use().kernels(p); }

const char* capability_name() { return in_use().name; }

}  // namespace fused_xent::cpu

// Cases that are launched by name, and their common buffers.
#pragma once
#include <cuda_runtime.h>

#include <cstring>

constexpr int kThreads = 64;  // TSan runs these too
constexpr int kWrongResult = -1, kUnknownCase = -2;

struct Buffers {
  float x[kThreads], *exact, *y;  // `exact` ends where its allocation ends
  Buffers() {
    for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i + 1);
    cudaMalloc(reinterpret_cast<void**>(&exact), sizeof x);
    cudaMalloc(reinterpret_cast<void**>(&y), sizeof x);
    memcpy(exact, x, sizeof x);
    memset(y, 0, sizeof x);
  }
  ~Buffers() {
    cudaFree(exact);
    cudaFree(y);
  }
};

inline bool reversed(const Buffers& b, int group) {
  for (int i = 0; i < kThreads; ++i)
    if (b.y[i] != b.x[i ^ (group - 1)]) return false;
  return true;
}

using Case = bool (*)(Buffers&);
struct NamedCase {
  const char* name;
  Case run;
};

// The launch's error, kWrongResult or kUnknownCase.
template <int kCount>
int run_named(const NamedCase (&cases)[kCount], const char* name) {
  for (const NamedCase& candidate : cases) {
    if (strcmp(name, candidate.name) != 0) continue;
    Buffers buffers;
    const bool right = candidate.run(buffers);
    const cudaError_t error = cudaGetLastError();
    return error != cudaSuccess ? error : right ? 0 : kWrongResult;
  }
  return kUnknownCase;
}

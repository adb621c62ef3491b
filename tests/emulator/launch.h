// A launch, as passed from the CUDA runtime's entry points to the machine.
#pragma once
#include <string>

#include "registry.h"

namespace emulator {

struct Launch {
  const Kernel* kernel;
  Dim3 grid, block;
  uint32_t cluster_size = 1;  // blocks along x
  uint32_t dynamic_shared_bytes = 0;
  void** parameters;
};
// Runs the launch to its end. Returns "", or a report of the kernel's error.
std::string run(const Launch& launch);

}  // namespace emulator

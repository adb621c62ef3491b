// Every header that the kernels need, read before a target region begins: what a header defines
// must not be compiled for one instruction set.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

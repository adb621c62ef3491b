// Memory of tests: buffers of exactly the size that a kernel may access, filled with and surrounded
// by NaN; and tensors of every dtype and layout in them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../../csrc/xent_params.h"

namespace fused_xent::test {

// Bytes between guards. Under AddressSanitizer its own guards are used, which also detect reads.
class Memory {
 public:
  Memory() = default;
  // The first byte is `shift` bytes after an aligned address.
  Memory(int64_t n_bytes, int64_t shift)
      : lead_(kGuard + shift), bytes_(new_bytes(kGuard + shift + n_bytes + kGuard)) {}

  void* data() { return bytes_.data() + lead_; }
  const void* data() const { return bytes_.data() + lead_; }
  bool operator==(const Memory& other) const { return bytes_ == other.bytes_; }

  bool guards_are_intact() const {
    const auto is_ff = [](unsigned char byte) { return byte == 0xff; };
    return std::all_of(bytes_.begin(), bytes_.begin() + lead_, is_ff) &&
           std::all_of(bytes_.end() - kGuard, bytes_.end(), is_ff);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGuard = 0;
#else
  static constexpr int64_t kGuard = 64;
#endif
  static std::vector<unsigned char> new_bytes(int64_t n) {
    std::vector<unsigned char> bytes;
    bytes.reserve(n);  // exact, so that the sanitizer detects accesses past the end
    bytes.resize(n, 0xff);
    return bytes;
  }

  int64_t lead_ = 0;
  std::vector<unsigned char> bytes_;
};

// The spacing of numbers at 1, and the smallest normal number.
struct Format {
  double epsilon, smallest;
};
inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return {0x1p-52, 0x1p-1022};
    case DType::float32:
      return {0x1p-23, 0x1p-126};
    case DType::bfloat16:
      return {0x1p-7, 0x1p-126};
    default:
      return {0x1p-10, 0x1p-14};
  }
}

// The spacing of dtype's numbers at |value|.
inline double ulp(DType dtype, double value) {
  const Format format = format_of(dtype);
  const auto exponent = std::bit_cast<uint64_t>(value) & 0x7ff0000000000000;
  return std::max(std::bit_cast<double>(exponent), format.smallest) * format.epsilon;
}

inline double half_to_double(uint16_t bits) {
  const uint64_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double normal = std::bit_cast<double>((exponent + 1008) << 52 | mantissa << 42);
  const double magnitude = exponent == 31  ? (mantissa == 0 ? INFINITY : NAN)
                           : exponent == 0 ? static_cast<double>(mantissa) * 0x1p-24
                                           : normal;
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// Rounds to nearest; numbers below the range become 0.
inline uint16_t double_to_half(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7e00;
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < 0x1p-14) return sign;
  const int exponent = std::ilogb(magnitude);
  const int scaled = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + scaled);
}

inline double read(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::float64:
      return static_cast<const double*>(data)[i];
    case DType::float32:
      return static_cast<const float*>(data)[i];
    case DType::bfloat16: {
      const uint32_t bits = uint32_t{static_cast<const uint16_t*>(data)[i]} << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    default:
      return half_to_double(static_cast<const uint16_t*>(data)[i]);
  }
}

inline void write(DType dtype, void* data, int64_t i, double value) {
  switch (dtype) {
    case DType::float64:
      static_cast<double*>(data)[i] = value;
      break;
    case DType::float32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case DType::bfloat16: {
      const float single = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &single, sizeof bits);
      static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits >> 16);
      break;
    }
    default:
      static_cast<uint16_t*>(data)[i] = double_to_half(value);
  }
}

enum class Shape {
  contiguous,
  padded,        // class stride 1, gaps between rows
  column,        // a transposed matrix
  image,         // (batch, class, pixel)
  strided,       // no stride is 1
  slices,        // two row dimensions that do not merge
  permuted,      // three row dimensions, not in the order of their strides
  scattered,     // four row dimensions, with the classes between them
  padded_image,  // class stride is a whole number of vectors, pixel count is not
  odd_image      // pixel count is a whole number of vectors, batch stride is not
};
constexpr int kShapes = 10;

inline const char* name_of(Shape shape) {
  const char* names[kShapes] = {"contiguous", "padded",   "column",    "image",        "strided",
                                "slices",     "permuted", "scattered", "padded image", "odd image"};
  return names[static_cast<int>(shape)];
}

// True if rows are adjacent in memory, so that several can be read as one vector.
inline bool has_adjacent_rows(Shape shape) {
  return shape == Shape::column || shape == Shape::image || shape == Shape::padded_image ||
         shape == Shape::odd_image;
}

// Splits n_rows into `count` factors; the last ones are small.
inline std::vector<int64_t> factors(int64_t n_rows, int count) {
  std::vector<int64_t> sizes(count, 1);
  for (int d = count - 1; d > 0; --d) {
    for (const int64_t divisor : {3, 2, 5, 7, 17}) {
      if (sizes[d] == 1 && n_rows % divisor == 0 && n_rows > divisor) sizes[d] = divisor;
    }
    n_rows /= sizes[d];
  }
  sizes[0] = n_rows;
  return sizes;
}

constexpr int kClass = -1;

// Computes strides from the innermost dimension outwards, with `pad` elements after each.
inline Layout arrange(const std::vector<int64_t>& sizes, int64_t vocab_size,
                      const std::vector<int>& order, int64_t first_stride, int64_t pad) {
  Layout layout{static_cast<int>(sizes.size()), {}, {}, 0};
  std::copy(sizes.begin(), sizes.end(), layout.size);
  int64_t stride = first_stride;
  for (const int d : order) {
    (d == kClass ? layout.class_stride : layout.stride[d]) = stride;
    stride = stride * (d == kClass ? vocab_size : sizes[d]) + pad;
  }
  return layout;
}

inline Layout layout_of(Shape shape, int64_t n_rows, int64_t vocab_size) {
  const int64_t batch = n_rows % 2 == 0 ? 2 : 1, pixels = n_rows / batch;
  const int64_t whole = (pixels / 8 + 1) * 8;  // vectors of any type
  switch (shape) {
    case Shape::contiguous:
      return arrange({n_rows}, vocab_size, {kClass, 0}, 1, 0);
    case Shape::padded:
      return arrange({n_rows}, vocab_size, {kClass, 0}, 1, 5);
    case Shape::column:
      return arrange({n_rows}, vocab_size, {0, kClass}, 1, 0);
    case Shape::image:
      return arrange({batch, pixels}, vocab_size, {1, kClass, 0}, 1, 0);
    case Shape::padded_image:
      return {2, {batch, pixels}, {whole * vocab_size, 1}, whole};
    case Shape::odd_image:
      return {2, {batch, pixels}, {pixels * vocab_size + 1, 1}, pixels};
    case Shape::strided:
      return arrange({n_rows}, vocab_size, {kClass, 0}, 2, 1);
    case Shape::slices:
      return arrange(factors(n_rows, 2), vocab_size, {kClass, 1, 0}, 1, 3);
    case Shape::permuted:
      return arrange(factors(n_rows, 3), vocab_size, {kClass, 0, 2, 1}, 1, 0);
    default:
      return arrange(factors(n_rows, 4), vocab_size, {2, kClass, 0, 3, 1}, 1, 1);
  }
}

inline int64_t extent(const Layout& layout, int64_t vocab_size) {
  int64_t last = (vocab_size - 1) * layout.class_stride;
  for (int d = 0; d < layout.n_dims; ++d) last += (layout.size[d] - 1) * layout.stride[d];
  return last + 1;
}

// A (n_rows, vocab_size) tensor, initially all NaN.
struct Tensor {
  DType dtype{};
  int64_t n_rows = 0, vocab_size = 0;
  Layout layout{};
  Memory memory;

  Tensor() = default;
  Tensor(DType dtype, Shape shape, int64_t n_rows, int64_t vocab_size, int64_t misalignment)
      : dtype(dtype),
        n_rows(n_rows),
        vocab_size(vocab_size),
        layout(layout_of(shape, n_rows, vocab_size)),
        memory(extent(layout, vocab_size) * element_size(dtype),
               misalignment * element_size(dtype)) {}

  int64_t index(int64_t row, int64_t j) const {
    return row_offset(layout, row) + j * layout.class_stride;
  }
  double at(int64_t row, int64_t j) const { return read(dtype, memory.data(), index(row, j)); }
  void set(int64_t row, int64_t j, double value) {
    write(dtype, memory.data(), index(row, j), value);
  }

  // True if the memory between and around the elements is unchanged.
  bool gaps_are_intact() const {
    const int64_t size = element_size(dtype), n_bytes = extent(layout, vocab_size) * size;
    if (!memory.guards_are_intact()) return false;
    if (n_bytes == n_rows * vocab_size * size) return true;
    Memory rest = memory;
    unsigned char* bytes = static_cast<unsigned char*>(rest.data());
    for (int64_t row = 0; row < n_rows; ++row) {
      for (int64_t j = 0; j < vocab_size; ++j) {
        std::memset(bytes + index(row, j) * size, 0xff, size);
      }
    }
    return std::all_of(bytes, bytes + n_bytes, [](unsigned char byte) { return byte == 0xff; });
  }
};

}  // namespace fused_xent::test

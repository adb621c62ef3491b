// The rows of a tile in memory, and copies of them to vector lanes and back. Included like simd.h.
//
// Scratch memory holds kGroup classes of all rows at a time, as A, one row a lane. It is copied by
// whole vectors where the rows or the classes of the tile are adjacent. A copy is faster than
// reading the tile in place twice: strided classes may be a power of two apart, so that all of them
// compete for one place in every cache.

constexpr int kGroup = 16;

// Class u of row i is at lanes[u * kTileRows + i].
template <typename A>
struct TileScratch {
  alignas(64) A lanes[kGroup * kTileRows];

  // Kernels compute with the lanes beyond the last row, too, but do not use the results.
  explicit TileScratch(int n_rows) {
    const int last = n_rows / kLanes<A> * kLanes<A>;
    if (last == n_rows) return;
    for (int u = 0; u < kGroup; ++u) store(lanes + u * kTileRows + last, Vec<A>{});
  }
};

#if XENT_VECTOR_BYTES >= 32
// Eight rows of eight numbers to eight columns, in 24 shuffles.
XENT_INLINE void transpose(F32x8 (&rows)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = (F32x8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    rows[i + 4] = (F32x8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
#endif

template <typename T>
class TileMemory {
 public:
  using A = Acc<T>;
  const int n_rows;

  TileMemory(const void* data, const Layout& layout, int64_t begin, int64_t end)
      : n_rows(static_cast<int>(end - begin)),
        base_(static_cast<T*>(const_cast<void*>(data)) + row_offset(layout, begin)),
        class_stride_(layout.class_stride) {
    const int inner = layout.n_dims - 1;
    const int64_t until_end = layout.size[inner] - begin % layout.size[inner];
    const int64_t row_stride = layout.stride[inner];
    const bool is_regular = inner == 0 || n_rows <= until_end;
    rows_are_adjacent_ = is_regular && row_stride == 1;
    for (int i = 0; i < n_rows && is_regular; ++i) offsets_[i] = i * row_stride;
    for (int i = 0; i < n_rows && !is_regular; ++i) {
      offsets_[i] = row_offset(layout, begin + i) - row_offset(layout, begin);
    }
  }

  T* at(int row, int64_t j) const { return base_ + offsets_[row] + j * class_stride_; }

  // Classes [j, j + count), count at most kGroup. Lanes beyond the last row are not written.
  XENT_INLINE void read(int64_t j, int count, A* lanes) const {
    if (rows_are_adjacent_) {
      for (int u = 0; u < count; ++u) read_row(at(0, j + u), lanes + u * kTileRows);
    } else {
      copy_columns<true>(j, count, lanes);
    }
  }
  XENT_INLINE void write(int64_t j, int count, const A* lanes) const {
    if (rows_are_adjacent_) {
      for (int u = 0; u < count; ++u) write_row(lanes + u * kTileRows, at(0, j + u));
    } else {
      copy_columns<false>(j, count, lanes);
    }
  }

 private:
  // Prefetches the same class of the next tile: its classes are too far apart for the processor's
  // own prefetcher.
  XENT_INLINE void read_row(const T* from, A* lanes) const {
    constexpr int kLine = 64 / sizeof(T);
    int i = 0;
    for (; i + kLine <= n_rows; i += kLine) {
      __builtin_prefetch(from + kTileRows + i);
#pragma GCC unroll 8
      for (int k = 0; k < kLine; k += kLanes<A>) store(lanes + i + k, load(from + i + k));
    }
    for (; i < n_rows; i += kLanes<A>) {
      store(lanes + i, load_first(from + i, n_rows - i < kLanes<A> ? n_rows - i : kLanes<A>));
    }
  }
  XENT_INLINE void write_row(const A* lanes, T* to) const {
    int i = 0;
#pragma GCC unroll 4
    for (; i + kLanes<A> <= n_rows; i += kLanes<A>) store(to + i, load(lanes + i));
    if (i < n_rows) store_first(to + i, load(lanes + i), n_rows - i);
  }

  // Calls square(i, u) for each square of eight rows from i on and eight adjacent classes from u
  // on. The last squares may overlap those before. Returns how many rows the squares cover.
  template <typename Square>
  XENT_INLINE int for_squares(int count, const Square& square) const {
    if (class_stride_ != 1 || count < 8) return 0;
    const int rows = n_rows / 8 * 8;
    for (int i = 0; i < rows; i += 8) {
      for (int u = 0; u + 8 <= count; u += 8) square(i, u);
      if (count % 8 != 0) square(i, count - 8);
    }
    return rows;
  }
  // From memory to lanes, or from lanes to memory.
  template <bool kRead, typename Lanes>
  XENT_INLINE void copy_columns(int64_t j, int count, Lanes* lanes) const {
    int squared = 0;
#if XENT_VECTOR_BYTES >= 32
    if constexpr (std::is_same_v<A, float>) {
      squared = for_squares(count, [&](int i, int u) __attribute__((always_inline)) {
        F32x8 square[8];
        for (int k = 0; k < 8; ++k) {
          square[k] = kRead ? load8(at(i + k, j + u)) : load8(lanes + (u + k) * kTileRows + i);
        }
        transpose(square);
        for (int k = 0; k < 8; ++k) {
          if constexpr (kRead) {
            store8(lanes + (u + k) * kTileRows + i, square[k]);
          } else {
            store8(at(i + k, j + u), square[k]);
          }
        }
      });
    }
#endif
    for (int i = squared; i < n_rows; ++i) {
      T* row = at(i, j);
      for (int u = 0; u < count; ++u) {
        if constexpr (kRead) {
          lanes[u * kTileRows + i] = load_one(row + u * class_stride_);
        } else {
          store_one(row + u * class_stride_, lanes[u * kTileRows + i]);
        }
      }
    }
  }

  T* base_;
  int64_t class_stride_;
  bool rows_are_adjacent_;
  int64_t offsets_[kTileRows];
};

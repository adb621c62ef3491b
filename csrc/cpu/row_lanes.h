// What is computed once per row, for several rows at a time: one in each lane of a vector of
// doubles. Batches of rows and tiles share this. Included like simd.h.

// Rows from `first` on, as many as F64 has lanes, of which the first n exist.
template <typename A>
struct RowLanes {
  const Params& p;
  int64_t first;
  int n;
  I64 kept;  // 0 for rows that are left out: their results are 0

  // Per-row values of type A, or `otherwise` if there are none.
  XENT_INLINE F64 read(const void* from, double otherwise = 0) const {
    if (from == nullptr) return otherwise - F64{};
    return load_wide(static_cast<const A*>(from) + first, n);
  }
  XENT_INLINE void write(void* to, F64 value) const {
    if (to == nullptr) return;
    store_narrow(static_cast<A*>(to) + first, kept == 0 ? F64{} : value, n);
  }

  XENT_INLINE F64 grad_loss() const {
    const A* from = static_cast<const A*>(p.grad_loss) + first * p.grad_loss_stride;
    if (p.grad_loss_stride == 0) return *from * p.grad_scale - F64{};
    const auto get = [=, this](int i) {
      return double{from[(i < n ? i : 0) * p.grad_loss_stride]};
    };
    return lanes_of(get) * p.grad_scale;
  }
};

// Turns cross-entropies into losses, and writes the slopes of the focal loss. mass is Q.
template <typename A>
XENT_INLINE F64 losses_of(const RowLanes<A>& rows, F64 cross_entropy, F64 mass, F64 lse) {
  const Params& p = rows.p;
  F64 loss = cross_entropy;
  if (p.focal_gamma != 0) {
    const FocalLoss<F64> focal = focal_loss<LaneMath>(cross_entropy, mass, p.focal_gamma);
    loss = focal.loss;
    rows.write(p.loss_slope, focal.slope);
  }
  return loss_of_row(loss, rows.read(p.token_weight, 1), p.lse_square_scale, lse);
}

// The upstream gradients of rows, from what forward has saved of them.
template <typename A>
XENT_INLINE Upstream<F64> upstream_of(const RowLanes<A>& rows, F64 max, F64 log_sum) {
  const Params& p = rows.p;
  Upstream<F64> upstream{rows.grad_loss(), F64{}, F64{}};
  if (!has_row_options(p)) return upstream;
  upstream.g *= rows.read(p.token_weight, 1);
  if (p.lse_square_scale != 0) {
    upstream.softmax = 2 * upstream.g * p.lse_square_scale * (max + log_sum);
  }
  upstream.softmax += rows.read(p.grad_lse);
  if (p.grad_entropy != nullptr) {
    const F64 grad_entropy = rows.read(p.grad_entropy);
    upstream.softmax -= grad_entropy * (rows.read(p.entropy) - log_sum);
    upstream.shifted = -grad_entropy;
  }
  if (p.focal_gamma != 0) upstream.g *= rows.read(p.loss_slope);
  return upstream;
}

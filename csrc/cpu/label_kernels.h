// Sparse labels, one row after another: see SparseLabels. Included like simd.h.

// The classes of a row's labels; -1 for those that do not count.
XENT_INLINE void read_classes(const Params& p, const SparseLabels& sparse, int64_t row,
                              int64_t* classes) {
  int64_t at = row_offset(sparse.classes_layout, row);
  for (int64_t k = 0; k < sparse.n_labels; ++k, at += sparse.classes_layout.class_stride) {
    const int64_t y = class_of_label(sparse, at);
    classes[k] = y == sparse.ignore_index ? -1 : checked_class(p, y);
  }
}

// The labels times their class weights, 0 for those that do not count. Returns their sum.
template <typename A>
XENT_INLINE double read_weights(const Params& p, const SparseLabels& sparse, int64_t row,
                                const int64_t* classes, double* weights) {
  const A* label = static_cast<const A*>(sparse.labels) + row_offset(sparse.labels_layout, row);
  double sum = 0;
  for (int64_t k = 0; k < sparse.n_labels; ++k, label += sparse.labels_layout.class_stride) {
    const int64_t y = classes[k];
    weights[k] = y < 0 ? 0 : *label * class_weight(p, y);
    sum += weights[k];
  }
  return sum;
}

template <typename T>
XENT_INLINE void read_logits(const Params& p, const SparseLabels& sparse, int64_t row,
                             const int64_t* classes, Acc<T>* logits) {
  const T* x = logits_row<T>(p, row);
  for (int64_t k = 0; k < sparse.n_labels; ++k) {
    logits[k] =
        classes[k] < 0 ? Acc<T>(0) : load_one(x + classes[k] * p.logits_layout.class_stride);
  }
}

template <typename A>
void read_labels_of_row(const Params& p, const SparseLabels& sparse, int64_t row,
                        const int64_t* classes, const A* logits) {
  const Transform<A> transform(p);
  int64_t top = -1;  // the label with the greatest logit
  for (int64_t k = 0; k < sparse.n_labels; ++k) {
    if (classes[k] >= 0 && (top < 0 || logits[k] > logits[top])) top = k;
  }
  sparse.target[row] = top < 0 ? 0 : static_cast<int32_t>(classes[top]);
  if (sparse.labels == nullptr) {
    static_cast<A*>(sparse.token_weight)[row] = top < 0 ? A(0) : A(1);
    return;
  }
  double weights[kMaxLabels];
  A z[kMaxLabels];
  const double weight = read_weights<A>(p, sparse, row, classes, weights);
  static_cast<A*>(sparse.label_weight)[row] = static_cast<A>(weight);
  if (sparse.extra_loss == nullptr) return;
  for_lanes<A>(0, sparse.n_labels, [&](int64_t k, int n) {
    store_first(z + k, transform(load_first(logits + k, n)).logit, n);
  });
  double extra_loss = 0;
  for (int64_t k = 0; k < sparse.n_labels; ++k) {
    // Two infinite logits are not subtracted.
    if (weights[k] != 0 && z[k] != z[top]) extra_loss += weights[k] * (double{z[top]} - z[k]);
  }
  // Smoothing may keep nothing of an infinite loss.
  const double keep = smoothing_of(p).keep;
  static_cast<A*>(sparse.extra_loss)[row] = static_cast<A>(keep == 0 ? 0 : keep * extra_loss);
}

template <typename T>
void read_labels(const Params& p, const SparseLabels& sparse, int64_t begin, int64_t end) {
  using A = Acc<T>;
  int64_t classes[kMaxLabels];
  A scratch[kMaxLabels];
  // A single label needs no logit, unless that or an extra loss is wanted.
  const bool reads_logits =
      sparse.n_labels > 1 || sparse.logits != nullptr || sparse.extra_loss != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    if (token_weight(p, row) == 0) {
      sparse.target[row] = 0;
      set_acc<A>(sparse.label_weight, row, 0);
      set_acc<A>(sparse.extra_loss, row, 0);
      continue;
    }
    A* kept = static_cast<A*>(sparse.logits);
    A* logits = kept == nullptr ? scratch : kept + row * sparse.n_labels;
    read_classes(p, sparse, row, classes);
    if (reads_logits) read_logits<T>(p, sparse, row, classes, logits);
    read_labels_of_row(p, sparse, row, classes, logits);
  }
}

// Adds up the weights of labels on the same class at the first of them. The others get class -1.
XENT_INLINE void add_up_labels(int64_t n_labels, int64_t* classes, double* weights) {
  int16_t slots[2 * kMaxLabels];  // of a hash table with open addressing: a label, or -1
  const int bits = std::bit_width(2 * static_cast<uint64_t>(n_labels) - 1);
  const int mask = (1 << bits) - 1;
  for (int i = 0; i <= mask; ++i) slots[i] = -1;
  for (int64_t k = 0; k < n_labels; ++k) {
    if (classes[k] < 0) continue;
    int slot = static_cast<int>(static_cast<uint32_t>(classes[k]) * 0x9e3779b1u >> (32 - bits));
    while (slots[slot] >= 0 && classes[slots[slot]] != classes[k]) slot = (slot + 1) & mask;
    if (slots[slot] < 0) {
      slots[slot] = static_cast<int16_t>(k);
    } else {
      weights[slots[slot]] += weights[k];
      classes[k] = -1;
    }
  }
}

// The gradients of a row at its labels. logits: as read_labels has kept them.
template <typename T>
void write_label_gradients_of_row(const Params& p, const SparseLabels& sparse, int64_t row) {
  using A = Acc<T>;
  int64_t classes[kMaxLabels];
  double weights[kMaxLabels];
  // q_k, and the sum of the q of other classes. That is a difference of two sums, which may both be
  // far greater: so they are computed in double.
  A on_label[kMaxLabels], on_others[kMaxLabels], class_weights[kMaxLabels], gradients[kMaxLabels];
  const Smoothing<double> smoothing = smoothing_of(p);
  read_classes(p, sparse, row, classes);
  const double sum = read_weights<A>(p, sparse, row, classes, weights);
  add_up_labels(sparse.n_labels, classes, weights);
  for (int64_t k = 0; k < sparse.n_labels; ++k) {
    on_label[k] = static_cast<A>(smoothing.keep * weights[k]);
    on_others[k] = static_cast<A>(smoothing.keep * (sum - weights[k]));
    class_weights[k] = classes[k] < 0 ? A(0) : static_cast<A>(class_weight(p, classes[k]));
  }
  const Transform<A> transform(p);
  const A* logits = static_cast<const A*>(sparse.logits) + row * sparse.n_labels;
  const RowResults<double> results = saved_results<double>(p, row);
  Upstream<double> upstream = upstream_of(p, row, grad_loss_of(p, row), results);
  add_entropy_gradient(upstream, p, row, results);
  const A g = static_cast<A>(upstream.g), spread = static_cast<A>(smoothing.uniform);
  const A mass = static_cast<A>(p.weight_sum);
  for_lanes<A>(0, sparse.n_labels, [&](int64_t k, int n) {
    const auto z = transform(load_first(logits + k, n));
    const Vec<A> difference = z.logit - static_cast<A>(results.max);
    const Vec<A> d = difference > 0 ? Vec<A>{} : difference;
    const Vec<A> log_prob = d - static_cast<A>(results.log_sum), prob = exp_nonpositive(log_prob);
    Vec<A> gradient =
        target_gradient(load_first(on_label + k, n), spread, prob, expm1_nonpositive(log_prob),
                        mass - Vec<A>{}, load_first(class_weights + k, n));
    gradient = g * (gradient + load_first(on_others + k, n) * prob);
    gradient = add_softmax_part(gradient, static_cast<A>(upstream.softmax) - Vec<A>{},
                                static_cast<A>(upstream.shifted) - Vec<A>{}, prob, d);
    store_first(gradients + k, gradient * z.slope, n);
  });
  T* out = gradient_row<T>(p, row);
  for (int64_t k = 0; k < sparse.n_labels; ++k) {
    if (classes[k] >= 0) store_one(out + classes[k] * p.grad_layout.class_stride, gradients[k]);
  }
}

template <typename T>
void write_label_gradients(const Params& p, const SparseLabels& sparse, int64_t begin,
                           int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (token_weight(p, row) != 0) write_label_gradients_of_row<T>(p, sparse, row);
  }
}

template <typename T>
void write_log_probs(const Params& p, const SparseLabels& sparse, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Transform<A> transform(p);
  int64_t classes[kMaxLabels];
  A logits[kMaxLabels];
  for (int64_t row = begin; row < end; ++row) {
    read_classes(p, sparse, row, classes);
    read_logits<T>(p, sparse, row, classes, logits);
    const A max = static_cast<const A*>(p.row_max)[row];
    const A log_sum = static_cast<const A*>(p.log_sum)[row];
    for_lanes<A>(0, sparse.n_labels, [&](int64_t k, int n) {
      const Vec<A> d = transform(load_first(logits + k, n)).logit - max;
      store_first(logits + k, (d > 0 ? Vec<A>{} : d) - log_sum, n);
    });
    A* out = static_cast<A*>(sparse.log_probs) + row_offset(sparse.log_probs_layout, row);
    for (int64_t k = 0; k < sparse.n_labels; ++k, out += sparse.log_probs_layout.class_stride) {
      *out = classes[k] < 0 ? A(0) : logits[k];
    }
  }
}

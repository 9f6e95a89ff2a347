// Attention forward: see templates/native.py for what is asked.
//
// Keys and values of some heads are packed into panels (`Packed`), then each task takes BLOCK_M rows of a head through the
// blocks of keys that they see: scores, softmax on line (Milakov and Gimelshein 2018; Dao 2023, FlashAttention-2), products
// with the values.  What leaves a block are its rows of the output and their log-sum-exp.

namespace {

constexpr long BLOCK_M = 48;
constexpr long BLOCK_N = 256;
constexpr long PACKED = 1 << 19;  // floats of packed operands that the caches hold

// Where packed operands lie, in floats.
template <bool PAIRS>
struct Packed {
  long steps;  // of q·kᵀ
  long width;  // of v, whole vectors
  long keys;   // whole panels
  long head;   // of the keys, [panels, steps, PANEL], and values, [keys or pairs of them, width], of a head
  long block;  // of what a task needs beside them
  explicit Packed(const Call& c)
      : steps(PAIRS ? (c.D + 1) / 2 : c.D),
        width(up(c.Dv, LANES)),
        keys(up(c.N, PANEL)),
        head(keys * steps + rows_of(keys) * width),
        block(BLOCK_M * (up(steps, LANES) + BLOCK_N + (PAIRS ? BLOCK_N / 2 : 0) + width)) {}
  static long rows_of(long keys) { return PAIRS ? keys / 2 : keys; }
};

// Rows [m0, m0 + BLOCK_M) of one head.
template <bool PAIRS, class T>
class Block {
 public:
  Block(const Call& c, const Packed<PAIRS>& packed, long b, long h, long m0, float* scratch)
      : c_(c), packed_(packed), rows_(std::min(BLOCK_M, c.M - m0)), b_(b), h_(h), m0_(m0) {
    q_ = scratch;
    scores_ = q_ + BLOCK_M * up(packed.steps, LANES);
    weights_ = PAIRS ? scores_ + BLOCK_M * BLOCK_N : scores_;
    out_ = weights_ + BLOCK_M * LDW;
    // plain scores stay what the product gives until the greatest is taken from them; zero times what stands for a key that is
    // not seen would be no number
    general_ = c.bias != nullptr || c.mask != nullptr || c.cap != 0 || c.scale == 0;
    scale_ = general_ ? 1.0f : static_cast<float>(c.scale);
    unit_ = general_ ? LOG2E : static_cast<float>(c.scale * 1.4426950408889634);
    const T* q = static_cast<const T*>(c.q) + b * c.q_b + h * c.q_h + m0 * c.q_m;
    pack_left<PAIRS>(q, c.q_m, c.D, rows_, packed.steps, q_);
    for (long r = 0; r < rows_; ++r) {
      most_[r] = none();
      sum_[r] = 0;
      seen_[r] = seen_by(c, m0 + r);
    }
    std::fill(out_, out_ + rows_ * packed.width, 0.0f);
  }

  void run(const float* keys, const float* values) {
    auto [first, last] = hull(0, rows_, 0, c_.N);
    for (long n0 = first / PANEL * PANEL; n0 < last; n0 += BLOCK_N)
      for (long r0 = 0; r0 < rows_; r0 += GROUP) {
        const long r1 = std::min(r0 + GROUP, rows_);
        auto [n_first, n_last] = hull(r0, r1, n0, std::min(n0 + BLOCK_N, last));
        if (n_first >= n_last) continue;
        for (long r = r0; r < r1; ++r) fetch_bias<T>(c_, b_, h_, m0_ + r, n_first, n_last);
        for (long n = n_first / PANEL * PANEL; n < n_last; n += PANEL)
          product<PAIRS>(r1 - r0, up(std::min(PANEL, n_last - n), LANES) / LANES, q_ + r0 * packed_.steps, packed_.steps,
                         keys + n * packed_.steps, PANEL, packed_.steps, scores_ + r0 * BLOCK_N + n - n0, BLOCK_N, false);
        const long c0 = (n_first - n0) / LANES * LANES, c1 = up(n_last - n0, LANES);
        for (long r = r0; r < r1; ++r) weigh(r, n0, c0, c1);
        for (long d = 0; d < packed_.width; d += PANEL)
          product_of<PAIRS>(r1 - r0, std::min(PANEL, packed_.width - d) / LANES, weights_ + r0 * LDW, LDW,
                            values + packed_.rows_of(n0) * packed_.width + d, packed_.width, n_first - n0, n_last - n0,
                            out_ + r0 * packed_.width + d, packed_.width);
      }
    finish();
  }

 private:
  static constexpr long LDW = PAIRS ? BLOCK_N / 2 : BLOCK_N;

  // The keys of [n0, n1) between the first and the last that one of some rows sees.
  Range hull(long r0, long r1, long n0, long n1) const {
    Range found{n1, n0};
    for (long r = r0; r < r1; ++r)
      if (seen_[r].first < seen_[r].last)
        found = {std::min(found.first, seen_[r].first), std::max(found.last, seen_[r].last)};
    return {std::max(found.first, n0), std::min(found.last, n1)};
  }

  // Scores of row r, plain ones without their scale, those of keys that it does not see the least; the one of greatest weight.
  float score(float* row, long r, long n0, long c0, long c1) {
    const long head = c0 / LANES * LANES, tail = c1 / LANES * LANES;
    auto in = [&](long i) {
      return static_cast<__mmask16>(lanes(c1 - i) & (i < c0 ? 0xffff << (c0 - i) : 0xffff));
    };
    const __m512 least = _mm512_set1_ps(-INF);
    __m512 most = least;
    if (general_) {
      const float cap = static_cast<float>(c_.cap);
      const __m512 scale = _mm512_set1_ps(static_cast<float>(cap != 0 ? c_.scale / c_.cap : c_.scale));
      for (long i = head; i < c1; i += LANES) {
        const __mmask16 some = allowed(c_, b_, h_, m0_ + r, n0 + i, in(i));
        const __m512 add = bias<T>(c_, b_, h_, m0_ + r, n0 + i, some);
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(row + i), scale);
        x = cap != 0 ? _mm512_fmadd_ps(_mm512_set1_ps(cap), tanh(x), add) : _mm512_add_ps(x, add);
        x = _mm512_mask_mov_ps(least, some, x);
        _mm512_storeu_ps(row + i, x);
        most = _mm512_max_ps(most, x);
      }
      return _mm512_reduce_max_ps(most);
    }
    if (head < c0) edge(row + head, in(head));
    if (tail < c1) edge(row + tail, in(tail));
    if (unit_ > 0) {
      for (long i = head; i < c1; i += LANES) most = _mm512_max_ps(most, _mm512_loadu_ps(row + i));
      return _mm512_reduce_max_ps(most);
    }
    most = _mm512_set1_ps(INF);
    for (long i = head; i < c1; i += LANES) most = _mm512_min_ps(most, _mm512_loadu_ps(row + i));
    return _mm512_reduce_min_ps(most);
  }

  // Lanes that are left out become the least of the row: times a negative scale +inf is.
  void edge(float* x, __mmask16 in) const {
    _mm512_storeu_ps(x, _mm512_mask_mov_ps(_mm512_set1_ps(none()), in, _mm512_loadu_ps(x)));
  }

  // Weights of row r for the columns [c0, c1) of a block, relative to its greatest score so far; the sums so far follow.
  void weigh(long r, long n0, long c0, long c1) {
    float* row = scores_ + r * BLOCK_N;
    float* to = weights_ + r * LDW;
    const long x0 = std::max(seen_[r].first - n0, c0), x1 = std::max(std::min(seen_[r].last - n0, c1), x0);
    const long head = x0 / LANES * LANES, tail = up(x1, LANES);
    if (x0 == x1) return clear(to, c0, c1);
    const float found = score(row, r, n0, x0, x1), before = most_[r];
    if (unit_ > 0 ? found > before : found < before) {
      most_[r] = found;
      if (sum_[r] != 0) shrink(r, std::exp2(unit_ * (before - found)));
    }
    const __m512 unit = _mm512_set1_ps(unit_), base = _mm512_set1_ps(most_[r] == none() ? 0.0f : most_[r]);
    __m512 sum = _mm512_setzero_ps();
    const Kept kept(c_, b_, h_, m0_ + r);
    clear(to, c0, head);
    for (long i = head; i < x1; i += LANES) {
      // a score can be finfo.min, of which no multiple is finite, and the rounding of a great one's more than its exponent bears
      const __m512 weight = exp2(_mm512_mul_ps(unit, _mm512_sub_ps(_mm512_loadu_ps(row + i), base)));
      sum = _mm512_add_ps(sum, weight);
      put(to, i, _mm512_maskz_mov_ps(kept.of(n0 + i), weight));
    }
    clear(to, tail, c1);
    sum_[r] += _mm512_reduce_add_ps(sum);
  }

  // What stands for the score of a row that has none yet.
  float none() const { return unit_ > 0 ? -INF : INF; }

  void shrink(long r, float factor) {
    sum_[r] *= factor;
    float* row = out_ + r * packed_.width;
    for (long d = 0; d < packed_.width; d += LANES)
      _mm512_storeu_ps(row + d, _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(row + d)));
  }

  static void put(float* row, long i, __m512 x) {
#if HAS_PAIRS
    if constexpr (PAIRS) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i / 2), (__m256i)_mm512_cvtneps_pbh(x));
      return;
    }
#endif
    _mm512_storeu_ps(row + i, x);
  }

  static void clear(float* row, long c0, long c1) {
    for (long i = c0; i < c1; i += LANES) put(row, i, _mm512_setzero_ps());
  }

  void finish() {
    T* to = static_cast<T*>(c_.out) + b_ * c_.out_b + h_ * c_.out_h + m0_ * c_.out_m;
    float* lse = c_.lse + b_ * c_.lse_b + h_ * c_.lse_h + m0_;
    for (long r = 0; r < rows_; ++r, to += c_.out_m) {
      const bool empty = sum_[r] == 0;
      const float dead = seen_[r].first < seen_[r].last ? static_cast<float>(c_.dead) : 0.0f;
      const float factor = static_cast<float>(c_.kept) / sum_[r];
      for (long d = 0; d < c_.Dv; d += LANES) {
        const __m512 x = _mm512_loadu_ps(out_ + r * packed_.width + d);
        store(to + d, empty ? _mm512_set1_ps(dead) : _mm512_mul_ps(_mm512_set1_ps(factor), x), lanes(c_.Dv - d));
      }
      const float most = most_[r] * scale_;
      lse[r] = empty ? -INF : most == INF ? INF : most + std::log(sum_[r]);
    }
  }

  const Call& c_;
  const Packed<PAIRS>& packed_;
  const long rows_, b_, h_, m0_;
  bool general_;
  float scale_, unit_;  // of scores, and of them in the exponent of two
  float *q_, *scores_, *weights_, *out_;
  float most_[BLOCK_M], sum_[BLOCK_M];
  Range seen_[BLOCK_M];
};

// Whether each thread takes KV heads of its own, so that none waits for another or reads what another one's caches hold: where
// there are some for each, and as many, or so many that one more does not matter, and its cache holds one.
template <bool PAIRS>
bool apart(const Call& c) {
  const long heads = c.B * c.Hkv;
  const bool enough = heads >= 8 * c.threads || (heads >= 4 * c.threads && heads % c.threads == 0);
  return enough && Packed<PAIRS>(c).head <= PACKED;
}

// KV heads whose keys and values are packed together, for all threads: what the caches hold, and no fewer than give each thread a
// block of rows.
template <bool PAIRS>
long heads_together(const Call& c) {
  const long head = std::max(1L, Packed<PAIRS>(c).head), tasks = std::max(1L, c.H / c.Hkv * (up(c.M, BLOCK_M) / BLOCK_M));
  return std::min(c.B * c.Hkv, std::max(PACKED / head, (c.threads + tasks - 1) / tasks));
}

// The panel of KV head (b, h) that begins at key n, where some row sees one of its keys.
template <bool PAIRS, class T>
void pack(const Call& c, const Packed<PAIRS>& packed, Range seen, long b, long h, long n, float* head) {
  // keys that no row sees may hold anything, and stand for zeros where they share a panel with others
  const long keys = std::clamp(seen.last - n, 0L, PANEL);
  if (keys == 0 || n + PANEL <= seen.first) return;
  const T* k = static_cast<const T*>(c.k) + b * c.k_b + h * c.k_h + n * c.k_n;
  const T* v = static_cast<const T*>(c.v) + b * c.v_b + h * c.v_h + n * c.v_n;
  pack_columns<PAIRS>(k, c.k_n, c.D, keys, packed.steps, head + n * packed.steps);
  head += packed.keys * packed.steps + packed.rows_of(n) * packed.width;
  pack_rows<PAIRS>(v, c.v_n, c.Dv, keys, PANEL, packed.width, head);
}

// Some rows of one of the `c.H / c.Hkv` heads that read KV head (b, h); `task` counts the blocks of all of them.
template <bool PAIRS, class T>
void attend(const Call& c, const Packed<PAIRS>& packed, long b, long h, long task, const float* head, float* scratch) {
  const long blocks = up(c.M, BLOCK_M) / BLOCK_M;
  // the last rows first: under a causal mask they take longest
  const long m = (blocks - 1 - task % blocks) * BLOCK_M;
  Block<PAIRS, T>(c, packed, b, h * (c.H / c.Hkv) + task / blocks, m, scratch).run(head, head + packed.keys * packed.steps);
}

template <bool PAIRS, class T>
void run(const Call& c) {
  const Packed<PAIRS> packed(c);
  float* heads = c.scratch + c.threads * packed.block;
  Range seen{c.N, 0};
  for (long m = 0; m < c.M; ++m) {
    const Range keys = seen_by(c, m);
    if (keys.first < keys.last) seen = {std::min(seen.first, keys.first), std::max(seen.last, keys.last)};
  }
  const long all = c.B * c.Hkv, panels = packed.keys / PANEL, tasks = c.H / c.Hkv * (up(c.M, BLOCK_M) / BLOCK_M);
  if (apart<PAIRS>(c)) {
#pragma omp parallel for schedule(dynamic) num_threads(c.threads)
    for (long at = 0; at < all; ++at) {
      const long b = at / c.Hkv, h = at % c.Hkv;
      float* head = heads + omp_get_thread_num() * packed.head;
      float* scratch = c.scratch + omp_get_thread_num() * packed.block;
      for (long i = 0; i < panels; ++i) pack<PAIRS, T>(c, packed, seen, b, h, i * PANEL, head);
      for (long i = 0; i < tasks; ++i) attend<PAIRS, T>(c, packed, b, h, i, head, scratch);
    }
    return;
  }
  const long together = heads_together<PAIRS>(c);
#pragma omp parallel num_threads(c.threads)
  for (long start = 0; start < all; start += together) {
    const long some = std::min(together, all - start);
#pragma omp for
    for (long i = 0; i < some * panels; ++i) {
      const long at = i / panels, b = (start + at) / c.Hkv, h = (start + at) % c.Hkv;
      pack<PAIRS, T>(c, packed, seen, b, h, i % panels * PANEL, heads + at * packed.head);
    }
#pragma omp for schedule(dynamic)
    for (long i = 0; i < some * tasks; ++i) {
      const long at = i / tasks, b = (start + at) / c.Hkv, h = (start + at) % c.Hkv;
      float* scratch = c.scratch + omp_get_thread_num() * packed.block;
      attend<PAIRS, T>(c, packed, b, h, i % tasks, heads + at * packed.head, scratch);
    }
  }
}

template <bool PAIRS>
int64_t floats(const Call& c) {
  const Packed<PAIRS> packed(c);
  return c.threads * packed.block + (apart<PAIRS>(c) ? c.threads : heads_together<PAIRS>(c)) * packed.head;
}

}  // namespace

// What a call needs in `scratch`, in floats, and the call itself.
extern "C" int64_t forward_floats_f32(const Call* c) { return floats<false>(*c); }
extern "C" int64_t forward_floats_f16(const Call* c) { return floats<false>(*c); }
extern "C" int64_t forward_floats_bf16(const Call* c) { return floats<HAS_PAIRS != 0>(*c); }
extern "C" void forward_f32(const Call* c) { run<false, float>(*c); }
extern "C" void forward_f16(const Call* c) { run<false, f16>(*c); }
extern "C" void forward_bf16(const Call* c) { run<HAS_PAIRS != 0, bf16>(*c); }

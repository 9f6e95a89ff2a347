// Gradients of q, k and v: see templates/native.py for what is asked.
//
// Each task takes blocks of BLOCK_N keys of a KV head through the blocks of rows that see them (Dao 2023, FlashAttention-2): weights
// P and their gradients dP once more, from these those of the scores, dS = P·(dP - delta); dv += Pᵀ·dout, dk += dSᵀ·q, and for
// each task of its own, dq += dS·k.  Each gradient is summed in one order, whatever the threads do.

namespace {

constexpr long BLOCK_M = 64;
constexpr long BLOCK_N = 128;

// Where a thread finds what it needs for a block of rows and keys, in floats.
template <bool PAIRS>
struct Room {
  long steps, steps_v;  // of q·kᵀ and dout·vᵀ
  long width, width_v;  // of q, k and v, whole vectors
  long total = 0;
  long q, dout, q_rows, dout_rows;        // blocks of rows, as left and as right operands
  long keys, values, key_rows;            // panels of keys, and keys as right operands
  long scores, slopes;                    // P and dP, then dS
  long weights_t, slopes_t, slopes_narrow;  // the same as pairs, for sums over rows and over keys
  long dk, dv;

  explicit Room(const Call& c)
      : steps(halved(c.D)), steps_v(halved(c.Dv)), width(up(c.D, LANES)), width_v(up(c.Dv, LANES)) {
    q_rows = take(halved(BLOCK_M) * width);
    dout_rows = take(halved(BLOCK_M) * width_v);
    // without pairs the rows are the same from either side
    q = PAIRS ? take(BLOCK_M * steps) : q_rows;
    dout = PAIRS ? take(BLOCK_M * steps_v) : dout_rows;
    keys = take(BLOCK_N * steps);
    values = take(BLOCK_N * steps_v);
    key_rows = take(halved(BLOCK_N) * width);
    scores = take(BLOCK_M * BLOCK_N);
    slopes = take(BLOCK_M * BLOCK_N);
    weights_t = take(PAIRS ? BLOCK_M / 2 * BLOCK_N : 0);
    slopes_t = take(PAIRS ? BLOCK_M / 2 * BLOCK_N : 0);
    slopes_narrow = take(PAIRS ? BLOCK_M * BLOCK_N / 2 : 0);
    dk = take(BLOCK_N * width);
    dv = take(BLOCK_N * width_v);
  }
  static long halved(long x) { return PAIRS ? (x + 1) / 2 : x; }
  long take(long floats) {
    const long at = total;
    total += up(floats, LANES);
    return at;
  }
};

// How many tasks share the keys of a head, so that all threads have some.
long parts_of(const Call& c) {
  const long heads = std::max(1L, c.B * c.Hkv), blocks = up(c.N, BLOCK_N) / BLOCK_N;
  return heads >= c.threads ? 1 : std::min({blocks, (c.threads + heads - 1) / heads, 8L});
}

template <bool PAIRS, class T>
class Task {
 public:
  Task(const Call& c, const Room<PAIRS>& room, float* memory, float* rows, float* dq, long b, long kv)
      : c_(c), room_(room), at_(memory), delta_(rows), raise_(rows + c.B * c.H * c.M), dq_(dq), b_(b), kv_(kv), group_(c.H / c.Hkv) {
    general_ = c.bias != nullptr || c.mask != nullptr || c.cap != 0;
  }

  // What tasks need of BLOCK_M rows of a head from m0 on: sums of dout·out, less the gradient of lse, and factors of weights.
  void prepare(long g, long m0) {
    const long h = head(g), rows = std::min(BLOCK_M, c_.M - m0);
    bool large = false;
    for (long m = m0; m < m0 + rows; ++m) {
      const T* dout = row(c_.dout, h, m, c_.dout_b, c_.dout_h, c_.dout_m);
      const T* out = row(c_.out, h, m, c_.out_b, c_.out_h, c_.out_m);
      __m512 sum = _mm512_setzero_ps();
      for (long d = 0; d < c_.Dv; d += LANES)
        sum = _mm512_fmadd_ps(load(dout + d, lanes(c_.Dv - d)), load(out + d, lanes(c_.Dv - d)), sum);
      float delta = _mm512_reduce_add_ps(sum);
      if (c_.dlse != nullptr) delta -= c_.dlse[b_ * c_.dlse_b + h * c_.dlse_h + m * c_.dlse_m];
      delta_[of(h, m)] = delta;
      // a score that is +inf makes all gradients of its row NaN; else such a row has no weights
      raise_[of(h, m)] = lse(h, m) == INF && std::isnan(delta) ? delta : 1.0f;
      large |= is_large(lse(h, m));
    }
    if (large && c_.whole) normalise(g, m0, rows);
  }

  void run(long n0) {
    const T* k = at_block(n0);
    const T* v = static_cast<const T*>(c_.v) + b_ * c_.v_b + kv_ * c_.v_h + n0 * c_.v_n;
    for (long n = 0; n < keys_; n += PANEL) {
      const long some = std::min(PANEL, keys_ - n);
      pack_columns<PAIRS>(k + n * c_.k_n, c_.k_n, c_.D, some, room_.steps, at_ + room_.keys + n * room_.steps);
      pack_columns<PAIRS>(v + n * c_.v_n, c_.v_n, c_.Dv, some, room_.steps_v, at_ + room_.values + n * room_.steps_v);
    }
    const long padded = up(keys_, LANES);
    pack_rows<PAIRS>(k, c_.k_n, c_.D, keys_, padded, room_.width, at_ + room_.key_rows);
    std::fill_n(at_ + room_.dk, padded * room_.width, 0.0f);
    std::fill_n(at_ + room_.dv, padded * room_.width_v, 0.0f);
    for (long g = 0; g < group_; ++g)
      for (long m0 = 0; m0 < c_.M; m0 += BLOCK_M) {
        const long rows = std::min(BLOCK_M, c_.M - m0);
        const auto [first, last] = see(m0, rows);
        if (first < last)
          block(g, m0, rows, first, last);
        else if (c_.dscores != nullptr)
          for (long r = 0; r < rows; ++r) std::fill_n(dscores(g, m0 + r), keys_, 0.0f);
      }
    give(c_.dk, c_.dk_b, c_.dk_h, c_.dk_n, at_ + room_.dk, room_.width, c_.D, static_cast<float>(c_.scale));
    give(c_.dv, c_.dv_b, c_.dv_h, c_.dv_n, at_ + room_.dv, room_.width_v, c_.Dv, static_cast<float>(c_.kept));
  }

 private:
  long head(long g) const { return kv_ * group_ + g; }

  const T* row(const void* x, long h, long m, long of_b, long of_h, long of_m) const {
    return static_cast<const T*>(x) + b_ * of_b + h * of_h + m * of_m;
  }

  // Begins a block of keys, [n0, n0 + keys_); the first of them.
  const T* at_block(long n0) {
    keys_ = std::min(BLOCK_N, c_.N - n0);
    n0_ = n0;
    return static_cast<const T*>(c_.k) + b_ * c_.k_b + kv_ * c_.k_h + n0 * c_.k_n;
  }

  // Notes the columns of the block of keys that each of some rows sees; from the first to the last of them.
  Range see(long m0, long rows) {
    Range found{BLOCK_N, 0};
    for (long r = 0; r < rows; ++r) {
      const Range seen = seen_by(c_, m0 + r);
      first_[r] = std::clamp(seen.first - n0_, 0L, keys_);
      last_[r] = std::clamp(seen.last - n0_, 0L, keys_);
      if (first_[r] < last_[r]) found = {std::min(found.first, first_[r]), std::max(found.last, last_[r])};
    }
    return found;
  }

  float lse(long h, long m) const { return c_.lse[b_ * c_.lse_b + h * c_.lse_h + m]; }

  long of(long h, long m) const { return (b_ * c_.H + h) * c_.M + m; }

  // Whether exp(x - lse) has errors beyond those of a softmax that rounds x: in float32 twice theirs from about 64 on.
  static bool is_large(float lse) { return std::abs(lse) > (sizeof(T) < sizeof(float) ? 8192.0f : 32.0f) && std::abs(lse) < INF; }

  // A log-sum-exp that is large has few digits for the number of keys, or none: the weights of its row are summed once more.
  void normalise(long g, long m0, long rows) {
    const long h = head(g);
    double sums[BLOCK_M] = {};
    float* p = at_ + room_.scores;
    pack_left<PAIRS>(row(c_.q, h, m0, c_.q_b, c_.q_h, c_.q_m), c_.q_m, c_.D, rows, room_.steps, at_ + room_.q);
    for (long n0 = 0; n0 < c_.N; n0 += BLOCK_N) {
      const T* k = at_block(n0);
      const auto [first, last] = see(m0, rows);
      if (first >= last) continue;
      for (long n = first / PANEL * PANEL; n < last; n += PANEL) {
        float* panel = at_ + room_.keys + n * room_.steps;
        pack_columns<PAIRS>(k + n * c_.k_n, c_.k_n, c_.D, std::min(PANEL, keys_ - n), room_.steps, panel);
        for (long r = 0; r < rows; r += GROUP)
          product<PAIRS>(std::min(GROUP, rows - r), PANEL / LANES, at_ + room_.q + r * room_.steps, room_.steps, panel, PANEL,
                         room_.steps, p + r * BLOCK_N + n, BLOCK_N, false);
      }
      for (long r = 0; r < rows; ++r)
        for (long i = first / LANES * LANES; i < last; i += LANES) {
          const __mmask16 some = allowed(c_, b_, h, m0 + r, n0_ + i, seen(r, i));
          const Scored found = scored(h, m0 + r, i, some, _mm512_loadu_ps(p + r * BLOCK_N + i));
          sums[r] += _mm512_mask_reduce_add_ps(some, exp2(found.exponent));
        }
    }
    for (long r = 0; r < rows; ++r)
      if (is_large(lse(h, m0 + r)) && sums[r] > 0 && sums[r] < INF) raise_[of(h, m0 + r)] = static_cast<float>(1 / sums[r]);
  }

  // The columns of 16 from i on that row r of a block sees.
  __mmask16 seen(long r, long i) const {
    const long skip = std::clamp(first_[r] - i, 0L, LANES);
    return static_cast<__mmask16>(lanes(last_[r] - i) & (0xffff << skip));
  }

  struct Scored {
    __m512 exponent, factor;  // of two, of the weight; the slope of the score by its product, but for the scale
  };

  // As in forward.cpp, so that what was rounded there is rounded here.
  Scored scored(long h, long m, long i, __mmask16 some, __m512 product) const {
    const __m512 one = _mm512_set1_ps(1.0f);
    const float cap = static_cast<float>(c_.cap);
    __m512 x = _mm512_mul_ps(product, _mm512_set1_ps(static_cast<float>(cap != 0 ? c_.scale / c_.cap : c_.scale))), factor = one;
    if (general_) {
      const __m512 add = bias<T>(c_, b_, h, m, n0_ + i, some);
      if (cap != 0) {
        const __m512 bent = tanh(x);
        factor = _mm512_fnmadd_ps(bent, bent, one);
        x = _mm512_fmadd_ps(_mm512_set1_ps(cap), bent, add);
      } else {
        x = _mm512_add_ps(x, add);
      }
    }
    return {_mm512_mul_ps(_mm512_set1_ps(LOG2E), _mm512_sub_ps(x, _mm512_set1_ps(lse(h, m)))), factor};
  }

  // Where the gradients of a row's scores go, for the block of keys.
  float* dscores(long g, long m) const { return c_.dscores + ((b_ * c_.H + head(g)) * c_.M + m) * c_.N + n0_; }

  // What rows [m0, m0 + rows) of a head give, for the columns [first, last) of the block of keys.
  void block(long g, long m0, long rows, long first, long last) {
    const long c0 = first / LANES * LANES, c1 = up(last, LANES);
    const long h = head(g), even = PAIRS ? up(rows, 2) : rows, row_steps = Room<PAIRS>::halved(rows);
    const T* q = row(c_.q, h, m0, c_.q_b, c_.q_h, c_.q_m);
    const T* dout = row(c_.dout, h, m0, c_.dout_b, c_.dout_h, c_.dout_m);
    float *left = at_ + room_.q, *left_v = at_ + room_.dout, *p = at_ + room_.scores, *ds = at_ + room_.slopes;
    const long of_left = PAIRS ? room_.steps : room_.width, of_left_v = PAIRS ? room_.steps_v : room_.width_v;
    if constexpr (PAIRS) {
      pack_left<PAIRS>(q, c_.q_m, c_.D, rows, room_.steps, left);
      pack_left<PAIRS>(dout, c_.dout_m, c_.Dv, rows, room_.steps_v, left_v);
    }
    pack_rows<PAIRS>(q, c_.q_m, c_.D, rows, even, room_.width, at_ + room_.q_rows);
    pack_rows<PAIRS>(dout, c_.dout_m, c_.Dv, rows, even, room_.width_v, at_ + room_.dout_rows);
    for (long n = c0 / PANEL * PANEL; n < c1; n += PANEL)
      for (long r = 0; r < rows; r += GROUP) {
        const long some = std::min(GROUP, rows - r), vectors = up(std::min(PANEL, c1 - n), LANES) / LANES;
        for (long i = r; i < r + some; ++i) fetch_bias<T>(c_, b_, h, m0 + i, n0_ + n, std::min(n0_ + n + PANEL, c_.N));
        product<PAIRS>(some, vectors, left + r * of_left, of_left, at_ + room_.keys + n * room_.steps, PANEL,
                       room_.steps, p + r * BLOCK_N + n, BLOCK_N, false);
        product<PAIRS>(some, vectors, left_v + r * of_left_v, of_left_v, at_ + room_.values + n * room_.steps_v, PANEL,
                       room_.steps_v, ds + r * BLOCK_N + n, BLOCK_N, false);
      }
    for (long r = 0; r < rows; ++r) slope(g, m0 + r, r, c0, c1);
    if (rows < even)
      for (float* x : {p, ds}) std::fill_n(x + rows * BLOCK_N + c0, c1 - c0, 0.0f);
    const float *p_t = p, *ds_t = ds, *ds_left = ds;
    long of_row = BLOCK_N;
    if constexpr (PAIRS) {
      pair(p, even, c0, c1, at_ + room_.weights_t, nullptr);
      pair(ds, even, c0, c1, at_ + room_.slopes_t, at_ + room_.slopes_narrow);
      p_t = at_ + room_.weights_t, ds_t = at_ + room_.slopes_t, ds_left = at_ + room_.slopes_narrow, of_row = BLOCK_N / 2;
    }
    for (long n = c0; n < c1; n += GROUP) {
      const long some = std::min(GROUP, c1 - n);
      for (long d = 0; d < room_.width_v; d += PANEL)
        product<PAIRS, true>(some, std::min(PANEL, room_.width_v - d) / LANES, p_t + n, BLOCK_N, at_ + room_.dout_rows + d,
                             room_.width_v, row_steps, at_ + room_.dv + n * room_.width_v + d, room_.width_v, true);
      for (long d = 0; d < room_.width; d += PANEL)
        product<PAIRS, true>(some, std::min(PANEL, room_.width - d) / LANES, ds_t + n, BLOCK_N, at_ + room_.q_rows + d,
                             room_.width, row_steps, at_ + room_.dk + n * room_.width + d, room_.width, true);
    }
    float* dq = dq_ + (g * c_.M + m0) * room_.width;
    for (long r = 0; r < rows; r += GROUP)
      for (long d = 0; d < room_.width; d += PANEL)
        product_of<PAIRS>(std::min(GROUP, rows - r), std::min(PANEL, room_.width - d) / LANES, ds_left + r * of_row, of_row,
                          at_ + room_.key_rows + d, room_.width, first, last, dq + r * room_.width + d, room_.width);
  }

  // P and dS of a row in place of its products, zero for keys that it does not see.
  void slope(long g, long m, long r, long c0, long c1) {
    const long h = head(g);
    float *p = at_ + room_.scores + r * BLOCK_N, *ds = at_ + room_.slopes + r * BLOCK_N;
    const __m512 delta = _mm512_set1_ps(delta_[of(h, m)]), raise = _mm512_set1_ps(raise_[of(h, m)]);
    const __m512 zero = _mm512_setzero_ps(), of_kept = _mm512_set1_ps(static_cast<float>(c_.kept));
    const Kept kept(c_, b_, h, m);
    float* given = c_.dscores == nullptr ? nullptr : dscores(g, m);
    if (given != nullptr) {
      std::fill_n(given, c0, 0.0f);
      if (c1 < keys_) std::fill_n(given + c1, keys_ - c1, 0.0f);
    }
    for (long i = c0; i < c1; i += LANES) {
      const __mmask16 some = allowed(c_, b_, h, m, n0_ + i, seen(r, i));
      if (some == 0) {
        _mm512_storeu_ps(p + i, zero);
        _mm512_storeu_ps(ds + i, zero);
        if (given != nullptr) store(given + i, zero, lanes(keys_ - i));
        continue;
      }
      const Scored found = scored(h, m, i, some, _mm512_loadu_ps(p + i));
      const __m512 weight = _mm512_maskz_mul_ps(some, raise, exp2(found.exponent));
      const __mmask16 keeps = kept.of(n0_ + i);
      const __m512 of_weight = _mm512_maskz_mul_ps(keeps, of_kept, _mm512_loadu_ps(ds + i));
      const __m512 slope = _mm512_maskz_mul_ps(some, weight, _mm512_sub_ps(of_weight, delta));
      _mm512_storeu_ps(p + i, _mm512_maskz_mov_ps(keeps, weight));
      _mm512_storeu_ps(ds + i, _mm512_maskz_mul_ps(some, slope, found.factor));
      if (given != nullptr) store(given + i, slope, lanes(keys_ - i));
    }
  }

  // Neighbouring rows as pairs, [rows / 2, BLOCK_N], and, where it is asked, neighbouring columns, [rows, BLOCK_N / 2].
  static void pair(const float* x, long rows, long c0, long c1, float* by_row, float* by_column) {
#if HAS_PAIRS
    for (long r = 0; r < rows; r += 2)
      for (long i = c0; i < c1; i += LANES) {
        const __m256i a = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + r * BLOCK_N + i));
        const __m256i b = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + (r + 1) * BLOCK_N + i));
        const __m512i low = _mm512_cvtepu16_epi32(a), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
        _mm512_storeu_si512(by_row + r / 2 * BLOCK_N + i, _mm512_or_si512(low, high));
        if (by_column != nullptr) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_column + (r * BLOCK_N + i) / 2), a);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_column + ((r + 1) * BLOCK_N + i) / 2), b);
        }
      }
#endif
  }

  // Writes, or adds, the gradient of the block of keys.
  void give(void* to, long of_b, long of_h, long of_n, const float* x, long width, long depth, float factor) {
    if (to == nullptr) return;
    for (long n = 0; n < keys_; ++n) {
      const long at = b_ * of_b + kv_ * of_h + (n0_ + n) * of_n;
      for (long d = 0; d < depth; d += LANES) {
        const __m512 value = _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(x + n * width + d));
        if (c_.adds) {
          float* sum = static_cast<float*>(to) + at + d;
          store(sum, _mm512_add_ps(load(sum, lanes(depth - d)), value), lanes(depth - d));
        } else {
          store(static_cast<T*>(to) + at + d, value, lanes(depth - d));
        }
      }
    }
  }

  const Call& c_;
  const Room<PAIRS>& room_;
  float *at_, *delta_, *raise_, *dq_;
  const long b_, kv_, group_;
  long n0_ = 0, keys_ = 0;
  bool general_;
  long first_[BLOCK_M], last_[BLOCK_M];
};

// The rows [m0, m1) of dq of a head from the sums of `parts` tasks.
template <class T>
void give_rows(const Call& c, long b, long h, long m0, long m1, const float* sums, long of_part, long parts, long width) {
  if (c.dq == nullptr) return;
  const __m512 scale = _mm512_set1_ps(static_cast<float>(c.scale));
  for (long m = m0; m < m1; ++m) {
    T* to = static_cast<T*>(c.dq) + b * c.dq_b + h * c.dq_h + m * c.dq_m;
    for (long d = 0; d < c.D; d += LANES) {
      __m512 sum = _mm512_setzero_ps();
      for (long part = 0; part < parts; ++part) sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums + part * of_part + m * width + d));
      store(to + d, _mm512_mul_ps(scale, sum), lanes(c.D - d));
    }
  }
}

template <bool PAIRS, class T>
void run(const Call& c) {
  const Room<PAIRS> room(c);
  const long parts = parts_of(c), group = c.H / c.Hkv, rows_of_head = group * c.M * room.width, heads = c.B * c.Hkv;
  const long blocks = up(c.M, BLOCK_M) / BLOCK_M;
  float* rows = c.scratch + c.threads * room.total;
  float* sums = rows + 2 * c.B * c.H * c.M;
#pragma omp parallel num_threads(c.threads)
  {
    float* memory = c.scratch + omp_get_thread_num() * room.total;
    if (parts > 1) {
#pragma omp for schedule(dynamic)
      for (long i = 0; i < heads * group * blocks; ++i) {
        const long at = i / blocks / group;
        Task<PAIRS, T>(c, room, memory, rows, nullptr, at / c.Hkv, at % c.Hkv).prepare(i / blocks % group, i % blocks * BLOCK_M);
      }
    }
#pragma omp for schedule(dynamic)
    for (long i = 0; i < heads * parts; ++i) {
      const long at = i / parts, part = i % parts, b = at / c.Hkv, kv = at % c.Hkv;
      float* dq = sums + (parts == 1 ? omp_get_thread_num() : i) * rows_of_head;
      std::fill_n(dq, rows_of_head, 0.0f);
      Task<PAIRS, T> task(c, room, memory, rows, dq, b, kv);
      for (long row = 0; parts == 1 && row < group * blocks; ++row) task.prepare(row / blocks, row % blocks * BLOCK_M);
      for (long n = part * BLOCK_N; n < c.N; n += parts * BLOCK_N) task.run(n);
      if (parts == 1)
        for (long g = 0; g < group; ++g)
          give_rows<T>(c, b, kv * group + g, 0, c.M, dq + g * c.M * room.width, 0, 1, room.width);
    }
    if (parts > 1) {
#pragma omp for
      for (long i = 0; i < heads * group; ++i) {
        const long at = i / group, g = i % group, b = at / c.Hkv, h = at % c.Hkv * group + g;
        give_rows<T>(c, b, h, 0, c.M, sums + at * parts * rows_of_head + g * c.M * room.width, rows_of_head, parts, room.width);
      }
    }
  }
}

template <bool PAIRS>
int64_t floats(const Call& c) {
  const Room<PAIRS> room(c);
  const long parts = parts_of(c), of_head = c.H / c.Hkv * c.M * room.width;
  return c.threads * room.total + 2 * c.B * c.H * c.M + (parts == 1 ? c.threads : c.B * c.Hkv * parts) * of_head;
}

}  // namespace

// What a call needs in `scratch`, in floats, and the call itself.
extern "C" int64_t backward_floats_f32(const Call* c) { return floats<false>(*c); }
extern "C" int64_t backward_floats_f16(const Call* c) { return floats<false>(*c); }
extern "C" int64_t backward_floats_bf16(const Call* c) { return floats<HAS_PAIRS != 0>(*c); }
extern "C" void backward_f32(const Call* c) { run<false, float>(*c); }
extern "C" void backward_f16(const Call* c) { run<false, f16>(*c); }
extern "C" void backward_bf16(const Call* c) { run<HAS_PAIRS != 0, bf16>(*c); }

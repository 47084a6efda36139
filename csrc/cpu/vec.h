// This header has the vectors of the instruction set in force (see each_isa.h) and the loops over rows that CPU
// kernels are made of. Rows of scratch memory are padded to whole vectors, so only loads from and stores to tensors
// have tails.
namespace blurry_attn::cpu::BLURRY_ISA {
namespace {

template <typename scalar>
struct vector_of {
  typedef scalar type __attribute__((vector_size(BLURRY_VECTOR_BYTES)));
  typedef scalar unaligned __attribute__((vector_size(BLURRY_VECTOR_BYTES), aligned(sizeof(scalar)), may_alias));
};
template <typename scalar>
using vec = typename vector_of<scalar>::type;

template <typename scalar>
constexpr int64_t kLanes = BLURRY_VECTOR_BYTES / sizeof(scalar);

template <typename scalar>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<scalar> - 1) / kLanes<scalar> * kLanes<scalar>;
}

template <typename scalar>
inline vec<scalar> load(const scalar* p) {
  return *reinterpret_cast<const typename vector_of<scalar>::unaligned*>(p);
}
template <typename scalar>
inline void store(scalar* p, vec<scalar> v) {
  *reinterpret_cast<typename vector_of<scalar>::unaligned*>(p) = v;
}
template <typename scalar>
inline vec<scalar> broadcast(scalar x) {
  return x - vec<scalar>{};
}
// sum() adds the lanes as a tree, the shortest chain of additions.
template <typename scalar>
inline scalar sum(vec<scalar> v) {
  scalar lanes[kLanes<scalar>];
  store(lanes, v);
  for (int64_t half = kLanes<scalar> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// load_row() reads n elements of a tensor's row, `stride` apart, into a padded scratch row, times `factor`.
template <typename storage, typename compute>
inline void load_row(const storage* from, int64_t stride, int64_t n, compute* to, compute factor = 1) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<compute>(from[i]) * factor;
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<compute>(from[i * stride]) * factor;
  }
  for (int64_t i = n; i < padded<compute>(n); ++i) to[i] = 0;
}

// read_row() returns the row itself where it can be read in place, else a copy of it in `scratch`.
template <typename storage, typename compute>
inline const compute* read_row(const storage* from, int64_t stride, int64_t n, compute* scratch) {
  if constexpr (std::is_same_v<storage, compute>) {
    if (stride == 1 && n % kLanes<compute> == 0) return from;
  }
  load_row(from, stride, n, scratch);
  return scratch;
}

template <typename storage, typename compute>
inline void store_row(const compute* from, int64_t n, storage* to, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<storage>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * stride] = static_cast<storage>(from[i]);
  }
}

template <typename scalar>
inline void copy_row(const scalar* from, int64_t width, scalar* to) {
  for (int64_t i = 0; i < width; i += kLanes<scalar>) store(to + i, load(from + i));
}
template <typename scalar>
inline void zero_row(scalar* to, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes<scalar>) store(to + i, vec<scalar>{});
}
template <typename scalar>
inline scalar dot(const scalar* a, const scalar* b, int64_t width) {
  vec<scalar> total{};
  for (int64_t i = 0; i < width; i += kLanes<scalar>) total += load(a + i) * load(b + i);
  return sum<scalar>(total);
}
template <typename scalar>
inline void add_scaled(scalar factor, const scalar* from, int64_t width, scalar* to) {
  const vec<scalar> f = broadcast(factor);
  for (int64_t i = 0; i < width; i += kLanes<scalar>) store(to + i, load(to + i) + f * load(from + i));
}
template <typename scalar>
inline void scale_row(scalar factor, int64_t width, scalar* to) {
  const vec<scalar> f = broadcast(factor);
  for (int64_t i = 0; i < width; i += kLanes<scalar>) store(to + i, load(to + i) * f);
}

// write_row() computes to = content + share (token - content). A share of exactly 1 replaces and one of exactly 0
// leaves: what is not taken is not read. `to` may be `content`.
template <typename scalar>
inline void write_row(scalar share, const scalar* token, const scalar* content, int64_t width, scalar* to) {
  if (share == 0) return copy_row(content, width, to);
  if (share == 1) return copy_row(token, width, to);
  const vec<scalar> g = broadcast(share);
  for (int64_t i = 0; i < width; i += kLanes<scalar>) {
    const vec<scalar> c = load(content + i);
    store(to + i, c + g * (load(token + i) - c));
  }
}
// keep_row() is the adjoint of write_row() for the content: content *= 1 - share, with the same exact cases.
template <typename scalar>
inline void keep_row(scalar share, int64_t width, scalar* adjoint) {
  if (share == 0) return;
  if (share == 1) return zero_row(adjoint, width);
  scale_row(1 - share, width, adjoint);
}

template <int rows, int columns, typename scalar>
inline void product_tile(int64_t depth, const scalar* a, int64_t a_row, int64_t a_depth, const scalar* b, int64_t b_row,
                         scalar* c, int64_t c_row, bool accumulate) {
  vec<scalar> total[rows][columns];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      total[i][j] = accumulate ? load(c + i * c_row + j * kLanes<scalar>) : vec<scalar>{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    vec<scalar> right[columns];
    for (int j = 0; j < columns; ++j) right[j] = load(b + k * b_row + j * kLanes<scalar>);
    for (int i = 0; i < rows; ++i) {
      const vec<scalar> left = broadcast(a[i * a_row + k * a_depth]);
      for (int j = 0; j < columns; ++j) total[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) store(c + i * c_row + j * kLanes<scalar>, total[i][j]);
  }
}

template <int columns, typename scalar>
inline void product_column(int64_t rows, int64_t depth, const scalar* a, int64_t a_row, int64_t a_depth,
                           const scalar* b, int64_t b_row, scalar* c, int64_t c_row, bool accumulate) {
  constexpr int kRows = BLURRY_VECTOR_BYTES == 64 ? 8 : 4;  // rows x 2 columns of accumulators fit the registers
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    product_tile<kRows, columns>(depth, a + i * a_row, a_row, a_depth, b, b_row, c + i * c_row, c_row, accumulate);
  }
  for (; i + 2 <= rows; i += 2) {
    product_tile<2, columns>(depth, a + i * a_row, a_row, a_depth, b, b_row, c + i * c_row, c_row, accumulate);
  }
  for (; i < rows; ++i) {
    product_tile<1, columns>(depth, a + i * a_row, a_row, a_depth, b, b_row, c + i * c_row, c_row, accumulate);
  }
}

// product() computes C[rows, columns] (+)= A[rows, depth] B[depth, columns]. `columns` are whole vectors; A has any
// strides.
template <typename scalar>
void product(int64_t rows, int64_t columns, int64_t depth, const scalar* a, int64_t a_row, int64_t a_depth,
             const scalar* b, int64_t b_row, scalar* c, int64_t c_row, bool accumulate) {
  constexpr int64_t lanes = kLanes<scalar>;
  int64_t j = 0;
  for (; j + 2 * lanes <= columns; j += 2 * lanes) {
    product_column<2>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row, accumulate);
  }
  for (; j < columns; j += lanes) {
    product_column<1>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row, accumulate);
  }
}

// exponential() is exp to an ulp or so: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. NaN
// stays, and below -87 the result is 0.
inline vec<float> exponential(vec<float> x) {
  typedef int32_t ints __attribute__((vector_size(BLURRY_VECTOR_BYTES)));
  const vec<float> high = broadcast(88.0f), low = broadcast(-87.0f);
  const ints under = x < low;
  x = x > high ? high : x;
  x = under ? low : x;
  const vec<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec<float> shifted = x * 1.44269504088896341f + magic;
  const vec<float> n = shifted - magic;
  const vec<float> f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec<float> y = broadcast(1.9875691500e-4f);
  y = y * f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * (f * f) + f + 1.0f;
  const ints power = (((ints)shifted - 0x4B400000) + 127) << 23;
  const vec<float> result = y * (vec<float>)power;
  return under ? vec<float>{} : result;
}
inline vec<double> exponential(vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// exponentials() computes row[i] = exp(row[i] - shift), i in 0 .. n - 1, and returns the sum.
template <typename scalar>
inline scalar exponentials(scalar* row, int64_t n, scalar shift) {
  constexpr int64_t lanes = kLanes<scalar>;
  const vec<scalar> s = broadcast(shift);
  vec<scalar> total{};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const vec<scalar> e = exponential(load(row + i) - s);
    total += e;
    store(row + i, e);
  }
  if (i < n) {
    vec<scalar> tail = s;
    for (int64_t j = 0; i + j < n; ++j) tail[j] = row[i + j];
    tail = exponential(tail - s);
    for (int64_t j = n - i; j < lanes; ++j) tail[j] = 0;
    total += tail;
    for (int64_t j = 0; i + j < n; ++j) row[i + j] = tail[j];
  }
  return sum<scalar>(total);
}

// softmax_backward() is the adjoint of a softmax, whose weights are row[i] / total, and of its log-sum-exp. It turns
// gradients of the weights into those of the logits, and the row into the weights.
template <typename scalar>
inline void softmax_backward(scalar* row, int64_t n, scalar total, scalar grad_lse, scalar* gradients) {
  constexpr int64_t lanes = kLanes<scalar>;
  vec<scalar> products{};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) products += load(row + i) * load(gradients + i);
  scalar mean = sum<scalar>(products);
  for (; i < n; ++i) mean += row[i] * gradients[i];
  const scalar inverse = 1 / total, shift = grad_lse - mean * inverse;
  for (i = 0; i < n; ++i) {
    row[i] *= inverse;
    gradients[i] = row[i] * (gradients[i] + shift);
  }
}

template <typename scalar>
inline scalar largest(const scalar* row, int64_t n, scalar start) {
  constexpr int64_t lanes = kLanes<scalar>;
  vec<scalar> top = broadcast(start);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const vec<scalar> x = load(row + i);
    top = x > top ? x : top;
  }
  scalar tops[lanes];
  store(tops, top);
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) tops[j] = tops[j] > tops[j + half] ? tops[j] : tops[j + half];
  }
  start = tops[0];
  for (; i < n; ++i) start = row[i] > start ? row[i] : start;
  return start;
}

}  // namespace
}  // namespace blurry_attn::cpu::BLURRY_ISA

// Dual attention, forward and backward; the formulas are in mmf_fast/ops/attention.py.
//
// Tiles of ROWS queries x COLUMNS keys, so that memory is linear in the sequence length. Keys and values of a head are
// copied once, in the order in which `multiply` reads them, converted and padded to whole vectors; logits of padded keys
// are -inf. q and q' are scaled when they are copied.
#include "lanes.h"

#include <limits>
#include <memory>

namespace mmf {
namespace {

constexpr int64_t ROWS = 96, COLUMNS = 128;

// -- C (m, n) = A (m, k) B (k, n), or += -------------------------------------------------------------------------------
// A has any strides (its transpose costs nothing), B and C contiguous rows, n is a multiple of the vector width.

template <class A, int rows, int vectors>
inline __attribute__((always_inline)) void tile(int64_t k, const A* a, int64_t a_row, int64_t a_column, const A* b,
                                                int64_t ldb, A* c, int64_t ldc, bool add) {
  using V = at::vec::Vectorized<A>;
  constexpr int64_t W = V::size();
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[r][j] = add ? V::loadu(c + r * ldc + j * W) : V(0);
  }
  for (int64_t i = 0; i < k; ++i) {
    V right[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) right[j] = V::loadu(b + i * ldb + j * W);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V left(a[r * a_row + i * a_column]);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[r][j] = at::vec::fmadd(left, right[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[r][j].store(c + r * ldc + j * W);
  }
}

constexpr int TILE_ROWS = 6;  // 6 x 4 sums fill the 32 registers of AVX512, 6 x 2 the 16 of AVX2

template <class A, int vectors, int rows = TILE_ROWS>
void strip(int64_t m, int64_t k, const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t ldb, A* c,
           int64_t ldc, bool add) {
  for (; m >= rows; m -= rows, a += rows * a_row, c += rows * ldc) {
    tile<A, rows, vectors>(k, a, a_row, a_column, b, ldb, c, ldc, add);
  }
  if constexpr (rows > 1) {
    if (m > 0) strip<A, vectors, rows - 1>(m, k, a, a_row, a_column, b, ldb, c, ldc, add);
  }
}

template <class A>
void multiply(int64_t m, int64_t n, int64_t k, const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t ldb,
              A* c, int64_t ldc, bool add) {
  constexpr int64_t W = at::vec::Vectorized<A>::size(), most = W * sizeof(A) == 64 ? 4 : 2;
  for (int64_t left = n / W; left > 0;) {
    const int64_t vectors = at::divup(left, at::divup(left, most));  // strips of equal width
    if (vectors == 4) strip<A, 4>(m, k, a, a_row, a_column, b, ldb, c, ldc, add);
    if (vectors == 3) strip<A, 3>(m, k, a, a_row, a_column, b, ldb, c, ldc, add);
    if (vectors == 2) strip<A, 2>(m, k, a, a_row, a_column, b, ldb, c, ldc, add);
    if (vectors == 1) strip<A, 1>(m, k, a, a_row, a_column, b, ldb, c, ldc, add);
    left -= vectors, b += vectors * W, c += vectors * W;
  }
}

// -- arguments ---------------------------------------------------------------------------------------------------------

template <class A>
int64_t padded(int64_t n) {
  constexpr int64_t W = at::vec::Vectorized<A>::size();
  return at::divup(n, W) * W;
}

// One head of a tensor (B, H, N, D) of any strides; null for an absent tensor.
template <class T>
struct Head {
  T* data = nullptr;
  int64_t row = 0, column = 0;

  Head() = default;
  Head(const at::Tensor& x, int64_t head) : row(x.stride(2)), column(x.stride(3)) {
    const int64_t heads = x.size(1), offset = head / heads * x.stride(0) + head % heads * x.stride(1);
    if constexpr (std::is_const_v<T>) {
      data = x.const_data_ptr<std::remove_const_t<T>>() + offset;
    } else {
      data = x.data_ptr<T>() + offset;
    }
  }
  Head(const MaybeTensor& x, int64_t head) {
    if (x.has_value() && x->numel()) *this = Head(*x, head);
  }
  explicit operator bool() const { return data; }
};

// out (rows, padded columns) = scale x, from row `first`.
template <class A, class T>
void copy_rows(Head<const T> x, int64_t first, int64_t rows, int64_t columns, A scale, A* out) {
  using L = Lanes<T>;
  const int64_t ld = padded<A>(columns);
  for (int64_t r = 0; r < rows; ++r, out += ld) {
    const T* from = x.data + (first + r) * x.row;
    if (x.column == 1) {
      for_lanes<L::width>(columns, [&](int64_t i, int64_t n) {
        (mmf::first(L::load(from + i, n), n) * typename L::V(scale)).store(out + i);
      });
    } else {
      for (int64_t i = 0; i < ld; ++i) out[i] = i < columns ? static_cast<A>(from[i * x.column]) * scale : A(0);
    }
  }
}

// out (columns, padded rows) = x^T.
template <class A, class T>
void copy_transposed(Head<const T> x, int64_t rows, int64_t columns, A* out) {
  constexpr int64_t W = at::vec::Vectorized<A>::size();
  const int64_t ld = padded<A>(rows);
  for (int64_t r = 0; r < ld; r += W) {
    const int64_t here = std::min(W, rows - r);
    for (int64_t i = 0; i < columns; ++i) {
      const T* from = x.data + r * x.row + i * x.column;
      A* to = out + i * ld + r;
      for (int64_t j = 0; j < here; ++j) to[j] = static_cast<A>(from[j * x.row]);
      for (int64_t j = here; j < W; ++j) to[j] = A(0);
    }
  }
}

// x (rows, columns) = scale in, from row `first`; `in` has padded rows.
template <class A, class T>
void write_rows(const A* in, A scale, Head<T> x, int64_t first, int64_t rows, int64_t columns) {
  using L = Lanes<T>;
  const int64_t ld = padded<A>(columns);
  for (int64_t r = 0; r < rows; ++r, in += ld) {
    for_lanes<L::width>(columns, [&](int64_t i, int64_t n) {
      L::store(x.data + (first + r) * x.row + i, L::V::loadu(in + i) * typename L::V(scale), n);
    });
  }
}

struct Shape {
  int64_t heads, N, M, D, E, Mp, Dp, Ep;  // heads of all samples; p: padded
};

template <class A>
Shape shape_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const int64_t M = k.size(2), D = q.size(3), E = v.size(3);
  return {q.size(0) * q.size(1), q.size(2), M, D, E, padded<A>(M), padded<A>(D), padded<A>(E)};
}

// Logits of rows [first, first + rows) and keys [key, key + keys), in place: bias, masked and padded ones -inf.
template <class T, class A>
struct Mask {
  Head<const bool> allowed;
  Head<const T> bias;
  bool causal;

  Mask(const MaybeTensor& mask, int64_t head, bool causal) : causal(causal) {
    if (!mask) return;
    if (mask->scalar_type() == at::kBool) {
      allowed = Head<const bool>(*mask, head);
    } else {
      bias = Head<const T>(*mask, head);
    }
  }

  int64_t keys_of(int64_t row, int64_t M) const { return causal ? std::min(row + 1, M) : M; }

  void apply(A* s, int64_t row, int64_t key, int64_t M, int64_t size) const {
    constexpr A minus_inf = -std::numeric_limits<A>::infinity();
    const int64_t end = std::clamp<int64_t>(keys_of(row, M) - key, 0, size);
    if (allowed) {
      const bool* at = allowed.data + row * allowed.row + key * allowed.column;
      for (int64_t j = 0; j < end; ++j) s[j] = at[j * allowed.column] ? s[j] : minus_inf;
    }
    if (bias) {
      const T* at = bias.data + row * bias.row + key * bias.column;
      for (int64_t j = 0; j < end; ++j) s[j] += static_cast<A>(at[j * bias.column]);
    }
    for (int64_t j = end; j < size; ++j) s[j] = minus_inf;
  }
};

// Scratch memory of one thread, handed out in pieces.
template <class A>
class Scratch {
 public:
  A* take(int64_t size) {
    pieces_.emplace_back(new A[std::max<int64_t>(size, 1)]);
    return pieces_.back().get();
  }
  A* take_if(bool wanted, int64_t size) { return wanted ? take(size) : nullptr; }

 private:
  std::vector<std::unique_ptr<A[]>> pieces_;
};

// Rows of a head are shared by several threads when there are fewer heads than threads.
int64_t parts_of(int64_t heads, int64_t N) {
  const int64_t wanted = heads >= at::get_num_threads() ? 1 : at::divup(2 * at::get_num_threads(), heads);
  return std::clamp<int64_t>(wanted, 1, at::divup(N, ROWS));
}

// -- forward -----------------------------------------------------------------------------------------------------------

// Online softmax of one row. Sums of P (S' - mu) are about the mean mu of S' so far, so that nothing cancels.
template <class A>
struct Row {
  A m = -std::numeric_limits<A>::infinity(), l = 0, mu = 0;

  // s: logits -> P, t: S' -> P (S' - mu), both up to the factor exp(m). Older sums are to be multiplied by the first
  // returned number; those of P (S' - mu) v gain the second times those of P v.
  std::pair<A, A> update(A* s, A* t, int64_t size) {
    using V = at::vec::Vectorized<A>;
    constexpr int64_t W = V::size();
    V top(m);
    for (int64_t j = 0; j < size; j += W) top = at::vec::maximum(top, V::loadu(s + j));
    const A next = at::vec::vec_reduce_all<A>([](V& a, V& b) { return at::vec::maximum(a, b); }, top);
    const V shift(next == -std::numeric_limits<A>::infinity() ? A(0) : next);
    V sum(0), dot(0);
    for (int64_t j = 0; j < size; j += W) {
      const V p = (V::loadu(s + j) - shift).exp();
      sum = sum + p;
      if (t) dot = at::vec::fmadd(p, V::loadu(t + j), dot);
      p.store(s + j);
    }
    const A fade = l == 0 ? A(0) : std::exp(m - next), older = l * fade, before = mu;
    m = next;
    l = older + total(sum);
    if (t) {
      mu = l > 0 ? (mu * older + total(dot)) / l : A(0);
      for (int64_t j = 0; j < size; j += W) (V::loadu(s + j) * (V::loadu(t + j) - V(mu))).store(t + j);
    }
    return {fade, before - mu};
  }
};

// x = factor (x + weight y), y absent: 0.
template <class A>
void scale_row(A* x, A factor, int64_t size, A weight = 0, const A* y = nullptr) {
  using V = at::vec::Vectorized<A>;
  for (int64_t i = 0; i < size; i += V::size()) {
    const V sum = y ? at::vec::fmadd(V(weight), V::loadu(y + i), V::loadu(x + i)) : V::loadu(x + i);
    (sum * V(factor)).store(x + i);
  }
}

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

at::Tensor empty_heads(const at::Tensor& like, int64_t width) {  // (B, H, N, width), laid out as (B, N, H, width)
  return at::empty({like.size(0), like.size(2), like.size(1), width}, like.options()).transpose(1, 2);
}

Four forward(const at::Tensor& q, const MaybeTensor& dq, const at::Tensor& k, const MaybeTensor& dk,
             const at::Tensor& v, const MaybeTensor& dv, const MaybeTensor& mask, bool causal, double scale,
             bool tangent_grad) {
  const auto wide = q.options().dtype(at::toOpMathType(q.scalar_type()));
  const bool logits = dq || dk, any = logits || dv;
  at::Tensor o = empty_heads(q, v.size(3)), d_o = any ? empty_heads(q, v.size(3)) : at::empty({0}, q.options());
  at::Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, wide);
  at::Tensor mu = logits ? at::empty_like(lse) : at::empty({0}, wide);
  if (lse.numel() == 0) return {o, d_o, lse, mu};
  MMF_DISPATCH(q, "attention", [&] {
    using T = scalar_t;
    using A = typename Lanes<T>::A;
    const auto [heads, N, M, D, E, Mp, Dp, Ep] = shape_of<A>(q, k, v);
    const int64_t n = N, m = M, d = D, e = E, mp = Mp, dp = Dp, ep = Ep;  // lambdas cannot capture bindings
    const int64_t parts = parts_of(heads, N), blocks = at::divup(N, ROWS);
    at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch;
      A *kt = scratch.take(d * mp), *dkt = scratch.take_if(dk.has_value(), d * mp);
      A *vs = scratch.take(m * ep), *dvs = scratch.take_if(dv.has_value(), m * ep);
      A *qs = scratch.take(ROWS * dp), *dqs = scratch.take_if(dq.has_value(), ROWS * dp);
      A *s = scratch.take(ROWS * COLUMNS), *t = scratch.take_if(logits, ROWS * COLUMNS);
      A *sum = scratch.take(ROWS * ep), *dsum = scratch.take_if(any, ROWS * ep);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t head = unit / parts, part = unit % parts;
        if (unit == begin || part == 0) {
          copy_transposed<A, T>(Head<const T>(k, head), m, d, kt);
          if (dk) copy_transposed<A, T>(Head<const T>(dk, head), m, d, dkt);
          copy_rows<A, T>(Head<const T>(v, head), 0, m, e, A(1), vs);
          if (dv) copy_rows<A, T>(Head<const T>(dv, head), 0, m, e, A(1), dvs);
        }
        const Mask<T, A> masked(mask, head, causal);
        for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
          const int64_t first = block * ROWS, rows = std::min(ROWS, n - first);
          copy_rows<A, T>(Head<const T>(q, head), first, rows, d, A(scale), qs);
          if (dq) copy_rows<A, T>(Head<const T>(dq, head), first, rows, d, A(scale), dqs);
          std::array<Row<A>, ROWS> state;
          std::fill_n(sum, rows * ep, A(0));
          if (any) std::fill_n(dsum, rows * ep, A(0));
          for (int64_t key = 0; key < masked.keys_of(first + rows - 1, m); key += COLUMNS) {
            const int64_t keys = std::min(COLUMNS, m - key), size = padded<A>(keys);
            multiply<A>(rows, size, d, qs, dp, 1, kt + key, mp, s, size, false);
            if (dq) multiply<A>(rows, size, d, dqs, dp, 1, kt + key, mp, t, size, false);
            if (dk) multiply<A>(rows, size, d, qs, dp, 1, dkt + key, mp, t, size, dq.has_value());
            for (int64_t r = 0; r < rows; ++r) {
              masked.apply(s + r * size, first + r, key, m, size);
              const auto [fade, shift] = state[r].update(s + r * size, t ? t + r * size : nullptr, size);
              if (any && (fade != 1 || logits)) scale_row(dsum + r * ep, fade, ep, shift, sum + r * ep);
              if (fade != 1) scale_row(sum + r * ep, fade, ep);
            }
            multiply<A>(rows, ep, keys, s, size, 1, vs + key * ep, ep, sum, ep, true);
            if (logits) multiply<A>(rows, ep, keys, t, size, 1, vs + key * ep, ep, dsum, ep, true);
            if (dv) multiply<A>(rows, ep, keys, s, size, 1, dvs + key * ep, ep, dsum, ep, true);
          }
          for (int64_t r = 0; r < rows; ++r) {
            const auto& row = state[r];
            const A inverse = row.l > 0 ? 1 / row.l : A(0);
            const int64_t at = head * n + first + r;
            lse.data_ptr<A>()[at] = row.l > 0 ? row.m + std::log(row.l) : std::numeric_limits<A>::infinity();
            if (logits) mu.data_ptr<A>()[at] = row.mu;
            scale_row(sum + r * ep, inverse, ep);
            if (any) scale_row(dsum + r * ep, inverse, ep);
          }
          write_rows<A, T>(sum, A(1), Head<T>(o, head), first, rows, e);
          if (any) write_rows<A, T>(dsum, A(1), Head<T>(d_o, head), first, rows, e);
        }
      }
    });
  });
  return {o, d_o, lse, mu};
}

// -- backward ----------------------------------------------------------------------------------------------------------

// P, S', G, G' of one row -> P, H, dS', dS in their place: see mmf_fast/ops/attention.py.
template <class A>
void row_backward(A* p, A* t, A* g, A* u, int64_t size, A lse, A mu, A gam, A del) {
  using V = at::vec::Vectorized<A>;
  for (int64_t j = 0; j < size; j += V::size()) {
    const V P = (V::loadu(p + j) - V(lse)).exp();
    V dS = V::loadu(g + j) - V(del);
    if (t) {
      const V centred = V::loadu(t + j) - V(mu), G = V::loadu(u + j) - V(gam);
      dS = at::vec::fmadd(G, centred, dS);
      (P * centred).store(t + j);
      (P * G).store(u + j);
    }
    P.store(p + j);
    (P * dS).store(g + j);
  }
}

template <class A>
A dot(const A* a, const A* b, int64_t size) {
  using V = at::vec::Vectorized<A>;
  V sum(0);
  for (int64_t i = 0; i < size; i += V::size()) sum = at::vec::fmadd(V::loadu(a + i), V::loadu(b + i), sum);
  return total(sum);
}

using Six = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Six backward(const MaybeTensor& g, const MaybeTensor& h, const at::Tensor& q, const MaybeTensor& dq, const at::Tensor& k,
             const MaybeTensor& dk, const at::Tensor& v, const MaybeTensor& dv, const MaybeTensor& mask,
             const at::Tensor& o, const MaybeTensor& d_o, const at::Tensor& lse, const MaybeTensor& mu, bool causal,
             double scale) {
  const bool has_dq = h && dq, has_dk = h && dk, has_dv = h && dv, logits = has_dq || has_dk;
  const int64_t parts = q.numel() && k.numel() ? parts_of(q.size(0) * q.size(1), q.size(2)) : 1;
  const auto none = at::empty({0}, q.options());
  const auto wide = q.options().dtype(at::toOpMathType(q.scalar_type()));
  // Parts of a head's rows each have their own gradients of keys and values.
  const auto of_keys = [&](const at::Tensor& x) {
    return parts == 1 ? empty_heads(x, x.size(3)) : at::empty({parts * x.size(0), x.size(1), x.size(2), x.size(3)}, wide);
  };
  at::Tensor g_q = empty_heads(q, q.size(3)), g_dq = has_dq ? empty_heads(q, q.size(3)) : none;
  at::Tensor g_k = of_keys(k), g_dk = has_dk ? of_keys(k) : none;
  at::Tensor g_v = of_keys(v), g_dv = has_dv ? of_keys(v) : none;
  if (q.numel() == 0 || k.numel() == 0 || v.numel() == 0) {
    for (at::Tensor x : {g_q, g_dq, g_k, g_dk, g_v, g_dv}) x.zero_();
    return {g_q, g_dq, g_k, g_dk, g_v, g_dv};
  }
  MMF_DISPATCH(q, "attention_backward", [&] {
    using T = scalar_t;
    using A = typename Lanes<T>::A;
    const auto [heads, N, M, D, E, Mp, Dp, Ep] = shape_of<A>(q, k, v);
    const int64_t all = heads, n = N, m = M, d = D, e = E, mp = Mp, dp = Dp, ep = Ep;
    const int64_t blocks = at::divup(N, ROWS);
    at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch;
      A *kt = scratch.take(d * mp), *dkt = scratch.take_if(has_dk, d * mp);
      A *vt = scratch.take(e * mp), *dvt = scratch.take_if(has_dv, e * mp);
      A *ks = scratch.take(m * dp), *dks = scratch.take_if(has_dk, m * dp);
      A *qs = scratch.take(ROWS * dp), *dqs = scratch.take_if(has_dq, ROWS * dp);
      A *gs = scratch.take(ROWS * ep), *hs = scratch.take_if(h.has_value(), ROWS * ep);
      A *os = scratch.take(ROWS * ep), *dos = scratch.take_if(h.has_value(), ROWS * ep);
      A *P = scratch.take(ROWS * COLUMNS), *S = scratch.take_if(logits, ROWS * COLUMNS);
      A *G = scratch.take(ROWS * COLUMNS), *U = scratch.take_if(logits, ROWS * COLUMNS);
      A *to_q = scratch.take(ROWS * dp), *to_dq = scratch.take_if(has_dq, ROWS * dp);
      A *to_k = scratch.take(m * dp), *to_dk = scratch.take_if(has_dk, m * dp);
      A *to_v = scratch.take(m * ep), *to_dv = scratch.take_if(has_dv, m * ep);
      std::array<A, ROWS> gam, del;
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t head = unit / parts, part = unit % parts;
        if (unit == begin || part == 0) {
          copy_transposed<A, T>(Head<const T>(k, head), m, d, kt);
          copy_rows<A, T>(Head<const T>(k, head), 0, m, d, A(1), ks);
          copy_transposed<A, T>(Head<const T>(v, head), m, e, vt);
          if (has_dk) copy_transposed<A, T>(Head<const T>(dk, head), m, d, dkt);
          if (has_dk) copy_rows<A, T>(Head<const T>(dk, head), 0, m, d, A(1), dks);
          if (has_dv) copy_transposed<A, T>(Head<const T>(dv, head), m, e, dvt);
        }
        for (A* x : {to_k, to_dk}) if (x) std::fill_n(x, m * dp, A(0));
        for (A* x : {to_v, to_dv}) if (x) std::fill_n(x, m * ep, A(0));
        const Mask<T, A> masked(mask, head, causal);
        for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
          const int64_t first = block * ROWS, rows = std::min(ROWS, n - first), at = head * n + first;
          copy_rows<A, T>(Head<const T>(q, head), first, rows, d, A(scale), qs);
          if (has_dq) copy_rows<A, T>(Head<const T>(dq, head), first, rows, d, A(scale), dqs);
          copy_rows<A, T>(Head<const T>(o, head), first, rows, e, A(1), os);
          if (g) copy_rows<A, T>(Head<const T>(g, head), first, rows, e, A(1), gs);
          if (h) copy_rows<A, T>(Head<const T>(h, head), first, rows, e, A(1), hs);
          if (h) copy_rows<A, T>(Head<const T>(d_o, head), first, rows, e, A(1), dos);
          for (int64_t r = 0; r < rows; ++r) {
            gam[r] = h ? dot(hs + r * ep, os + r * ep, ep) : A(0);
            del[r] = (g ? dot(gs + r * ep, os + r * ep, ep) : A(0)) + (h ? dot(hs + r * ep, dos + r * ep, ep) : A(0));
          }
          std::fill_n(to_q, rows * dp, A(0));
          if (has_dq) std::fill_n(to_dq, rows * dp, A(0));
          for (int64_t key = 0; key < masked.keys_of(first + rows - 1, m); key += COLUMNS) {
            const int64_t keys = std::min(COLUMNS, m - key), size = padded<A>(keys);
            multiply<A>(rows, size, d, qs, dp, 1, kt + key, mp, P, size, false);
            if (has_dq) multiply<A>(rows, size, d, dqs, dp, 1, kt + key, mp, S, size, false);
            if (has_dk) multiply<A>(rows, size, d, qs, dp, 1, dkt + key, mp, S, size, has_dq);
            if (g) multiply<A>(rows, size, e, gs, ep, 1, vt + key, mp, G, size, false);
            if (has_dv) multiply<A>(rows, size, e, hs, ep, 1, dvt + key, mp, G, size, g.has_value());
            if (!g && !has_dv) std::fill_n(G, rows * size, A(0));
            if (logits) multiply<A>(rows, size, e, hs, ep, 1, vt + key, mp, U, size, false);
            for (int64_t r = 0; r < rows; ++r) {
              masked.apply(P + r * size, first + r, key, m, size);
              row_backward<A>(P + r * size, S ? S + r * size : nullptr, G + r * size, U ? U + r * size : nullptr, size,
                              lse.const_data_ptr<A>()[at + r], logits ? mu->const_data_ptr<A>()[at + r] : A(0), gam[r],
                              del[r]);
            }
            // Here S is H, G is dS, U is dS'.
            multiply<A>(rows, dp, keys, G, size, 1, ks + key * dp, dp, to_q, dp, true);
            if (has_dk) multiply<A>(rows, dp, keys, U, size, 1, dks + key * dp, dp, to_q, dp, true);
            if (has_dq) multiply<A>(rows, dp, keys, U, size, 1, ks + key * dp, dp, to_dq, dp, true);
            multiply<A>(keys, dp, rows, G, 1, size, qs, dp, to_k + key * dp, dp, true);
            if (has_dq) multiply<A>(keys, dp, rows, U, 1, size, dqs, dp, to_k + key * dp, dp, true);
            if (has_dk) multiply<A>(keys, dp, rows, U, 1, size, qs, dp, to_dk + key * dp, dp, true);
            if (g) multiply<A>(keys, ep, rows, P, 1, size, gs, ep, to_v + key * ep, ep, true);
            if (logits) multiply<A>(keys, ep, rows, S, 1, size, hs, ep, to_v + key * ep, ep, true);
            if (has_dv) multiply<A>(keys, ep, rows, P, 1, size, hs, ep, to_dv + key * ep, ep, true);
          }
          write_rows<A, T>(to_q, A(scale), Head<T>(g_q, head), first, rows, d);
          if (has_dq) write_rows<A, T>(to_dq, A(scale), Head<T>(g_dq, head), first, rows, d);
        }
        const auto write = [&](const A* in, at::Tensor& out, int64_t width) {
          if (parts == 1) {
            write_rows<A, T>(in, A(1), Head<T>(out, head), 0, m, width);
          } else {
            write_rows<A, A>(in, A(1), Head<A>(out, part * all + head), 0, m, width);
          }
        };
        write(to_k, g_k, d);
        if (has_dk) write(to_dk, g_dk, d);
        write(to_v, g_v, e);
        if (has_dv) write(to_dv, g_dv, e);
      }
    });
  });
  if (parts > 1) {
    for (at::Tensor* x : {&g_k, &g_dk, &g_v, &g_dv}) {
      if (x->dim() == 4) *x = empty_heads(k, x->size(3)).copy_(x->unflatten(0, {parts, -1}).sum(0));
    }
  }
  return {g_q, g_dq, g_k, g_dk, g_v, g_dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmf_fast_native, m) {
  m.def("attention", &forward);
  m.def("attention_backward", &backward);
}

}  // namespace mmf

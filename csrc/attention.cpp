// Dual attention, forward; the formulas are in mmf_fast/ops/attention.py.
#include "attention.h"

namespace mmf {
namespace {

// Online softmax of one row. P (S' - mu) is summed with mu the mean of S' so far, so that no digits cancel.
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

Four forward(const at::Tensor& q, const MaybeTensor& dq, const at::Tensor& k, const MaybeTensor& dk,
             const at::Tensor& v, const MaybeTensor& dv, const MaybeTensor& mask, bool causal, double scale,
             bool tangent_grad) {
  check_attention("attention", q, dq, k, dk, v, dv, mask);
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmf_fast_native, m) { m.def("attention", &forward); }

}  // namespace mmf

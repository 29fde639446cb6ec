// Dual attention, backward; the formulas are in mmf_fast/ops/attention.py.
#include "attention.h"

namespace mmf {
namespace {

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
  check_attention("attention_backward", q, dq, k, dk, v, dv, mask);
  const Arguments arguments{"attention_backward"};
  const at::ScalarType accumulated = at::toOpMathType(q.scalar_type());
  const std::array<int64_t, 4> results{q.size(0), q.size(1), q.size(2), v.size(3)};
  arguments.tensor("g", g, q.scalar_type(), results), arguments.tensor("h", h, q.scalar_type(), results);
  arguments.tensor("o", o, q.scalar_type(), results);
  if (h) arguments.tensor("d_o", d_o, q.scalar_type(), results);
  arguments.contiguous("lse", lse, accumulated, q.sizes().slice(0, 3));
  if (h && (dq || dk)) {
    arguments.contiguous("mu", mu, accumulated, q.sizes().slice(0, 3));
    arguments.holds(mu.has_value(), "mu must be given where q or k has a tangent");
  }
  arguments.holds(!h || d_o.has_value(), "d_o must be given where it has a cotangent");
  const bool has_dq = h && dq, has_dk = h && dk, has_dv = h && dv, logits = has_dq || has_dk;
  const int64_t parts = q.numel() && k.numel() ? parts_of(q.size(0) * q.size(1), q.size(2)) : 1;
  const auto none = at::empty({0}, q.options());
  const auto wide = q.options().dtype(at::toOpMathType(q.scalar_type()));
  // Each thread of a head sums gradients of keys and values apart; they are added at the end.
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
            // By now the tile S holds H, the tile G holds dS, and U holds dS'.
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

TORCH_LIBRARY_FRAGMENT(mmf_fast_native, m) { m.def("attention_backward", &backward); }

}  // namespace mmf

// modulated_layer_norm and its backward; the formulas are in mmf_fast/ops/layer_norm.py.
// x (R, D); gain, bias and their tangents (G, D), each for R / G consecutive rows.
// A row lies in the first-level cache, so statistics are recomputed rather than saved.
#include "lanes.h"

namespace mmf {
namespace {

template <class T>
struct Row {
  using L = Lanes<T>;
  using A = typename L::A;
  using V = typename L::V;

  const T *x, *dx;
  int64_t size;
  A mean = 0, r = 0, mean_dx = 0, m2 = 0;  // m2 = mean(x^ x')

  Row(const T* x, const T* dx, int64_t size, bool rms, double eps) : x(x), dx(dx), size(size) {
    if (!rms) {
      auto sums = row_sums<V, 2>(size, [&](int64_t i, int64_t n, auto& s) {
        s[0] = s[0] + L::load(x + i, n);
        if (dx) s[1] = s[1] + L::load(dx + i, n);
      });
      mean = static_cast<A>(sums[0] / size), mean_dx = static_cast<A>(sums[1] / size);
    }
    auto sums = row_sums<V, 2>(size, [&](int64_t i, int64_t n, auto& s) {
      V c = first(L::load(x + i, n) - V(mean), n);
      s[0] = at::vec::fmadd(c, c, s[0]);
      if (dx) s[1] = at::vec::fmadd(c, L::load(dx + i, n) - V(mean_dx), s[1]);
    });
    const double r_std = 1 / std::sqrt(sums[0] / size + eps);
    r = static_cast<A>(r_std), m2 = static_cast<A>(r_std * sums[1] / size);
  }

  V x_hat(int64_t i, int64_t n) const { return (L::load(x + i, n) - V(mean)) * V(r); }

  V d_hat(V x_hat, int64_t i, int64_t n) const {
    return dx ? V(r) * (L::load(dx + i, n) - V(mean_dx) - x_hat * V(m2)) : V(0);
  }
};

template <class T>
void forward_rows(const T* x, const T* dx, const T* gain, const T* dgain, const T* bias, const T* dbias, T* y, T* dy,
                  int64_t begin, int64_t end, int64_t rows_per_group, int64_t size, bool rms, double eps) {
  using L = Lanes<T>;
  using V = typename L::V;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * size, group = row / rows_per_group * size;
    const Row<T> s(x + at, dx ? dx + at : nullptr, size, rms, eps);
    for_lanes<L::width>(size, [&](int64_t i, int64_t n) {
      V x_hat = s.x_hat(i, n), d_hat = s.d_hat(x_hat, i, n);
      const V a = gain ? L::load(gain + group + i, n) : V(1);
      V out = x_hat * a;
      if (bias) out = out + L::load(bias + group + i, n);
      L::store(y + at + i, out, n);
      if (dy) {
        V d = d_hat * a;
        if (dgain) d = at::vec::fmadd(x_hat, L::load(dgain + group + i, n), d);
        if (dbias) d = d + L::load(dbias + group + i, n);
        L::store(dy + at + i, d, n);
      }
    });
  }
}

// Checks the arguments; returns the number of groups of rows.
int64_t check(const char* op, const at::Tensor& x, const MaybeTensor& dx, const MaybeTensor& gain,
              const MaybeTensor& dgain, const MaybeTensor& bias, const MaybeTensor& dbias) {
  const Arguments arguments{op};
  arguments.dimensions("x", x, 2);
  arguments.contiguous("x", x, x.scalar_type(), x.sizes());
  arguments.contiguous("dx", dx, x.scalar_type(), x.sizes());
  const MaybeTensor* first = gain ? &gain : bias ? &bias : dgain ? &dgain : &dbias;
  const int64_t groups = *first && (*first)->dim() ? (*first)->size(0) : 1;
  const auto parameter = [&](const char* name, const MaybeTensor& p) {
    arguments.contiguous(name, p, x.scalar_type(), {groups, x.size(1)});
  };
  parameter("gain", gain), parameter("dgain", dgain), parameter("bias", bias), parameter("dbias", dbias);
  arguments.holds(groups > 0 ? x.size(0) % groups == 0 : x.size(0) == 0,
                  "the rows of gain and bias must divide those of x");
  return groups;
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const MaybeTensor& dx, const MaybeTensor& gain,
                                           const MaybeTensor& dgain, const MaybeTensor& bias, const MaybeTensor& dbias,
                                           bool rms, double eps, bool tangent_grad) {
  const int64_t groups = check("modulated_layer_norm", x, dx, gain, dgain, bias, dbias);
  const int64_t size = x.size(1), rows = x.size(0);
  at::Tensor y = at::empty_like(x);
  at::Tensor dy = dx || dgain || dbias ? at::empty_like(x) : at::empty({0}, x.options());
  if (x.numel() == 0) return {y, dy};
  MMF_DISPATCH(x, "modulated_layer_norm", [&] {
    using T = scalar_t;
    const auto* p = x.const_data_ptr<T>();
    T* d = dy.numel() ? dy.data_ptr<T>() : nullptr;
    at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / size), [&](int64_t begin, int64_t end) {
      forward_rows<T>(p, pointer<T>(dx), pointer<T>(gain), pointer<T>(dgain), pointer<T>(bias), pointer<T>(dbias),
                      y.data_ptr<T>(), d, begin, end, rows / groups, size, rms, eps);
    });
  });
  return {y, dy};
}

// Pointers to the sums over rows that gain, dgain, bias and dbias receive; null for an absent parameter.
template <class A>
struct Columns {
  A *gain, *dgain, *bias, *dbias;
};

template <class T>
void backward_row(const Row<T>& s, const T* g, const T* h, const T* gain, const T* dgain, bool rms, T* g_x, T* g_dx,
                  const Columns<typename Lanes<T>::A>& columns) {
  using L = Lanes<T>;
  using V = typename L::V;
  using A = typename L::A;
  using LA = Lanes<A>;
  const auto cotangents = [&](int64_t i, int64_t n, V& of_x_hat, V& of_d_hat) {  // G = g a + h a', H = h a
    const V a = gain ? L::load(gain + i, n) : V(1);
    of_x_hat = g ? L::load(g + i, n) * a : V(0);
    of_d_hat = V(0);
    if (h) {
      const V v = L::load(h + i, n);
      of_d_hat = v * a;
      if (dgain) of_x_hat = at::vec::fmadd(v, L::load(dgain + i, n), of_x_hat);
    }
  };
  const auto add = [](A* to, V v, int64_t n) { LA::store(to, LA::load(to, n) + v, n); };
  auto sums = row_sums<V, 5>(s.size, [&](int64_t i, int64_t n, auto& sum) {
    V G, H;
    cotangents(i, n, G, H);
    const V x_hat = s.x_hat(i, n);
    sum[0] = sum[0] + G;
    sum[1] = at::vec::fmadd(G, x_hat, sum[1]);
    if (h) {
      const V d_hat = s.d_hat(x_hat, i, n);
      sum[2] = sum[2] + H;
      sum[3] = at::vec::fmadd(H, x_hat, sum[3]);
      sum[4] = at::vec::fmadd(H, d_hat, sum[4]);
    }
  });
  const double scale = 1.0 / s.size;
  const V mean_G(static_cast<A>(rms ? 0 : sums[0] * scale)), dot_G(static_cast<A>(sums[1] * scale));
  const V mean_H(static_cast<A>(rms ? 0 : sums[2] * scale)), dot_H(static_cast<A>(sums[3] * scale));
  const V dot_Hd(static_cast<A>(sums[4] * scale)), r(s.r), m2(s.m2);
  for_lanes<L::width>(s.size, [&](int64_t i, int64_t n) {
    V G, H;
    cotangents(i, n, G, H);
    const V x_hat = s.x_hat(i, n);
    const V d_hat = h ? s.d_hat(x_hat, i, n) : V(0);
    V out = r * (G - mean_G - x_hat * dot_G);  // J G
    if (h) {
      const V jh = r * (H - mean_H - x_hat * dot_H);  // J H
      if (s.dx) out = out - r * (m2 * jh + dot_H * d_hat + dot_Hd * x_hat);
      if (g_dx) L::store(g_dx + i, jh, n);
    }
    L::store(g_x + i, out, n);
    if (columns.bias && g) add(columns.bias + i, L::load(g + i, n), n);
    if (columns.dbias) add(columns.dbias + i, L::load(h + i, n), n);
    if (columns.dgain) add(columns.dgain + i, L::load(h + i, n) * x_hat, n);
    if (columns.gain) {
      V v = g ? L::load(g + i, n) * x_hat : V(0);
      if (h) v = at::vec::fmadd(L::load(h + i, n), d_hat, v);
      add(columns.gain + i, v, n);
    }
  });
}

using Six = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Six backward(const MaybeTensor& g, const MaybeTensor& h, const at::Tensor& x, const MaybeTensor& dx,
             const MaybeTensor& gain, const MaybeTensor& dgain, const MaybeTensor& bias, const MaybeTensor& dbias,
             bool rms, double eps) {
  const int64_t groups = check("modulated_layer_norm_backward", x, dx, gain, dgain, bias, dbias);
  const Arguments arguments{"modulated_layer_norm_backward"};
  arguments.contiguous("g", g, x.scalar_type(), x.sizes()), arguments.contiguous("h", h, x.scalar_type(), x.sizes());
  const int64_t size = x.size(1), rows = x.size(0);
  const int64_t per_group = groups ? rows / groups : 0;
  // Several threads may share a group of rows: each has its own sums.
  const int64_t parts = std::max<int64_t>(1, std::min(per_group, at::divup(at::get_num_threads(), std::max<int64_t>(groups, 1))));
  const auto accumulator = [&](bool wanted) {
    return wanted ? at::zeros({groups, parts, size}, x.options().dtype(at::toOpMathType(x.scalar_type())))
                  : at::empty({0}, x.options());
  };
  at::Tensor g_x = at::empty_like(x), g_dx = dx && h ? at::empty_like(x) : at::empty({0}, x.options());
  std::array<at::Tensor, 4> sums = {accumulator(gain.has_value()), accumulator(dgain && h), accumulator(bias.has_value()),
                                    accumulator(dbias && h)};
  if (x.numel() > 0) {
    MMF_DISPATCH(x, "modulated_layer_norm_backward", [&] {
      using T = scalar_t;
      using A = typename Lanes<T>::A;
      const T *px = x.const_data_ptr<T>(), *pdx = pointer<T>(dx), *pg = pointer<T>(g), *ph = pointer<T>(h);
      const T *pgain = pointer<T>(gain), *pdgain = pointer<T>(dgain);
      T *out = g_x.data_ptr<T>(), *dout = g_dx.numel() ? g_dx.data_ptr<T>() : nullptr;
      std::array<A*, 4> into;
      for (int k = 0; k < 4; ++k) into[k] = sums[k].numel() ? sums[k].template data_ptr<A>() : nullptr;
      at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t group = unit / parts, part = unit % parts;
          const int64_t from = group * per_group + part * per_group / parts;
          const int64_t to = group * per_group + (part + 1) * per_group / parts;
          const auto of_group = [&](const T* p) { return p ? p + group * size : nullptr; };
          const auto of_unit = [&](A* p) { return p ? p + unit * size : nullptr; };
          const Columns<A> columns{of_unit(into[0]), of_unit(into[1]), of_unit(into[2]), of_unit(into[3])};
          for (int64_t row = from; row < to; ++row) {
            const auto of_row = [&](auto* p) { return p ? p + row * size : nullptr; };
            const Row<T> s(of_row(px), of_row(pdx), size, rms, eps);
            backward_row<T>(s, of_row(pg), of_row(ph), of_group(pgain), of_group(pdgain), rms, of_row(out),
                            of_row(dout), columns);
          }
        }
      });
    });
  }
  for (auto& s : sums) {
    if (s.dim() == 3) s = (parts == 1 ? s.view({groups, size}) : s.sum(1)).to(x.scalar_type());
  }
  return {g_x, g_dx, sums[0], sums[1], sums[2], sums[3]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmf_fast_native, m) {
  m.def("modulated_layer_norm", &forward);
  m.def("modulated_layer_norm_backward", &backward);
}

}  // namespace mmf

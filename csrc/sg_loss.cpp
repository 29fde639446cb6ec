// sg_loss and its backward; see mmf_fast/ops/sg_loss.py. u, du (B, K); target, interval in float or double.
#include "lanes.h"

namespace mmf {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// e = u + (t - r) du - target of one sample, a register at a time.
template <typename T>
struct Error {
  using L = Lanes<T>;
  using A = typename L::A;
  using V = typename L::V;
  const T *u, *du;
  const A *target, *interval;

  Error(const at::Tensor& u, const MaybeTensor& du, const at::Tensor& target, const at::Tensor& interval)
      : u(u.const_data_ptr<T>()), du(pointer<T>(du)), target(target.const_data_ptr<A>()),
        interval(interval.const_data_ptr<A>()) {}

  V operator()(int64_t b, int64_t at, int64_t n) const {
    const V e = L::load(u + at, n) - Lanes<A>::load(target + at, n);
    return du ? at::vec::fmadd(V(interval[b]), L::load(du + at, n), e) : e;
  }
};

Arguments check(const char* name, const at::Tensor& u, const MaybeTensor& du, const at::Tensor& target,
                const at::Tensor& interval, const at::Tensor& lam) {
  const Arguments arguments{name};
  const at::ScalarType wide = at::toOpMathType(u.scalar_type());
  arguments.dimensions("u", u, 2);
  arguments.contiguous("u", u, u.scalar_type(), u.sizes()), arguments.contiguous("du", du, u.scalar_type(), u.sizes());
  arguments.contiguous("the target", target, wide, u.sizes());
  arguments.contiguous("the interval", interval, wide, {u.size(0)}), arguments.tensor("lam", lam, wide, {});
  return arguments;
}

// The loss, its terms and s.
Three forward(const at::Tensor& u, const MaybeTensor& du, const at::Tensor& target, const at::Tensor& interval,
              const at::Tensor& lam, double p, double c, bool) {
  check("sg_loss", u, du, target, interval, lam);
  const int64_t batch = u.size(0), size = u.size(1);
  at::Tensor square = at::empty({batch}, target.options());
  MMF_DISPATCH(u, "sg_loss", [&] {
    using E = Error<scalar_t>;
    const E error(u, du, target, interval);
    typename E::A* ps = square.data_ptr<typename E::A>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        ps[b] = row_sums<typename E::V, 1>(size, [&](int64_t i, int64_t n, auto& s) {
          const auto e = error(b, b * size + i, n);
          s[0] = at::vec::fmadd(e, e, s[0]);
        })[0];
      }
    });
  });
  at::Tensor per_sample = square * (square + c).pow(-p);
  return {per_sample.mean(), per_sample, square};
}

// g_u = 2 g e_b / (B (s_b + c)^p) and g_du = lam (t - r) g_u (empty without tangent_grad).
Two backward(const at::Tensor& g, const at::Tensor& u, const MaybeTensor& du, const at::Tensor& target,
             const at::Tensor& square, const at::Tensor& interval, const at::Tensor& lam, double p, double c,
             bool tangent_grad) {
  const Arguments arguments = check("sg_loss_backward", u, du, target, interval, lam);
  arguments.contiguous("the squares", square, target.scalar_type(), {u.size(0)});
  arguments.tensor("g", g, target.scalar_type(), {});
  const int64_t batch = u.size(0), size = u.size(1);
  const double scale = g.item<double>() * 2 / batch, share = lam.item<double>();
  at::Tensor g_u = at::empty_like(u), g_du = tangent_grad ? at::empty_like(u) : at::empty({0}, u.options());
  MMF_DISPATCH(u, "sg_loss_backward", [&] {
    using E = Error<scalar_t>;
    using A = typename E::A;
    using V = typename E::V;
    const E error(u, du, target, interval);
    const A *ps = square.const_data_ptr<A>(), *pt = interval.const_data_ptr<A>();
    scalar_t *out = g_u.data_ptr<scalar_t>(), *dout = tangent_grad ? g_du.data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const double k = scale * std::pow(ps[b] + c, -p);
        const V of_u(static_cast<A>(k)), of_du(static_cast<A>(k * share * pt[b]));
        for_lanes<E::L::width>(size, [&](int64_t i, int64_t n) {
          const V e = error(b, b * size + i, n);
          E::L::store(out + b * size + i, of_u * e, n);
          if (dout) E::L::store(dout + b * size + i, of_du * e, n);
        });
      }
    });
  });
  return {g_u, g_du};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmf_fast_native, m) {
  m.def("sg_loss", &forward);
  m.def("sg_loss_backward", &backward);
}

}  // namespace mmf

// sg_loss and its backward; see mmf_fast/ops/sg_loss.py. u, du (B, K); x, noise or target, interval in float or double.
#include "lanes.h"

#include <torch/csrc/autograd/custom_function.h>

namespace mmf {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// e = u + (t - r) du - (noise - x) of one sample, a register at a time.
template <typename T>
struct Error {
  using L = Lanes<T>;
  using A = typename L::A;
  using V = typename L::V;
  using LA = Lanes<A>;
  const T *u, *du;
  const A *x, *noise, *interval;

  Error(const at::Tensor& u, const MaybeTensor& du, const MaybeTensor& x, const at::Tensor& noise,
        const at::Tensor& interval)
      : u(u.const_data_ptr<T>()), du(pointer<T>(du)), x(pointer<A>(x)), noise(noise.const_data_ptr<A>()),
        interval(interval.const_data_ptr<A>()) {}

  V operator()(int64_t b, int64_t at, int64_t n) const {
    V e = L::load(u + at, n) - LA::load(noise + at, n);
    if (x) e = e + LA::load(x + at, n);
    return du ? at::vec::fmadd(V(interval[b]), L::load(du + at, n), e) : e;
  }
};

void check(const at::Tensor& u, const MaybeTensor& du, const MaybeTensor& x, const at::Tensor& noise,
           const at::Tensor& interval, const at::Tensor& lam) {
  const Arguments arguments{"sg_loss"};
  const at::ScalarType wide = at::toOpMathType(u.scalar_type());
  arguments.dimensions("u", u, 2);
  arguments.contiguous("u", u, u.scalar_type(), u.sizes()), arguments.contiguous("du", du, u.scalar_type(), u.sizes());
  arguments.contiguous("x", x, wide, u.sizes()), arguments.contiguous("the target", noise, wide, u.sizes());
  arguments.contiguous("the interval", interval, wide, {u.size(0)}), arguments.tensor("lam", lam, wide, {});
}

// The loss, its terms and s; e too where a tensor for it is given.
Three values(const at::Tensor& u, const MaybeTensor& du, const MaybeTensor& x, const at::Tensor& noise,
             const at::Tensor& interval, double p, double c, const MaybeTensor& kept) {
  const int64_t batch = u.size(0), size = u.size(1);
  at::Tensor square = at::empty({batch}, noise.options());
  MMF_DISPATCH(u, "sg_loss", [&] {
    using E = Error<scalar_t>;
    const E error(u, du, x, noise, interval);
    typename E::A *pe = kept ? kept->data_ptr<typename E::A>() : nullptr, *ps = square.data_ptr<typename E::A>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        ps[b] = row_sums<typename E::V, 1>(size, [&](int64_t i, int64_t n, auto& s) {
          const auto e = error(b, b * size + i, n);
          if (pe) E::LA::store(pe + b * size + i, e, n);
          s[0] = at::vec::fmadd(e, e, s[0]);
        })[0];
      }
    });
  });
  at::Tensor per_sample = square * (square + c).pow(-p);
  return {per_sample.mean(), per_sample, square};
}

Four forward(const at::Tensor& u, const MaybeTensor& du, const MaybeTensor& x, const at::Tensor& noise,
             const at::Tensor& interval, const at::Tensor& lam, double p, double c, bool) {
  check(u, du, x, noise, interval, lam);
  at::Tensor error = at::empty(u.sizes(), noise.options());
  auto [loss, per_sample, square] = values(u, du, x, noise, interval, p, c, error);
  return {loss, per_sample, square, error};
}

// g_u = 2 g e_b / (B (s_b + c)^p) and g_du = lam (t - r) g_u (empty without tangent_grad), of the given type and shaped
// like u. error_of(T()): a function of (sample, index, lanes) that gives e in registers of T's kind.
template <class F>
Two cotangents(const at::Tensor& g, F error_of, at::ScalarType dtype, at::IntArrayRef shape, const at::Tensor& square,
               const at::Tensor& interval, const at::Tensor& lam, double p, double c, bool tangent_grad) {
  const int64_t batch = shape[0], size = shape[1];
  const double scale = g.item<double>() * 2 / batch, share = lam.item<double>();
  at::Tensor g_u = at::empty(shape, square.options().dtype(dtype));
  at::Tensor g_du = tangent_grad ? at::empty_like(g_u) : at::empty({0}, g_u.options());
  MMF_DISPATCH(g_u, "sg_loss_backward", [&] {
    using L = Lanes<scalar_t>;
    using A = typename L::A;
    const auto error = error_of(scalar_t());
    const A *ps = square.const_data_ptr<A>(), *pt = interval.const_data_ptr<A>();
    scalar_t *out = g_u.data_ptr<scalar_t>(), *dout = tangent_grad ? g_du.data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const double k = scale * std::pow(ps[b] + c, -p);
        const typename L::V of_u(static_cast<A>(k)), of_du(static_cast<A>(k * share * pt[b]));
        for_lanes<L::width>(size, [&](int64_t i, int64_t n) {
          const auto e = error(b, b * size + i, n);
          L::store(out + b * size + i, of_u * e, n);
          if (dout) L::store(dout + b * size + i, of_du * e, n);
        });
      }
    });
  });
  return {g_u, g_du};
}

Two backward(const at::Tensor& g, const at::Tensor& error, const at::Tensor& square, const at::Tensor& interval,
             const at::Tensor& lam, double p, double c, bool tangent_grad, at::ScalarType dtype) {
  const Arguments arguments{"sg_loss_backward"};
  const at::ScalarType wide = at::toOpMathType(dtype);
  arguments.dimensions("the error", error, 2);
  arguments.contiguous("the error", error, wide, error.sizes());
  arguments.contiguous("the squares", square, wide, {error.size(0)});
  arguments.contiguous("the interval", interval, wide, {error.size(0)});
  arguments.tensor("lam", lam, wide, {}), arguments.tensor("g", g, wide, {});
  const auto kept = [&](auto type) {
    using A = typename Lanes<decltype(type)>::A;
    return [e = error.const_data_ptr<A>()](int64_t, int64_t at, int64_t n) { return Lanes<A>::load(e + at, n); };
  };
  return cotangents(g, kept, dtype, error.sizes(), square, interval, lam, p, c, tangent_grad);
}

// The same with its derivative, for eager mode: at this size an operator whose derivative is registered from Python
// spends as long in the registration as in the kernels, and fresh pages for an error to keep cost more than computing it
// again.
struct Differentiable : torch::autograd::Function<Differentiable> {
  using Tensors = torch::autograd::variable_list;

  static Tensors forward(torch::autograd::AutogradContext* ctx, const at::Tensor& u, const MaybeTensor& du,
                         const MaybeTensor& x, const at::Tensor& noise, const at::Tensor& interval,
                         const at::Tensor& lam, double p, double c, bool tangent_grad) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, per_sample, square] = values(u, du, x, noise, interval, p, c, {});
    ctx->save_for_backward({u, du.value_or(at::Tensor()), x.value_or(at::Tensor()), noise, interval, lam, square});
    ctx->saved_data["p"] = p;
    ctx->saved_data["c"] = c;
    ctx->saved_data["tangent_grad"] = tangent_grad;
    ctx->mark_non_differentiable({per_sample, square});
    return {loss, per_sample, square};
  }

  static Tensors backward(torch::autograd::AutogradContext* ctx, const Tensors& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "sg_loss has no second derivative as a fused operator: set MMF_FAST_OPS=reference");
    const auto saved = ctx->get_saved_variables();
    const auto maybe = [](const at::Tensor& a) { return a.defined() ? MaybeTensor(a) : MaybeTensor(); };
    const at::Tensor &u = saved[0], &interval = saved[4];
    const auto again = [&](auto type) {
      return Error<decltype(type)>(u, maybe(saved[1]), maybe(saved[2]), saved[3], interval);
    };
    const bool tangent_grad = ctx->saved_data["tangent_grad"].toBool();
    auto [g_u, g_du] =
        cotangents(grads[0], again, u.scalar_type(), u.sizes(), saved[6], interval, saved[5],
                   ctx->saved_data["p"].toDouble(), ctx->saved_data["c"].toDouble(), tangent_grad);
    Tensors all(9);
    all[0] = g_u;
    if (tangent_grad) all[1] = g_du;
    return all;
  }
};

Three differentiable(const at::Tensor& u, const MaybeTensor& du, const MaybeTensor& x, const at::Tensor& noise,
                     const at::Tensor& interval, const at::Tensor& lam, double p, double c, bool tangent_grad) {
  check(u, du, x, noise, interval, lam);
  TORCH_CHECK_VALUE(du || !tangent_grad, "sg_loss: tangent_grad needs du");
  auto out = Differentiable::apply(u, du, x, noise, interval, lam, p, c, tangent_grad);
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmf_fast_native, m) {
  m.def("sg_loss", &forward);
  m.def("sg_loss_differentiable", &differentiable);
  m.def("sg_loss_backward", &backward);
}

}  // namespace mmf

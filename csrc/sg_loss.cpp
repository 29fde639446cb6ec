// sg_loss and its backward; see mmf_fast/ops/sg_loss.py. u, du (B, K); x, noise or target, interval in float or double.
#include "lanes.h"

#include <torch/csrc/autograd/custom_function.h>

namespace mmf {
namespace {

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Four forward(const at::Tensor& u, const MaybeTensor& du, const MaybeTensor& x, const at::Tensor& noise,
             const at::Tensor& interval, const at::Tensor&, double p, double c, bool) {
  const int64_t batch = u.size(0), size = u.size(1);
  const auto options = u.options().dtype(at::toOpMathType(u.scalar_type()));
  at::Tensor error = at::empty(u.sizes(), options), square = at::empty({batch}, options);
  MMF_DISPATCH(u, "sg_loss", [&] {
    using T = scalar_t;
    using L = Lanes<T>;
    using A = typename L::A;
    using V = typename L::V;
    using LA = Lanes<A>;
    const T *pu = u.const_data_ptr<T>(), *pdu = pointer<T>(du);
    const A *px = pointer<A>(x), *pn = noise.const_data_ptr<A>(), *pt = interval.const_data_ptr<A>();
    A *pe = error.data_ptr<A>(), *ps = square.data_ptr<A>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * size;
        ps[b] = row_sums<V, 1>(size, [&](int64_t i, int64_t n, auto& s) {
          V e = L::load(pu + at + i, n) - LA::load(pn + at + i, n);
          if (px) e = e + LA::load(px + at + i, n);
          if (pdu) e = at::vec::fmadd(V(pt[b]), L::load(pdu + at + i, n), e);
          LA::store(pe + at + i, e, n);
          s[0] = at::vec::fmadd(e, e, s[0]);
        })[0];
      }
    });
  });
  at::Tensor per_sample = square * (square + c).pow(-p);
  return {per_sample.mean(), per_sample, square, error};
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& g, const at::Tensor& error, const at::Tensor& square,
                                            const at::Tensor& interval, const at::Tensor& lam, double p, double c,
                                            bool tangent_grad, at::ScalarType dtype) {
  const int64_t batch = error.size(0), size = error.size(1);
  at::Tensor g_u = at::empty(error.sizes(), error.options().dtype(dtype));
  at::Tensor g_du = tangent_grad ? at::empty_like(g_u) : at::empty({0}, g_u.options());
  MMF_DISPATCH(g_u, "sg_loss_backward", [&] {
    using T = scalar_t;
    using L = Lanes<T>;
    using A = typename L::A;
    using V = typename L::V;
    using LA = Lanes<A>;
    const A *pe = error.const_data_ptr<A>(), *ps = square.const_data_ptr<A>(), *pt = interval.const_data_ptr<A>();
    const double scale = g.item<double>() * 2 / batch, share = lam.item<double>();
    T *out = g_u.data_ptr<T>(), *dout = tangent_grad ? g_du.data_ptr<T>() : nullptr;
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * size;
        const double k = scale * std::pow(ps[b] + c, -p);
        const V of_u(static_cast<A>(k)), of_du(static_cast<A>(k * share * pt[b]));
        for_lanes<L::width>(size, [&](int64_t i, int64_t n) {
          const V e = LA::load(pe + at + i, n);
          L::store(out + at + i, of_u * e, n);
          if (dout) L::store(dout + at + i, of_du * e, n);
        });
      }
    });
  });
  return {g_u, g_du};
}

// The same with its derivative, for eager mode: at this size an operator whose derivative is registered from Python
// spends as long in the registration as in the kernels.
struct Differentiable : torch::autograd::Function<Differentiable> {
  using Tensors = torch::autograd::variable_list;

  static Tensors forward(torch::autograd::AutogradContext* ctx, const at::Tensor& u, const MaybeTensor& du,
                         const MaybeTensor& x, const at::Tensor& noise, const at::Tensor& interval,
                         const at::Tensor& lam, double p, double c, bool tangent_grad) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, per_sample, square, error] = mmf::forward(u, du, x, noise, interval, lam, p, c, tangent_grad);
    ctx->save_for_backward({error, square, interval, lam});
    ctx->saved_data["p"] = p;
    ctx->saved_data["c"] = c;
    ctx->saved_data["tangent_grad"] = tangent_grad;
    ctx->saved_data["dtype"] = static_cast<int64_t>(u.scalar_type());
    ctx->mark_non_differentiable({per_sample, square});
    return {loss, per_sample, square};
  }

  static Tensors backward(torch::autograd::AutogradContext* ctx, const Tensors& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "sg_loss has no second derivative as a fused operator: set MMF_FAST_OPS=reference");
    const auto saved = ctx->get_saved_variables();
    const bool tangent_grad = ctx->saved_data["tangent_grad"].toBool();
    auto [g_u, g_du] = mmf::backward(grads[0], saved[0], saved[1], saved[2], saved[3], ctx->saved_data["p"].toDouble(),
                                     ctx->saved_data["c"].toDouble(), tangent_grad,
                                     static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt()));
    Tensors all(9);
    all[0] = g_u;
    if (tangent_grad) all[1] = g_du;
    return all;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> differentiable(const at::Tensor& u, const MaybeTensor& du,
                                                              const MaybeTensor& x, const at::Tensor& noise,
                                                              const at::Tensor& interval, const at::Tensor& lam,
                                                              double p, double c, bool tangent_grad) {
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

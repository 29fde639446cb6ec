// activation and its backward: y = f(x), y' = f'(x) x'; see mmf_fast/ops/pointwise.py.
#include "activations.h"

namespace mmf {
namespace {

constexpr int64_t grain = 16384;

// Checks that x has no gaps in memory, in any order of its dimensions, and that the others have its strides.
void check(const char* op, const at::Tensor& x) {
  const Arguments arguments{op};
  arguments.like("x", x, x);
  arguments.holds(x.is_non_overlapping_and_dense(), "x must have no gaps in memory");
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& dx, std::string name, bool) {
  check("activation", x);
  Arguments{"activation"}.like("dx", dx, x);
  at::Tensor y = at::empty_like(x), dy = at::empty_like(x);
  MMF_DISPATCH(x, "activation", [&] {
    using T = scalar_t;
    using L = Lanes<T>;
    const T *px = x.const_data_ptr<T>(), *pdx = dx.const_data_ptr<T>();
    T *py = y.data_ptr<T>(), *pdy = dy.data_ptr<T>();
    with_act(name, [&](auto act) {
      at::parallel_for(0, x.numel(), grain, [&](int64_t begin, int64_t end) {
        for_lanes<L::width>(end - begin, [&](int64_t i, int64_t n) {
          const auto f = value_and_slopes<act.value>(L::load(px + begin + i, n));
          L::store(py + begin + i, f.value, n);
          L::store(pdy + begin + i, f.slope * L::load(pdx + begin + i, n), n);
        });
      });
    });
  });
  return {y, dy};
}

// g_x = f' g + f'' x' h,  g_x' = f' h
std::tuple<at::Tensor, at::Tensor> backward(const MaybeTensor& g, const at::Tensor& h, const at::Tensor& x,
                                            const at::Tensor& dx, std::string name) {
  check("activation_backward", x);
  const Arguments arguments{"activation_backward"};
  arguments.like("dx", dx, x), arguments.like("g", g, x), arguments.like("h", h, x);
  at::Tensor g_x = at::empty_like(x), g_dx = at::empty_like(x);
  MMF_DISPATCH(x, "activation_backward", [&] {
    using T = scalar_t;
    using L = Lanes<T>;
    using V = typename L::V;
    const T *px = x.const_data_ptr<T>(), *pdx = dx.const_data_ptr<T>(), *pg = pointer<T>(g), *ph = h.const_data_ptr<T>();
    T *out = g_x.data_ptr<T>(), *dout = g_dx.data_ptr<T>();
    with_act(name, [&](auto act) {
      at::parallel_for(0, x.numel(), grain, [&](int64_t begin, int64_t end) {
        for_lanes<L::width>(end - begin, [&](int64_t i, int64_t n) {
          i += begin;
          const auto f = value_and_slopes<act.value>(L::load(px + i, n));
          const V v = L::load(ph + i, n);
          V to_x = f.curvature * L::load(pdx + i, n) * v;
          if (pg) to_x = at::vec::fmadd(f.slope, L::load(pg + i, n), to_x);
          L::store(out + i, to_x, n);
          L::store(dout + i, f.slope * v, n);
        });
      });
    });
  });
  return {g_x, g_dx};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmf_fast_native, m) {
  m.def("activation", &forward);
  m.def("activation_backward", &backward);
}

}  // namespace mmf

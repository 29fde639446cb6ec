// group_norm_silu and its backward, contiguous and channels-last; the formulas are in mmf_fast/ops/group_norm.py.
// x (B, C, pixels); gain, bias and their tangents (1 or B, C). A thread owns whole groups: one at a time where images
// are contiguous, all groups of an image where channels are innermost.
#include <vector>

#include "activations.h"

namespace mmf {
namespace {

// What the pixels of a channel share, as vectors: the same for all lanes, or one channel per lane.
template <class V>
struct Channel {
  V mean, r, mean_dx, m2, a, da, b, db;
  V mean_G, dot_G, mean_H, dot_H, dot_Hd;  // of the backward pass
};

struct Shape {
  int64_t batch, channels, pixels, groups;
  bool channels_last;
  explicit Shape(const at::Tensor& x, int64_t groups)
      : batch(x.size(0)), channels(x.size(1)), pixels(batch * channels ? x.numel() / (batch * channels) : 0),
        groups(groups), channels_last(!x.is_contiguous()) {}
};

// One image, or one group of it, with the per-channel numbers it needs.
template <class T>
struct Image {
  using L = Lanes<T>;
  using A = typename L::A;
  using V = typename L::V;
  using LA = Lanes<A>;
  static constexpr int kinds = 13;

  const Shape& shape;
  std::vector<A> numbers;      // (13, channels), as in Channel
  std::vector<double> totals;  // (5, channels)

  explicit Image(const Shape& s) : shape(s), numbers(kinds * s.channels), totals(5 * s.channels) {}

  A* number(int k) { return numbers.data() + k * shape.channels; }
  double* sum(int k) { return totals.data() + k * shape.channels; }

  template <class F>
  static Channel<V> channel(F load) {
    return {load(0), load(1), load(2), load(3), load(4), load(5), load(6),
            load(7), load(8), load(9), load(10), load(11), load(12)};
  }
  Channel<V> at_channel(int64_t c) {
    return channel([&](int k) { return V(number(k)[c]); });
  }
  Channel<V> at_channels(int64_t c, int64_t n) {
    return channel([&](int k) { return LA::load(number(k) + c, n); });
  }

  // f(first channel, n, first pixel, last) for all of channels-last images, by tiles of one vector of channels, whose
  // numbers stay in registers, and as many pixels as leave the other vectors of the same pixels in the cache.
  template <class F>
  void tiles(int64_t from, int64_t to, F f) {
    constexpr int64_t block = 32;
    for (int64_t start = 0; start < shape.pixels; start += block)
      for_lanes<L::width>(to - from, [&](int64_t i, int64_t n) {
        f(from + i, n, start, std::min(start + block, shape.pixels));
      });
  }

  // f(offset, n, channel) for all pixels of the channels [from, to).
  template <class F>
  void each(int64_t from, int64_t to, F f) {
    if (!shape.channels_last) {
      for (int64_t c = from; c < to; ++c) {
        const auto channel = at_channel(c);
        for_lanes<L::width>(shape.pixels, [&](int64_t i, int64_t n) { f(c * shape.pixels + i, n, channel); });
      }
    } else {
      tiles(from, to, [&](int64_t c, int64_t n, int64_t start, int64_t stop) {
        const auto channel = at_channels(c, n);
        for (int64_t p = start; p < stop; ++p) f(p * shape.channels + c, n, channel);
      });
    }
  }

  // K sums over pixels for each of the channels [from, to): f(offset, n, channel, sums) adds to std::array<V, K>.
  template <size_t K, class F>
  void sums(int64_t from, int64_t to, F f) {
    if (!shape.channels_last) {
      for (int64_t c = from; c < to; ++c) {
        const auto channel = at_channel(c);
        const auto result = row_sums<V, K>(
            shape.pixels, [&](int64_t i, int64_t n, auto& s) { f(c * shape.pixels + i, n, channel, s); });
        for (size_t k = 0; k < K; ++k) sum(k)[c] = result[k];
      }
      return;
    }
    for (size_t k = 0; k < K; ++k) std::fill(sum(k) + from, sum(k) + to, 0.0);
    tiles(from, to, [&](int64_t c, int64_t n, int64_t start, int64_t stop) {
      const auto channel = at_channels(c, n);
      std::array<V, K> s;
      s.fill(V(0));
      for (int64_t p = start; p < stop; ++p) f(p * shape.channels + c, n, channel, s);
      for (size_t k = 0; k < K; ++k) {
        std::array<A, L::width> lanes;
        s[k].store(lanes.data());
        for (int64_t i = 0; i < n; ++i) sum(k)[c + i] += lanes[i];
      }
    });
  }

  // f(first channel, last, sum over the group of each of K channel sums)
  template <size_t K, class F>
  void each_group(int64_t from, int64_t to, F f) {
    const int64_t per_group = shape.channels / shape.groups;
    for (int64_t c = from; c < to; c += per_group) {
      std::array<double, K> s{};
      for (size_t k = 0; k < K; ++k)
        for (int64_t i = c; i < c + per_group; ++i) s[k] += sum(k)[i];
      f(c, c + per_group, s);
    }
  }

  void statistics(const T* x, const T* dx, int64_t from, int64_t to, double eps) {
    const double count = shape.channels / shape.groups * shape.pixels;
    sums<2>(from, to, [&](int64_t at, int64_t n, const auto&, auto& s) {
      s[0] = s[0] + L::load(x + at, n);
      if (dx) s[1] = s[1] + L::load(dx + at, n);
    });
    each_group<2>(from, to, [&](int64_t first, int64_t last, const auto& s) {
      std::fill(number(0) + first, number(0) + last, static_cast<A>(s[0] / count));
      std::fill(number(2) + first, number(2) + last, static_cast<A>(s[1] / count));
    });
    sums<2>(from, to, [&](int64_t at, int64_t n, const auto& k, auto& s) {
      const V c = mmf::first(L::load(x + at, n) - k.mean, n);
      s[0] = at::vec::fmadd(c, c, s[0]);
      if (dx) s[1] = at::vec::fmadd(c, L::load(dx + at, n) - k.mean_dx, s[1]);
    });
    each_group<2>(from, to, [&](int64_t first, int64_t last, const auto& s) {
      const double r = 1 / std::sqrt(s[0] / count + eps);
      std::fill(number(1) + first, number(1) + last, static_cast<A>(r));
      std::fill(number(3) + first, number(3) + last, static_cast<A>(r * s[1] / count));
    });
  }

  void parameters(int64_t image, const MaybeTensor& a, const MaybeTensor& da, const MaybeTensor& b,
                  const MaybeTensor& db) {
    const auto copy = [&](const MaybeTensor& p, int k, A absent) {
      const T* from = pointer<T>(p);
      if (from && p->size(0) > 1) from += image * shape.channels;
      for (int64_t c = 0; c < shape.channels; ++c) number(k)[c] = from ? static_cast<A>(from[c]) : absent;
    };
    copy(a, 4, 1), copy(da, 5, 0), copy(b, 6, 0), copy(db, 7, 0);
  }
};

template <class V>
struct Point {
  V x_hat, d_hat, u, du;
};

template <class T, class V>
inline Point<V> point(const T* x, const T* dx, int64_t at, int64_t n, const Channel<V>& k) {
  using L = Lanes<T>;
  const V x_hat = (L::load(x + at, n) - k.mean) * k.r;
  const V d_hat = dx ? k.r * (L::load(dx + at, n) - k.mean_dx - x_hat * k.m2) : V(0);
  return {x_hat, d_hat, at::vec::fmadd(x_hat, k.a, k.b), d_hat * k.a + x_hat * k.da + k.db};
}

// f(image, base offset, image number, first channel, last channel) for every unit of work.
template <class T, class F>
void for_units(const Shape& shape, F f) {
  const int64_t per_image = shape.channels_last ? 1 : shape.groups, channels = shape.channels / per_image;
  at::parallel_for(0, shape.batch * per_image, 1, [&](int64_t begin, int64_t end) {
    Image<T> image(shape);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t number = unit / per_image, from = unit % per_image * channels;
      f(image, number * shape.channels * shape.pixels, number, from, from + channels);
    }
  });
}

// x contiguous or channels-last, dx like it, gain and bias (1 or B, C).
void check(const char* op, const at::Tensor& x, const MaybeTensor& dx, const MaybeTensor& gain, const MaybeTensor& dgain,
           const MaybeTensor& bias, const MaybeTensor& dbias, int64_t groups) {
  const Arguments arguments{op};
  arguments.holds(x.dim() >= 2, "x must have the dimensions (B, C, ...)");
  arguments.like("x", x, x), arguments.like("dx", dx, x);
  const bool channels_last = (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
                             (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d));
  arguments.holds(x.is_contiguous() || channels_last, "x must be contiguous or channels-last");
  arguments.holds(groups > 0 && x.size(1) % groups == 0, "the channels of x must divide into the groups");
  const auto parameter = [&](const char* name, const MaybeTensor& p) {
    const bool rows = p && p->dim() == 2 && p->size(0) == x.size(0);
    arguments.contiguous(name, p, x.scalar_type(), {rows ? x.size(0) : 1, x.size(1)});
  };
  parameter("gain", gain), parameter("dgain", dgain), parameter("bias", bias), parameter("dbias", dbias);
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const MaybeTensor& dx, const MaybeTensor& gain,
                                           const MaybeTensor& dgain, const MaybeTensor& bias, const MaybeTensor& dbias,
                                           int64_t groups, double eps, std::string act, bool) {
  check("group_norm_silu", x, dx, gain, dgain, bias, dbias, groups);
  const Shape shape(x, groups);
  at::Tensor y = at::empty_like(x);
  at::Tensor dy = dx || dgain || dbias ? at::empty_like(x) : at::empty({0}, x.options());
  if (x.numel() == 0) return {y, dy};
  MMF_DISPATCH(x, "group_norm_silu", [&] {
    using T = scalar_t;
    using L = Lanes<T>;
    T* out = y.data_ptr<T>();
    T* dout = dy.numel() ? dy.data_ptr<T>() : nullptr;
    with_act(act, [&](auto act) {
      for_units<T>(shape, [&](Image<T>& image, int64_t base, int64_t number, int64_t from, int64_t to) {
        const T *px = x.const_data_ptr<T>() + base, *pdx = dx ? pointer<T>(dx) + base : nullptr;
        image.parameters(number, gain, dgain, bias, dbias);
        image.statistics(px, pdx, from, to, eps);
        image.each(from, to, [&](int64_t at, int64_t n, const auto& k) {
          const auto p = point(px, pdx, at, n, k);
          const auto f = value_and_slopes<act.value>(p.u);
          L::store(out + base + at, f.value, n);
          if (dout) L::store(dout + base + at, f.slope * p.du, n);
        });
      });
    });
  });
  return {y, dy};
}

using Six = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Six backward(const MaybeTensor& g, const MaybeTensor& h, const at::Tensor& x, const MaybeTensor& dx,
             const MaybeTensor& gain, const MaybeTensor& dgain, const MaybeTensor& bias, const MaybeTensor& dbias,
             int64_t groups, double eps, std::string act) {
  check("group_norm_silu_backward", x, dx, gain, dgain, bias, dbias, groups);
  const Arguments arguments{"group_norm_silu_backward"};
  arguments.like("g", g, x), arguments.like("h", h, x);
  const Shape shape(x, groups);
  at::Tensor g_x = at::empty_like(x), g_dx = dx && h ? at::empty_like(x) : at::empty({0}, x.options());
  at::Tensor sums = at::zeros({4, shape.batch, shape.channels}, x.options().dtype(at::toOpMathType(x.scalar_type())));
  if (x.numel() > 0) {
    MMF_DISPATCH(x, "group_norm_silu_backward", [&] {
      using T = scalar_t;
      using L = Lanes<T>;
      using V = typename L::V;
      using A = typename L::A;
      const double count = shape.channels / groups * shape.pixels;
      A* columns = sums.data_ptr<A>();
      with_act(act, [&](auto act) {
        for_units<T>(shape, [&](Image<T>& image, int64_t base, int64_t number, int64_t from, int64_t to) {
          const auto of_image = [&](const MaybeTensor& t) { return t ? pointer<T>(t) + base : nullptr; };
          const T *px = x.const_data_ptr<T>() + base, *pdx = of_image(dx), *pg = of_image(g), *ph = of_image(h);
          T *out = g_x.data_ptr<T>() + base, *dout = g_dx.numel() ? g_dx.data_ptr<T>() + base : nullptr;
          image.parameters(number, gain, dgain, bias, dbias);
          image.statistics(px, pdx, from, to, eps);
          // Cotangents of u and u'.
          const auto cotangents = [&](const Point<V>& p, int64_t at, int64_t n, V& gu, V& hu) {
            const auto f = value_and_slopes<act.value>(p.u);
            gu = pg ? f.slope * L::load(pg + at, n) : V(0);
            hu = V(0);
            if (ph) {
              const V v = L::load(ph + at, n);
              hu = f.slope * v;
              gu = at::vec::fmadd(f.curvature * p.du, v, gu);
            }
          };
          image.template sums<5>(from, to, [&](int64_t at, int64_t n, const auto& k, auto& s) {
            const auto p = point(px, pdx, at, n, k);
            V gu, hu;
            cotangents(p, at, n, gu, hu);
            s[0] = s[0] + gu;
            s[1] = at::vec::fmadd(gu, p.x_hat, s[1]);
            if (ph) {
              s[2] = s[2] + hu;
              s[3] = at::vec::fmadd(hu, p.x_hat, s[3]);
              s[4] = at::vec::fmadd(hu, p.d_hat, s[4]);
            }
          });
          const int64_t plane = shape.batch * shape.channels;
          const A *a = image.number(4), *da = image.number(5);
          for (int64_t c = from; c < to; ++c) {
            A* column = columns + number * shape.channels + c;
            column[0] = image.sum(1)[c] + image.sum(4)[c];  // gain
            column[plane] = image.sum(3)[c];                // its tangent
            column[2 * plane] = image.sum(0)[c];            // bias
            column[3 * plane] = image.sum(2)[c];            // its tangent
            // From u to x^: G = gu a + hu a', H = hu a.
            image.sum(0)[c] = image.sum(0)[c] * a[c] + image.sum(2)[c] * da[c];
            image.sum(1)[c] = image.sum(1)[c] * a[c] + image.sum(3)[c] * da[c];
            for (int k = 2; k < 5; ++k) image.sum(k)[c] *= a[c];
          }
          image.template each_group<5>(from, to, [&](int64_t first, int64_t last, const auto& s) {
            for (int k = 0; k < 5; ++k)
              std::fill(image.number(8 + k) + first, image.number(8 + k) + last, static_cast<A>(s[k] / count));
          });
          image.each(from, to, [&](int64_t at, int64_t n, const auto& k) {
            const auto p = point(px, pdx, at, n, k);
            V gu, hu;
            cotangents(p, at, n, gu, hu);
            const V G = gu * k.a + hu * k.da, H = hu * k.a;
            V to_x = k.r * (G - k.mean_G - p.x_hat * k.dot_G);  // J G
            if (ph && pdx) {
              const V jh = k.r * (H - k.mean_H - p.x_hat * k.dot_H);  // J H
              to_x = to_x - k.r * (k.m2 * jh + k.dot_H * p.d_hat + k.dot_Hd * p.x_hat);
              L::store(dout + at, jh, n);
            }
            L::store(out + at, to_x, n);
          });
        });
      });
    });
  }
  const auto column = [&](const MaybeTensor& p, int k, bool wanted) {
    if (!p || !wanted) return at::empty({0}, x.options());
    at::Tensor s = sums.select(0, k);
    return (p->size(0) == shape.batch ? s.clone() : s.sum(0, true)).to(x.scalar_type());
  };
  return {g_x, g_dx, column(gain, 0, true), column(dgain, 1, h.has_value()), column(bias, 2, true),
          column(dbias, 3, h.has_value())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmf_fast_native, m) {
  m.def("group_norm_silu", &forward);
  m.def("group_norm_silu_backward", &backward);
}

}  // namespace mmf

// Value, slope and curvature of SiLU and GELU on vectors.
#pragma once

#include "lanes.h"

namespace mmf {

enum class Act { none, silu, gelu, gelu_tanh };

template <class V>
struct ValueAndSlopes {
  V value, slope, curvature;
};

// f = x s(q(x)) with the sigmoid s:  f' = s + x s (1 - s) q',  f'' = s (1 - s) (2 q' + x ((1 - 2 s) q'^2 + q'')).
// SiLU: q = x.  GELU (tanh): q = 2 sqrt(2 / pi) (x + 0.044715 x^3).
template <class V>
inline ValueAndSlopes<V> sigmoid_gated(V x, V near, V q, V q1, V q2) {
  const V one(1), s = one / (one + q.neg().exp()), ss = s * (one - s);
  return {x * s, s + near * ss * q1, ss * (V(2) * q1 + near * ((one - V(2) * s) * q1 * q1 + q2))};
}

template <Act act, class V>
inline ValueAndSlopes<V> value_and_slopes(V x) {
  if constexpr (act == Act::silu) {
    return sigmoid_gated(x, x, x, V(1), V(0));
  } else if constexpr (act == Act::gelu_tanh) {
    constexpr double k = 1.5957691216057308, a = 0.044715;
    const V near = at::vec::clamp(x, V(-25), V(25));  // beyond, s is 0 or 1 and the powers of x must not overflow
    const V x2 = near * near;
    return sigmoid_gated(x, near, near * (V(k) + V(k * a) * x2), V(k) + V(3 * k * a) * x2, V(6 * k * a) * near);
  } else if constexpr (act == Act::gelu) {  // x Phi(x), Phi + x phi, phi (2 - x^2)
    const V near = at::vec::clamp(x, V(-40), V(40));
    const V Phi = V(0.5) * (V(1) + (x * V(0.7071067811865476)).erf());
    const V phi = V(0.3989422804014327) * (V(-0.5) * near * near).exp();
    return {x * Phi, Phi + near * phi, phi * (V(2) - near * near)};
  } else {
    return {x, V(1), V(0)};
  }
}

template <class F>
void with_act(const std::string& name, F f) {
  if (name == "none") return f(std::integral_constant<Act, Act::none>());
  if (name == "silu") return f(std::integral_constant<Act, Act::silu>());
  if (name == "gelu") return f(std::integral_constant<Act, Act::gelu>());
  if (name == "gelu_tanh") return f(std::integral_constant<Act, Act::gelu_tanh>());
  TORCH_CHECK(false, "unknown activation ", name);
}

}  // namespace mmf

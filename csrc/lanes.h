// Vector loads and stores that compute in float (float, bfloat16) or double, and row sums.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <array>

#include "arguments.h"

namespace mmf {

template <class T>
struct Lanes {
  using A = at::opmath_type<T>;  // what arithmetic is done in
  using V = at::vec::Vectorized<A>;
  static constexpr int64_t width = V::size();

  // The first n lanes; the others are zero.
  static V load(const T* p, int64_t n) {
    if constexpr (std::is_same_v<T, A>) {
      return n == width ? V::loadu(p) : V::loadu(p, n);
    } else {
      return at::vec::convert<A>(at::vec::Vectorized<T>::loadu(p, n));
    }
  }

  static void store(T* p, V v, int64_t n) {
    if constexpr (std::is_same_v<T, A>) {
      n == width ? v.store(p) : v.store(p, n);
    } else {
      at::vec::convert<T>(v).store(p, n);
    }
  }
};

// f(i, n) for i in 0, width, ..., with n = width but for the last.
template <int64_t width, class F>
inline __attribute__((always_inline)) void for_lanes(int64_t size, F f) {
  int64_t i = 0;
  for (; i + width <= size; i += width) f(i, width);
  if (i < size) f(i, size - i);
}

template <class V>
inline V first(V v, int64_t n) {
  return n == V::size() ? v : V::set(V(0), v, n);
}

template <class V>
inline typename V::value_type total(V v) {
  return at::vec::vec_reduce_all<typename V::value_type>([](V& a, V& b) { return a + b; }, v);
}

// K sums over size elements: f(i, n, sums) adds to std::array<V, K>. Each block of 256 vectors goes into a double, so
// that long rows lose nothing.
template <class V, size_t K, class F>
inline __attribute__((always_inline)) std::array<double, K> row_sums(int64_t size, F f) {
  std::array<double, K> out{};
  constexpr int64_t width = V::size(), block = 256 * width;
  for (int64_t start = 0; start < size; start += block) {
    std::array<V, K> sums;
    sums.fill(V(0));
    for_lanes<width>(std::min(block, size - start), [&](int64_t i, int64_t n) { f(start + i, n, sums); });
    for (size_t k = 0; k < K; ++k) out[k] += static_cast<double>(total(sums[k]));
  }
  return out;
}

template <class T>
const T* pointer(const MaybeTensor& t) {
  return t.has_value() && t->defined() ? t->const_data_ptr<T>() : nullptr;
}

#define MMF_DISPATCH(x, name, ...)                                                                     \
  AT_DISPATCH_SWITCH(x.scalar_type(), name,                                                            \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kDouble, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

}  // namespace mmf

// What the two passes of attention share: heads, masks, scratch memory and the division of work.
//
// Tiles of ROWS queries x COLUMNS keys, so that memory is linear in the sequence length. Keys and values of a head are
// copied once, in the order in which `multiply` reads them, converted and padded to whole vectors; logits of padded keys
// are -inf. q and q' are scaled when they are copied.
#pragma once

#include "multiply.h"

#include <limits>
#include <memory>

namespace mmf {

constexpr int64_t ROWS = 96, COLUMNS = 128;

template <class A>
int64_t padded(int64_t n) {
  constexpr int64_t W = at::vec::Vectorized<A>::size();
  return at::divup(n, W) * W;
}

// One head of a tensor (B, H, N, D) of any strides; null for an absent tensor.
template <class T>
struct Head {
  T* data = nullptr;
  int64_t row = 0, column = 0;

  Head() = default;
  Head(const at::Tensor& x, int64_t head) : row(x.stride(2)), column(x.stride(3)) {
    const int64_t heads = x.size(1), offset = head / heads * x.stride(0) + head % heads * x.stride(1);
    if constexpr (std::is_const_v<T>) {
      data = x.const_data_ptr<std::remove_const_t<T>>() + offset;
    } else {
      data = x.data_ptr<T>() + offset;
    }
  }
  Head(const MaybeTensor& x, int64_t head) {
    if (x.has_value() && x->numel()) *this = Head(*x, head);
  }
  explicit operator bool() const { return data; }
};

// out (rows, padded columns) = scale x, from row `first`.
template <class A, class T>
void copy_rows(Head<const T> x, int64_t first, int64_t rows, int64_t columns, A scale, A* out) {
  using L = Lanes<T>;
  const int64_t ld = padded<A>(columns);
  for (int64_t r = 0; r < rows; ++r, out += ld) {
    const T* from = x.data + (first + r) * x.row;
    if (x.column == 1) {
      for_lanes<L::width>(columns, [&](int64_t i, int64_t n) {
        (mmf::first(L::load(from + i, n), n) * typename L::V(scale)).store(out + i);
      });
    } else {
      for (int64_t i = 0; i < ld; ++i) out[i] = i < columns ? static_cast<A>(from[i * x.column]) * scale : A(0);
    }
  }
}

// out (columns, padded rows) = x^T.
template <class A, class T>
void copy_transposed(Head<const T> x, int64_t rows, int64_t columns, A* out) {
  constexpr int64_t W = at::vec::Vectorized<A>::size();
  const int64_t ld = padded<A>(rows);
  for (int64_t r = 0; r < ld; r += W) {
    const int64_t here = std::min(W, rows - r);
    for (int64_t i = 0; i < columns; ++i) {
      const T* from = x.data + r * x.row + i * x.column;
      A* to = out + i * ld + r;
      for (int64_t j = 0; j < here; ++j) to[j] = static_cast<A>(from[j * x.row]);
      for (int64_t j = here; j < W; ++j) to[j] = A(0);
    }
  }
}

// x (rows, columns) = scale in, from row `first`; `in` has padded rows.
template <class A, class T>
void write_rows(const A* in, A scale, Head<T> x, int64_t first, int64_t rows, int64_t columns) {
  using L = Lanes<T>;
  const int64_t ld = padded<A>(columns);
  for (int64_t r = 0; r < rows; ++r, in += ld) {
    for_lanes<L::width>(columns, [&](int64_t i, int64_t n) {
      L::store(x.data + (first + r) * x.row + i, L::V::loadu(in + i) * typename L::V(scale), n);
    });
  }
}

struct Shape {
  int64_t heads, N, M, D, E, Mp, Dp, Ep;  // heads of all samples; p: padded
};

template <class A>
Shape shape_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const int64_t M = k.size(2), D = q.size(3), E = v.size(3);
  return {q.size(0) * q.size(1), q.size(2), M, D, E, padded<A>(M), padded<A>(D), padded<A>(E)};
}

// Logits of rows [first, first + rows) and keys [key, key + keys), in place: bias, masked and padded ones -inf.
template <class T, class A>
struct Mask {
  Head<const bool> allowed;
  Head<const T> bias;
  bool causal;

  Mask(const MaybeTensor& mask, int64_t head, bool causal) : causal(causal) {
    if (!mask) return;
    if (mask->scalar_type() == at::kBool) {
      allowed = Head<const bool>(*mask, head);
    } else {
      bias = Head<const T>(*mask, head);
    }
  }

  int64_t keys_of(int64_t row, int64_t M) const { return causal ? std::min(row + 1, M) : M; }

  void apply(A* s, int64_t row, int64_t key, int64_t M, int64_t size) const {
    constexpr A minus_inf = -std::numeric_limits<A>::infinity();
    const int64_t end = std::clamp<int64_t>(keys_of(row, M) - key, 0, size);
    if (allowed) {
      const bool* at = allowed.data + row * allowed.row + key * allowed.column;
      for (int64_t j = 0; j < end; ++j) s[j] = at[j * allowed.column] ? s[j] : minus_inf;
    }
    if (bias) {
      const T* at = bias.data + row * bias.row + key * bias.column;
      for (int64_t j = 0; j < end; ++j) s[j] += static_cast<A>(at[j * bias.column]);
    }
    for (int64_t j = end; j < size; ++j) s[j] = minus_inf;
  }
};

// Scratch memory of one thread, handed out in pieces.
template <class A>
class Scratch {
 public:
  A* take(int64_t size) {
    pieces_.emplace_back(new A[std::max<int64_t>(size, 1)]);
    return pieces_.back().get();
  }
  A* take_if(bool wanted, int64_t size) { return wanted ? take(size) : nullptr; }

 private:
  std::vector<std::unique_ptr<A[]>> pieces_;
};

// Rows of a head are shared by several threads when there are fewer heads than threads.
inline int64_t parts_of(int64_t heads, int64_t N) {
  const int64_t wanted = heads >= at::get_num_threads() ? 1 : at::divup(2 * at::get_num_threads(), heads);
  return std::clamp<int64_t>(wanted, 1, at::divup(N, ROWS));
}

// q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), their tangents alike, mask (B, H, N, M); any strides.
inline void check_attention(const char* op, const at::Tensor& q, const MaybeTensor& dq, const at::Tensor& k,
                            const MaybeTensor& dk, const at::Tensor& v, const MaybeTensor& dv, const MaybeTensor& mask) {
  const Arguments arguments{op};
  const at::ScalarType dtype = q.scalar_type();
  arguments.dimensions("q", q, 4), arguments.dimensions("k", k, 4), arguments.dimensions("v", v, 4);
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), M = k.size(2), D = q.size(3), E = v.size(3);
  arguments.tensor("q", q, dtype, q.sizes()), arguments.tensor("dq", dq, dtype, q.sizes());
  arguments.tensor("k", k, dtype, {B, H, M, D}), arguments.tensor("dk", dk, dtype, {B, H, M, D});
  arguments.tensor("v", v, dtype, {B, H, M, E}), arguments.tensor("dv", dv, dtype, {B, H, M, E});
  const bool boolean = mask && mask->scalar_type() == at::kBool;
  arguments.tensor("the mask", mask, boolean ? at::kBool : dtype, {B, H, N, M});
}

// (B, H, N, width), laid out as (B, N, H, width).
inline at::Tensor empty_heads(const at::Tensor& like, int64_t width) {
  return at::empty({like.size(0), like.size(2), like.size(1), width}, like.options()).transpose(1, 2);
}

}  // namespace mmf

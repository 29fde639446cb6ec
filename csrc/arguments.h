// What a kernel asks of its arguments, whoever calls it. It finds elements by arithmetic of its own, so a tensor of
// another shape, dtype, device or layout would be read and written outside: each operator names what it takes first.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace mmf {

using MaybeTensor = std::optional<at::Tensor>;

inline const at::Tensor* present(const at::Tensor& t) { return &t; }
inline const at::Tensor* present(const MaybeTensor& t) { return t && t->defined() ? &*t : nullptr; }

struct Arguments {
  const char* op;

  // A tensor of this dtype and shape with memory on the CPU; an absent one passes.
  template <class T>
  void tensor(const char* name, const T& argument, at::ScalarType dtype, at::IntArrayRef shape) const {
    const at::Tensor* t = present(argument);
    if (!t) return;
    TORCH_CHECK_VALUE(t->defined() && t->device().is_cpu() && t->layout() == at::kStrided && !t->_is_zerotensor() &&
                          !t->is_neg() && !t->is_conj(),
                      op, ": ", name, " must be an ordinary tensor on the CPU");
    TORCH_CHECK_VALUE(t->scalar_type() == dtype, op, ": ", name, " is ", t->scalar_type(), ", it must be ", dtype);
    TORCH_CHECK_VALUE(t->sizes() == shape, op, ": ", name, " has shape ", t->sizes(), ", it must have ", shape);
  }

  // The same, without gaps and in the order of its dimensions.
  template <class T>
  void contiguous(const char* name, const T& argument, at::ScalarType dtype, at::IntArrayRef shape) const {
    tensor(name, argument, dtype, shape);
    const at::Tensor* t = present(argument);
    TORCH_CHECK_VALUE(!t || t->is_contiguous(), op, ": ", name, " must be contiguous, its strides are ", t->strides());
  }

  // Of the dtype, shape and place in memory of x.
  template <class T>
  void like(const char* name, const T& argument, const at::Tensor& x) const {
    tensor(name, argument, x.scalar_type(), x.sizes());
    const at::Tensor* t = present(argument);
    for (int64_t i = 0; t && i < x.dim(); ++i)
      TORCH_CHECK_VALUE(x.size(i) < 2 || t->stride(i) == x.stride(i), op, ": ", name, " has strides ", t->strides(),
                        ", it must have those of its primal, ", x.strides());
  }

  void dimensions(const char* name, const at::Tensor& t, int64_t dimensions) const {
    TORCH_CHECK_VALUE(t.defined() && t.dim() == dimensions, op, ": ", name, " must have ", dimensions,
                      " dimensions, it has shape ", t.sizes());
  }

  void holds(bool condition, const char* rule) const { TORCH_CHECK_VALUE(condition, op, ": ", rule); }
};

}  // namespace mmf

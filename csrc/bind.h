// How a kernel becomes a Python function. Tensors arrive as addresses, so that nothing here links to
// PyTorch; cmai_fast/ops has checked shapes, dtypes and layout before. `Tail` holds the further arguments of a backend.
#pragma once

#include <pybind11/pybind11.h>

#include "step.h"

namespace cmai_fast {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Arguments are positional: naming seventeen of them costs more than a step on a small image.
template <class... Tail>
void define_pgd_step(pybind11::module_& module, const char* name, void (*kernel)(const PgdStep&, Tail...)) {
  module.def(
      name,
      [kernel](const Layout& layout, Address adv, Address grad, Address clean, Address eps, Address step,
               Address active, Address model_input, Address velocity, Address nonfinite, Address mean, Address std,
               float decay, Tail... tail) {
        kernel({layout, at<float>(adv), at<const void>(grad), at<const void>(clean), at<const float>(eps),
                at<const float>(step), at<const bool>(active), at<void>(model_input), at<float>(velocity),
                at<int64_t>(nonfinite), at<const float>(mean), at<const float>(std), decay},
               tail...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

template <class... Tail>
void define_apgd_step(pybind11::module_& module, const char* name, void (*kernel)(const ApgdStep&, Tail...)) {
  module.def(
      name,
      [kernel](const Layout& layout, Address adv, Address previous, Address grad, Address top_adv, Address top_grad,
               Address clean, Address eps, Address step, Address improved, Address restart, Address model_input,
               Address nonfinite, Address mean, Address std, double momentum, Tail... tail) {
        kernel(
            {layout, at<float>(adv), at<float>(previous), at<const void>(grad), at<float>(top_adv), at<void>(top_grad),
             at<const void>(clean), at<const float>(eps), at<const float>(step), at<const bool>(improved),
             at<const bool>(restart), at<void>(model_input), at<int64_t>(nonfinite), at<const float>(mean),
             at<const float>(std), static_cast<float>(momentum), static_cast<float>(1 - momentum)},
            tail...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

template <class... Tail>
void define_random_start(pybind11::module_& module, const char* name, void (*kernel)(const RandomStart&, Tail...)) {
  module.def(
      name,
      [kernel](const Layout& layout, Address adv, Address clean, Address eps, Address sample_ids, int64_t seed,
               Tail... tail) {
        kernel(
            {layout, at<float>(adv), at<const void>(clean), at<const float>(eps), at<const int64_t>(sample_ids), seed},
            tail...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

template <class... Tail>
void define_gated_activation(pybind11::module_& module, const char* name,
                             void (*kernel)(const GatedActivation&, void*, Tail...)) {
  module.def(
      name,
      [kernel](const Layout& layout, float rate, Address x, Address other, Address out, Tail... tail) {
        kernel({layout, rate, at<const void>(x), at<const void>(other)}, at<void>(out), tail...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

template <class... Tail>
void define_gated_activation_backward(pybind11::module_& module, const char* name,
                                      void (*kernel)(const GatedActivation&, const void*, void*, void*, Tail...)) {
  module.def(
      name,
      [kernel](const Layout& layout, float rate, Address x, Address other, Address grad, Address grad_x,
               Address grad_other, Tail... tail) {
        kernel({layout, rate, at<const void>(x), at<const void>(other)}, at<const void>(grad), at<void>(grad_x),
               at<void>(grad_other), tail...);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace cmai_fast

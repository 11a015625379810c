// The Python face of the compiled extension. Tensors arrive as addresses, so nothing here links to PyTorch and one
// binary serves every version of it; cmai_fast/ops/cpu.py has checked shapes, dtypes and layout before.
#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;

namespace {

using namespace cmai_fast;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Arguments are positional: naming seventeen of them costs more than a step on a small image.
template <void (*Kernel)(const PgdStep&, int)>
void define_pgd_step(py::module_& module, const char* name) {
  module.def(
      name,
      [](const Layout& layout, Address adv, Address grad, Address clean, Address eps, Address step, Address active,
         Address model_input, Address velocity, Address nonfinite, Address mean, Address std, float decay,
         int threads) {
        Kernel({layout, at<float>(adv), at<const void>(grad), at<const void>(clean), at<const float>(eps),
                at<const float>(step), at<const bool>(active), at<void>(model_input), at<float>(velocity),
                at<int64_t>(nonfinite), at<const float>(mean), at<const float>(std), decay},
               threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

template <void (*Kernel)(const ApgdStep&, int)>
void define_apgd_step(py::module_& module, const char* name) {
  module.def(
      name,
      [](const Layout& layout, Address adv, Address previous, Address grad, Address top_adv, Address top_grad,
         Address clean, Address eps, Address step, Address improved, Address restart, Address model_input,
         Address nonfinite, Address mean, Address std, double momentum, int threads) {
        Kernel({layout, at<float>(adv), at<float>(previous), at<const void>(grad), at<float>(top_adv),
                at<void>(top_grad), at<const void>(clean), at<const float>(eps), at<const float>(step),
                at<const bool>(improved), at<const bool>(restart), at<void>(model_input), at<int64_t>(nonfinite),
                at<const float>(mean), at<const float>(std), static_cast<float>(momentum),
                static_cast<float>(1 - momentum)},
               threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

template <void (*Kernel)(const RandomStart&, int)>
void define_random_start(py::module_& module, const char* name) {
  module.def(
      name,
      [](const Layout& layout, Address adv, Address clean, Address eps, Address sample_ids, int64_t seed,
         int threads) {
        Kernel({layout, at<float>(adv), at<const void>(clean), at<const float>(eps), at<const int64_t>(sample_ids),
                seed},
               threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::class_<Layout>(module, "Layout")
      .def(py::init([](int64_t rows, int64_t patches, int64_t channels, int64_t inner, int grad, int clean,
                       int model_input, float lower, float upper) {
             return Layout{rows,
                           patches,
                           channels,
                           inner,
                           static_cast<Type>(grad),
                           static_cast<Type>(clean),
                           static_cast<Type>(model_input),
                           lower,
                           upper};
           }),
           py::kw_only(), py::arg("rows"), py::arg("patches"), py::arg("channels"), py::arg("inner"), py::arg("grad"),
           py::arg("clean"), py::arg("model_input"), py::arg("lower"), py::arg("upper"));
  define_pgd_step<pgd_linf_step>(module, "pgd_linf_step");
  define_pgd_step<pgd_l2_step>(module, "pgd_l2_step");
  define_apgd_step<apgd_linf_step>(module, "apgd_linf_step");
  define_apgd_step<apgd_l2_step>(module, "apgd_l2_step");
  define_random_start<random_start_linf>(module, "random_start_linf");
  define_random_start<random_start_l2>(module, "random_start_l2");
}

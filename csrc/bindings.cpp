// The Python face of the compiled extension. Tensors arrive as addresses, so nothing here links to PyTorch and one
// binary serves every version of it; cmai_fast/ops/cpu.py has checked shapes, dtypes and layout before.
#include <pybind11/pybind11.h>

#include "pgd_step.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <void (*Kernel)(const cmai_fast::PgdStep&)>
void define_pgd_step(py::module_& module, const char* name) {
  module.def(
      name,
      [](Address adv, Address grad, bool grad_is_bf16, Address clean, Address eps, Address step, Address active,
         Address model_input, bool model_input_is_bf16, Address mean, Address std, int64_t rows, int64_t channels,
         int64_t inner, float lower, float upper, int threads) {
        Kernel({at<float>(adv),
                {at<const void>(grad), grad_is_bf16},
                at<const float>(clean),
                at<const float>(eps),
                at<const float>(step),
                at<const bool>(active),
                {at<void>(model_input), model_input_is_bf16},
                at<const float>(mean),
                at<const float>(std),
                rows,
                channels,
                inner,
                lower,
                upper,
                threads});
      },
      py::kw_only(), py::arg("adv"), py::arg("grad"), py::arg("grad_is_bf16"), py::arg("clean"), py::arg("eps"),
      py::arg("step"), py::arg("active"), py::arg("model_input"), py::arg("model_input_is_bf16"), py::arg("mean"),
      py::arg("std"), py::arg("rows"), py::arg("channels"), py::arg("inner"), py::arg("lower"), py::arg("upper"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  define_pgd_step<cmai_fast::pgd_linf_step>(module, "pgd_linf_step");
  define_pgd_step<cmai_fast::pgd_l2_step>(module, "pgd_l2_step");
}

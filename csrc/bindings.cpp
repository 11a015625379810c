// Python bindings of the compiled extension; one binary works with every version of PyTorch.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "kernels.h"

namespace py = pybind11;
using namespace cmai_fast;

namespace cmai_fast::cuda {
void define(py::module_& module);
}

namespace {

// Build settings and compiler versions, for `cmai-fast info`.
py::dict build() {
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["flags"] = CMAI_FAST_FLAGS;
#ifdef _OPENMP
  facts["openmp"] = "yes";
#else
  facts["openmp"] = "no: one thread";
#endif
  facts["cuda"] = CMAI_FAST_CUDA;
#ifdef CMAI_FAST_WITH_CUDA
  facts["cuda architectures"] = CMAI_FAST_CUDA_ARCHS;
  facts["cuda flags"] = CMAI_FAST_CUDA_FLAGS;
#endif
  return facts;
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
  define_pgd_step(module, "pgd_linf_step", pgd_linf_step);
  define_pgd_step(module, "pgd_l2_step", pgd_l2_step);
  define_apgd_step(module, "apgd_linf_step", apgd_linf_step);
  define_apgd_step(module, "apgd_l2_step", apgd_l2_step);
  define_random_start(module, "random_start_linf", random_start_linf);
  define_random_start(module, "random_start_l2", random_start_l2);
  define_gated_activation(module, "gated_activation", gated_activation);
  define_gated_activation_backward(module, "gated_activation_backward", gated_activation_backward);
  module.attr("BUILD") = build();
#ifdef CMAI_FAST_WITH_CUDA
  cuda::define(module);
#endif
}

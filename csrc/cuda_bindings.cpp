// Python bindings of the CUDA kernels, functions `cuda_*`; in a file without kernels, since pybind11 slows nvcc down.
#include "bind.h"
#include "cuda_kernels.h"

namespace cmai_fast::cuda {

void define(pybind11::module_& module) {
  define_pgd_step(module, "cuda_pgd_linf_step", pgd_linf_step);
  define_pgd_step(module, "cuda_pgd_l2_step", pgd_l2_step);
  define_apgd_step(module, "cuda_apgd_linf_step", apgd_linf_step);
  define_apgd_step(module, "cuda_apgd_l2_step", apgd_l2_step);
  define_random_start(module, "cuda_random_start_linf", random_start_linf);
  define_random_start(module, "cuda_random_start_l2", random_start_l2);
  define_gated_activation(module, "cuda_gated_activation", gated_activation);
  define_gated_activation_backward(module, "cuda_gated_activation_backward", gated_activation_backward);
  module.def("cuda_scratch_size", scratch_size);
  module.def("cuda_carries", carries);
  module.def("cuda_no_device", no_device);
}

}  // namespace cmai_fast::cuda

// The CUDA kernels as a module of their own, compiled for the host.
#include "cuda_bindings.cpp"
#include "cuda_device.h"

PYBIND11_MODULE(emulated, module) {
  cmai_fast::cuda::define(module);
  module.def("quotient", [](uint32_t n, uint32_t divisor) { return cmai_fast::cuda::Divider(divisor).quotient(n); });
  module.def("pixel_value", cmai_fast::cuda::pixel_value);
  module.attr("TILE") = cmai_fast::cuda::kTile;
}

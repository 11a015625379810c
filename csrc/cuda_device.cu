// Queries of the CUDA runtime, and checks of a batch before the launch.
#include <stdexcept>

#include "cuda_device.h"

namespace cmai_fast::cuda {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // cleared, so that the next call does not report it again
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

std::string no_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  cudaGetLastError();
  return error == cudaSuccess ? "no CUDA-capable device is detected" : cudaGetErrorString(error);
}

int64_t scratch_size(const Layout& layout) {
  const Grid grid(layout);
  return 3 * grid.tiles() + 2 * grid.rows;
}

bool carries(const Layout& layout) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  const int64_t per_row = (layout.row_size() + kTile - 1) / kTile;
  const bool one_channel = layout.channels == 1 && layout.patches == 1;
  return per_row <= kMost && layout.rows <= kMost / per_row &&
         (one_channel || layout.channels * layout.inner <= kMost - kTile);
}

}  // namespace cmai_fast::cuda

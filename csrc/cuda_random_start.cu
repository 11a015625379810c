// A random point of the ball, on a GPU: every element's bits come from its place in the sample alone.
#include "cuda_device.h"

namespace cmai_fast::cuda {
namespace {

__device__ inline uint64_t bits_of(uint64_t start, int64_t element) {
  return mix(start + static_cast<uint64_t>(element + 1) * kGolden);
}

// cospif reduces its argument exactly and without the table in local memory that cosf needs for large ones.
__device__ inline float gaussian(uint64_t bits) {
  return sqrtf(-2 * logf(upper_uniform(bits))) * cospif(2 * lower_uniform(bits));
}

template <class A>
__global__ void __launch_bounds__(kThreads) linf_start(RandomStart args, Grid grid) {
  const Tile tile(grid);
  Raw raw;
  float values[kEach];
  load<A>(args.clean, args.layout.clean, tile, raw);
  const float eps = args.eps[tile.row];
  const uint64_t start = start_of_sample(args.seed, args.sample_ids[tile.row]);
  widen<A>(raw, args.layout.clean, values);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t element = tile.start + A::position(i / A::kSpan) + i % A::kSpan;
    values[i] =
        clamp(values[i] + symmetric_uniform(bits_of(start, element)) * eps, args.layout.lower, args.layout.upper);
  }
  store<A>(args.adv, tile, values);
}

__global__ void __launch_bounds__(kThreads) squared_sums(RandomStart args, Grid grid, double* of_tiles) {
  const Tile tile(grid);
  const uint64_t start = start_of_sample(args.seed, args.sample_ids[tile.row]);
  double squared[1] = {0};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int position = Narrow::position(i);
    const double noise = gaussian(bits_of(start, tile.start + position));
    if (position < tile.count) squared[0] += noise * noise;
  }
  store_sums(of_tiles, squared);
}

struct BallFactor {
  const float* eps;
  const int64_t* sample_ids;
  int64_t seed, row_size;
  double* factors;
  __device__ void operator()(const double (&sums)[1], int64_t row) const {
    const uint64_t own = bits_of(start_of_sample(seed, sample_ids[row]), row_size);
    factors[row] = ball_factor(sums[0], own, row_size, eps[row]);
  }
};

// The noise is computed again: storing and loading it would take as long.
template <class A>
__global__ void __launch_bounds__(kThreads) l2_start(RandomStart args, Grid grid, const double* factors) {
  const Tile tile(grid);
  Raw raw;
  float values[kEach];
  load<A>(args.clean, args.layout.clean, tile, raw);
  const float factor = static_cast<float>(factors[tile.row]);
  const uint64_t start = start_of_sample(args.seed, args.sample_ids[tile.row]);
  widen<A>(raw, args.layout.clean, values);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t element = tile.start + A::position(i / A::kSpan) + i % A::kSpan;
    values[i] = clamp(values[i] + gaussian(bits_of(start, element)) * factor, args.layout.lower, args.layout.upper);
  }
  store<A>(args.adv, tile, values);
}

bool aligned(const RandomStart& args, const Grid& grid) {
  return aligned(grid, Tensor{args.adv, Type::kFloat32}, Tensor{args.clean, args.layout.clean});
}

}  // namespace

void random_start_linf(const RandomStart& args, Address, int device, Address stream) {
  const OnDevice current(device);
  const Grid grid(args.layout);
  launch(aligned(args, grid) ? linf_start<Wide> : linf_start<Narrow>, grid.tiles(), stream, args, grid);
}

void random_start_l2(const RandomStart& args, Address memory, int device, Address stream) {
  const OnDevice current(device);
  const Grid grid(args.layout);
  const Scratch scratch(memory, grid);
  launch(squared_sums, grid.tiles(), stream, args, grid, scratch.of_tiles);
  launch(finish_rows<1, BallFactor>, grid.rows, stream, scratch.of_tiles, grid.per_row,
         BallFactor{args.eps, args.sample_ids, args.seed, grid.row_size, scratch.of_rows});
  launch(aligned(args, grid) ? l2_start<Wide> : l2_start<Narrow>, grid.tiles(), stream, args, grid, scratch.of_rows);
}

}  // namespace cmai_fast::cuda

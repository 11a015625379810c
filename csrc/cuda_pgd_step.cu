// One step of projected gradient ascent on a batch of images, on a GPU.
#include "cuda_device.h"

namespace cmai_fast::cuda {
namespace {

constexpr Type kFloat = Type::kFloat32;

template <class A>
__global__ void __launch_bounds__(kThreads) l1_sums(PgdStep args, Grid grid, Channels channels, double* of_tiles) {
  const Tile tile(grid);
  if (args.active != nullptr && !args.active[tile.row]) return;
  Raw raw;
  float grad[kEach];
  load<A>(args.grad, args.layout.grad, tile, raw);
  widen<A>(raw, args.layout.grad, grad);
  count_nonfinite(args.nonfinite, tile.row, grad);
  to_pixels<A>(channels, tile, grad);
  double sum[1] = {0};
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum[0] += fabs(static_cast<double>(grad[i]));
  store_sums(of_tiles, sum);
}

struct InverseNorm {
  double* factors;
  __device__ void operator()(const double (&sums)[1], int64_t row) const { factors[row] = inverse_norm(sums[0]); }
};

// The new velocity: decay * velocity + factor * gradient. A factor of 0 stands for a gradient that may hold infinities.
__device__ inline void accumulate(const float (&velocity)[kEach], float (&grad)[kEach], float decay, double factor) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    grad[i] = decay * velocity[i] + (factor == 0 ? 0.0f : static_cast<float>(factor * grad[i]));
  }
}

template <class A, bool kMomentum>
__global__ void __launch_bounds__(kThreads)
    linf_step(PgdStep args, Grid grid, Channels channels, const double* factors) {
  const Tile tile(grid);
  if (args.active != nullptr && !args.active[tile.row]) return;
  const Layout& layout = args.layout;
  Raw adv_raw, grad_raw, clean_raw, velocity_raw;
  load<A>(args.grad, layout.grad, tile, grad_raw);
  load<A>(args.adv, kFloat, tile, adv_raw);
  load<A>(args.clean, layout.clean, tile, clean_raw);
  if (kMomentum) load<A>(args.velocity, kFloat, tile, velocity_raw);
  const float eps = args.eps[tile.row], step = args.step[tile.row];

  float adv[kEach], grad[kEach], clean[kEach];
  widen<A>(grad_raw, layout.grad, grad);
  if (kMomentum) {
    float velocity[kEach];
    to_pixels<A>(channels, tile, grad);
    widen<A>(velocity_raw, kFloat, velocity);
    accumulate(velocity, grad, args.decay, factors[tile.row]);
    store<A>(args.velocity, tile, grad);
  } else {
    count_nonfinite(args.nonfinite, tile.row, grad);
  }
  widen<A>(adv_raw, kFloat, adv);
  widen<A>(clean_raw, layout.clean, clean);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    adv[i] = clamp(clamp(adv[i] + step * sign(grad[i]), clean[i] - eps, clean[i] + eps), layout.lower, layout.upper);
  }
  store<A>(args.adv, tile, adv);
  store_model_input<A>(args.model_input, layout.model_input, channels, tile, adv);
}

template <class A, bool kMomentum>
__global__ void __launch_bounds__(kThreads)
    l2_sums(PgdStep args, Grid grid, Channels channels, const double* factors, double* of_tiles) {
  const Tile tile(grid);
  if (args.active != nullptr && !args.active[tile.row]) return;
  const Layout& layout = args.layout;
  Raw adv_raw, grad_raw, clean_raw, velocity_raw;
  load<A>(args.grad, layout.grad, tile, grad_raw);
  load<A>(args.adv, kFloat, tile, adv_raw);
  load<A>(args.clean, layout.clean, tile, clean_raw);
  if (kMomentum) load<A>(args.velocity, kFloat, tile, velocity_raw);

  float adv[kEach], grad[kEach], clean[kEach];
  widen<A>(grad_raw, layout.grad, grad);
  if (!kMomentum) count_nonfinite(args.nonfinite, tile.row, grad);
  to_pixels<A>(channels, tile, grad);
  if (kMomentum) {
    float velocity[kEach];
    widen<A>(velocity_raw, kFloat, velocity);
    accumulate(velocity, grad, args.decay, factors[tile.row]);
    store<A>(args.velocity, tile, grad);
  }
  widen<A>(adv_raw, kFloat, adv);
  widen<A>(clean_raw, layout.clean, clean);
  double sums[3] = {0, 0, 0};
#pragma unroll
  for (int i = 0; i < kEach; ++i) add_to(sums, adv[i], grad[i], clean[i]);
  store_sums(of_tiles, sums);
}

template <class A>
__global__ void __launch_bounds__(kThreads) l2_step(PgdStep args, Grid grid, Channels channels, const Move* moves) {
  const Tile tile(grid);
  if (args.active != nullptr && !args.active[tile.row]) return;
  const Layout& layout = args.layout;
  const bool momentum = args.velocity != nullptr;
  const Type grad_type = momentum ? kFloat : layout.grad;
  Raw adv_raw, grad_raw, clean_raw;
  load<A>(momentum ? args.velocity : args.grad, grad_type, tile, grad_raw);
  load<A>(args.adv, kFloat, tile, adv_raw);
  load<A>(args.clean, layout.clean, tile, clean_raw);
  const Move move = moves[tile.row];

  float adv[kEach], grad[kEach], clean[kEach];
  widen<A>(grad_raw, grad_type, grad);
  if (!momentum) to_pixels<A>(channels, tile, grad);
  widen<A>(adv_raw, kFloat, adv);
  widen<A>(clean_raw, layout.clean, clean);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    adv[i] = clamp(moved(adv[i], grad[i], clean[i], move), layout.lower, layout.upper);
  }
  store<A>(args.adv, tile, adv);
  store_model_input<A>(args.model_input, layout.model_input, channels, tile, adv);
}

bool aligned(const PgdStep& args, const Grid& grid) {
  const Layout& layout = args.layout;
  return aligned(grid, Tensor{args.adv, kFloat}, Tensor{args.grad, layout.grad}, Tensor{args.clean, layout.clean},
                 Tensor{args.velocity, kFloat}, Tensor{args.model_input, layout.model_input});
}

void sum_l1(const PgdStep& args, const Grid& grid, const Channels& channels, const Scratch& scratch, bool wide,
            Address stream) {
  launch(wide ? l1_sums<Wide> : l1_sums<Spread>, grid.tiles(), stream, args, grid, channels, scratch.of_tiles);
  launch(finish_rows<1, InverseNorm>, grid.rows, stream, scratch.of_tiles, grid.per_row, InverseNorm{scratch.of_rows});
}

}  // namespace

void pgd_linf_step(const PgdStep& args, Address memory, int device, Address stream) {
  const OnDevice current(device);
  const Grid grid(args.layout);
  const Channels channels(args.layout, args.mean, args.std);
  const Scratch scratch(memory, grid);
  const bool wide = aligned(args, grid);
  if (args.velocity == nullptr) {
    launch(wide ? linf_step<Wide, false> : linf_step<Narrow, false>, grid.tiles(), stream, args, grid, channels,
           nullptr);
    return;
  }
  sum_l1(args, grid, channels, scratch, wide, stream);
  launch(wide ? linf_step<Wide, true> : linf_step<Narrow, true>, grid.tiles(), stream, args, grid, channels,
         scratch.of_rows);
}

void pgd_l2_step(const PgdStep& args, Address memory, int device, Address stream) {
  const OnDevice current(device);
  const Grid grid(args.layout);
  const Channels channels(args.layout, args.mean, args.std);
  const Scratch scratch(memory, grid);
  const bool wide = aligned(args, grid);
  if (args.velocity == nullptr) {
    launch(wide ? l2_sums<Wide, false> : l2_sums<Spread, false>, grid.tiles(), stream, args, grid, channels, nullptr,
           scratch.of_tiles);
  } else {
    sum_l1(args, grid, channels, scratch, wide, stream);
    launch(wide ? l2_sums<Wide, true> : l2_sums<Spread, true>, grid.tiles(), stream, args, grid, channels,
           scratch.of_rows, scratch.of_tiles);
  }
  launch(finish_rows<3, PlanMove>, grid.rows, stream, scratch.of_tiles, grid.per_row,
         PlanMove{args.eps, args.step, scratch.moves()});
  launch(wide ? l2_step<Wide> : l2_step<Narrow>, grid.tiles(), stream, args, grid, channels, scratch.moves());
}

}  // namespace cmai_fast::cuda

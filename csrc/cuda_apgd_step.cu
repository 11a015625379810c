// One step of Auto-PGD (Croce and Hein, 2020, algorithm 1) on a GPU, with the bookkeeping of the best point.
#include "cuda_device.h"

namespace cmai_fast::cuda {
namespace {

constexpr Type kFloat = Type::kFloat32;

// Loads the point and the gradient that the step starts from, which for a row that restarts are the best ones.
template <class A>
__device__ inline void load_base(const ApgdStep& args, const Tile& tile, Raw& adv, Raw& grad) {
  const bool back = args.restart[tile.row] && !args.improved[tile.row];
  load<A>(back ? args.top_adv : args.adv, kFloat, tile, adv);
  load<A>(back ? args.top_grad : args.grad, args.layout.grad, tile, grad);
}

// Updates the stored point and gradient; counts the non-finite elements of the gradient at the point before.
template <class A>
__device__ inline void update_best(const ApgdStep& args, const Tile& tile, const Raw& adv, const Raw& grad,
                                  const float (&grad_values)[kEach]) {
  const bool improved = args.improved[tile.row], back = args.restart[tile.row] && !improved;
  if (improved) {
    store_words<A, 4>(args.top_adv, tile, adv);
    if (args.layout.grad == kFloat) {
      store_words<A, 4>(args.top_grad, tile, grad);
    } else {
      store_words<A, 2>(args.top_grad, tile, grad);
    }
  }
  if (!back) return count_nonfinite(args.nonfinite, tile.row, grad_values);
  store_words<A, 4>(args.adv, tile, adv);
  if (args.nonfinite == nullptr) return;
  Raw raw;
  float left[kEach];
  load<A>(args.grad, args.layout.grad, tile, raw);
  widen<A>(raw, args.layout.grad, left);
  count_nonfinite(args.nonfinite, tile.row, left);
}

__device__ inline float mix_in(const ApgdStep& args, float x, float stepped, float previous) {
  return x + args.momentum * (stepped - x) + args.carry * (x - previous);
}

template <class A>
__global__ void __launch_bounds__(kThreads) linf_step(ApgdStep args, Grid grid, Channels channels) {
  const Tile tile(grid);
  const Layout& layout = args.layout;
  Raw adv_raw, grad_raw, clean_raw, previous_raw;
  load_base<A>(args, tile, adv_raw, grad_raw);
  load<A>(args.clean, layout.clean, tile, clean_raw);
  load<A>(args.previous, kFloat, tile, previous_raw);
  const float eps = args.eps[tile.row], step = args.step[tile.row];

  float adv[kEach], grad[kEach], clean[kEach], next[kEach];
  widen<A>(grad_raw, layout.grad, grad);
  update_best<A>(args, tile, adv_raw, grad_raw, grad);
  widen<A>(adv_raw, kFloat, adv);
  widen<A>(clean_raw, layout.clean, clean);
  widen<A>(previous_raw, kFloat, next);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float low = clean[i] - eps, high = clean[i] + eps;
    const float stepped = clamp(clamp(adv[i] + step * sign(grad[i]), low, high), layout.lower, layout.upper);
    next[i] = clamp(clamp(mix_in(args, adv[i], stepped, next[i]), low, high), layout.lower, layout.upper);
  }
  store<A>(args.previous, tile, next);
  store_model_input<A>(args.model_input, layout.model_input, channels, tile, next);
}

template <class A>
__global__ void __launch_bounds__(kThreads) l2_sums(ApgdStep args, Grid grid, Channels channels, double* of_tiles) {
  const Tile tile(grid);
  const Layout& layout = args.layout;
  Raw adv_raw, grad_raw, clean_raw;
  load_base<A>(args, tile, adv_raw, grad_raw);
  load<A>(args.clean, layout.clean, tile, clean_raw);

  float adv[kEach], grad[kEach], clean[kEach];
  widen<A>(grad_raw, layout.grad, grad);
  update_best<A>(args, tile, adv_raw, grad_raw, grad);
  to_pixels<A>(channels, tile, grad);
  widen<A>(adv_raw, kFloat, adv);
  widen<A>(clean_raw, layout.clean, clean);
  double sums[3] = {0, 0, 0};
#pragma unroll
  for (int i = 0; i < kEach; ++i) add_to(sums, adv[i], grad[i], clean[i]);
  store_sums(of_tiles, sums);
}

// The point before its projection, written to `previous`, and its squared distance from `clean`. Limited to four blocks
// per multiprocessor: without the limit, nvcc 13.0 spills registers on sm_100 to fit five.
template <class A>
__global__ void __launch_bounds__(kThreads, A::kWide ? 4 : 3)
    l2_mix(ApgdStep args, Grid grid, Channels channels, const Move* moves, double* of_tiles) {
  const Tile tile(grid);
  const Layout& layout = args.layout;
  Raw adv_raw, grad_raw, clean_raw, previous_raw;
  load<A>(args.adv, kFloat, tile, adv_raw);
  load<A>(args.restart[tile.row] ? args.top_grad : args.grad, layout.grad, tile, grad_raw);
  load<A>(args.clean, layout.clean, tile, clean_raw);
  load<A>(args.previous, kFloat, tile, previous_raw);
  const Move move = moves[tile.row];

  float adv[kEach], grad[kEach], clean[kEach], next[kEach];
  widen<A>(grad_raw, layout.grad, grad);
  to_pixels<A>(channels, tile, grad);
  widen<A>(adv_raw, kFloat, adv);
  widen<A>(clean_raw, layout.clean, clean);
  widen<A>(previous_raw, kFloat, next);
  double squared[1] = {0};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float stepped = clamp(moved(adv[i], grad[i], clean[i], move), layout.lower, layout.upper);
    next[i] = mix_in(args, adv[i], stepped, next[i]);
    const double far = static_cast<double>(next[i]) - clean[i];
    if (A::position(i / A::kSpan) + i % A::kSpan < tile.count) squared[0] += far * far;
  }
  store<A>(args.previous, tile, next);
  store_sums(of_tiles, squared);
}

struct Shrink {
  const float* eps;
  double* shrinks;
  __device__ void operator()(const double (&sums)[1], int64_t row) const {
    shrinks[row] = shrink_to(sums[0], eps[row]);
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads)
    l2_project(ApgdStep args, Grid grid, Channels channels, const double* shrinks) {
  const Tile tile(grid);
  const Layout& layout = args.layout;
  Raw next_raw, clean_raw;
  load<A>(args.previous, kFloat, tile, next_raw);
  load<A>(args.clean, layout.clean, tile, clean_raw);
  const Move move = {0, shrinks[tile.row]};

  float next[kEach], clean[kEach];
  widen<A>(next_raw, kFloat, next);
  widen<A>(clean_raw, layout.clean, clean);
#pragma unroll
  for (int i = 0; i < kEach; ++i) next[i] = clamp(moved(next[i], 0, clean[i], move), layout.lower, layout.upper);
  store<A>(args.previous, tile, next);
  store_model_input<A>(args.model_input, layout.model_input, channels, tile, next);
}

bool aligned(const ApgdStep& args, const Grid& grid) {
  const Layout& layout = args.layout;
  return aligned(grid, Tensor{args.adv, kFloat}, Tensor{args.previous, kFloat}, Tensor{args.grad, layout.grad},
                 Tensor{args.top_adv, kFloat}, Tensor{args.top_grad, layout.grad}, Tensor{args.clean, layout.clean},
                 Tensor{args.model_input, layout.model_input});
}

}  // namespace

void apgd_linf_step(const ApgdStep& args, Address, int device, Address stream) {
  const OnDevice current(device);
  const Grid grid(args.layout);
  const Channels channels(args.layout, args.mean, args.std);
  launch(aligned(args, grid) ? linf_step<Wide> : linf_step<Narrow>, grid.tiles(), stream, args, grid, channels);
}

void apgd_l2_step(const ApgdStep& args, Address memory, int device, Address stream) {
  const OnDevice current(device);
  const Grid grid(args.layout);
  const Channels channels(args.layout, args.mean, args.std);
  const Scratch scratch(memory, grid);
  const bool wide = aligned(args, grid);
  launch(wide ? l2_sums<Wide> : l2_sums<Spread>, grid.tiles(), stream, args, grid, channels, scratch.of_tiles);
  launch(finish_rows<3, PlanMove>, grid.rows, stream, scratch.of_tiles, grid.per_row,
         PlanMove{args.eps, args.step, scratch.moves()});
  launch(wide ? l2_mix<Wide> : l2_mix<Spread>, grid.tiles(), stream, args, grid, channels, scratch.moves(),
         scratch.of_tiles);
  launch(finish_rows<1, Shrink>, grid.rows, stream, scratch.of_tiles, grid.per_row, Shrink{args.eps, scratch.of_rows});
  launch(wide ? l2_project<Wide> : l2_project<Narrow>, grid.tiles(), stream, args, grid, channels, scratch.of_rows);
}

}  // namespace cmai_fast::cuda

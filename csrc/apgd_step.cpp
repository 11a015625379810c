// One step of Auto-PGD (Croce and Hein, 2020, algorithm 1): the bookkeeping of the best point, the step, the momentum.
#include <cstring>
#include <vector>

#include "blocks.h"
#include "kernels.h"

namespace cmai_fast {
namespace {

// Where the step starts: the point and its gradient, which for a row that restarts are the best ones.
struct Base {
  const float* adv;
  const void* grad;
};

Base update_best(const ApgdStep& args, const Block& block) {
  const size_t image_bytes = block.count * sizeof(float);
  const size_t element = args.layout.grad == Type::kFloat32 ? 4 : 2, grad_bytes = block.count * element;
  float *adv = args.adv + block.offset, *top_adv = args.top_adv + block.offset;
  char* top_grad = static_cast<char*>(args.top_grad) + block.offset * element;
  if (args.improved[block.row]) {
    std::memcpy(top_adv, adv, image_bytes);
    std::memcpy(top_grad, static_cast<const char*>(args.grad) + block.offset * element, grad_bytes);
  }
  if (!args.restart[block.row]) return {adv, args.grad};
  if (!args.improved[block.row]) std::memcpy(adv, top_adv, image_bytes);
  return {adv, args.top_grad};
}

CMAI_FAST_CLONES void linf_block(const float* adv, float* previous, const float* grad, const float* clean,
                                 int64_t count, float eps, float step, float momentum, float carry, float lower,
                                 float upper) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = adv[i], low = clean[i] - eps, high = clean[i] + eps;
    const float stepped = clamp(clamp(x + step * sign(grad[i]), low, high), lower, upper);
    const float mixed = x + momentum * (stepped - x) + carry * (x - previous[i]);
    previous[i] = clamp(clamp(mixed, low, high), lower, upper);
  }
}

// The point before its projection, written to `previous`; returns its squared distance from `clean`.
CMAI_FAST_CLONES double l2_mix(const float* adv, float* previous, const float* grad, const float* clean, int64_t count,
                               Move move, float momentum, float carry, float lower, float upper) {
  const bool outside = move.shrink < 1;
  double squared = 0;
#pragma omp simd reduction(+ : squared)
  for (int64_t i = 0; i < count; ++i) {
    const float x = adv[i];
    const double delta = static_cast<double>(x) - clean[i] + move.along * grad[i];
    const double on_ball = clean[i] + move.shrink * delta, inside = x + move.along * grad[i];
    const float stepped = clamp(static_cast<float>(outside ? on_ball : inside), lower, upper);
    const float mixed = x + momentum * (stepped - x) + carry * (x - previous[i]);
    const double far = static_cast<double>(mixed) - clean[i];
    previous[i] = mixed;
    squared += far * far;
  }
  return squared;
}

CMAI_FAST_CLONES void l2_project(float* image, const float* clean, int64_t count, double shrink, float lower,
                                 float upper) {
  const bool outside = shrink < 1;
  for (int64_t i = 0; i < count; ++i) {
    const float on_ball = static_cast<float>(clean[i] + shrink * (static_cast<double>(image[i]) - clean[i]));
    image[i] = clamp(outside ? on_ball : image[i], lower, upper);
  }
}

}  // namespace

void apgd_linf_step(const ApgdStep& args, int threads) {
  const Layout& layout = args.layout;
  for_each_block(layout, nullptr, threads, [&](const Block& block) {
    float grad_buffer[kBlock], clean_buffer[kBlock];
    if (args.nonfinite != nullptr && args.restart[block.row]) {
      load_gradient(args.grad, layout.grad, block, args.nonfinite, grad_buffer);
    }
    const Base base = update_best(args, block);
    int64_t* nonfinite = args.restart[block.row] ? nullptr : args.nonfinite;
    const float* grad = load_gradient(base.grad, layout.grad, block, nonfinite, grad_buffer);
    const float* clean = load(args.clean, layout.clean, block, clean_buffer);
    linf_block(base.adv, args.previous + block.offset, grad, clean, block.count, args.eps[block.row],
               args.step[block.row], args.momentum, args.carry, layout.lower, layout.upper);
    write_model_input(layout, args.previous + block.offset, args.mean, args.std, args.model_input, block);
  });
}

void apgd_l2_step(const ApgdStep& args, int threads) {
  const Layout& layout = args.layout;
  const int64_t per_row = blocks_per_row(layout);
  std::vector<Sums> sums(layout.rows * per_row);
  for_each_block(layout, nullptr, threads, [&](const Block& block) {
    float grad[kBlock], clean_buffer[kBlock];
    if (args.nonfinite != nullptr && args.restart[block.row]) {
      load_gradient(args.grad, layout.grad, block, args.nonfinite, grad);
    }
    const Base base = update_best(args, block);
    load_pixel_gradient(layout, base.grad, args.std, block, args.restart[block.row] ? nullptr : args.nonfinite, grad);
    const float* clean = load(args.clean, layout.clean, block, clean_buffer);
    sums[block.index] = l2_sums(base.adv, grad, clean, block.count);
  });

  std::vector<Move> moves(layout.rows);
  for (int64_t row = 0; row < layout.rows; ++row) {
    moves[row] = plan_move(total(&sums[row * per_row], per_row), args.eps[row], args.step[row]);
  }

  for_each_block(layout, nullptr, threads, [&](const Block& block) {
    float grad[kBlock], clean_buffer[kBlock];
    const Move move = moves[block.row];
    if (move.along == 0) {
      std::fill_n(grad, block.count, 0.0f);  // the gradient may hold infinities
    } else {
      const void* from = args.restart[block.row] ? args.top_grad : args.grad;
      load_pixel_gradient(layout, from, args.std, block, nullptr, grad);
    }
    const float* clean = load(args.clean, layout.clean, block, clean_buffer);
    sums[block.index].dd = l2_mix(args.adv + block.offset, args.previous + block.offset, grad, clean, block.count, move,
                                  args.momentum, args.carry, layout.lower, layout.upper);
  });

  std::vector<double> shrinks(layout.rows);
  for (int64_t row = 0; row < layout.rows; ++row) {
    double squared = 0;
    for (int64_t i = 0; i < per_row; ++i) squared += sums[row * per_row + i].dd;
    shrinks[row] = shrink_to(squared, args.eps[row]);
  }

  for_each_block(layout, nullptr, threads, [&](const Block& block) {
    float clean_buffer[kBlock];
    const float* clean = load(args.clean, layout.clean, block, clean_buffer);
    float* next = args.previous + block.offset;
    l2_project(next, clean, block.count, shrinks[block.row], layout.lower, layout.upper);
    write_model_input(layout, next, args.mean, args.std, args.model_input, block);
  });
}

}  // namespace cmai_fast

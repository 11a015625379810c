// One step of projected gradient ascent on a batch of images.
#include <cmath>
#include <vector>

#include "blocks.h"
#include "kernels.h"

namespace cmai_fast {
namespace {

CMAI_FAST_CLONES void linf_block(float* adv, const float* grad, const float* clean, int64_t count, float eps,
                                 float step, float lower, float upper) {
  for (int64_t i = 0; i < count; ++i) {
    adv[i] = clamp(clamp(adv[i] + step * sign(grad[i]), clean[i] - eps, clean[i] + eps), lower, upper);
  }
}

CMAI_FAST_CLONES void l2_block(float* adv, const float* grad, const float* clean, int64_t count, Move move, float lower,
                               float upper) {
  if (move.shrink < 1) {
    for (int64_t i = 0; i < count; ++i) {
      const double delta = static_cast<double>(adv[i]) - clean[i] + move.along * grad[i];
      adv[i] = clamp(static_cast<float>(clean[i] + move.shrink * delta), lower, upper);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) adv[i] = clamp(static_cast<float>(adv[i] + move.along * grad[i]), lower, upper);
  }
}

CMAI_FAST_CLONES double l1_sum(const float* in, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += std::fabs(static_cast<double>(in[i]));
  return sum;
}

CMAI_FAST_CLONES void accumulate(float* velocity, const float* grad, int64_t count, float decay, double factor) {
  for (int64_t i = 0; i < count; ++i) velocity[i] = decay * velocity[i] + static_cast<float>(factor * grad[i]);
}

// velocity = decay * velocity + g / ||g||_1 of the gradient g in pixels, which adds nothing where that norm is 0 or
// infinite.
void update_velocity(const PgdStep& args, int threads) {
  const Layout& layout = args.layout;
  const int64_t per_row = blocks_per_row(layout);
  std::vector<double> sums(layout.rows * per_row);
  for_each_block(layout, args.active, threads, [&](const Block& block) {
    float buffer[kBlock];
    load_pixel_gradient(layout, args.grad, args.std, block, args.nonfinite, buffer);
    sums[block.index] = l1_sum(buffer, block.count);
  });
  std::vector<double> factors(layout.rows);
  for (int64_t row = 0; row < layout.rows; ++row) {
    double norm = 0;
    for (int64_t i = 0; i < per_row; ++i) norm += sums[row * per_row + i];
    factors[row] = inverse_norm(norm);
  }
  for_each_block(layout, args.active, threads, [&](const Block& block) {
    float buffer[kBlock];
    if (factors[block.row] == 0) {
      std::fill_n(buffer, block.count, 0.0f);  // the gradient may hold infinities, and 0 * inf is NaN
    } else {
      load_pixel_gradient(layout, args.grad, args.std, block, nullptr, buffer);
    }
    accumulate(args.velocity + block.offset, buffer, block.count, args.decay, factors[block.row]);
  });
}

}  // namespace

void pgd_linf_step(const PgdStep& args, int threads) {
  const Layout& layout = args.layout;
  if (args.velocity != nullptr) update_velocity(args, threads);
  for_each_block(layout, args.active, threads, [&](const Block& block) {
    float grad_buffer[kBlock], clean_buffer[kBlock];
    // With momentum the bad elements have been counted, and the velocity has none.
    const float* grad = args.velocity != nullptr
                            ? args.velocity + block.offset
                            : load_gradient(args.grad, layout.grad, block, args.nonfinite, grad_buffer);
    const float* clean = load(args.clean, layout.clean, block, clean_buffer);
    linf_block(args.adv + block.offset, grad, clean, block.count, args.eps[block.row], args.step[block.row],
               layout.lower, layout.upper);
    write_model_input(layout, args.adv + block.offset, args.mean, args.std, args.model_input, block);
  });
}

void pgd_l2_step(const PgdStep& args, int threads) {
  const Layout& layout = args.layout;
  if (args.velocity != nullptr) update_velocity(args, threads);
  const auto direction = [&](const Block& block, int64_t* nonfinite, float* buffer) -> const float* {
    if (args.velocity != nullptr) return args.velocity + block.offset;
    load_pixel_gradient(layout, args.grad, args.std, block, nonfinite, buffer);
    return buffer;
  };

  const int64_t per_row = blocks_per_row(layout);
  std::vector<Sums> sums(layout.rows * per_row);
  for_each_block(layout, args.active, threads, [&](const Block& block) {
    float grad_buffer[kBlock], clean_buffer[kBlock];
    const float* grad = direction(block, args.nonfinite, grad_buffer);
    const float* clean = load(args.clean, layout.clean, block, clean_buffer);
    sums[block.index] = l2_sums(args.adv + block.offset, grad, clean, block.count);
  });

  std::vector<Move> moves(layout.rows);
  for (int64_t row = 0; row < layout.rows; ++row) {
    moves[row] = plan_move(total(&sums[row * per_row], per_row), args.eps[row], args.step[row]);
  }

  for_each_block(layout, args.active, threads, [&](const Block& block) {
    float grad_buffer[kBlock], clean_buffer[kBlock];
    const Move move = moves[block.row];
    const float* grad = grad_buffer;
    if (move.along == 0) {
      std::fill_n(grad_buffer, block.count, 0.0f);  // the gradient may hold infinities
    } else {
      grad = direction(block, nullptr, grad_buffer);
    }
    const float* clean = load(args.clean, layout.clean, block, clean_buffer);
    l2_block(args.adv + block.offset, grad, clean, block.count, move, layout.lower, layout.upper);
    write_model_input(layout, args.adv + block.offset, args.mean, args.std, args.model_input, block);
  });
}

}  // namespace cmai_fast

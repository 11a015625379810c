// A random point of the ball: one SplitMix64 sequence (Steele, Lea, Flood 2014) per (seed, sample id).
#include <cmath>
#include <vector>

#include "blocks.h"
#include "kernels.h"

namespace cmai_fast {
namespace {

inline uint64_t start_of(const RandomStart& args, int64_t row) {
  return start_of_sample(args.seed, args.sample_ids[row]);
}

inline float gaussian(uint64_t bits) {
  return std::sqrt(-2 * std::log(upper_uniform(bits))) * std::cos(6.2831853071795865f * lower_uniform(bits));
}

}  // namespace

void random_start_linf(const RandomStart& args, int threads) {
  const Layout& layout = args.layout;
  for_each_block(layout, nullptr, threads, [&](const Block& block) {
    float buffer[kBlock];
    const float* clean = load(args.clean, layout.clean, block, buffer);
    float* adv = args.adv + block.offset;
    const float eps = args.eps[block.row];
    uint64_t counter = start_of(args, block.row) + static_cast<uint64_t>(block.start) * kGolden;
    for (int64_t i = 0; i < block.count; ++i) {
      counter += kGolden;
      adv[i] = clamp(clean[i] + symmetric_uniform(mix(counter)) * eps, layout.lower, layout.upper);
    }
  });
}

void random_start_l2(const RandomStart& args, int threads) {
  const Layout& layout = args.layout;
  const int64_t per_row = blocks_per_row(layout), row_size = layout.row_size();
  std::vector<double> sums(layout.rows * per_row);
  for_each_block(layout, nullptr, threads, [&](const Block& block) {
    float* adv = args.adv + block.offset;
    uint64_t counter = start_of(args, block.row) + static_cast<uint64_t>(block.start) * kGolden;
    double squared = 0;
    for (int64_t i = 0; i < block.count; ++i) {
      counter += kGolden;
      adv[i] = gaussian(mix(counter));
      squared += static_cast<double>(adv[i]) * adv[i];
    }
    sums[block.index] = squared;
  });

  std::vector<float> factors(layout.rows);
  for (int64_t row = 0; row < layout.rows; ++row) {
    double squared = 0;
    for (int64_t i = 0; i < per_row; ++i) squared += sums[row * per_row + i];
    const uint64_t own = mix(start_of(args, row) + static_cast<uint64_t>(row_size + 1) * kGolden);
    factors[row] = ball_factor(squared, own, row_size, args.eps[row]);
  }

  for_each_block(layout, nullptr, threads, [&](const Block& block) {
    float buffer[kBlock];
    const float* clean = load(args.clean, layout.clean, block, buffer);
    float* adv = args.adv + block.offset;
    const float factor = factors[block.row];
    for (int64_t i = 0; i < block.count; ++i) adv[i] = clamp(clean[i] + adv[i] * factor, layout.lower, layout.upper);
  });
}

}  // namespace cmai_fast

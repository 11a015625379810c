// A random point of the ball: one SplitMix64 sequence (Steele, Lea, Flood 2014) per (seed, sample id).
#include <cmath>
#include <vector>

#include "blocks.h"
#include "kernels.h"

namespace cmai_fast {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

inline uint64_t mix(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB;
  return bits ^ (bits >> 31);
}

inline uint64_t start_of(const RandomStart& args, int64_t row) {
  return mix(mix(static_cast<uint64_t>(args.seed) + kGolden) ^ mix(static_cast<uint64_t>(args.sample_ids[row])));
}

// In (0, 1], from the upper half of the bits.
inline float upper_uniform(uint64_t bits) { return (static_cast<float>(bits >> 32) + 0.5f) * 0x1p-32f; }

inline float gaussian(uint64_t bits) {
  const float turn = static_cast<float>(bits & 0xffffffff) * 0x1p-32f;
  return std::sqrt(-2 * std::log(upper_uniform(bits))) * std::cos(6.2831853071795865f * turn);
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
      // An odd integer below 2^24 in absolute value: exact in float32.
      const int32_t odd = static_cast<int32_t>(mix(counter) >> 40 << 1) + 1 - (1 << 24);
      adv[i] = clamp(clean[i] + static_cast<float>(odd) * 0x1p-24f * eps, layout.lower, layout.upper);
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
    // The element after the last is the row's own: the radius, uniform in the volume.
    const uint64_t own = mix(start_of(args, row) + static_cast<uint64_t>(row_size + 1) * kGolden);
    const double radius = args.eps[row] * std::pow(static_cast<double>(upper_uniform(own)), 1.0 / row_size);
    factors[row] = static_cast<float>(radius / std::max(std::sqrt(squared), 1e-12));
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

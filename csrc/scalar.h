// The formulas of one element or one row, compiled for the host and, by nvcc, for the device too.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define CMAI_FAST_SCALAR __host__ __device__ inline
#else
#define CMAI_FAST_SCALAR inline
#endif

namespace cmai_fast {

// Both comparisons are false for NaN, which therefore stays NaN instead of becoming a bound.
CMAI_FAST_SCALAR float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

CMAI_FAST_SCALAR float sign(float x) { return x > 0 ? 1.0f : (x < 0 ? -1.0f : 0.0f); }

// Value and slope of x * sigmoid(rate * x), from sigmoid(|rate * x|) and sigmoid(-|rate * x|). The latter is not taken as
// a difference, of which little would be left for large x.
struct Activation {
  float value, slope;
};

CMAI_FAST_SCALAR Activation activation_from(float x, float rate, float high, float low) {
  const float sigmoid = rate * x < 0 ? low : high;
  return {x * sigmoid, sigmoid + x * (rate * (high * low))};
}

// The sums that give an L2 step its length and its projection.
struct Sums {
  double gg = 0, dg = 0, dd = 0;
};

// How far an L2 step goes along the gradient, and the factor back onto the ball: 1 for a row inside it, which then is
// not rounded through `clean`.
struct Move {
  double along, shrink;
};

CMAI_FAST_SCALAR double shrink_to(double squared_norm, float eps) {
  const double norm = sqrt(squared_norm > 0 ? squared_norm : 0.0);
  return norm > eps ? eps / norm : 1.0;
}

CMAI_FAST_SCALAR Move plan_move(const Sums& row, float eps, float step) {
  const bool moves = row.gg > 0 && row.gg < HUGE_VAL;
  const double along = moves ? step / sqrt(row.gg) : 0.0;
  return {along, shrink_to(moves ? row.dd + 2 * along * row.dg + along * along * row.gg : row.dd, eps)};
}

// A gradient of zero, or with an infinite element, has no direction.
CMAI_FAST_SCALAR double inverse_norm(double norm) { return norm > 0 && norm < HUGE_VAL ? 1 / norm : 0.0; }

// SplitMix64 (Steele, Lea, Flood 2014): element i of a sample has the bits mix(start + (i + 1) * kGolden).
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

CMAI_FAST_SCALAR uint64_t mix(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB;
  return bits ^ (bits >> 31);
}

CMAI_FAST_SCALAR uint64_t start_of_sample(int64_t seed, int64_t sample) {
  return mix(mix(static_cast<uint64_t>(seed) + kGolden) ^ mix(static_cast<uint64_t>(sample)));
}

// In (-1, 1): an odd integer below 2^24 in absolute value is exact in float32.
CMAI_FAST_SCALAR float symmetric_uniform(uint64_t bits) {
  const int32_t odd = static_cast<int32_t>(bits >> 40 << 1) + 1 - (1 << 24);
  return static_cast<float>(odd) * 0x1p-24f;
}

// In (0, 1], from the upper half of the bits.
CMAI_FAST_SCALAR float upper_uniform(uint64_t bits) {
  return (static_cast<float>(static_cast<uint32_t>(bits >> 32)) + 0.5f) * 0x1p-32f;
}

// In [0, 1], from the lower half.
CMAI_FAST_SCALAR float lower_uniform(uint64_t bits) {
  return static_cast<float>(static_cast<uint32_t>(bits)) * 0x1p-32f;
}

// What takes Gaussian noise of this squared norm to a point uniform in the volume of the ball. The row's own bits are
// those after its last element's.
CMAI_FAST_SCALAR float ball_factor(double squared, uint64_t own, int64_t row_size, float eps) {
  const double norm = sqrt(squared), radius = eps * pow(static_cast<double>(upper_uniform(own)), 1.0 / row_size);
  return static_cast<float>(radius / (norm > 1e-12 ? norm : 1e-12));
}

}  // namespace cmai_fast

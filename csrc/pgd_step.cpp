#include "pgd_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

// One binary for every x86-64 machine: the loader picks the AVX2 build of a kernel where the processor has it.
#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__GNUC__) && (!defined(__clang__) || __clang_major__ >= 16))
#define CMAI_FAST_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CMAI_FAST_CLONES
#endif

namespace cmai_fast {
namespace {

// Elements of one channel handled at once: the float32 copy of a gradient block stays in the first-level cache.
constexpr int64_t kBlock = 2048;

// Fewer elements than this take about 0.1 ms (AMD EPYC, one core), which is what waking a thread may cost.
constexpr int64_t kSerialBelow = 1 << 18;

struct Block {
  int64_t row, channel, offset, count;
};

// The three sums that give an L2 step its length and its projection.
struct Sums {
  double gg = 0, dg = 0, dd = 0;
};

// ---- Kernels: one block of one channel of one row -------------------------------------------------------------------

CMAI_FAST_CLONES void widen_bf16(const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
    std::memcpy(&out[i], &bits, sizeof bits);
  }
}

// Rounds to nearest even, as PyTorch does.
CMAI_FAST_CLONES void narrow_bf16(const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &in[i], sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

CMAI_FAST_CLONES void normalise(const float* in, float* out, int64_t count, float mean, float std) {
  for (int64_t i = 0; i < count; ++i) out[i] = (in[i] - mean) / std;
}

// Both comparisons are false for NaN, which so stays where it is instead of becoming a bound.
inline float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

CMAI_FAST_CLONES void linf_block(float* adv, const float* grad, const float* clean, int64_t count, float eps,
                                 float step, float lower, float upper) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = grad[i];
    const float move = g > 0 ? step : (g < 0 ? -step : 0.0f);  // 0 for NaN
    adv[i] = clamp(clamp(adv[i] + move, clean[i] - eps, clean[i] + eps), lower, upper);
  }
}

CMAI_FAST_CLONES void to_pixel_gradient(const float* in, float* out, int64_t count, float std) {
  for (int64_t i = 0; i < count; ++i) out[i] = (in[i] == in[i] ? in[i] : 0.0f) / std;
}

CMAI_FAST_CLONES Sums l2_sums(const float* adv, const float* grad, const float* clean, int64_t count) {
  double gg = 0, dg = 0, dd = 0;
#pragma omp simd reduction(+ : gg, dg, dd)
  for (int64_t i = 0; i < count; ++i) {
    const double g = grad[i], d = static_cast<double>(adv[i]) - clean[i];
    gg += g * g;
    dg += d * g;
    dd += d * d;
  }
  return {gg, dg, dd};
}

// `shrink` is the factor onto the ball, and 1 for a row inside it, which then is not rounded through `clean`.
CMAI_FAST_CLONES void l2_block(float* adv, const float* grad, const float* clean, int64_t count, double move,
                               double shrink, float lower, float upper) {
  if (shrink < 1) {
    for (int64_t i = 0; i < count; ++i) {
      const double delta = static_cast<double>(adv[i]) - clean[i] + move * grad[i];
      adv[i] = clamp(static_cast<float>(clean[i] + shrink * delta), lower, upper);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) adv[i] = clamp(static_cast<float>(adv[i] + move * grad[i]), lower, upper);
  }
}

// ---- Launchers ------------------------------------------------------------------------------------------------------

int64_t blocks_per_row(const PgdStep& args) { return args.channels * ((args.inner + kBlock - 1) / kBlock); }

// Calls body(block, index) for every block of every active row. Blocks do not depend on the threads, so neither do
// results.
template <class Body>
void for_each_block(const PgdStep& args, Body body) {
  const int64_t per_row = blocks_per_row(args), per_channel = per_row / args.channels, total = args.rows * per_row;
  [[maybe_unused]] const int threads =
      args.rows * args.channels * args.inner < kSerialBelow ? 1 : std::max(1, args.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t index = 0; index < total; ++index) {
    const int64_t row = index / per_row, in_row = index % per_row;
    if (args.active != nullptr && !args.active[row]) continue;
    const int64_t channel = in_row / per_channel, start = in_row % per_channel * kBlock;
    const int64_t offset = (row * args.channels + channel) * args.inner + start;
    body(Block{row, channel, offset, std::min(kBlock, args.inner - start)}, index);
  }
}

const float* load_gradient(const PgdStep& args, const Block& block, float* buffer) {
  if (!args.grad.is_bf16) return static_cast<const float*>(args.grad.data) + block.offset;
  widen_bf16(static_cast<const uint16_t*>(args.grad.data) + block.offset, buffer, block.count);
  return buffer;
}

const float* load_pixel_gradient(const PgdStep& args, const Block& block, float* buffer) {
  to_pixel_gradient(load_gradient(args, block, buffer), buffer, block.count,
                    args.std == nullptr ? 1.0f : args.std[block.channel]);
  return buffer;
}

void write_model_input(const PgdStep& args, const Block& block) {
  if (args.model_input.data == nullptr) return;
  const float mean = args.mean == nullptr ? 0.0f : args.mean[block.channel];
  const float std = args.std == nullptr ? 1.0f : args.std[block.channel];
  const float* adv = args.adv + block.offset;
  if (!args.model_input.is_bf16) {
    normalise(adv, static_cast<float*>(args.model_input.data) + block.offset, block.count, mean, std);
    return;
  }
  float buffer[kBlock];
  normalise(adv, buffer, block.count, mean, std);
  narrow_bf16(buffer, static_cast<uint16_t*>(args.model_input.data) + block.offset, block.count);
}

// How far along the gradient, and the factor back onto the ball.
struct Move {
  double along, shrink;
};

Move plan_move(const Sums* sums, int64_t count, float eps, float step) {
  Sums row;
  for (int64_t i = 0; i < count; ++i) {
    row.gg += sums[i].gg;
    row.dg += sums[i].dg;
    row.dd += sums[i].dd;
  }
  const bool moves = row.gg > 0 && std::isfinite(row.gg);
  const double along = moves ? step / std::sqrt(row.gg) : 0.0;
  const double squared = moves ? row.dd + 2 * along * row.dg + along * along * row.gg : row.dd;
  const double norm = std::sqrt(std::max(0.0, squared));
  return {along, norm > eps ? eps / norm : 1.0};
}

}  // namespace

void pgd_linf_step(const PgdStep& args) {
  for_each_block(args, [&](const Block& block, int64_t) {
    float buffer[kBlock];
    const float* grad = load_gradient(args, block, buffer);
    linf_block(args.adv + block.offset, grad, args.clean + block.offset, block.count, args.eps[block.row],
               args.step[block.row], args.lower, args.upper);
    write_model_input(args, block);
  });
}

void pgd_l2_step(const PgdStep& args) {
  const int64_t per_row = blocks_per_row(args);
  std::vector<Sums> sums(args.rows * per_row);
  for_each_block(args, [&](const Block& block, int64_t index) {
    float buffer[kBlock];
    const float* grad = load_pixel_gradient(args, block, buffer);
    sums[index] = l2_sums(args.adv + block.offset, grad, args.clean + block.offset, block.count);
  });

  std::vector<Move> moves(args.rows);
  for (int64_t row = 0; row < args.rows; ++row) {
    moves[row] = plan_move(&sums[row * per_row], per_row, args.eps[row], args.step[row]);
  }

  for_each_block(args, [&](const Block& block, int64_t) {
    float buffer[kBlock];
    const Move move = moves[block.row];
    if (move.along == 0) {
      std::fill_n(buffer, block.count, 0.0f);  // the gradient may hold infinities, and 0 * inf is NaN
    } else {
      load_pixel_gradient(args, block, buffer);
    }
    l2_block(args.adv + block.offset, buffer, args.clean + block.offset, block.count, move.along, move.shrink,
             args.lower, args.upper);
    write_model_input(args, block);
  });
}

}  // namespace cmai_fast

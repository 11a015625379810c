// How the CPU kernels divide a batch: blocks of one row that fit the first-level cache, in float32 whatever the dtypes of
// the tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "scalar.h"
#include "step.h"

// One binary for every x86-64 machine: the loader picks the build of a kernel that the processor can run. AVX-512 saves
// a quarter of a step whose images lie in the cache (32 x 3 x 64 x 64 on two cores of an EPYC: 54 to 41 us).
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CMAI_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && (defined(__GNUC__) && (!defined(__clang__) || __clang_major__ >= 16))
#define CMAI_FAST_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CMAI_FAST_CLONES
#endif

namespace cmai_fast {

constexpr int64_t kBlock = 2048;

// Fewer elements than this take about 0.1 ms (AMD EPYC, one core), which is what waking a thread may cost.
constexpr int64_t kSerialBelow = 1 << 18;

struct Block {
  int64_t row, start, count;  // elements [start, start + count) of the row
  int64_t offset;             // of the first one in the batch
  int64_t index;              // of the block in the batch
};

inline int64_t blocks_per_row(const Layout& layout) { return (layout.row_size() + kBlock - 1) / kBlock; }

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Calls body(block) for every block of every active row (null: all). Blocks do not depend on the threads, so neither do
// results.
template <class Body>
void for_each_block(const Layout& layout, const bool* active, int threads, Body body) {
  const int64_t row_size = layout.row_size(), per_row = blocks_per_row(layout), total = layout.rows * per_row;
  [[maybe_unused]] const int team = layout.rows * row_size < kSerialBelow ? 1 : std::max(1, threads);
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t index = 0; index < total; ++index) {
    const int64_t row = index / per_row, start = index % per_row * kBlock;
    if (active != nullptr && !active[row]) continue;
    body(Block{row, start, std::min(kBlock, row_size - start), row * row_size + start, index});
  }
}

// Calls body(first, count, channel) for every run of one channel in the block; `first` counts from the block's start.
template <class Body>
void for_each_channel(const Layout& layout, const Block& block, Body body) {
  for (int64_t done = 0; done < block.count;) {
    const int64_t at = block.start + done, run = at / layout.inner;
    const int64_t count = std::min(block.count - done, (run + 1) * layout.inner - at);
    body(done, count, run % layout.channels);
    done += count;
  }
}

// The block's elements as float32: where they are, or widened into `buffer`. 8-bit pixels are scaled to [0, 1].
const float* load(const void* tensor, Type type, const Block& block, float* buffer);

// Where a kernel writes the block, as float32: into the tensor itself, or into `buffer` if it is narrower.
float* room(void* tensor, Type type, const Block& block, float* buffer);

// Rounds what was written there to nearest even, into the tensor; nothing where it is there already.
void store(const float* values, void* tensor, Type type, const Block& block);

// `load` of a gradient, which adds to nonfinite[row] (may be null) and in which NaN counts as 0.
const float* load_gradient(const void* grad, Type type, const Block& block, int64_t* nonfinite, float* buffer);

// The same, divided by std (null: 1): the gradient in pixels, always in `buffer`.
void load_pixel_gradient(const Layout& layout, const void* grad, const float* std, const Block& block,
                         int64_t* nonfinite, float* buffer);

// Writes (image - mean) / std of the block to `model_input`, rounded to nearest even; nothing where that is null.
void write_model_input(const Layout& layout, const float* image, const float* mean, const float* std, void* model_input,
                       const Block& block);

Sums l2_sums(const float* adv, const float* grad, const float* clean, int64_t count);
Sums total(const Sums* of_blocks, int64_t count);

}  // namespace cmai_fast

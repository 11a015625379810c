// One step of projected gradient ascent on a batch of images, on the CPU.
//
// The formulas are those of cmai_fast/ops/reference.py, which is the definition of right.
#pragma once

#include <cstdint>

namespace cmai_fast {

// A tensor of what the model sees: float32, or bfloat16 held as its upper 16 bits.
template <class Pointer>
struct ModelTensor {
  Pointer data;
  bool is_bf16;
};

// All arrays are contiguous. Images are (rows, channels, inner); without mean and std, channels is 1.
struct PgdStep {
  float* adv;  // read and written
  ModelTensor<const void*> grad;
  const float* clean;              //
  const float* eps;                // (rows,)
  const float* step;               // (rows,)
  const bool* active;              // (rows,) or null: all
  ModelTensor<void*> model_input;  // written; or null
  const float* mean;               // (channels,) or null: 0
  const float* std;                // (channels,) or null: 1
  int64_t rows, channels, inner;
  float lower, upper;
  int threads;
};

void pgd_linf_step(const PgdStep& args);
void pgd_l2_step(const PgdStep& args);

}  // namespace cmai_fast

// The arguments of the kernels: one description for every backend of the compiled extension.
//
// The formulas are those of cmai_fast/ops/reference.py, which define the right result.
#pragma once

#include <cstdint>

namespace cmai_fast {

enum class Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3 };

// What stays the same from call to call. All image tensors are contiguous, (rows, patches, channels, inner) in memory.
struct Layout {
  int64_t rows, patches, channels, inner;
  Type grad, clean, model_input;  // grad and model_input: a float type; clean: kFloat32 or kUInt8
  float lower, upper;             // the pixel box

  int64_t row_size() const { return patches * channels * inner; }
};

// Null pointers are arguments that were not given.
struct PgdStep {
  Layout layout;
  float* adv;          // read and written
  const void* grad;    // of type layout.grad
  const void* clean;   // of type layout.clean
  const float* eps;    // (rows,)
  const float* step;   // (rows,)
  const bool* active;  // (rows,) or null: all
  void* model_input;   // written, of type layout.model_input; or null
  float* velocity;     // read and written; or null
  int64_t* nonfinite;  // (rows,) added to; or null
  const float* mean;   // (channels,) or null: 0
  const float* std;    // (channels,) or null: 1
  float decay;
};

struct ApgdStep {
  Layout layout;
  float* adv;            // x_k; rows that restart receive top_adv
  float* previous;       // x_(k-1) on entry, x_(k+1) on return
  const void* grad;      // at x_k, of type layout.grad
  float* top_adv;        // the best point; rows that improved receive adv
  void* top_grad;        // the gradient there, of type layout.grad
  const void* clean;     // of type layout.clean
  const float* eps;      // (rows,)
  const float* step;     // (rows,)
  const bool* improved;  // (rows,)
  const bool* restart;   // (rows,)
  void* model_input;     // written, of type layout.model_input; or null
  int64_t* nonfinite;    // (rows,) added to; or null
  const float* mean;     // (channels,) or null: 0
  const float* std;      // (channels,) or null: 1
  float momentum, carry;  // of the step, and of the last change: 1 - momentum
};

struct RandomStart {
  Layout layout;  // its grad and model_input are unused
  float* adv;     // written
  const void* clean;
  const float* eps;           // (rows,)
  const int64_t* sample_ids;  // (rows,)
  int64_t seed;
};

// x * sigmoid(rate * x) * other.
struct GatedActivation {
  Layout layout;  // one row; all tensors are of the float type layout.grad
  float rate;
  const void* x;
  const void* other;  // or null: 1

  Type type() const { return layout.grad; }
};

}  // namespace cmai_fast

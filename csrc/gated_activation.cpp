// x * sigmoid(rate * x) * other, and its gradients, in one pass each.
//
// An element's result does not depend on its place: without contraction, vectors and what is left over compute alike.
#include <cmath>

#include "blocks.h"
#include "kernels.h"
#include "scalar.h"

namespace cmai_fast {
namespace {

// exp(t) for t <= 0, to 2^-23: 2^n times the polynomial of Cephes' expf. 0 where the result would be subnormal.
inline float exp_nonpositive(float t) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then is in the lowest bits
  const float shifted = t * 1.44269504f + magic, n = shifted - magic;
  const float r = t - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts; the first product is exact
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = from_bits((to_bits(shifted) << 23) + 0x3f800000);
  return t < -87.0f ? 0.0f : p * power;
}

inline Activation activation(float x, float rate) {
  const float small = exp_nonpositive(-std::fabs(rate * x)), high = 1.0f / (1.0f + small);
  return activation_from(x, rate, high, small * high);
}

// Outputs may be inputs.
CMAI_FAST_CLONES void forward(const float* x, const float* other, float* out, int64_t count, float rate) {
  if (other == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = activation(x[i], rate).value;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = activation(x[i], rate).value * other[i];
  }
}

CMAI_FAST_CLONES void backward(const float* x, const float* grad, float* grad_x, int64_t count, float rate) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) grad_x[i] = grad[i] * activation(x[i], rate).slope;
}

CMAI_FAST_CLONES void gated_backward(const float* x, const float* other, const float* grad, float* grad_x,
                                     float* grad_other, int64_t count, float rate) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Activation act = activation(x[i], rate);
    const float along_x = grad[i] * other[i] * act.slope, along_other = grad[i] * act.value;
    grad_x[i] = along_x;
    grad_other[i] = along_other;
  }
}

// Of so many elements three buffers and the narrow tensors beside them stay in the first-level cache.
constexpr int64_t kChunk = 512;

// Calls body(chunk) for all elements, as chunks of one row.
template <class Body>
void for_each_chunk(const GatedActivation& args, int threads, Body body) {
  for_each_block(args.layout, nullptr, threads, [&](const Block& block) {
    for (int64_t done = 0; done < block.count; done += kChunk) {
      const int64_t at = block.offset + done;
      body(Block{0, at, std::min(kChunk, block.count - done), at, block.index});
    }
  });
}

}  // namespace

void gated_activation(const GatedActivation& args, void* out, int threads) {
  for_each_chunk(args, threads, [&](const Block& chunk) {
    float x_buffer[kChunk], other_buffer[kChunk];
    const float* x = load(args.x, args.type(), chunk, x_buffer);
    const float* other = args.other == nullptr ? nullptr : load(args.other, args.type(), chunk, other_buffer);
    float* result = room(out, args.type(), chunk, x_buffer);
    forward(x, other, result, chunk.count, args.rate);
    store(result, out, args.type(), chunk);
  });
}

void gated_activation_backward(const GatedActivation& args, const void* grad, void* grad_x, void* grad_other,
                               int threads) {
  for_each_chunk(args, threads, [&](const Block& chunk) {
    float x_buffer[kChunk], other_buffer[kChunk], grad_buffer[kChunk];
    const float* x = load(args.x, args.type(), chunk, x_buffer);
    const float* incoming = load(grad, args.type(), chunk, grad_buffer);
    float* along_x = room(grad_x, args.type(), chunk, x_buffer);
    if (args.other == nullptr) {
      backward(x, incoming, along_x, chunk.count, args.rate);
    } else {
      const float* other = load(args.other, args.type(), chunk, other_buffer);
      float* along_other = room(grad_other, args.type(), chunk, other_buffer);
      gated_backward(x, other, incoming, along_x, along_other, chunk.count, args.rate);
      store(along_other, grad_other, args.type(), chunk);
    }
    store(along_x, grad_x, args.type(), chunk);
  });
}

}  // namespace cmai_fast

#include "blocks.h"

namespace cmai_fast {
namespace {

CMAI_FAST_CLONES void widen_bf16(const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_bits(static_cast<uint32_t>(in[i]) << 16);
}

CMAI_FAST_CLONES void narrow_bf16(const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = to_bits(in[i]), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

// Shifting the bits of a half into place leaves its exponent 112 too low, also for subnormal numbers; a
// multiplication corrects it.
CMAI_FAST_CLONES void widen_fp16(const uint16_t* in, float* out, int64_t count) {
  const float scale = from_bits((127 + 112) << 23);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t half = in[i], magnitude = (half & 0x7fff) << 13;
    const uint32_t finite = to_bits(from_bits(magnitude) * scale), special = magnitude | 0x7f800000;
    out[i] = from_bits((magnitude >= 0x0f800000 ? special : finite) | (half & 0x8000) << 16);
  }
}

CMAI_FAST_CLONES void narrow_fp16(const float* in, uint16_t* out, int64_t count) {
  // Below the normal halves, adding 0.5 makes the floating-point unit round to a multiple of 2^-24.
  const float half = 0.5f;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = to_bits(in[i]), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    const uint32_t subnormal = to_bits(from_bits(magnitude) + half) - to_bits(half);
    uint32_t rounded = magnitude < (113u << 23) ? subnormal : std::min(normal, 0x7c00u);
    rounded = magnitude >= 0x7f800000 ? (magnitude > 0x7f800000 ? 0x7e00u : 0x7c00u) : rounded;
    out[i] = static_cast<uint16_t>(rounded | (bits >> 16 & 0x8000));
  }
}

CMAI_FAST_CLONES void widen_pixels(const uint8_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]) / 255.0f;
}

CMAI_FAST_CLONES int64_t count_nonfinite(const float* in, int64_t count) {
  int32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad += (to_bits(in[i]) & 0x7f800000) == 0x7f800000;
  return bad;
}

CMAI_FAST_CLONES void divide(const float* in, float* out, int64_t count, float std) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[i] / std;
}

CMAI_FAST_CLONES void nan_to_zero(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[i] == in[i] ? in[i] : 0.0f;
}

CMAI_FAST_CLONES void normalise(const float* in, float* out, int64_t count, float mean, float std) {
  for (int64_t i = 0; i < count; ++i) out[i] = (in[i] - mean) / std;
}

}  // namespace

const float* load(const void* tensor, Type type, const Block& block, float* buffer) {
  switch (type) {
    case Type::kFloat32:
      return static_cast<const float*>(tensor) + block.offset;
    case Type::kBFloat16:
      widen_bf16(static_cast<const uint16_t*>(tensor) + block.offset, buffer, block.count);
      break;
    case Type::kFloat16:
      widen_fp16(static_cast<const uint16_t*>(tensor) + block.offset, buffer, block.count);
      break;
    case Type::kUInt8:
      widen_pixels(static_cast<const uint8_t*>(tensor) + block.offset, buffer, block.count);
      break;
  }
  return buffer;
}

float* room(void* tensor, Type type, const Block& block, float* buffer) {
  return type == Type::kFloat32 ? static_cast<float*>(tensor) + block.offset : buffer;
}

void store(const float* values, void* tensor, Type type, const Block& block) {
  if (type == Type::kFloat32) return;
  uint16_t* half = static_cast<uint16_t*>(tensor) + block.offset;
  if (type == Type::kBFloat16) {
    narrow_bf16(values, half, block.count);
  } else {
    narrow_fp16(values, half, block.count);
  }
}

const float* load_gradient(const void* grad, Type type, const Block& block, int64_t* nonfinite, float* buffer) {
  const float* values = load(grad, type, block, buffer);
  // Counting reads the block while it is in the first-level cache; finite gradients, the usual case, skip the copy.
  const int64_t bad = count_nonfinite(values, block.count);
  if (bad == 0) return values;
  if (nonfinite != nullptr) {
#pragma omp atomic
    nonfinite[block.row] += bad;
  }
  nan_to_zero(values, buffer, block.count);
  return buffer;
}

void load_pixel_gradient(const Layout& layout, const void* grad, const float* std, const Block& block,
                         int64_t* nonfinite, float* buffer) {
  const float* values = load_gradient(grad, layout.grad, block, nonfinite, buffer);
  if (std == nullptr) {
    if (values != buffer) std::copy_n(values, block.count, buffer);
    return;
  }
  for_each_channel(layout, block, [&](int64_t first, int64_t count, int64_t channel) {
    divide(values + first, buffer + first, count, std[channel]);
  });
}

void write_model_input(const Layout& layout, const float* image, const float* mean, const float* std, void* model_input,
                       const Block& block) {
  if (model_input == nullptr) return;
  float buffer[kBlock];
  float* out = room(model_input, layout.model_input, block, buffer);
  if (mean == nullptr) {
    std::copy_n(image, block.count, out);
  } else {
    for_each_channel(layout, block, [&](int64_t first, int64_t count, int64_t channel) {
      normalise(image + first, out + first, count, mean[channel], std[channel]);
    });
  }
  store(out, model_input, layout.model_input, block);
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

Sums total(const Sums* of_blocks, int64_t count) {
  Sums row;
  for (int64_t i = 0; i < count; ++i) {
    row.gg += of_blocks[i].gg;
    row.dg += of_blocks[i].dg;
    row.dd += of_blocks[i].dd;
  }
  return row;
}

}  // namespace cmai_fast

// x * sigmoid(rate * x) * other, and its gradients, on a GPU: one pass over memory each.
#include <type_traits>

#include "cuda_device.h"

namespace cmai_fast::cuda {
namespace {

template <Type kType>
using Constant = std::integral_constant<Type, kType>;

// Calls body(type) with the type as a constant: one branch for all elements, where nvcc would make one for each.
template <class A, class Body>
__device__ inline void with_type(Type type, Body body) {
  if constexpr (A::kSpan == Wide::kSpan) {
    body(Constant<Type::kFloat32>());  // the others have Halves
  } else if (type == Type::kBFloat16) {
    body(Constant<Type::kBFloat16>());
  } else if (A::kSpan == Halves::kSpan || type == Type::kFloat16) {
    body(Constant<Type::kFloat16>());
  } else if constexpr (A::kSpan == Narrow::kSpan) {
    body(Constant<Type::kFloat32>());
  }
}

__device__ inline Activation activation(float x, float rate) {
  const float small = expf(-fabsf(rate * x)), high = reciprocal(1.0f + small);
  return activation_from(x, rate, high, small * high);
}

// Of a tensor, or ones without one.
template <class A>
__device__ inline void widen_or_ones(const void* tensor, const Raw& raw, Type type, float (&values)[kEach]) {
  if (tensor != nullptr) return widen<A>(raw, type, values);
#pragma unroll
  for (int i = 0; i < kEach; ++i) values[i] = 1.0f;
}

template <class A>
__global__ void __launch_bounds__(kThreads) forward(GatedActivation args, Grid grid, void* out) {
  const Tile tile(grid);
  with_type<A>(args.layout.grad, [&](auto constant) {
    constexpr Type type = decltype(constant)::value;
    Raw x_raw, other_raw;
    load<A>(args.x, type, tile, x_raw);
    if (args.other != nullptr) load<A>(args.other, type, tile, other_raw);

    float x[kEach], other[kEach];
    widen<A>(x_raw, type, x);
    widen_or_ones<A>(args.other, other_raw, type, other);
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[i] = activation(x[i], args.rate).value * other[i];
    store<A>(out, type, tile, x);
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    backward(GatedActivation args, Grid grid, const void* grad, void* grad_x, void* grad_other) {
  const Tile tile(grid);
  with_type<A>(args.layout.grad, [&](auto constant) {
    constexpr Type type = decltype(constant)::value;
    Raw x_raw, other_raw, grad_raw;
    load<A>(args.x, type, tile, x_raw);
    load<A>(grad, type, tile, grad_raw);
    if (args.other != nullptr) load<A>(args.other, type, tile, other_raw);

    float x[kEach], other[kEach], incoming[kEach];
    widen<A>(x_raw, type, x);
    widen<A>(grad_raw, type, incoming);
    widen_or_ones<A>(args.other, other_raw, type, other);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const Activation act = activation(x[i], args.rate);
      x[i] = incoming[i] * other[i] * act.slope;
      other[i] = incoming[i] * act.value;
    }
    store<A>(grad_x, type, tile, x);
    if (args.other != nullptr) store<A>(grad_other, type, tile, other);
  });
}

// Whether 128 bits of every tensor can be moved at once.
template <class... Addresses>
bool aligned(const GatedActivation& args, const Addresses*... tensors) {
  return args.layout.inner * bytes_of(args.type()) % 16 == 0 &&
         ((reinterpret_cast<Address>(tensors) % 16 == 0) && ...);
}

}  // namespace

void gated_activation(const GatedActivation& args, void* out, Address, int device, Address stream) {
  const OnDevice current(device);
  const Grid grid(args.layout);
  const bool single = args.type() == Type::kFloat32;
  const auto wide = single ? forward<Wide> : forward<Halves>;
  launch(aligned(args, args.x, args.other, out) ? wide : forward<Narrow>, grid.tiles(), stream, args, grid, out);
}

void gated_activation_backward(const GatedActivation& args, const void* grad, void* grad_x, void* grad_other, Address,
                               int device, Address stream) {
  const OnDevice current(device);
  const Grid grid(args.layout);
  const bool single = args.type() == Type::kFloat32;
  const auto wide = single ? backward<Wide> : backward<Halves>;
  launch(aligned(args, args.x, args.other, grad, grad_x, grad_other) ? wide : backward<Narrow>, grid.tiles(), stream,
         args, grid, grad, grad_x, grad_other);
}

}  // namespace cmai_fast::cuda

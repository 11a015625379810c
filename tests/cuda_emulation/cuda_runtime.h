// The part of CUDA that the kernels use, on the host, so that tests run the kernels' own source where there is no GPU.
// The threads of a block are fibers that take turns between collective operations; blocks run one after another. What
// this cannot show: races, the memory model, PTX, and the compiler.
#pragma once

#include <immintrin.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

template <class T>
void __stwb(T* to, T value) {
  *to = value;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorNoDevice = 100 };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace emulation {

constexpr unsigned kThreads = 256, kStack = 1 << 16;

struct Fiber {
  ucontext_t context;
  bool done;
  unsigned collectives;
};
inline Fiber fibers[kThreads];
inline ucontext_t scheduler;
inline uint64_t slots[2][kThreads];  // two, so that nobody writes what a neighbour has still to read

// Comes back when every thread of the block has come here.
inline void wait() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

// Calls read(slots) when every thread has put in its value.
template <class T, class Read>
auto exchange(T value, Read read) {
  uint64_t* shared = slots[fibers[threadIdx.x].collectives++ % 2];
  std::memcpy(&shared[threadIdx.x], &value, sizeof value);
  wait();
  return read(shared);
}

template <class T>
T value_at(const uint64_t* shared, unsigned thread) {
  T value;
  std::memcpy(&value, &shared[thread], sizeof value);
  return value;
}

template <class Body>
void run_block(Body& body) {
  static std::vector<char> stacks(static_cast<size_t>(kThreads) * kStack);
  for (unsigned thread = 0; thread < kThreads; ++thread) {
    Fiber& fiber = fibers[thread];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = &stacks[static_cast<size_t>(thread) * kStack];
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    fiber.done = false;
    fiber.collectives = 0;
    static Body* current;
    current = &body;
    makecontext(
        &fiber.context,
        [] {
          (*current)();
          fibers[threadIdx.x].done = true;
        },
        0);
  }
  for (bool left = true; left;) {
    left = false;
    unsigned waiting = 0, finished = 0;
    for (unsigned thread = 0; thread < kThreads; ++thread) {
      if (fibers[thread].done) continue;
      threadIdx.x = thread;
      swapcontext(&scheduler, &fibers[thread].context);
      ++(fibers[thread].done ? finished : waiting);
      left = left || !fibers[thread].done;
    }
    if (waiting != 0 && finished != 0) throw std::logic_error("some threads ended and others wait for them");
  }
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::exchange(0, [](const uint64_t*) { return 0; });
}

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned far) {
  const unsigned lane = threadIdx.x % 32, from = threadIdx.x + (lane + far < 32 ? far : 0);
  return emulation::exchange(value, [&](const uint64_t* shared) { return emulation::value_at<T>(shared, from); });
}

inline int __reduce_add_sync(unsigned, int value) {
  return emulation::exchange(value, [](const uint64_t* shared) {
    int sum = 0;
    for (unsigned i = 0; i < 32; ++i) sum += emulation::value_at<int>(shared, threadIdx.x / 32 * 32 + i);
    return sum;
  });
}

inline void atomicAdd(unsigned long long* address, unsigned long long value) { *address += value; }

// Exact at the quarters and for arguments from 0 to 2, as CUDA's is.
inline float cospif(float x) { return static_cast<float>(std::cos(3.14159265358979323846 * static_cast<double>(x))); }

namespace cmai_fast::cuda {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float widen_fp16(uint32_t half) { return _cvtsh_ss(static_cast<unsigned short>(half)); }
inline uint32_t narrow_fp16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
inline float reciprocal(float value) { return 1 / value; }
inline uint32_t narrow_bf16(float value) {
  const uint32_t bits = as_bits(value);
  return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}

void check(cudaError_t error);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, std::uintptr_t, const Arguments&... arguments) {
  for (blockIdx.x = 0; blockIdx.x < static_cast<uint64_t>(blocks); ++blockIdx.x) {
    auto body = [&] { kernel(arguments...); };
    emulation::run_block(body);
  }
}

struct OnDevice {
  explicit OnDevice(int) {}
};

}  // namespace cmai_fast::cuda

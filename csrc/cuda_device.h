// How the CUDA kernels divide a batch: a block takes a tile of one row, a thread eight elements of it, which it loads
// unconverted from every tensor before it uses the first. The dtype is a branch that all threads take alike, not a
// template argument, so nvcc compiles each kernel only twice: for 128-bit accesses, and for unaligned tensors.
#pragma once

#include <cuda_runtime.h>

#include "cuda_kernels.h"
#include "scalar.h"

namespace cmai_fast::cuda {

constexpr int kThreads = 256;
constexpr int kEach = 8;
constexpr int kTile = kThreads * kEach;
constexpr unsigned kAllLanes = 0xffffffff;

// n / divisor for n < 2^31 (Granlund and Montgomery 1994): the GPU has no instruction for it.
struct Divider {
  uint32_t divisor, multiplier, shift;

  __host__ explicit Divider(uint32_t by) : divisor(by), shift(0) {
    while ((uint64_t{1} << shift) < by) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by) / by + 1);
  }
  __host__ __device__ uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> 32) + n) >> shift;
  }
};

// Which channel an element belongs to, and its mean and std.
struct Channels {
  const float *mean, *std;  // or null: 0 and 1
  uint32_t period;          // elements of one run of all channels
  bool split;               // four neighbours may belong to several channels
  Divider inner, count;

  __host__ Channels(const Layout& layout, const float* mean, const float* std)
      : mean(mean),
        std(std),
        period(std == nullptr ? 1 : static_cast<uint32_t>(layout.channels * layout.inner)),
        split(layout.inner % 4 != 0),
        inner(std == nullptr ? 1 : static_cast<uint32_t>(layout.inner)),
        count(static_cast<uint32_t>(layout.channels)) {}

  __device__ uint32_t channel(uint32_t in_period) const {
    const uint32_t run = inner.quotient(in_period);
    return run - count.quotient(run) * count.divisor;
  }
};

struct Grid {
  int64_t rows, row_size;
  uint32_t per_row;  // tiles

  __host__ explicit Grid(const Layout& layout)
      : rows(layout.rows),
        row_size(layout.row_size()),
        per_row(static_cast<uint32_t>((layout.row_size() + kTile - 1) / kTile)) {}
  __host__ int64_t tiles() const { return rows * per_row; }
};

struct Tile {
  int64_t row, start, offset;  // the first element, in the row and in the batch
  int count;

  __device__ explicit Tile(const Grid& grid)
      : row(blockIdx.x / grid.per_row), start(static_cast<int64_t>(blockIdx.x % grid.per_row) * kTile) {
    offset = row * grid.row_size + start;
    count = static_cast<int>(grid.row_size - start < kTile ? grid.row_size - start : kTile);
  }
};

// Which elements are a thread's, in groups of kSpan neighbours, and whether one access moves a group.
template <int kSpan_, bool kWide_>
struct Access {
  static constexpr int kSpan = kSpan_, kGroups = kEach / kSpan_;
  static constexpr bool kWide = kWide_;
  static __device__ int position(int group) { return (group * kThreads + static_cast<int>(threadIdx.x)) * kSpan; }
};
using Wide = Access<4, true>;     // every tensor's rows are aligned to four of its elements
using Narrow = Access<1, false>;  // neighbours to neighbouring threads
using Spread = Access<4, false>;  // sums in the order of Wide, so that a result does not depend on the alignment
using Halves = Access<8, true>;   // every tensor is of 16-bit floats, and aligned to eight of them

template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<1> {
  using type = uint8_t;
};

// A thread's elements of one tensor, as they are in memory: packed in the first words of each group if kWide, else one
// a word.
using Raw = uint32_t[kEach];

__device__ inline void unpack(uint4 word, uint32_t* to) {
  to[0] = word.x, to[1] = word.y, to[2] = word.z, to[3] = word.w;
}
__device__ inline void unpack(uint2 word, uint32_t* to) { to[0] = word.x, to[1] = word.y; }
__device__ inline void unpack(uint32_t word, uint32_t* to) { to[0] = word; }

__device__ inline void pack(const uint32_t* from, uint4& word) {
  word = make_uint4(from[0], from[1], from[2], from[3]);
}
__device__ inline void pack(const uint32_t* from, uint2& word) { word = make_uint2(from[0], from[1]); }
template <class T>
__device__ inline void pack(const uint32_t* from, T& word) {
  word = static_cast<T>(from[0]);
}

template <class A, int kBytes>
__device__ inline void load_words(const void* tensor, const Tile& tile, Raw& raw) {
  using Group = typename Word<kBytes*(A::kWide ? A::kSpan : 1)>::type;
  const char* from = static_cast<const char*>(tensor) + tile.offset * kBytes;
  constexpr int kStep = A::kWide ? A::kSpan : 1;
#pragma unroll
  for (int i = 0; i < kEach; i += kStep) {
    const int position = A::position(i / A::kSpan) + i % A::kSpan;
    if (position < tile.count) {
      unpack(*reinterpret_cast<const Group*>(from + static_cast<int64_t>(position) * kBytes), raw + i);
    } else {
#pragma unroll
      for (int j = 0; j < kStep; ++j) raw[i + j] = 0;
    }
  }
}

template <class A, int kBytes>
__device__ inline void store_words(void* tensor, const Tile& tile, const Raw& raw) {
  using Group = typename Word<kBytes*(A::kWide ? A::kSpan : 1)>::type;
  char* to = static_cast<char*>(tensor) + tile.offset * kBytes;
  constexpr int kStep = A::kWide ? A::kSpan : 1;
#pragma unroll
  for (int i = 0; i < kEach; i += kStep) {
    const int position = A::position(i / A::kSpan) + i % A::kSpan;
    if (position < tile.count) {
      Group group;
      pack(raw + i, group);
      // nvcc 13.0 split an ordinary assignment into four.
      __stwb(reinterpret_cast<Group*>(to + static_cast<int64_t>(position) * kBytes), group);
    }
  }
}

__host__ __device__ inline int bytes_of(Type type) {
  return type == Type::kFloat32 ? 4 : (type == Type::kUInt8 ? 1 : 2);
}

// Zeros past the end of the tile.
template <class A>
__device__ inline void load(const void* tensor, Type type, const Tile& tile, Raw& raw) {
  if constexpr (A::kSpan == Halves::kSpan) {
    load_words<A, 2>(tensor, tile, raw);
  } else if (type == Type::kFloat32) {
    load_words<A, 4>(tensor, tile, raw);
  } else if (type == Type::kUInt8) {
    load_words<A, 1>(tensor, tile, raw);
  } else {
    load_words<A, 2>(tensor, tile, raw);
  }
}

#ifdef __CUDACC__  // tests/cuda_emulation runs the kernels on the host, and brings its own of these

__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t as_bits(float value) { return __float_as_uint(value); }

// One instruction each; including cuda_fp16.h and cuda_bf16.h would dominate nvcc's time.
__device__ inline float widen_fp16(uint32_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(half)));
  return value;
}
__device__ inline uint32_t narrow_fp16(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
__device__ inline uint32_t narrow_bf16(float value) {
  uint16_t half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
// To one unit in the last place: the exact one takes as many instructions as all the rest of an activation.
__device__ inline float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

void check(cudaError_t error);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, Address stream, const Arguments&... arguments) {
  [&](Parameters... parameters) {
    void* addresses[] = {&parameters...};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                           addresses, 0, reinterpret_cast<cudaStream_t>(stream)));
  }(arguments...);
}

// Makes a device current, and restores the previous one. This runtime is separate from PyTorch's.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (device != before_) check(cudaSetDevice(device));
    device_ = device;
  }
  ~OnDevice() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0, device_ = 0;
};

#endif

// pixel / 255.0f to the last bit for all 256 pixels, at a third of a division's instructions.
__device__ inline float pixel_value(uint32_t pixel) {
  const float value = static_cast<float>(pixel), near = value * (1 / 255.0f);
  return fmaf(fmaf(-255.0f, near, value), 1 / 255.0f, near);
}

template <class A>
__device__ inline void widen(const Raw& raw, Type type, float (&values)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int first = i / A::kSpan * A::kSpan, lane = i % A::kSpan;
    const uint32_t half = A::kWide ? raw[first + lane / 2] >> 16 * (lane % 2) & 0xffff : raw[i];
    const uint32_t byte = A::kWide ? raw[first] >> 8 * (lane % 4) & 0xff : raw[i];
    switch (type) {
      case Type::kFloat32:
        values[i] = as_float(raw[i]);
        break;
      case Type::kBFloat16:
        values[i] = as_float(half << 16);
        break;
      case Type::kFloat16:
        values[i] = widen_fp16(half);
        break;
      case Type::kUInt8:
        values[i] = pixel_value(byte);
        break;
    }
  }
}

template <class A>
__device__ inline void store(float* tensor, const Tile& tile, const float (&values)[kEach]) {
  Raw raw;
#pragma unroll
  for (int i = 0; i < kEach; ++i) raw[i] = as_bits(values[i]);
  store_words<A, 4>(tensor, tile, raw);
}

// Rounded to a float type.
template <class A>
__device__ inline void store(void* tensor, Type type, const Tile& tile, const float (&values)[kEach]) {
  if constexpr (A::kSpan != Halves::kSpan) {
    if (type == Type::kFloat32) return store<A>(static_cast<float*>(tensor), tile, values);
  }
  Raw raw;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint32_t half = type == Type::kBFloat16 ? narrow_bf16(values[i]) : narrow_fp16(values[i]);
    const int lane = i % A::kSpan, word = A::kWide ? i / A::kSpan * A::kSpan + lane / 2 : i;
    raw[word] = A::kWide && lane % 2 == 1 ? raw[word] | half << 16 : half;
  }
  store_words<A, 2>(tensor, tile, raw);
}

// Calls body(i, mean, std) for the thread's elements.
template <class A, class Body>
__device__ inline void for_each_channel(const Channels& channels, const Tile& tile, Body body) {
  const uint32_t start = static_cast<uint32_t>(tile.start % channels.period);
  float mean = 0, std = 1;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int position = A::position(i / A::kSpan) + i % A::kSpan;
    if (position < tile.count) {
      if (i % A::kSpan == 0 || channels.split) {
        const uint32_t channel = channels.channel(start + position);
        std = channels.std[channel];
        if (channels.mean != nullptr) mean = channels.mean[channel];
      }
      body(i, mean, std);
    }
  }
}

// NaN as 0, and in pixels: divided by std.
template <class A>
__device__ inline void to_pixels(const Channels& channels, const Tile& tile, float (&grad)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) grad[i] = grad[i] == grad[i] ? grad[i] : 0.0f;
  if (channels.std == nullptr) return;
  for_each_channel<A>(channels, tile, [&](int i, float, float std) { grad[i] /= std; });
}

template <class A>
__device__ inline void store_model_input(void* tensor, Type type, const Channels& channels, const Tile& tile,
                                         float (&values)[kEach]) {
  if (tensor == nullptr) return;
  if (channels.std != nullptr) {
    for_each_channel<A>(channels, tile, [&](int i, float mean, float std) { values[i] = (values[i] - mean) / std; });
  }
  store<A>(tensor, type, tile, values);
}

// Adds the NaN and infinite elements to nonfinite[row] (or null). All threads of the block take part.
__device__ inline void count_nonfinite(int64_t* nonfinite, int64_t row, const float (&grad)[kEach]) {
  if (nonfinite == nullptr) return;
  int bad = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) bad += (as_bits(grad[i]) & 0x7f800000) == 0x7f800000;
  bad = __reduce_add_sync(kAllLanes, bad);
  // Whole numbers add up to the same in any order.
  if (threadIdx.x % 32 == 0 && bad != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(nonfinite + row), static_cast<unsigned long long>(bad));
  }
}

// Sums over the block, in a fixed order; valid in thread 0.
template <int kSums>
__device__ inline void block_sum(double (&sums)[kSums]) {
  __shared__ double of_warps[kThreads / 32][kSums];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int far = 16; far > 0; far /= 2) sums[k] += __shfl_down_sync(kAllLanes, sums[k], far);
    if (lane == 0) of_warps[warp][k] = sums[k];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sums[k] = of_warps[0][k];
#pragma unroll
    for (int i = 1; i < kThreads / 32; ++i) sums[k] += of_warps[i][k];
  }
}

template <int kSums>
__device__ inline void store_sums(double* of_tiles, double (&sums)[kSums]) {
  block_sum(sums);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < kSums; ++k) of_tiles[static_cast<int64_t>(blockIdx.x) * kSums + k] = sums[k];
}

// A block for each row: results[row] = finish(the sums of its tiles, row).
template <int kSums, class Finish>
__global__ void __launch_bounds__(kThreads) finish_rows(const double* of_tiles, uint32_t per_row, Finish finish) {
  double sums[kSums] = {};
  const double* first = of_tiles + static_cast<int64_t>(blockIdx.x) * per_row * kSums;
  for (uint32_t tile = threadIdx.x; tile < per_row; tile += kThreads) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] += first[static_cast<int64_t>(tile) * kSums + k];
  }
  block_sum(sums);
  if (threadIdx.x == 0) finish(sums, blockIdx.x);
}

__device__ inline void add_to(double (&sums)[3], float adv, float grad, float clean) {
  const double g = grad, d = static_cast<double>(adv) - clean;
  sums[0] += g * g;
  sums[1] += d * g;
  sums[2] += d * d;
}

struct PlanMove {
  const float *eps, *step;
  Move* moves;
  __device__ void operator()(const double (&sums)[3], int64_t row) const {
    moves[row] = plan_move({sums[0], sums[1], sums[2]}, eps[row], step[row]);
  }
};

// A step along the gradient and onto the ball. A row that does not move may have a gradient with infinities.
__device__ inline float moved(float adv, float grad, float clean, const Move& move) {
  const double way = move.along == 0 ? 0.0 : move.along * grad;
  if (move.shrink < 1) return static_cast<float>(clean + move.shrink * (static_cast<double>(adv) - clean + way));
  return static_cast<float>(adv + way);
}

// The parts of the scratch memory.
struct Scratch {
  double *of_tiles, *of_rows;

  __host__ Scratch(Address address, const Grid& grid)
      : of_tiles(reinterpret_cast<double*>(address)), of_rows(of_tiles + 3 * grid.tiles()) {}
  __host__ Move* moves() const { return reinterpret_cast<Move*>(of_rows); }
};

// Whether rows start where four elements can be moved at once.
struct Tensor {
  const void* address;
  Type type;
};
template <class... Tensors>
bool aligned(const Grid& grid, const Tensors&... tensors) {
  return grid.row_size % 4 == 0 &&
         ((reinterpret_cast<Address>(tensors.address) % (4 * bytes_of(tensors.type)) == 0) && ...);
}

}  // namespace cmai_fast::cuda

// Rows of T in global memory as the activations of a product: each lane loads just the columns that it multiplies.
#pragma once
#include "common/workspace.h"
#include "gemv/product.cuh"

namespace fastshard {

// Rows of x, unit-stride and 16-byte aligned, as one product takes them.
template <typename T>
struct Rows {
  const T* data;    // [num_tokens, in_features]
  int64_t stride;   // a multiple of 8
  int num_tokens;
  int in_features;  // a multiple of 8
};

// The 8 columns of a step that a lane holds of a slice, and of which rows.
template <typename T>
class LaneColumns {
 public:
  __device__ __forceinline__ LaneColumns(const Rows<T>& rows, int slice)
      : first_(ptx::mov_opaque(slice) * kChunkColumns + threadIdx.x / 32 * kWarpColumns + threadIdx.x % 4 * 8),
        left_(rows.num_tokens - int(threadIdx.x % 32 / 4)), end_(rows.in_features) {}

  __device__ __forceinline__ int column(int step) const {
    return first_ + step / kChunkSteps * kChunkColumns + step % kChunkSteps * 32;
  }
  __device__ __forceinline__ bool inside(int step, int half) const { return 8 * half < left_ && column(step) < end_; }

 private:
  int first_, left_, end_;
};

// The lane's activations of a slice; zeros past the columns and past the tokens. load: of 16 bytes.
template <typename T, int kTokens, typename Load>
__device__ __forceinline__ void load_rows(Activations<kTokens>& x, const Rows<T>& rows, int slice, Load load) {
  const LaneColumns<T> columns(rows, slice);
  const T* const row = rows.data + int(threadIdx.x % 32 / 4) * rows.stride;
#pragma unroll
  for (int i = 0; i < kSliceSteps; ++i) {
#pragma unroll
    for (int half = 0; half < x.kHalves; ++half) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (columns.inside(i, half)) v = load(row + 8 * half * rows.stride + columns.column(i));
      x.set(i, half, v);
    }
  }
}

template <typename T, int kTokens>
__device__ __forceinline__ void load_rows(Activations<kTokens>& x, const Rows<T>& rows, int slice) {
  load_rows(x, rows, slice, [](const T* from) { return *reinterpret_cast<const uint4*>(from); });
}

// The same of rows that other blocks are writing, in words that are kUnwritten before: waits for all of them.
// All lanes of a warp call it.
template <typename T, int kTokens>
__device__ __forceinline__ void load_rows_when_written(Activations<kTokens>& x, const Rows<T>& rows, int slice) {
  uint32_t max;
  do {
    load_rows(x, rows, slice, [](const T* from) { return ptx::ld_global_relaxed(from); });
    max = 0;
#pragma unroll
    for (int i = 0; i < kSliceSteps; ++i) {
#pragma unroll
      for (int half = 0; half < x.kHalves; ++half) {
        const uint4 v = x.get(i, half);
        max = ::max(max, ::max(::max(v.x, v.y), ::max(v.z, v.w)));
      }
    }
  } while (__any_sync(0xffffffffu, max == kUnwritten));
}

}  // namespace fastshard

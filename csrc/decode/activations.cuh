// The flagged activations of a decode step as input of a product.
#pragma once
#include "common/reduce.cuh"
#include "decode/step.h"
#include "gemv/flagged.cuh"
#include "gemv/product.cuh"

namespace fastshard {

using DecodeActivations = Activations<kDecodeMaxTokens>;
using DecodeSquares = Squares<kDecodeMaxTokens>;

// What norm-weighted values are scaled by before they are rounded: float16 holds no more than 65504, and they have not
// been divided by the root mean square yet.
template <typename T>
__device__ constexpr float norm_scale() {
  return std::is_same_v<T, __half> ? 0.125f : 1.f;
}

// 1 / sqrt(mean(x^2) + eps), for products of what norm_scale() has scaled.
template <typename T>
__device__ __forceinline__ float product_rstd(const DecodeSquares& squares, int token, int size, float eps) {
  return rstd_of<kDecodeMaxTokens>(squares, token, size, eps) / norm_scale<T>();
}

// Load chunks slice, slice + 1, ... as multiply() asks for it, waiting for them as long as it takes.
// rows: [num_tokens, in_features / 2] words of two values each. norm: what values are multiplied by, [in_features], or
// null. squares: where the sums of x^2 of this slice are added up, from zero where it is the first; or null.
template <typename T>
__device__ __forceinline__ void load_flagged_rows(DecodeActivations& x, const uint64_t* rows, uint32_t flag,
                                                  const void* norm, int in_features, int num_tokens, int slice,
                                                  int chunks, WarpStorage<T>& storage, DecodeSquares* squares) {
  constexpr int kTokens = 4;  // at a time
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = slice * kChunkColumns + warp * kWarpColumns + 4 * lane;  // of this lane's columns of a chunk
  static_assert(kWarpColumns == 4 * 32);
  bool inside[kSliceChunks];
  uint2 weights[kSliceChunks];
#pragma unroll
  for (int i = 0; i < kSliceChunks; ++i) {
    const int column = first + i * kChunkColumns;
    inside[i] = i < chunks && column < in_features;
    if (norm != nullptr && inside[i]) {
      weights[i] = ptx::ld_global_streaming_8(static_cast<const T*>(norm) + column);
    }
  }
  const uint64_t missing = uint64_t(~flag) << 32;
#pragma unroll 1
  for (int begin = 0; begin < num_tokens; begin += kTokens) {
    ulonglong2 words[kTokens][kSliceChunks];
#pragma unroll
    for (int i = 0; i < kTokens * kSliceChunks; ++i) {
      words[i / kSliceChunks][i % kSliceChunks] = make_ulonglong2(missing, missing);
    }
    const uint64_t* const from = rows + (begin * in_features + first) / 2;
    uint32_t wrong;
    do {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (begin + t >= num_tokens) break;
#pragma unroll
        for (int i = 0; i < kSliceChunks; ++i) {
          if (inside[i] && flag_error(words[t][i], flag) != 0) {
            words[t][i] = ptx::ld_relaxed_2x64(from + (t * in_features + i * kChunkColumns) / 2);
          }
        }
      }
      wrong = 0;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (begin + t >= num_tokens) break;
#pragma unroll
        for (int i = 0; i < kSliceChunks; ++i) {
          if (inside[i]) wrong |= flag_error(words[t][i], flag);
        }
      }
    } while (__any_sync(0xffffffffu, wrong != 0));

#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (begin + t >= num_tokens) break;
      float square = 0.f;
#pragma unroll
      for (int i = 0; i < kSliceChunks; ++i) {
        if (i >= chunks) break;
        uint2 pairs = make_uint2(0, 0);
        if (inside[i]) pairs = make_uint2(uint32_t(words[t][i].x), uint32_t(words[t][i].y));
        if (norm != nullptr && inside[i]) {
          const float2 low = unpack_pair<T>(pairs.x), high = unpack_pair<T>(pairs.y);
          const float2 a = unpack_pair<T>(weights[i].x), b = unpack_pair<T>(weights[i].y);
          constexpr float kScale = norm_scale<T>();
          square += low.x * low.x + low.y * low.y + (high.x * high.x + high.y * high.y);
          pairs.x = pack_pair<T>(low.x * a.x * kScale, low.y * a.y * kScale);
          pairs.y = pack_pair<T>(high.x * b.x * kScale, high.y * b.y * kScale);
        }
        T* const to = storage.staged[t % kStagedTokens] + i * kWarpColumns + lane / 2 * 8 + lane % 2 * 2;
        *reinterpret_cast<uint32_t*>(to) = pairs.x, *reinterpret_cast<uint32_t*>(to + 4) = pairs.y;
      }
      if (squares != nullptr) {
        square = warp_reduce_sum(square);
        float& sum = (*squares)[begin + t][warp];
        if (lane == 0) sum = slice == 0 ? square : sum + square;
      }
      if (t % kStagedTokens == kStagedTokens - 1 || begin + t == num_tokens - 1) {
        x.take_staged(storage, begin + t, chunks);
      }
    }
  }
}

}  // namespace fastshard

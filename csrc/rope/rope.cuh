// RoPE: each pair (a, b) of a head becomes (a cos - b sin, b cos + a sin), by the angles of the token's position
//
// Grid x counts tokens; the threads of grid y cover the token's heads, q then k then v, one vector of kVecSize elements
// each. q goes to q_out, rotated k and v as it is go to their row of the cache. A partner half a head away is read by
// two threads, the second time from L1.
// Floor: q, k and v read once and written once.
#pragma once
#include <cmath>

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "rope/rope.h"

namespace fastshard {

template <typename T, int kVecSize_>
struct RopeConfig {
  static constexpr int kThreads = 128;
  static constexpr int kVecSize = kVecSize_;  // one 16-byte vector, or 1 element for any alignment
  static_assert(kVecSize == 1 || kVecSize == Vec<T>::kSize);
};

template <typename T, int kVecSize>
struct RopeVec {
  T elems[kVecSize];

  __device__ void load(const T* ptr) {
    if constexpr (kVecSize == 1) {
      elems[0] = *ptr;
    } else {
      const Vec<T> v = load_vec(ptr);
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) elems[j] = v[j];
    }
  }

  __device__ void store(T* ptr) const {
    if constexpr (kVecSize == 1) {
      *ptr = elems[0];
    } else {
      Vec<T> v;
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) v[j] = elems[j];
      store_vec(ptr, v);
    }
  }
};

// Elements [i, i + kVecSize) of a rotated head. table_row: [rotary_dim / 2, 2]
template <typename T, int kVecSize>
__device__ __forceinline__ RopeVec<T, kVecSize> rotate(const T* head, int i, const float* table_row,
                                                       const RopeParams& p) {
  RopeVec<T, kVecSize> own, partner, y;
  own.load(head + i);
  if (i >= p.rotary_dim) return own;
  const int half = p.rotary_dim / 2;
  const bool is_second = i >= half;  // of the pairs (i, i + half)
  if (!p.interleaved) {
    partner.load(head + (is_second ? i - half : i + half));
  } else if constexpr (kVecSize == 1) {
    partner.load(head + (i ^ 1));
  } else {
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) partner.elems[j] = own.elems[j ^ 1];
  }
#pragma unroll
  for (int j = 0; j < kVecSize; ++j) {
    const int pair = p.interleaved ? (i + j) / 2 : (is_second ? i - half : i) + j;
    const bool adds = p.interleaved ? (i + j) % 2 != 0 : is_second;
    const float2 angle = *reinterpret_cast<const float2*>(table_row + 2 * pair);  // cosine, sine
    const float product = to_float(partner.elems[j]) * angle.y;
    y.elems[j] = from_float<T>(fmaf(to_float(own.elems[j]), angle.x, adds ? product : -product));
  }
  return y;
}

template <typename T, typename Config>
__global__ __launch_bounds__(Config::kThreads) void rope_kernel(const RopeParams p) {
  constexpr int kSize = Config::kVecSize;
  const int token = int(blockIdx.x), row = token / p.seq_len, column = token % p.seq_len;
  const int num_kv_heads = p.slots.data != nullptr ? p.num_kv_heads : 0;

  bool valid = true;
  int64_t position = 0, slot = 0;
  if (p.positions.data != nullptr) {
    position = p.positions.data[row * p.positions.batch_stride + column * p.positions.token_stride];
    valid = position >= 0 && position < p.max_positions;
  }
  if (p.slots.data != nullptr) {
    slot = p.slots.data[row * p.slots.batch_stride + column * p.slots.token_stride];
    valid = valid && slot >= 0 && slot < p.max_seq_len;
    if (!valid && blockIdx.y == 0 && threadIdx.x == 0) *p.overflow = 1;
  }
  const float* table_row = p.table + position * p.rotary_dim;

  const int vecs_per_head = p.head_dim / kSize;
  const int index = int(blockIdx.y) * Config::kThreads + int(threadIdx.x);
  int head = index / vecs_per_head;
  const int i = index % vecs_per_head * kSize;
  const auto source = [&](const RopeHeads& x) {
    return static_cast<const T*>(x.data) + row * x.batch_stride + column * x.token_stride + head * x.head_stride;
  };
  const auto target = [&](const RopeCache& cache) {
    return static_cast<T*>(cache.data) + row * cache.batch_stride + head * cache.head_stride + slot * cache.slot_stride;
  };

  if (head < p.num_qo_heads) {
    RopeVec<T, kSize> y;
    if (valid) {
      y = rotate<T, kSize>(source(p.q), i, table_row, p);
    } else {
      const float fill = p.overflow != nullptr ? 0.f : NAN;
#pragma unroll
      for (int j = 0; j < kSize; ++j) y.elems[j] = from_float<T>(fill);
    }
    y.store(static_cast<T*>(p.q_out) + (int64_t(token) * p.num_qo_heads + head) * p.head_dim + i);
    return;
  }
  if (!valid) return;
  head -= p.num_qo_heads;
  if (head < num_kv_heads) {
    rotate<T, kSize>(source(p.k), i, table_row, p).store(target(p.k_cache) + i);
    return;
  }
  head -= num_kv_heads;
  if (head < num_kv_heads) {
    RopeVec<T, kSize> y;
    y.load(source(p.v) + i);
    y.store(target(p.v_cache) + i);
  }
}

}  // namespace fastshard

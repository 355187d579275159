// RoPE: each pair (a, b) of a head becomes (a cos - b sin, b cos + a sin), by the angles of the token's position
//
// Grid x counts tokens. A thread owns kVecSize elements of a head, the same ones of up to kHeads heads of the token, q
// then k then v: it reads their angles once. q goes to q_out, rotated k and v as it is go to their row of the cache. A
// partner half a head away is read by two threads, the second time from L1.
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
  static constexpr int kHeads = 4;  // of a thread, at most
  static constexpr int kVecSize = kVecSize_;  // one 16-byte vector, or 1 element for any alignment
  static_assert(kVecSize == 1 || kVecSize == Vec<T>::kSize);
};

// How the threads of a block cover heads side by side.
template <typename Config>
struct RopeCover {
  int lanes;  // threads in a head; grid z covers the rest of a longer one
  int heads;  // of a block at a time

  __host__ __device__ explicit RopeCover(int head_dim) {
    const int vecs = head_dim / Config::kVecSize;
    lanes = vecs < Config::kThreads ? vecs : Config::kThreads;
    heads = Config::kThreads / lanes;
  }
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

  __device__ void fill(float value) {
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) elems[j] = from_float<T>(value);
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

// What elements [i, i + kVecSize) of each head of a token turn by.
template <typename T, int kVecSize>
struct RopeAngles {
  float cosines[kVecSize], sines[kVecSize];  // sines negative where the partner's part is subtracted
  int to_partner;  // elements from these to their partners; 0 where they are neighbours in a vector

  __device__ void set_partner(int i, const RopeParams& p) {
    to_partner = i < p.rotary_dim / 2 ? p.rotary_dim / 2 : -(p.rotary_dim / 2);
    if (p.interleaved) to_partner = kVecSize > 1 ? 0 : i % 2 == 0 ? 1 : -1;
  }

  // row: of the table, [rotary_dim / 2, 2] cosine and sine
  __device__ void load(const float* row, int i, const RopeParams& p) {
    const int half = p.rotary_dim / 2;
    const bool is_second = !p.interleaved && i >= half;
    const float* const first = row + (p.interleaved ? i / 2 * 2 : 2 * (is_second ? i - half : i));
    float2 pairs[kVecSize];
    if constexpr (kVecSize == 1) {
      pairs[0] = *reinterpret_cast<const float2*>(first);
    } else {
#pragma unroll
      for (int n = 0; n < kVecSize; n += 2) {
        if (p.interleaved && n >= kVecSize / 2) continue;
        const Vec<float> two = load_vec(first + 2 * n);
        pairs[n] = make_float2(two[0], two[1]);
        pairs[n + 1] = make_float2(two[2], two[3]);
      }
    }
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) {
      const float2 pair = p.interleaved ? pairs[j / 2] : pairs[j];
      const bool adds = p.interleaved ? (i + j) % 2 != 0 : is_second;
      cosines[j] = pair.x;
      sines[j] = adds ? pair.y : -pair.y;
    }
  }

  // The partners of own, which was loaded from ptr.
  __device__ RopeVec<T, kVecSize> partner(const RopeVec<T, kVecSize>& own, const T* ptr) const {
    RopeVec<T, kVecSize> partner;
    if (to_partner != 0) {
      partner.load(ptr + to_partner);
    } else if constexpr (kVecSize > 1) {
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) partner.elems[j] = own.elems[j ^ 1];
    }
    return partner;
  }

  __device__ void rotate(RopeVec<T, kVecSize>& own, const RopeVec<T, kVecSize>& partner) const {
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) {
      own.elems[j] = from_float<T>(fmaf(to_float(own.elems[j]), cosines[j], to_float(partner.elems[j]) * sines[j]));
    }
  }
};

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
    if (!valid && blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0) *p.overflow = 1;
  }
  const RopeCover<Config> cover(p.head_dim);
  const int first_head = int(blockIdx.y) * cover.heads + int(threadIdx.x) / cover.lanes;
  const int i = (int(blockIdx.z) * cover.lanes + int(threadIdx.x) % cover.lanes) * kSize;
  if (int(threadIdx.x) >= cover.heads * cover.lanes || i >= p.head_dim) return;

  const bool rotates = i < p.rotary_dim;
  RopeAngles<T, kSize> angles;
  angles.set_partner(i, p);

  const int num_rotated = p.num_qo_heads + num_kv_heads, num_heads = num_rotated + num_kv_heads;
  const auto source = [&](const RopeHeads& x, int head) {
    return static_cast<const T*>(x.data) + row * x.batch_stride + column * x.token_stride + head * x.head_stride + i;
  };
  const auto target = [&](const RopeCache& cache, int head) {
    return static_cast<T*>(cache.data) + row * cache.batch_stride + head * cache.head_stride +
           slot * cache.slot_stride + i;
  };
  RopeVec<T, kSize> own[Config::kHeads], partner[Config::kHeads];  // in flight beside position, slot and angles
  const int step = int(gridDim.y) * cover.heads;
#pragma unroll
  for (int n = 0; n < Config::kHeads; ++n) {
    const int head = first_head + n * step;
    if (head >= num_heads) continue;
    const T* const from = head < p.num_qo_heads ? source(p.q, head)
                          : head < num_rotated  ? source(p.k, head - p.num_qo_heads)
                                                : source(p.v, head - num_rotated);
    own[n].load(from);
    if (rotates && head < num_rotated) partner[n] = angles.partner(own[n], from);
  }
  if (rotates && valid) angles.load(p.table + position * p.rotary_dim, i, p);
#pragma unroll
  for (int n = 0; n < Config::kHeads; ++n) {
    const int head = first_head + n * step;
    if (head >= num_heads) continue;
    if (rotates && valid && head < num_rotated) angles.rotate(own[n], partner[n]);
    if (head < p.num_qo_heads) {
      if (!valid) own[n].fill(p.overflow != nullptr ? 0.f : NAN);
      own[n].store(static_cast<T*>(p.q_out) + (int64_t(token) * p.num_qo_heads + head) * p.head_dim + i);
    } else if (valid) {
      own[n].store(head < num_rotated ? target(p.k_cache, head - p.num_qo_heads)
                                      : target(p.v_cache, head - num_rotated));
    }
  }
}

}  // namespace fastshard

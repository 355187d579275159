// RMSNorm: out[t, h] = x[t, h] * rsqrt(mean_h(x[t, h]^2) + eps) * weight[h]
//
// One CTA per token. The row is read once into registers, reduced in fp32 and written once:
// the floor is 2 * hidden_size * sizeof(T) bytes of HBM traffic per token.
#pragma once
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "norm/rms_norm.h"

namespace fastshard {

template <int kThreads_, int kVecsPerThread_>
struct RmsNormConfig {
  static constexpr int kThreads = kThreads_;
  static constexpr int kVecsPerThread = kVecsPerThread_;  // 16-byte vectors held in registers
  static constexpr int kMaxRowBytes = kThreads * kVecsPerThread * 16;
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
};

template <typename Config>
struct RmsNormSharedStorage {
  float warp_sums[Config::kThreads / 32];
};

template <typename T, typename Config>
__global__ __launch_bounds__(Config::kThreads) void rms_norm_kernel(const RmsNormParams p) {
  FS_SHARED_STORAGE(RmsNormSharedStorage<Config>, smem);
  constexpr int kVecSize = Vec<T>::kSize;
  const T* x = static_cast<const T*>(p.x) + int64_t(blockIdx.x) * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + int64_t(blockIdx.x) * p.hidden_size;

  // Load the row; consecutive threads read consecutive vectors.
  Vec<T> row[Config::kVecsPerThread];
  float sum_sq = 0.f;
#pragma unroll
  for (int i = 0; i < Config::kVecsPerThread; ++i) {
    const int h = (i * Config::kThreads + threadIdx.x) * kVecSize;
    if (h >= p.hidden_size) break;
    row[i] = load_vec(x + h);
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) sum_sq += to_float(row[i][j]) * to_float(row[i][j]);
  }

  const float rstd = rsqrtf(block_reduce_sum<Config::kThreads>(sum_sq, smem.warp_sums) / p.hidden_size + p.eps);

  // Scale and store; the reference in fastshard/ops/norm.py rounds in the same places.
#pragma unroll
  for (int i = 0; i < Config::kVecsPerThread; ++i) {
    const int h = (i * Config::kThreads + threadIdx.x) * kVecSize;
    if (h >= p.hidden_size) break;
    const Vec<T> w = load_vec(weight + h);
    Vec<T> y;
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) {
      float x_hat = to_float(row[i][j]) * rstd;
      if (!p.weight_in_fp32) x_hat = to_float(from_float<T>(x_hat));
      y[j] = from_float<T>(x_hat * to_float(w[j]));
    }
    store_vec(out + h, y);
  }
}

}  // namespace fastshard

// out[t, n] = residual[t, n] + bias[n] + sum_k rms_norm(x)[t, k] * weight[n, k] for 1..16 rows t
//
// Blocks stride over tiles of weight rows as tile.cuh says. Sums and epilogue are fp32, rounded once.
// Floor: the weights' bytes at the bandwidth of the memory; rows of x, residual and out are small beside them.
#pragma once
#include "gemv/linear.h"
#include "gemv/tile.cuh"

namespace fastshard {

template <typename T, typename Config>
__global__ __launch_bounds__(Config::kThreads, 2) void linear_kernel(const LinearParams p) {
  FS_SHARED_STORAGE(GemvSharedStorage<Config>, smem);
  const GemvProblem<T> problem{static_cast<const T*>(p.x),
                               static_cast<const T*>(p.weight),
                               static_cast<const T*>(p.norm_weight),
                               p.x_stride,
                               p.weight_stride,
                               p.num_tokens,
                               p.out_features,
                               p.in_features,
                               p.norm_eps,
                               p.norm_weight_in_fp32};
  const T* bias = static_cast<const T*>(p.bias);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);

  const auto store = [&](int token, int n, float sum) {
    if (bias != nullptr) sum += to_float(bias[n]);
    if (residual != nullptr) sum += to_float(residual[token * p.residual_stride + n]);
    out[int64_t(token) * p.out_features + n] = from_float<T>(sum);
  };
  GemvBatch<Config> batch;
  load_first_batch(batch, problem);
  gemv(problem, smem, batch, [&](int token, int n, float first, float second) {
    store(token, n, first);
    if (n + 1 < p.out_features) store(token, n + 1, second);
  });
}

}  // namespace fastshard

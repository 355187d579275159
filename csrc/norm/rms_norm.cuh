// RMSNorm: out[t, h] = x[t, h] * rsqrt(mean_h(x[t, h]^2) + eps) * weight[h], of x or of x + residual
//
// One CTA per token; for short rows a part of a warp (row.cuh). The row is read once into registers, reduced in fp32
// and written once: the floor is 2 * hidden_size * sizeof(T) bytes of HBM traffic per token, 4 * with the residual.
#pragma once
#include "norm/rms_norm.h"
#include "norm/row.cuh"

namespace fastshard {

template <typename T, typename Config, bool kAdd>
__global__ __launch_bounds__(Config::kThreads) void rms_norm_kernel(const RmsNormParams p) {
  FS_SHARED_STORAGE(RowSharedStorage<Config>, smem);
  const Row<T, Config> row(p.rows);
  Vec<T> x[Config::kVecsPerThread], weight[Config::kVecsPerThread];
  row.template load_sum<kAdd>(x, p.rows);
  row.load(weight, static_cast<const T*>(p.weight));  // in flight during the sum

  const float sum_sq = row.sum(x, smem, [](float v) { return v * v; });
  const float rstd = inverse_sqrt(fmaf(sum_sq, p.rows.inv_hidden_size, p.eps));

  // The reference in fastshard/ops/norm.py rounds in the same places.
  row.store(x, p.rows, [&](int i, Floats<T>& y) {
    const Floats<T> w = to_floats(weight[i]);
#pragma unroll
    for (int j = 0; j < Vec<T>::kSize; ++j) y[j] *= rstd;
    if (!p.weight_in_fp32) y = to_floats(from_floats(y));
#pragma unroll
    for (int j = 0; j < Vec<T>::kSize; ++j) y[j] *= w[j];
  });
}

template <typename T, typename Menu>
void launch_rms_norm(const RmsNormParams& p, RowVariant variant, cudaStream_t stream) {
  with_row_config<T, Menu>("rms_norm", p.rows, variant, [&](auto config) {
    using Config = decltype(config);
    const auto kernel = p.rows.residual ? rms_norm_kernel<T, Config, true> : rms_norm_kernel<T, Config, false>;
    launch_kernel<RowSharedStorage<Config>>(kernel, row_grid<Config>(p.rows), Config::kThreads, stream, p);
  });
}

}  // namespace fastshard

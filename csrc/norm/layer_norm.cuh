// LayerNorm: out[t, h] = (x[t, h] - mean) * rsqrt(var + eps) * weight[h] + bias[h], of x or of x + residual
//
// One CTA per token; for short rows a part of a warp (row.cuh). The row is read once into registers; the variance is
// summed about means, in a second pass over them, so that a large mean costs no digits.
// Floor: 2 * hidden_size * sizeof(T) bytes of HBM traffic per token, 4 * with the residual.
#pragma once
#include "norm/layer_norm.h"
#include "norm/row.cuh"

namespace fastshard {

template <typename T, typename Config, bool kAdd>
__global__ __launch_bounds__(Config::kThreads) void layer_norm_kernel(const LayerNormParams p) {
  FS_SHARED_STORAGE(RowSharedStorage<Config>, smem);
  const Row<T, Config> row(p.rows);
  Vec<T> x[Config::kVecsPerThread];
  row.template load_sum<kAdd>(x, p.rows);

  const Moments moments = row.moments(x, smem);
  const float mean = moments.mean;
  const float rstd = inverse_sqrt(moments.squares / p.rows.hidden_size + p.eps);

  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  Vec<T> w[Config::kVecsPerThread], b[Config::kVecsPerThread];
  if (weight != nullptr) row.load(w, weight);
  if (bias != nullptr) row.load(b, bias);
  row.store(x, p.rows, [&](int i, int j, float v) {
    float y = (v - mean) * rstd;
    if (weight != nullptr) y *= to_float(w[i][j]);
    if (bias != nullptr) y += to_float(b[i][j]);
    return y;
  });
}

}  // namespace fastshard

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
  const T* const weight = static_cast<const T*>(p.weight);
  const T* const bias = static_cast<const T*>(p.bias);
  // In flight during the sums, where registers have room for them and the sums take long enough.
  constexpr bool kEarly = Config::kThreadsPerRow > 32 && Config::kVecsPerThread <= 2;
  Vec<T> weights[Config::kVecsPerThread], biases[Config::kVecsPerThread];
  if (kEarly && weight != nullptr) row.load(weights, weight);
  if (kEarly && bias != nullptr) row.load(biases, bias);

  const Moments moments = row.moments(x, p.rows, smem);
  const float mean = moments.mean;
  const float rstd = inverse_sqrt(fmaf(moments.squares, p.rows.inv_hidden_size, p.eps));

  row.store(x, p.rows, [&](int i, Floats<T>& y) {
    if (!row.inside(i)) return;
#pragma unroll
    for (int j = 0; j < Vec<T>::kSize; ++j) y[j] = (y[j] - mean) * rstd;
    if (weight != nullptr) {
      const Floats<T> w = to_floats(kEarly ? weights[i] : load_vec(weight + row.offset(i)));
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) y[j] *= w[j];
    }
    if (bias != nullptr) {
      const Floats<T> b = to_floats(kEarly ? biases[i] : load_vec(bias + row.offset(i)));
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) y[j] += b[j];
    }
  });
}

template <typename T, typename Menu>
void launch_layer_norm(const LayerNormParams& p, RowVariant variant, cudaStream_t stream) {
  with_row_config<T, Menu>("layer_norm", p.rows, variant, [&](auto config) {
    using Config = decltype(config);
    const auto kernel = p.rows.residual ? layer_norm_kernel<T, Config, true> : layer_norm_kernel<T, Config, false>;
    launch_kernel<RowSharedStorage<Config>>(kernel, row_grid<Config>(p.rows), Config::kThreads, stream, p);
  });
}

}  // namespace fastshard

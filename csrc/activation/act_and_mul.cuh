// out[t, i] = activation(gate[t, i]) * up[t, i]
//
// One thread computes kVecSize neighbouring outputs; grid x counts tokens, grid y parts of a row.
// Floor: 3 * intermediate_size * sizeof(T) bytes of HBM traffic per token.
#pragma once
#include "activation/act_and_mul.h"
#include "activation/activate.cuh"
#include "common/launch.cuh"
#include "common/vec.cuh"

namespace fastshard {

template <typename T, int kVecSize_>
struct ActAndMulConfig {
  static constexpr int kThreads = 128;
  static constexpr int kVecSize = kVecSize_;  // outputs of a thread: one 16-byte vector, or 1 for any alignment
  static constexpr int kOutputsPerBlock = kThreads * kVecSize;
  static_assert(kVecSize == 1 || kVecSize == Vec<T>::kSize);
};

template <typename T, typename Config>
__global__ __launch_bounds__(Config::kThreads) void act_and_mul_kernel(const ActAndMulParams p) {
  constexpr int kSize = Config::kVecSize;
  const int column = (int(blockIdx.y) * Config::kThreads + int(threadIdx.x)) * kSize;
  if (column >= p.intermediate_size) return;
  const T* row = static_cast<const T*>(p.gate_up) + row_offset(p.gate_up_layout, blockIdx.x);
  T* out = static_cast<T*>(p.out) + int64_t(blockIdx.x) * p.intermediate_size + column;

  // pair: gates then ups, or gates and ups in turn
  const T* first = row + (p.interleaved ? 2 * int64_t(column) : column);
  const T* second = p.interleaved ? first + kSize : first + p.intermediate_size;
  T pair[2 * kSize], y[kSize];
  if constexpr (kSize == 1) {
    pair[0] = *first;
    pair[1] = *second;
  } else {
    const Vec<T> a = load_vec(first), b = load_vec(second);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      pair[j] = a[j];
      pair[kSize + j] = b[j];
    }
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const T gate = p.interleaved ? pair[2 * j] : pair[j];
    const T up = p.interleaved ? pair[2 * j + 1] : pair[kSize + j];
    y[j] = from_float<T>(activate(p.activation, to_float(gate)) * to_float(up));
  }
  if constexpr (kSize == 1) {
    *out = y[0];
  } else {
    Vec<T> v;
#pragma unroll
    for (int j = 0; j < kSize; ++j) v[j] = y[j];
    store_vec(out, v);
  }
}

}  // namespace fastshard

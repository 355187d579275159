// hidden = act(x . gate) * (x . up), out = residual + hidden . down for 1..16 rows, in one cooperative launch
//
// Phase 1: blocks stride over tiles of gate_up rows (gemv/tile.cuh); the thread that sums a gate sums its up too, and
// writes hidden, rounded to T. Phase 2, behind a grid barrier: the same over the rows of down, whose first weights are
// in flight while the block waits. Sums, activation and residual are fp32.
// Floor: 3 * hidden_size * intermediate_size * sizeof(T) bytes of weights at the bandwidth of the memory.
#pragma once
#include "activation/activate.cuh"
#include "gemv/tile.cuh"
#include "mlp/fused_mlp.h"

namespace fastshard {

template <typename T, typename Config>
__global__ __launch_bounds__(Config::kThreads, 2) void fused_mlp_kernel(const FusedMlpParams p) {
  FS_SHARED_STORAGE(GemvSharedStorage<Config>, smem);
  T* hidden = static_cast<T*>(p.hidden);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  GemvProblem<T> problem{};
  GemvBatch<Config> batch;
  problem.num_tokens = p.num_tokens;

  if (p.phase != MlpPhase::kDown) {
    problem.x = static_cast<const T*>(p.x);
    problem.x_stride = p.x_stride;
    problem.weight = static_cast<const T*>(p.gate_up_weight);
    problem.weight_stride = p.gate_up_stride;
    problem.out_features = 2 * p.intermediate_size;
    problem.in_features = p.hidden_size;
    load_first_batch(batch, problem);
    gemv(problem, smem, batch, [&](int token, int n, float gate, float up) {
      hidden[int64_t(token) * p.intermediate_size + n / 2] = from_float<T>(activate(p.activation, gate) * up);
    });
  }
  if (p.phase != MlpPhase::kGateUp) {
    problem.x = hidden;
    problem.x_stride = p.intermediate_size;
    problem.weight = static_cast<const T*>(p.down_weight);
    problem.weight_stride = p.down_stride;
    problem.out_features = p.hidden_size;
    problem.in_features = p.intermediate_size;
    load_first_batch(batch, problem);
    if (p.phase == MlpPhase::kBoth) grid_sync();  // all of hidden is written
    // hidden_size is even: n + 1 is a row too
    gemv(problem, smem, batch, [&](int token, int n, float first, float second) {
      if (residual != nullptr) {
        first += to_float(residual[token * p.residual_stride + n]);
        second += to_float(residual[token * p.residual_stride + n + 1]);
      }
      out[int64_t(token) * p.hidden_size + n] = from_float<T>(first);
      out[int64_t(token) * p.hidden_size + n + 1] = from_float<T>(second);
    });
  }
}

}  // namespace fastshard

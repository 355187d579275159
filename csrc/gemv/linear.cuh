// out[t, n] = residual[t, n] + bias[n] + sum_k rms_norm(x)[t, k] * weight[n, k] for 1..16 rows t
//
// A block owns the tiles of 8 weight rows blockIdx.x, blockIdx.x + gridDim.x, ..., which stream through its shared
// memory (weight_stream.cuh); its warps hold x in registers (product.cuh), each its own columns.
// Sums and epilogue are fp32, rounded once.
// Floor: the weights' bytes at the bandwidth of the memory; rows of x, residual and out are small beside them.
#pragma once
#include "common/reduce.cuh"
#include "gemv/linear.h"
#include "gemv/matrix.cuh"
#include "gemv/rows.cuh"

namespace fastshard {

constexpr int kLinearStages = 5;  // chunks of weights that a block has on their way: 80 KB

// kTokens: 8 or 16, at most.
template <typename T, int kTokens>
struct LinearStorage {
  alignas(128) unsigned char queue[kLinearStages * kChunkBytes];
  ProductStorage<T> product;
  Squares<kTokens> squares;
  Matrix<T> matrix;
};

// The squares of x, summed up. All threads of the block call it.
template <typename T, int kTokens>
__device__ __forceinline__ void sum_squares(Squares<kTokens>& squares, const Rows<T>& rows) {
  const int token = threadIdx.x % 32 / 4, warp = threadIdx.x / 32;
  float sums[kTokens / 8] = {};
#pragma unroll 1
  for (int slice = 0; slice < num_chunks(rows.in_features); slice += kSliceChunks) {
    Activations<kTokens> x;
    load_rows(x, rows, slice);
#pragma unroll
    for (int i = 0; i < kSliceSteps; ++i) {
#pragma unroll
      for (int half = 0; half < x.kHalves; ++half) {
        const uint4 v = x.get(i, half);
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 pair = unpack_pair<T>(pairs[j]);
          sums[half] += pair.x * pair.x + pair.y * pair.y;
        }
      }
    }
  }
#pragma unroll
  for (int half = 0; half < kTokens / 8; ++half) {
    const float sum = warp_reduce_sum<4>(sums[half]);
    if (threadIdx.x % 4 == 0) squares[token + 8 * half][warp] = sum;
  }
  __syncthreads();
}

// Chunks slice, slice + 1, ... of x through the norm; rounds as the reference of rms_norm.
template <typename T, int kTokens>
__device__ __forceinline__ void normalize(Activations<kTokens>& x, const LinearParams& p, const Rows<T>& rows,
                                          int slice, int chunks, const Squares<kTokens>& squares) {
  const T* const norm_weight = static_cast<const T*>(p.norm_weight);
  const LaneColumns<T> columns(rows, slice);
  float rstd[kTokens / 8];
#pragma unroll
  for (int half = 0; half < kTokens / 8; ++half) {
    rstd[half] = rstd_of<kTokens>(squares, threadIdx.x % 32 / 4 + 8 * half, p.in_features, p.norm_eps);
  }
#pragma unroll
  for (int chunk = 0; chunk < kSliceChunks; ++chunk) {
    if (chunk >= chunks) break;
    uint4 weights[kChunkSteps];
#pragma unroll
    for (int i = 0; i < kChunkSteps; ++i) {
      const int step = chunk * kChunkSteps + i;
      if (columns.inside(step, 0)) {
        weights[i] = *reinterpret_cast<const uint4*>(norm_weight + columns.column(step));
      }
    }
#pragma unroll
    for (int i = 0; i < kChunkSteps; ++i) {
      const int step = chunk * kChunkSteps + i;
      if (!columns.inside(step, 0)) break;
      const uint32_t w[4] = {weights[i].x, weights[i].y, weights[i].z, weights[i].w};
#pragma unroll
      for (int half = 0; half < x.kHalves; ++half) {
        const uint4 v = x.get(step, half);
        uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float2 x_hat = unpack_pair<T>(pairs[j]);
          x_hat.x *= rstd[half], x_hat.y *= rstd[half];
          if (!p.norm_weight_in_fp32) x_hat = unpack_pair<T>(pack_pair<T>(x_hat.x, x_hat.y));
          const float2 weight = unpack_pair<T>(w[j]);
          pairs[j] = pack_pair<T>(x_hat.x * weight.x, x_hat.y * weight.y);
        }
        x.set(step, half, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
      }
    }
  }
}

template <typename T, int kTokens>
__global__ __launch_bounds__(kStreamThreads, 1) void linear_kernel(const __grid_constant__ LinearParams p) {
  using Storage = LinearStorage<T, kTokens>;
  FS_SHARED_STORAGE(Storage, smem);
  if (threadIdx.x == 0) {
    smem.matrix = streamed_matrix<T>(p.weight, p.weight_stride, p.out_features, p.in_features,
                                     whole_rows(p.out_features, p.in_features, p.num_tokens));
  }
  __syncthreads();
  MatrixSchedule<T> schedule(&smem.matrix, 0, 1);
  WeightStream<T, kLinearStages, MatrixSchedule<T>> stream(smem.queue, schedule);

  const Rows<T> rows{static_cast<const T*>(p.x), p.x_stride, p.num_tokens, p.in_features};
  const T* const bias = static_cast<const T*>(p.bias);
  const T* const residual = static_cast<const T*>(p.residual);
  if (p.norm_weight != nullptr) sum_squares<T, kTokens>(smem.squares, rows);
  const auto load = [&](Activations<kTokens>& x, int slice, int chunks, bool, WarpStorage<T>&) {
    load_rows(x, rows, slice);
    if (p.norm_weight != nullptr) normalize<T, kTokens>(x, p, rows, slice, chunks, smem.squares);
  };
  struct Kept {
    T bias[2], residual[2];
  };
  const auto begin = [&](bool valid, int token, int n) {
    Kept kept;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool inside = valid && n + i < p.out_features;
      kept.bias[i] = inside && bias != nullptr ? bias[n + i] : from_float<T>(0.f);
      kept.residual[i] =
          inside && residual != nullptr ? residual[token * p.residual_stride + n + i] : from_float<T>(0.f);
    }
    return kept;
  };
  const auto finish = [&](const Kept& kept, bool valid, int token, int n, float first, float second) {
    if (!valid) return;
    T* const to = static_cast<T*>(p.out) + int64_t(token) * p.out_features + n;
    to[0] = from_float<T>(first + to_float(kept.bias[0]) + to_float(kept.residual[0]));
    if (n + 1 < p.out_features) to[1] = from_float<T>(second + to_float(kept.bias[1]) + to_float(kept.residual[1]));
  };
  multiply<kTokens, T>(stream, smem.product, smem.matrix.segment, p.out_features, p.num_tokens, load, begin, finish);
}

}  // namespace fastshard

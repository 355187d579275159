// out[t, n] = residual[t, n] + bias[n] + sum_k rms_norm(x)[t, k] * weight[n, k] for 1..16 rows t
//
// Up to 8 rows, linear_kernel: a block owns the tiles of 8 weight rows blockIdx.x, blockIdx.x + gridDim.x, ..., which
// stream through its shared memory (weight_stream.cuh); its warps hold x in registers (product.cuh), each its own
// columns. 9..16 rows, wide_linear_kernel: blocks stride over larger tiles as tile.cuh says.
// Sums and epilogue are fp32, rounded once.
// Floor: the weights' bytes at the bandwidth of the memory; rows of x, residual and out are small beside them.
#pragma once
#include "common/reduce.cuh"
#include "gemv/linear.h"
#include "gemv/product.cuh"
#include "gemv/tile.cuh"

namespace fastshard {

constexpr int kLinearStages = 5;  // chunks of weights that a block has on their way: 80 KB

template <typename T>
struct LinearStorage {
  alignas(128) unsigned char queue[kLinearStages * kChunkBytes];
  ProductStorage<T> product;
  float squares[kProductTokens][kStreamWarps];  // the warps' sums of x^2
};

// The runs of the weights: the source of their stream.
template <typename T>
class LinearSchedule {
 public:
  __device__ __forceinline__ LinearSchedule(const LinearParams& p, const Segment& segment) : p_(p), segment_(segment) {}

  __device__ __forceinline__ const T* next(Run& run) {
    if (index_ == num_runs(segment_)) return nullptr;
    run = run_of(segment_, p_.out_features, p_.in_features, int(p_.weight_stride), index_++);
    return static_cast<const T*>(p_.weight);
  }

 private:
  const LinearParams& p_;
  const Segment& segment_;
  int index_ = 0;
};

// The columns of x and of norm_weight that a lane holds of a slice: 8 of each step, of token lane / 4.
struct LaneColumns {
  int first, end;

  __device__ __forceinline__ LaneColumns(const LinearParams& p, int slice)
      : first(slice * kChunkColumns + threadIdx.x / 32 * kWarpColumns + threadIdx.x % 4 * 8),
        end(int(threadIdx.x % 32 / 4) < p.num_tokens ? p.in_features : 0) {}

  __device__ __forceinline__ int column(int step) const {
    return first + step / kChunkSteps * kChunkColumns + step % kChunkSteps * 32;
  }
  __device__ __forceinline__ bool inside(int step) const { return column(step) < end; }
};

constexpr int kSliceSteps = kSliceChunks * kChunkSteps;

// The lane's activations of a slice, not normalised; zeros past the columns and past the tokens.
template <typename T>
__device__ __forceinline__ void load_rows(Activations& x, const LinearParams& p, const LaneColumns& columns) {
  const T* const row = static_cast<const T*>(p.x) + int(threadIdx.x % 32 / 4) * p.x_stride;
#pragma unroll
  for (int i = 0; i < kSliceSteps; ++i) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (columns.inside(i)) v = *reinterpret_cast<const uint4*>(row + columns.column(i));
    x.set(i, make_uint4(v.x, v.z, v.y, v.w));
  }
}

// 1 / sqrt(mean(x^2) + eps) of token lane / 4. All threads of the block call it.
template <typename T>
__device__ __forceinline__ float load_rstd(const LinearParams& p, LinearStorage<T>& smem) {
  const int token = threadIdx.x % 32 / 4, warp = threadIdx.x / 32;
  float sum = 0.f;
#pragma unroll 1
  for (int slice = 0; slice < num_chunks(p.in_features); slice += kSliceChunks) {
    Activations x;
    load_rows<T>(x, p, LaneColumns(p, slice));
#pragma unroll
    for (int i = 0; i < kSliceSteps; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = unpack_pair<T>(x.a[i][j]);
        sum += pair.x * pair.x + pair.y * pair.y;
      }
    }
  }
  sum = warp_reduce_sum<4>(sum);
  if (threadIdx.x % 4 == 0) smem.squares[token][warp] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int i = 0; i < kStreamWarps; ++i) sum += smem.squares[token][i];
  return rsqrtf(sum / p.in_features + p.norm_eps);
}

// x through the norm; rounds as the reference of rms_norm.
template <typename T>
__device__ __forceinline__ void normalize(Activations& x, const LinearParams& p, const LaneColumns& columns,
                                          float rstd) {
#pragma unroll
  for (int i = 0; i < kSliceSteps; ++i) {
    if (!columns.inside(i)) continue;
    const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.norm_weight) + columns.column(i));
    const uint32_t weights[4] = {v.x, v.z, v.y, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float2 x_hat = unpack_pair<T>(x.a[i][j]);
      x_hat.x *= rstd, x_hat.y *= rstd;
      if (!p.norm_weight_in_fp32) x_hat = unpack_pair<T>(pack_pair<T>(x_hat.x, x_hat.y));
      const float2 weight = unpack_pair<T>(weights[j]);
      x.a[i][j] = pack_pair<T>(x_hat.x * weight.x, x_hat.y * weight.y);
    }
  }
}

template <typename T>
__global__ __launch_bounds__(kStreamThreads, 1) void linear_kernel(const __grid_constant__ LinearParams p) {
  FS_SHARED_STORAGE(LinearStorage<T>, smem);
  const Segment segment = whole_rows(p.out_features, p.in_features, p.num_tokens);
  LinearSchedule<T> schedule(p, segment);
  WeightStream<T, kLinearStages, LinearSchedule<T>> stream(smem.queue, schedule);

  const T* const bias = static_cast<const T*>(p.bias);
  const T* const residual = static_cast<const T*>(p.residual);
  const float rstd = p.norm_weight != nullptr ? load_rstd(p, smem) : 0.f;
  const auto load = [&](Activations& x, int slice, int, bool, WarpStorage<T>&) {
    const LaneColumns columns(p, slice);
    load_rows<T>(x, p, columns);
    if (p.norm_weight != nullptr) normalize<T>(x, p, columns, rstd);
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
  multiply<T>(stream, smem.product, segment, p.out_features, p.num_tokens, load, begin, finish);
}

template <typename T, typename Config>
__global__ __launch_bounds__(Config::kThreads, 2) void wide_linear_kernel(const LinearParams p) {
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

// y[m, n] = x[m, :] . W[n, :] for up to 16 rows m: weights stream once from global memory into tensor cores.
//
// A block owns 16 * kWeightTiles weight rows at a time; its warps split K and add their sums up in shared memory. The
// weights are the A operand of mma.m16n8k16, the activations B, so that 1..8 rows cost the same. Both operands permute
// k alike: in a step of 32 values, thread t of a group of four holds values 8t..8t+7, which is one 16-byte load of a
// weight row, straight into fragment registers, and one 16-byte load of an activation row from shared memory.
// Fragment rows g and g + 8 are weight rows 2g and 2g + 1: a thread holds neighbouring rows, such as gate and up.
// Floor: N * K * sizeof(T) bytes of weights at the bandwidth of the memory.
#pragma once
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace fastshard {

template <int kWeightTiles_, int kTokenTiles_, int kDepth_, int kActivationElems_>
struct GemvConfig {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kWeightTiles = kWeightTiles_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kFragments = kWeightTiles * kTokenTiles;
  static constexpr int kTileRows = 16 * kWeightTiles;  // weight rows of a block's tile
  static constexpr int kMaxTokens = 8 * kTokenTiles;
  static constexpr int kDepth = kDepth_;               // steps of 32 k in a batch: what a thread keeps in flight
  static constexpr int kBatch = 32 * kDepth;           // k values a warp loads at once
  static constexpr int kRound = kBatch * kWarps;       // k values the block's warps load at once
  static constexpr int kActivationElems = kActivationElems_;  // 16-bit activations in shared memory
  static_assert(kActivationElems / kMaxTokens >= kRound && kRound % 64 == 0);
};

using GemvNarrow = GemvConfig<1, 1, 4, 22 * 1024>;  // 1..8 tokens: 16 weight rows a block
using GemvWide = GemvConfig<2, 2, 2, 16 * 1024>;    // 9..16 tokens: 32 weight rows, as x is read once a tile
constexpr int kGemvMaxTokens = GemvWide::kMaxTokens;

// Two blocks fit the 100 KB of an 8.6 multiprocessor, of which each block costs 1 KB besides.
template <typename Config>
struct GemvSharedStorage {
  uint4 activations[Config::kActivationElems / 8];  // [num_tokens, chunk] of T, 16-byte units swizzled
  float4 sums[Config::kWarps][Config::kFragments][32];
  float rstd[Config::kMaxTokens];
};
static_assert(2 * (sizeof(GemvSharedStorage<GemvNarrow>) + 1024) <= 100 * 1024);
static_assert(2 * (sizeof(GemvSharedStorage<GemvWide>) + 1024) <= 100 * 1024);

// One product. in_features is a multiple of 8; rows of x, weight and norm_weight are 16-byte aligned.
template <typename T>
struct GemvProblem {
  const T* x;            // [num_tokens, in_features]
  const T* weight;       // [out_features, in_features]
  const T* norm_weight;  // [in_features] or null: x goes through an RMSNorm first
  int64_t x_stride;
  int64_t weight_stride;
  int num_tokens;
  int out_features;
  int in_features;
  float norm_eps;
  bool norm_weight_in_fp32;
};

// What one thread has in flight: rows 2g and 2g + 1 of each of the weight tiles, kDepth steps of 32 k.
template <typename Config>
struct GemvBatch {
  uint4 rows[Config::kDepth][Config::kWeightTiles][2];
};

// Load the warp's batch of tile `tile` at k; zeros past the matrix.
template <typename Config, typename T>
__device__ __forceinline__ void load_batch(GemvBatch<Config>& batch, const GemvProblem<T>& p, int tile, int k) {
  const int group = threadIdx.x % 32 / 4, thread = threadIdx.x % 4;
  const int row = tile * Config::kTileRows + 2 * group;
#pragma unroll
  for (int step = 0; step < Config::kDepth; ++step) {
    const int column = k + 32 * step + 8 * thread;
#pragma unroll
    for (int w = 0; w < Config::kWeightTiles; ++w) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = row + 16 * w + i;
        batch.rows[step][w][i] = ptx::ld_global_streaming_or_zero(
            p.weight + n * p.weight_stride + column, n < p.out_features && column < p.in_features);
      }
    }
  }
}

// Load the first batch that gemv() will use: early, so that it is in flight while the block waits for something else.
template <typename Config, typename T>
__device__ __forceinline__ void load_first_batch(GemvBatch<Config>& batch, const GemvProblem<T>& p) {
  load_batch(batch, p, blockIdx.x, threadIdx.x / 32 * Config::kBatch);
}

// The 16-byte unit of activations[token][k] in a chunk of `chunk` values (a multiple of 64) a token. Odd tokens swap
// the 64-byte halves of a line, so that the eight lanes of a phase, two tokens by 64 bytes, touch every bank once.
__device__ __forceinline__ int activation_unit(int token, int k, int chunk) {
  return token * (chunk / 8) + ((k / 8) ^ (token % 2 * 4));
}

// smem.rstd = 1 / sqrt(mean(x^2) + eps) of each token, behind the caller's next barrier. A warp has a token at a time.
template <typename Config, typename T>
__device__ __forceinline__ void compute_rstd(const GemvProblem<T>& p, GemvSharedStorage<Config>& smem) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int token = warp; token < p.num_tokens; token += Config::kWarps) {
    const T* row = p.x + token * p.x_stride;
    float sum = 0.f;
#pragma unroll 4
    for (int k = 8 * lane; k < p.in_features; k += 8 * 32) {
      const Vec<T> x = load_vec(row + k);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += to_float(x[j]) * to_float(x[j]);
    }
    sum = warp_reduce_sum(sum);
    if (lane == 0) smem.rstd[token] = rsqrtf(sum / p.in_features + p.norm_eps);
  }
}

// smem.activations = x[:, k0 : k0 + chunk], through the norm where there is one; zeros past in_features.
template <typename Config, typename T>
__device__ __forceinline__ void load_activations(const GemvProblem<T>& p, GemvSharedStorage<Config>& smem, int k0,
                                                 int chunk) {
  constexpr int kLoads = 4;  // a thread has these in flight
  const int batches = (p.in_features - k0 + Config::kBatch - 1) / Config::kBatch;
  const int vecs = min(chunk, batches * Config::kBatch) / 8;  // a token, as far as the warps read
  for (int first = threadIdx.x; first < p.num_tokens * vecs; first += kLoads * Config::kThreads) {
    Vec<T> x[kLoads] = {}, weight[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int token = (first + i * Config::kThreads) / vecs, k = k0 + (first + i * Config::kThreads) % vecs * 8;
      if (token < p.num_tokens && k < p.in_features) {
        x[i] = load_vec(p.x + token * p.x_stride + k);
        if (p.norm_weight != nullptr) weight[i] = load_vec(p.norm_weight + k);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int token = (first + i * Config::kThreads) / vecs, k = (first + i * Config::kThreads) % vecs * 8;
      if (token >= p.num_tokens) break;
      if (p.norm_weight != nullptr) {  // rounds as the reference of rms_norm
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float x_hat = to_float(x[i][j]) * smem.rstd[token];
          if (!p.norm_weight_in_fp32) x_hat = to_float(from_float<T>(x_hat));
          x[i][j] = from_float<T>(x_hat * to_float(weight[i][j]));
        }
      }
      store_vec(reinterpret_cast<T*>(smem.activations + activation_unit(token, k, chunk)), x[i]);
    }
  }
}

template <typename Config>
using GemvSums = float[Config::kWeightTiles][Config::kTokenTiles][4];

// sums += the batch times the activations of its k, which start at k of the chunk.
template <typename T, typename Config>
__device__ __forceinline__ void multiply_batch(GemvSums<Config>& sums, const GemvBatch<Config>& batch,
                                               const GemvSharedStorage<Config>& smem, int num_tokens, int k,
                                               int chunk) {
  const int group = threadIdx.x % 32 / 4, thread = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < Config::kDepth; ++step) {
    uint4 x[Config::kTokenTiles];
#pragma unroll
    for (int t = 0; t < Config::kTokenTiles; ++t) {
      const int token = 8 * t + group;
      x[t] = make_uint4(0, 0, 0, 0);
      if (token < num_tokens) x[t] = smem.activations[activation_unit(token, k + 32 * step + 8 * thread, chunk)];
    }
#pragma unroll
    for (int w = 0; w < Config::kWeightTiles; ++w) {
      const uint4 lo = batch.rows[step][w][0], hi = batch.rows[step][w][1];
      const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y}, second[4] = {lo.z, hi.z, lo.w, hi.w};
#pragma unroll
      for (int t = 0; t < Config::kTokenTiles; ++t) {
        ptx::mma_m16n8k16<T>(sums[w][t], first, x[t].x, x[t].y);
        ptx::mma_m16n8k16<T>(sums[w][t], second, x[t].z, x[t].w);
      }
    }
  }
}

// Add up the warps' sums of a tile and call epilogue(token, n, y[token, n], y[token, n + 1]) for each even n.
template <typename Config, typename T, typename Epilogue>
__device__ __forceinline__ void reduce_tile(const GemvSums<Config>& sums, const GemvProblem<T>& p,
                                            GemvSharedStorage<Config>& smem, int tile, Epilogue epilogue) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // the sums of the tile before have been read
#pragma unroll
  for (int w = 0; w < Config::kWeightTiles; ++w) {
#pragma unroll
    for (int t = 0; t < Config::kTokenTiles; ++t) {
      const float(&s)[4] = sums[w][t];
      smem.sums[warp][w * Config::kTokenTiles + t][lane] = make_float4(s[0], s[1], s[2], s[3]);
    }
  }
  __syncthreads();
  // Of a fragment, lane 4g + t holds rows 2g (x, y) and 2g + 1 (z, w) of tokens 2t (x, z) and 2t + 1 (y, w).
  for (int i = threadIdx.x; i < 64 * Config::kFragments; i += Config::kThreads) {
    const int fragment = i / 64, source = i % 64 / 2;
    const bool odd = i % 2;
    const int token = 8 * (fragment % Config::kTokenTiles) + 2 * (source % 4) + odd;
    const int n = tile * Config::kTileRows + 16 * (fragment / Config::kTokenTiles) + 2 * (source / 4);
    if (token >= p.num_tokens || n >= p.out_features) continue;
    float first = 0.f, second = 0.f;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) {
      const float4& s = smem.sums[w][fragment][source];
      first += odd ? s.y : s.x;
      second += odd ? s.w : s.z;
    }
    epilogue(token, n, first, second);
  }
}

// The product, tiles strided over the grid. `batch` comes from load_first_batch(). All threads of the block call it.
template <typename T, typename Config, typename Epilogue>
__device__ __forceinline__ void gemv(const GemvProblem<T>& p, GemvSharedStorage<Config>& smem,
                                     GemvBatch<Config>& batch, Epilogue epilogue) {
  const int warp = threadIdx.x / 32;
  const int num_tiles = (p.out_features + Config::kTileRows - 1) / Config::kTileRows;
  const int chunk = Config::kActivationElems / p.num_tokens / Config::kRound * Config::kRound;
  const bool fits = p.in_features <= chunk;  // the activations stay in shared memory for all tiles
  if (p.norm_weight != nullptr && blockIdx.x < num_tiles) compute_rstd(p, smem);

  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    GemvSums<Config> sums = {};
    for (int k0 = 0; k0 < p.in_features; k0 += chunk) {
      if (!fits || tile == blockIdx.x) {
        __syncthreads();  // the chunk before has been read
        load_activations(p, smem, k0, chunk);
        __syncthreads();
      }
      const int end = min(chunk, p.in_features - k0);
      for (int k = warp * Config::kBatch; k < end; k += Config::kRound) {
        // The next batch, of the next tile after the last, is in flight while this one is multiplied.
        GemvBatch<Config> next;
        const bool more = k0 + k + Config::kRound < p.in_features;
        load_batch(next, p, more ? tile : tile + gridDim.x, more ? k0 + k + Config::kRound : warp * Config::kBatch);
        multiply_batch<T>(sums, batch, smem, p.num_tokens, k, chunk);
        batch = next;
      }
    }
    reduce_tile(sums, p, smem, tile, epilogue);
  }
}

// Blocks of a launch of which `resident` fit the device together: no more, and all with as many tiles.
template <typename Config>
int gemv_grid(int64_t out_features, int resident) {
  const int64_t num_tiles = (out_features + Config::kTileRows - 1) / Config::kTileRows;
  const int64_t tiles_per_block = (num_tiles + resident - 1) / resident;
  return static_cast<int>((num_tiles + tiles_per_block - 1) / tiles_per_block);
}

}  // namespace fastshard

// Attention: out[i] = sum_j softmax_j(q[i] . k[j] * scale) * v[j], online over tiles of keys (FlashAttention-2).
//
// A row is one query token of one query head. The rows of all query heads that share a key/value head form one matrix
// [s_q * group, head_dim], of which a block owns Config::kRows: keys and values are read once for the whole group.
// Warps stand kRowWarps x kKeyWarps: each owns 16 rows and, of every tile of keys, its own kWarpKeys; what the key
// warps found is merged at the end, and what blocks of different splits found in attention_combine_kernel.
// Floor: 4 * head_dim FLOPs for each visible pair of query and key, and q, k, v, out once through global memory.
#pragma once
#include "attention/finish.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "attention/visibility.cuh"
#include "common/launch.cuh"

namespace fastshard {

template <int kHeadDim_, int kRowWarps_, int kKeyWarps_, int kWarpKeys_, int kStages_, int kMinBlocks_>
struct AttentionConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kKeyWarps = kKeyWarps_;
  static constexpr int kWarpKeys = kWarpKeys_;
  static constexpr int kStages = kStages_;        // tiles of k and v in shared memory
  static constexpr int kMinBlocks = kMinBlocks_;  // that the registers of a multiprocessor must hold
  static constexpr int kWarps = kRowWarps * kKeyWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kKeys = kKeyWarps * kWarpKeys;
  static constexpr bool kQueryInRegisters = kHeadDim <= 128;
  static_assert(kWarpKeys % 16 == 0 && kStages >= 2);
};

template <typename T, typename Config>
struct AttentionSharedStorage {
  struct Tiles {
    T q[Config::kRows * Config::kHeadDim];
    T k[Config::kStages][Config::kKeys * Config::kHeadDim];
    T v[Config::kStages][Config::kKeys * Config::kHeadDim];
  };
  union {
    Tiles tiles;
    PartialRows<Config::kKeyWarps, Config::kRows, Config::kHeadDim> results;  // after the last tile
  };
};

// What one block does.
struct AttentionWork {
  int batch, kv_head, first_row, split;
  int64_t row_base;  // of first_row, in the numbering of AttentionParams::num_rows

  template <typename Config>
  static __device__ AttentionWork of_block(const AttentionParams& p) {
    const int num_tiles = (p.rows_per_head() + Config::kRows - 1) / Config::kRows;
    int block = blockIdx.x;
    AttentionWork work;
    work.split = block % p.num_splits;
    block /= p.num_splits;
    work.first_row = (num_tiles - 1 - block % num_tiles) * Config::kRows;  // causal: the longest first
    block /= num_tiles;
    work.kv_head = block % p.num_kv_heads;
    work.batch = block / p.num_kv_heads;
    work.row_base = int64_t(block) * p.rows_per_head() + work.first_row;
    return work;
  }
};

// Store a row, or where the keys are split its partial result.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_row(RowResult<kHeadDim>& result, const AttentionParams& p, int split,
                                          int64_t row) {
  if (p.num_splits == 1) return result.template store<T>(p, row);
  const int64_t at = split * p.num_rows() + row;
  p.partial_max[at] = result.max;
  p.partial_sum[at] = result.sum;
  float2* out = reinterpret_cast<float2*>(p.partial_out + at * p.head_dim);
#pragma unroll
  for (int j = 0; j < RowResult<kHeadDim>::kPairs; ++j) {
    if (2 * result.pair(j) < p.head_dim) out[result.pair(j)] = result.out[j];
  }
}

template <typename T, typename Config>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void attention_kernel(const AttentionParams p) {
  using Storage = AttentionSharedStorage<T, Config>;
  constexpr int kHeadDim = Config::kHeadDim, kKeys = Config::kKeys, kStages = Config::kStages;
  FS_SHARED_STORAGE(Storage, smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / Config::kKeyWarps * 16, key_warp = warp % Config::kKeyWarps;
  const int warp_key = key_warp * Config::kWarpKeys;
  const AttentionWork work = AttentionWork::of_block<Config>(p);
  const int num_rows = min(p.rows_per_head() - work.first_row, Config::kRows);

  // The tiles of keys that any row of this block sees, and of those the share of this split.
  const RowBounds bounds = row_bounds(p, work.batch);
  const KeyRange first_keys = visible_keys(p, bounds, work.first_row / p.group);
  const KeyRange last_keys = visible_keys(p, bounds, (work.first_row + num_rows - 1) / p.group);
  const KeyRange keys{first_keys.begin, last_keys.end};
  const int first_tile = keys.begin / kKeys;
  const int num_tiles = max((keys.end + kKeys - 1) / kKeys - first_tile, 0);
  const int tiles_per_split = (num_tiles + p.num_splits - 1) / p.num_splits;
  const int begin_tile = first_tile + min(work.split * tiles_per_split, num_tiles);
  const int end_tile = first_tile + min((work.split + 1) * tiles_per_split, num_tiles);
  if (begin_tile == end_tile && p.num_splits > 1) {
    if (threadIdx.x < num_rows) p.partial_sum[work.split * p.num_rows() + work.row_base + threadIdx.x] = 0.f;
    return;
  }

  const T* q = static_cast<const T*>(p.q) + work.batch * p.q_strides.batch +
               int64_t(work.kv_head) * p.group * p.q_strides.head;
  const T* k = static_cast<const T*>(p.k) + work.batch * p.k_strides.batch + work.kv_head * p.k_strides.head;
  const T* v = static_cast<const T*>(p.v) + work.batch * p.v_strides.batch + work.kv_head * p.v_strides.head;

  // Keys outside the range are never read, so that nothing there, NaN included, reaches the products.
  using KeyLoader = TileLoader<Config, kKeys>;
  const auto load_keys = [&](int tile, int stage) {
    const int key = tile * kKeys;
    const auto rows_of = [&](const T* base, int64_t stride) {
      return [&keys, key, stride, next = base + (key + KeyLoader::first_row()) * stride](int row) mutable {
        const T* from = key + row >= keys.begin && key + row < keys.end ? next : nullptr;
        next += KeyLoader::kStep * stride;
        return from;
      };
    };
    KeyLoader::load(smem.tiles.k[stage], p.head_dim, k, rows_of(k, p.k_strides.token));
    KeyLoader::load(smem.tiles.v[stage], p.head_dim, v, rows_of(v, p.v_strides.token));
  };

  // Copies in flight: the queries, then up to kStages - 1 tiles ahead; one group each, empty ones included.
  TileLoader<Config, Config::kRows>::load(smem.tiles.q, p.head_dim, q, [&](int row) {
    const int in_head = work.first_row + row;
    return row < num_rows ? q + in_head / p.group * p.q_strides.token + in_head % p.group * p.q_strides.head : nullptr;
  });
  ptx::cp_async_commit();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (begin_tile + i < end_tile) load_keys(begin_tile + i, i);
    ptx::cp_async_commit();
  }

  uint32_t q_fragments[Config::kQueryInRegisters ? kHeadDim / 16 : 1][4];
  if constexpr (Config::kQueryInRegisters) {
    ptx::cp_async_wait<kStages - 1>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      load_query_fragment<kHeadDim>(q_fragments[i], smem.tiles.q, warp_row, i);
    }
  }

  const ScoreRule rule(p);
  const ThreadRows rows(p, bounds, work.first_row + warp_row + lane / 4);
  OnlineSoftmax softmax;
  float out[kHeadDim / 8][4] = {};
  int stage = 0;
  for (int tile = begin_tile; tile < end_tile; ++tile) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this tile has arrived for all; and all are done with the stage that is refilled next
    if (tile + kStages - 1 < end_tile) load_keys(tile + kStages - 1, (stage + kStages - 1) % kStages);
    ptx::cp_async_commit();

    float scores[Config::kWarpKeys / 8][4];
    multiply_queries_keys<kHeadDim, Config::kQueryInRegisters>(scores, q_fragments, smem.tiles.q, warp_row,
                                                               smem.tiles.k[stage], warp_key);
    const bool all_visible = tile * kKeys >= last_keys.begin && (tile + 1) * kKeys <= first_keys.end;
    apply_rules(scores, p, rule, work.batch, rows, tile * kKeys + warp_key + lane % 4 * 2, all_visible);
    softmax.update(scores, out, rule.exp_scale());
    accumulate_values<T>(out, scores, smem.tiles.v[stage], warp_key);
    stage = (stage + 1) % kStages;
  }

  // Through shared memory to whole rows.
  ptx::cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_row + lane / 4 + 8 * i;
    const float sum = softmax.row_sum(i);
    if (lane % 4 == 0) {
      smem.results.max[key_warp][row] = softmax.max[i] * rule.exp_scale();
      smem.results.sum[key_warp][row] = sum;
    }
    float2* to = reinterpret_cast<float2*>(smem.results.out[key_warp][row]) + lane % 4;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) to[n * 4] = make_float2(out[n][2 * i], out[n][2 * i + 1]);
  }
  __syncthreads();
  for (int row = warp; row < num_rows; row += Config::kWarps) {
    RowResult<kHeadDim> result;
    result.merge(SharedParts{smem.results, row}, Config::kKeyWarps, p.head_dim);
    store_row<T>(result, p, work.split, work.row_base + row);
  }
}

// Splits first, first + step, ... of one row, for RowResult::merge.
struct SplitParts {
  const AttentionParams& p;
  int64_t row;
  int first, step;
  __device__ int64_t at(int i) const { return (first + int64_t(i) * step) * p.num_rows() + row; }
  __device__ float max(int i) const { return p.partial_max[at(i)]; }
  __device__ float sum(int i) const { return p.partial_sum[at(i)]; }
  __device__ float2 pair(int i, int index) const {
    return reinterpret_cast<const float2*>(p.partial_out + at(i) * p.head_dim)[index];
  }
};

constexpr int kCombineWarps = 4;
constexpr int kAttentionMaxSplits = 32 * kCombineWarps;

template <int kHeadDim>
using AttentionCombineSharedStorage = PartialRows<kCombineWarps, 1, kHeadDim>;

// Merge the splits of a row: one block per row, each warp takes every kCombineWarps-th split.
// Floor: num_splits * (head_dim + 2) floats read for each row.
template <typename T, int kHeadDim>
__global__ __launch_bounds__(32 * kCombineWarps) void attention_combine_kernel(const AttentionParams p) {
  FS_SHARED_STORAGE(AttentionCombineSharedStorage<kHeadDim>, smem);
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / 32;
  RowResult<kHeadDim> result;
  const int num_parts = (p.num_splits - warp + kCombineWarps - 1) / kCombineWarps;
  result.merge(SplitParts{p, row, warp, kCombineWarps}, num_parts, p.head_dim);
  result.write(smem, warp, 0);
  __syncthreads();
  if (warp != 0) return;
  result.merge(SharedParts{smem, 0}, kCombineWarps, p.head_dim);
  result.template store<T>(p, row);
}

}  // namespace fastshard

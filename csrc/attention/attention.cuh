// Attention: out[i] = sum_j softmax_j(q[i] . k[j] * scale) * v[j], online over tiles of keys (FlashAttention-2).
//
// A row is one query token of one query head. The rows of all query heads that share a key/value head form one matrix
// [s_q * group, head_dim], of which a block owns Config::kRows: keys and values are read once for the whole group.
// Warps stand kRowWarps x kKeyWarps: each owns kRowTiles times 16 rows and, of every tile of keys, its own kWarpKeys;
// what the key warps found is merged at the end, and what blocks of different splits found in attention_combine_kernel.
// Floor: 4 * head_dim FLOPs for each visible pair of query and key, and q, k, v, out once through global memory. A warp
// of 32 rows reads the keys and values for them from shared memory in 62 % of the time that its products take; of 16
// rows it would take 125 %.
#pragma once
#include "attention/finish.cuh"
#include "attention/rotate.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "attention/visibility.cuh"
#include "common/launch.cuh"

namespace fastshard {

// What a kernel does to scores beside the key ranges of visibility.cuh: nothing, a mask that MaskBytes or MaskValues can
// load, or all that AttentionParams has.
enum class AttentionRules { kRanges, kMaskBytes, kMaskValues, kAll };

template <int kHeadDim_, int kRowWarps_, int kRowTiles_, int kKeyWarps_, int kWarpKeys_, int kMinBlocks_,
          bool kQueryInRegisters_, AttentionRules kRules_>
struct AttentionConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kRowTiles = kRowTiles_;  // of 16 rows, that a warp owns
  static constexpr int kKeyWarps = kKeyWarps_;
  static constexpr int kWarpKeys = kWarpKeys_;
  static constexpr int kMinBlocks = kMinBlocks_;  // that the registers of a multiprocessor must hold
  static constexpr bool kQueryInRegisters = kQueryInRegisters_;
  static constexpr AttentionRules kRules = kRules_;
  static constexpr int kStages = 2;  // tiles of k and v in shared memory
  static constexpr int kWarps = kRowWarps * kKeyWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
  static constexpr int kKeys = kKeyWarps * kWarpKeys;
  static_assert(kWarpKeys % 16 == 0 && (kKeyWarps == 1 || kRowTiles == 1));
};

template <typename T, typename Config>
struct AttentionSharedStorage {
  struct alignas(128) Tiles {
    T q[Config::kRows * Config::kHeadDim];
    T k[Config::kStages][Config::kKeys * Config::kHeadDim];
    T v[Config::kStages][Config::kKeys * Config::kHeadDim];
  };
  // Of the key warps, after the last tile.
  using Results = PartialRows<Config::kKeyWarps, Config::kRows, Config::kHeadDim>;
  union {
    Tiles tiles;
    std::conditional_t<(Config::kKeyWarps > 1), Results, char> results;
  };
  RowTable<Config::kRows, Config::kRules != AttentionRules::kRanges> rows;
};

// What one block does. Blocks start in the order of their number: row tiles of `heads_at_once` heads side by side, whose
// keys and values the L2 cache holds together, and of those the last first, which are the longest if causal.
struct AttentionWork {
  int batch, kv_head, first_row, split;
  int64_t row_base;  // of first_row, in the numbering of AttentionParams::num_rows

  template <typename Config>
  static __device__ AttentionWork of_block(const AttentionParams& p, int block) {
    const int num_tiles = (p.rows_per_head() + Config::kRows - 1) / Config::kRows;
    AttentionWork work;
    work.split = block % p.num_splits;
    block /= p.num_splits;
    const int first_head = block / (p.heads_at_once * num_tiles) * p.heads_at_once;
    const int num_heads = min(p.batch * p.num_kv_heads - first_head, p.heads_at_once);
    block -= first_head * num_tiles;
    const int head = first_head + block % num_heads;
    work.first_row = (num_tiles - 1 - block / num_heads) * Config::kRows;
    work.kv_head = head % p.num_kv_heads;
    work.batch = head / p.num_kv_heads;
    work.row_base = int64_t(head) * p.rows_per_head() + work.first_row;
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

// The end of a warp that has its rows' keys alone: normalise, optional LayerNorm, round to T, store; or store partial
// results.
// staging: of shared memory that only this warp uses, [16 * kRowTiles, kHeadDim], laid out as TileLayout has it.
template <typename T, int kHeadDim, int kRowTiles, int kOutTiles>
__device__ __forceinline__ void store_warp_rows(float (&out)[kRowTiles][kOutTiles][4],
                                                const LazySoftmax<kRowTiles>& softmax, const AttentionParams& p,
                                                const AttentionWork& work, int warp_row, T* staging) {
  using Layout = TileLayout<kHeadDim>;
  const int lane = threadIdx.x % 32;
  const int num_rows = p.rows_per_head() - work.first_row - warp_row;  // from the warp's first on
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    auto& tiles = out[i / 2];
    const int e = i % 2 * 2, row = i * 8 + lane / 4;
    const float sum = softmax.row_sum(i);
    if (p.num_splits > 1) {
      if (row >= num_rows) continue;
      const int64_t at = work.split * p.num_rows() + work.row_base + warp_row + row;
      if (lane % 4 == 0) p.partial_max[at] = softmax.origin[i], p.partial_sum[at] = sum;
      float2* const to = reinterpret_cast<float2*>(p.partial_out + at * p.head_dim) + lane % 4;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        if (n * 8 < p.head_dim) to[n * 4] = make_float2(tiles[n][e], tiles[n][e + 1]);
      }
      continue;
    }
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // nothing to attend to: zeros
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) tiles[n][e] *= inverse, tiles[n][e + 1] *= inverse;
    if (p.layer_norm) {
      float total = 0.f, squares = 0.f;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) total += tiles[n][e] + tiles[n][e + 1];  // columns past head_dim are zero
      const float mean = warp_reduce_sum<kRowLanes>(total) / p.head_dim;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        tiles[n][e] -= mean, tiles[n][e + 1] -= mean;
        if (n * 8 < p.head_dim) squares += tiles[n][e] * tiles[n][e] + tiles[n][e + 1] * tiles[n][e + 1];
      }
      const float rstd = rsqrtf(warp_reduce_sum<kRowLanes>(squares) / p.head_dim + p.eps);
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        if (n * 8 >= p.head_dim) break;
        const float2 y = scale_and_shift<T>(make_float2(tiles[n][e] * rstd, tiles[n][e + 1] * rstd), p,
                                            n * 8 + lane % 4 * 2);
        tiles[n][e] = y.x, tiles[n][e + 1] = y.y;
      }
    }
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
      T* const to = staging + Layout::offset(row, row % 8, n) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(tiles[n][e], tiles[n][e + 1]);
    }
  }
  if (p.num_splits > 1) return;
  __syncwarp();

  // Whole rows, 16 bytes a lane.
  constexpr int kLanesPerRow = Layout::kLanesPerRow;
  const int chunk = lane % kLanesPerRow;
  if (chunk * 8 >= p.head_dim) return;
  RowCursor cursor(work.first_row + warp_row + lane / kLanesPerRow, p.group);
  const RowStep step(32 / kLanesPerRow, p.group);
  const int64_t first_head = int64_t(work.batch) * p.s_q * p.num_kv_heads * p.group + work.kv_head * p.group;
#pragma unroll 4
  for (int row = lane / kLanesPerRow; row < min(num_rows, 16 * kRowTiles); row += 32 / kLanesPerRow) {
    const int64_t head = first_head + int64_t(cursor.token) * p.num_kv_heads * p.group + cursor.head;
    store_vec(static_cast<T*>(p.out) + head * p.head_dim + chunk * 8,
              load_vec(staging + Layout::offset(row, row % 8, chunk)));
    cursor.advance(step, p.group);
  }
}

template <typename T, typename Config>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void attention_kernel(const AttentionParams p) {
  using Storage = AttentionSharedStorage<T, Config>;
  using Order = KeyOrder<Config::kWarpKeys>;
  constexpr int kHeadDim = Config::kHeadDim, kKeys = Config::kKeys, kRowTiles = Config::kRowTiles;
  FS_SHARED_STORAGE(Storage, smem);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned warp_row = warp / Config::kKeyWarps * 16 * kRowTiles, key_warp = warp % Config::kKeyWarps;
  const AttentionWork work = AttentionWork::of_block<Config>(p, blockIdx.x);
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
    for (int row = threadIdx.x; row < num_rows; row += Config::kThreads) {
      p.partial_sum[work.split * p.num_rows() + work.row_base + row] = 0.f;
    }
    return;
  }

  const T* q = static_cast<const T*>(p.q) + work.batch * p.q_strides.batch +
               int64_t(work.kv_head) * p.group * p.q_strides.head;
  const T* k = static_cast<const T*>(p.k) + work.batch * p.k_strides.batch + work.kv_head * p.k_strides.head;
  const T* v = static_cast<const T*>(p.v) + work.batch * p.v_strides.batch + work.kv_head * p.v_strides.head;

  // Keys outside the range are never read, so that nothing there, NaN included, reaches the products.
  using Copies = KeyCopies<T, Config>;
  Copies copies(p, k, v, smem.tiles.k[0], begin_tile * kKeys, keys.begin,
                min(keys.end, end_tile * kKeys));

  // Copies in flight: the queries and the first tile, then a tile ahead.
  using Queries = QueryLoader<Config>;
  RowCursor cursor(work.first_row + Queries::first_row(), p.group);
  const RowStep step(Queries::kStep, p.group);
  Queries::load(smem.tiles.q, p.head_dim, num_rows, [&] {
    const T* const from = q + cursor.token * p.q_strides.token + cursor.head * p.q_strides.head;
    cursor.advance(step, p.group);
    return from;
  });
#pragma unroll
  for (unsigned i = 0; i < Copies::kCopies; ++i) copies.copy(p, 0, i);
  copies.next_tile(p);
  ptx::cp_async_commit();
  smem.rows.template fill<Config::kThreads>(p, bounds, work.first_row);
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (p.rope.table != nullptr) {
    QueryRotation<Config>::rotate(smem.tiles.q, p, work.batch, work.first_row, num_rows);
    __syncthreads();
  }

  uint32_t q_fragments[kRowTiles][Config::kQueryInRegisters ? kHeadDim / 16 : 1][4];
  if constexpr (Config::kQueryInRegisters) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const uint32_t address = query_address<kHeadDim>(lane, smem.tiles.q, warp_row + 16 * r);
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) load_query_fragment<kHeadDim>(q_fragments[r][i], address, i);
    }
  }

  const KeyRange visible_tiles{(last_keys.begin + kKeys - 1) / kKeys, first_keys.end / kKeys};  // to all rows
  const ScoreRule rule(p);
  const float exp_scale = Config::kRules == AttentionRules::kAll          ? rule.exp_scale()
                          : Config::kRules == AttentionRules::kMaskValues ? 1.f
                                                                          : rule.scale;
  LazySoftmax<kRowTiles> softmax;
  float out[kRowTiles][kHeadDim / 8][4] = {};
  int stage = 0;
  const unsigned warp_key = key_warp * Config::kWarpKeys;
  const uint32_t q_address = query_address<kHeadDim>(lane, smem.tiles.q, warp_row);
  const uint32_t k_address = key_address<kHeadDim, Config::kWarpKeys>(lane, smem.tiles.k[0], warp_key);
  const uint32_t v_address = value_address<kHeadDim, Config::kWarpKeys>(lane, smem.tiles.v[0], warp_key);
  for (int tile = begin_tile; tile < end_tile; ++tile) {
    // Of scores[..][0][0]; the lane's columns are the keys from there on.
    const int key = tile * kKeys + warp_key + lane % 4 * Order::kSpan;
    const int row = warp_row + lane / 4;
    MaskBytes<kRowTiles, Order::kSpan> mask;
    if constexpr (Config::kRules == AttentionRules::kMaskBytes) {
      mask.load(p, work.batch, key, [&](int i) { return smem.rows.token[row + 8 * i]; });
    }

    float scores[kRowTiles][Config::kWarpKeys / 8][4];
    const auto load_query = [&](uint32_t(&a)[4], int r, int i) {
      if constexpr (Config::kQueryInRegisters) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[e] = q_fragments[r][i][e];
      } else {
        load_query_fragment<kHeadDim>(a, q_address + r * 16 * kHeadDim * sizeof(T), i);
      }
    };
    // The copies of the next tile, zeros after the last one, stand between the products.
    const auto copy_some = [&](unsigned step) {
#pragma unroll
      for (unsigned i = 0; i < Copies::kCopies; ++i) {
        if (i * (kHeadDim / 16) / Copies::kCopies == step) copies.copy(p, stage ^ 1, i);
      }
    };
    multiply_queries_keys<kHeadDim, T>(scores, k_address + stage * Copies::kTileBytes, load_query, copy_some);
    copies.next_tile(p);
    ptx::cp_async_commit();
    const bool all_visible = tile >= visible_tiles.begin && tile < visible_tiles.end;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if constexpr (Config::kRules == AttentionRules::kAll) {
        const ThreadRows rows(smem.rows, row + 16 * r);
        apply_rules<2>(scores[r], p, rule, work.batch, rows, key, all_visible);
      } else {
        if constexpr (Config::kRules == AttentionRules::kMaskBytes) mask.hide(scores[r], r);
        if constexpr (Config::kRules == AttentionRules::kMaskValues) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            MaskValues<T, Order::kSpan> values;
            values.load(p, work.batch, smem.rows.token[row + 16 * r + 8 * half], key);
            values.add(scores[r], half, rule.scale);
          }
        }
        if (!all_visible) hide_keys<2>(scores[r], ThreadRows(smem.rows, row + 16 * r), key);
      }
    }
    softmax.move_origins(scores, out, exp_scale);
    accumulate_values<T>(out, scores, v_address + stage * Copies::kTileBytes, [&](int r, int n, int e) {
      return softmax.weigh(scores[r][n][e], 2 * r + e / 2, exp_scale);
    });
    stage ^= 1;
    ptx::cp_async_wait<0>();
    __syncthreads();  // the next tile has arrived for all; and all are done with the stage that is refilled next
  }

  const auto ended_work = AttentionWork::of_block<Config>(p, ptx::mov_opaque(blockIdx.x));
  if constexpr (Config::kKeyWarps == 1) {
    store_warp_rows<T, kHeadDim>(out, softmax, p, ended_work, warp_row, smem.tiles.q + warp_row * kHeadDim);
  } else {
    // Through shared memory to whole rows.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + lane / 4 + 8 * i;
      const float sum = softmax.row_sum(i);
      if (lane % 4 == 0) {
        smem.results.max[key_warp][row] = softmax.origin[i];
        smem.results.sum[key_warp][row] = sum;
      }
      float2* to = reinterpret_cast<float2*>(smem.results.out[key_warp][row]) + lane % 4;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) to[n * 4] = make_float2(out[0][n][2 * i], out[0][n][2 * i + 1]);
    }
    __syncthreads();
    for (int row = warp; row < num_rows; row += Config::kWarps) {
      RowResult<kHeadDim> result;
      result.merge(SharedParts{smem.results, row}, Config::kKeyWarps, p.head_dim);
      store_row<T>(result, p, work.split, work.row_base + row);
    }
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
static_assert(kAttentionMaxSplits == 32 * kCombineWarps);

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

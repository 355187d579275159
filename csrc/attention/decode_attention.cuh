// Decode attention: the formula of attention.cuh for up to 16 query rows a key/value head, in one launch.
//
// A block has one (batch row, key/value head) and every num_splits-th tile of its keys; a warp has every kWarps-th of
// those (decode_warp.cuh). The blocks of a head draw tickets. All but the last one to come publish their results and
// leave; the last one waits for them, merges, and stores. It waits for blocks only that run already, so nothing needs
// to be resident, and a published word says by itself that it is there: it is not kUnwritten. So no fence is needed.
// Floor: k and v through global memory once.
#pragma once
#include "attention/decode_attention.h"
#include "attention/decode_warp.cuh"
#include "common/launch.cuh"

namespace fastshard {

template <int kHeadDim_, int kWarps_, int kMinBlocks_>
struct DecodeAttentionConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kMinBlocks = kMinBlocks_;  // that the registers of a multiprocessor must hold
  static constexpr int kThreads = 32 * kWarps;
};

template <typename Config>
struct DecodeAttentionSharedStorage {
  PartialRows<Config::kWarps, kDecodeRows, Config::kHeadDim> parts;
  bool is_last;  // of the blocks of a head to come
};

constexpr uint32_t kUnwritten = 0xffffffff;  // a NaN that no arithmetic gives

// The workspace of decode_attention: a counter of tickets for each head, then what the splits found.
struct SplitResults {
  uint32_t* words;
  int num_heads, num_rows, head_dim;  // num_heads: of all batch rows; num_rows: of a head

  // A row is its columns, max and sum, and rounds up to 16 bytes.
  __host__ __device__ int64_t split_words() const { return int64_t(num_rows) * (head_dim + 4); }
  __host__ __device__ int64_t results_begin() const { return (num_heads + 3) / 4 * 4; }
  __host__ __device__ int64_t num_words(int num_splits) const {
    return results_begin() + int64_t(num_heads) * num_splits * split_words();
  }
  __device__ uint32_t* counter(int head) const { return words + head; }
  __device__ uint32_t* split(int head, int num_splits, int i) const {
    return words + results_begin() + (int64_t(head) * num_splits + i) * split_words();
  }
};

__device__ __forceinline__ uint32_t published(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits == kUnwritten ? 0x7fffffffu : bits;
}

__device__ __forceinline__ void publish(uint32_t* row, int column, int head_dim, const DecodeColumns& part) {
  ptx::st_global_relaxed(row + column, make_uint4(published(part.out.x), published(part.out.y), published(part.out.z),
                                                  published(part.out.w)));
  if (column == 0) ptx::st_global_relaxed_8(row + head_dim, make_uint2(published(part.max), published(part.sum)));
}

__device__ __forceinline__ bool is_written(const uint4& v) {
  return v.x != kUnwritten && v.y != kUnwritten && v.z != kUnwritten && v.w != kUnwritten;
}

__device__ __forceinline__ bool is_written(const uint2& v) { return v.x != kUnwritten && v.y != kUnwritten; }

// Merge the results of all splits, in their order whichever block does it; `own` is that of this block's split.
// row: where column 0 of the row lies in split 0.
__device__ __forceinline__ DecodeColumns merge_splits(const uint32_t* row, int64_t split_words, int num_splits,
                                                      int own_split, const DecodeColumns& own, int column,
                                                      int head_dim) {
  constexpr int kAtATime = 8;
  DecodeColumns merged{make_float4(0.f, 0.f, 0.f, 0.f), -INFINITY, 0.f};
  for (int first = 0; first < num_splits; first += kAtATime) {
    uint4 out[kAtATime];
    uint2 rest[kAtATime];
    const auto load = [&](int i) {
      const uint32_t* from = row + (first + i) * split_words;
      out[i] = ptx::ld_global_relaxed(from + column);
      rest[i] = ptx::ld_global_relaxed_8(from + head_dim);
    };
    const auto is_other = [&](int i) { return first + i < num_splits && first + i != own_split; };
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      if (is_other(i)) load(i);
    }
    DecodeColumns parts[kAtATime];
    float max = merged.max;
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      parts[i] = first + i < num_splits ? own : DecodeColumns{make_float4(0.f, 0.f, 0.f, 0.f), -INFINITY, 0.f};
      if (is_other(i)) {
        while (!is_written(out[i]) || !is_written(rest[i])) load(i);
        parts[i].out = make_float4(__uint_as_float(out[i].x), __uint_as_float(out[i].y), __uint_as_float(out[i].z),
                                   __uint_as_float(out[i].w));
        parts[i].max = __uint_as_float(rest[i].x);
        parts[i].sum = __uint_as_float(rest[i].y);
      }
      max = fmaxf(max, parts[i].max);
    }
    const float origin = max == -INFINITY ? 0.f : max;
    const auto add = [&](float& to, float weight, float value) { to += weight * value; };
    const float rescale = ptx::ex2(merged.max - origin);
    merged.max = max;
    merged.sum *= rescale;
    merged.out = make_float4(merged.out.x * rescale, merged.out.y * rescale, merged.out.z * rescale,
                             merged.out.w * rescale);
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      const float weight = ptx::ex2(parts[i].max - origin);
      add(merged.sum, weight, parts[i].sum);
      add(merged.out.x, weight, parts[i].out.x);
      add(merged.out.y, weight, parts[i].out.y);
      add(merged.out.z, weight, parts[i].out.z);
      add(merged.out.w, weight, parts[i].out.w);
    }
  }
  return merged;
}

template <typename T, typename Config>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void decode_attention_kernel(
    const AttentionParams p, const SplitResults results) {
  using Storage = DecodeAttentionSharedStorage<Config>;
  constexpr int kHeadDim = Config::kHeadDim, kColumns = kHeadDim / 4;  // of four, as the ends of rows go
  FS_SHARED_STORAGE(Storage, smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int num_splits = gridDim.x, split = blockIdx.x, kv_head = blockIdx.y, batch = blockIdx.z;
  const int num_rows = p.rows_per_head(), head = batch * p.num_kv_heads + kv_head;

  DecodeWarp<T, kHeadDim> worker;
  const T* q[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = min(lane / 4 + 8 * i, num_rows - 1), token = row / p.group;
    q[i] = static_cast<const T*>(p.q) + batch * p.q_strides.batch + token * p.q_strides.token +
           (int64_t(kv_head) * p.group + row - token * p.group) * p.q_strides.head;
  }
  worker.load_queries([&](int half, int column) { return ptx::ld_global_streaming(q[half] + column); });

  const RowBounds bounds = row_bounds(p, batch);
  const KeyRange first_keys = visible_keys(p, bounds, 0), last_keys = visible_keys(p, bounds, p.s_q - 1);
  const KeyRange keys{first_keys.begin, last_keys.end};
  const int num_tiles = max((keys.end - keys.begin + kDecodeKeys - 1) / kDecodeKeys, 0);
  const int num_parts = min(num_splits, max(num_tiles, 1));
  if (split >= num_parts) return;

  const CachedHead<T> cache{static_cast<const T*>(p.k) + batch * p.k_strides.batch + kv_head * p.k_strides.head,
                            static_cast<const T*>(p.v) + batch * p.v_strides.batch + kv_head * p.v_strides.head,
                            int(p.k_strides.token * int(sizeof(T))), int(p.v_strides.token * int(sizeof(T)))};
  const int first_tile = split + num_splits * warp;
  worker.prefetch(cache, keys, first_tile);
  uint32_t ticket = 0;
  if (threadIdx.x == 0 && num_parts > 1) ticket = ptx::atom_global_add(results.counter(head), 1) + 1;  // counts from -1

  const ScoreRule rule(p);
  const ThreadRows rows(p, bounds, lane / 4);
  worker.attend(cache, keys, first_tile, num_splits * Config::kWarps, rule.exp_scale(),
                [&](float(&scores)[2][4], int key) {
                  const int tile = key - lane % 4 * 2;
                  const bool all_visible = tile >= last_keys.begin && tile + kDecodeKeys <= first_keys.end;
                  apply_rules(scores, p, rule, batch, rows, key, all_visible);
                });
  worker.write(smem.parts, warp, num_rows, rule.exp_scale());
  if (threadIdx.x == 0) smem.is_last = ticket + 1 == uint32_t(num_parts) || num_parts == 1;
  __syncthreads();

  const bool is_last = smem.is_last;
  uint32_t* const splits = results.split(head, num_splits, 0);
  for (int i = threadIdx.x; i < num_rows * kColumns; i += Config::kThreads) {
    const int row = i / kColumns, column = i % kColumns * 4;
    DecodeColumns result = merge_decode_parts<Config::kWarps>(smem.parts, row, column);
    uint32_t* const split_row = splits + row * (kHeadDim + 4);
    if (!is_last) {
      publish(split_row + split * results.split_words(), column, kHeadDim, result);
      continue;
    }
    if (num_parts > 1) {
      result = merge_splits(split_row, results.split_words(), num_parts, split, result, column, kHeadDim);
    }
    const float inverse = result.sum == 0.f ? 0.f : 1.f / result.sum;  // nothing to attend to: zeros
    const int64_t token = int64_t(batch) * p.s_q + row / p.group;
    const int64_t qo_head = int64_t(kv_head) * p.group + row % p.group;
    T* const to = static_cast<T*>(p.out) + (token * p.num_kv_heads * p.group + qo_head) * kHeadDim + column;
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_floats<T>(result.out.x * inverse, result.out.y * inverse),
                                               pack_floats<T>(result.out.z * inverse, result.out.w * inverse));
  }
  if (!is_last || num_parts == 1) return;

  // Leave the workspace as it was.
  __syncthreads();  // all have read the results
  if (threadIdx.x == 0) *results.counter(head) = kUnwritten;
  const int64_t num_words = num_parts * results.split_words();
  for (int64_t i = threadIdx.x * 4; i < num_words; i += Config::kThreads * 4) {
    *reinterpret_cast<uint4*>(splits + i) = make_uint4(kUnwritten, kUnwritten, kUnwritten, kUnwritten);
  }
}

}  // namespace fastshard

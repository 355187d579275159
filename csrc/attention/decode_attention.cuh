// Decode attention: the formula of attention.cuh for up to 16 query rows a key/value head, in one launch.
//
// A block has one (batch row, key/value head) and of its keys every num_splits-th kWarps tiles, each warp one of those
// (decode_warp.cuh): a short row is in few blocks. The blocks of a head that have keys draw tickets. All but the last
// to come publish their results and leave; that one waits for them, merges, and stores. It waits for blocks only that
// run already, so nothing needs to be resident, and a published word says by itself that it is there: it is not
// kUnwritten. So no fence is needed.
// Floor: k and v through global memory once.
#pragma once
#include "attention/decode_attention.h"
#include "attention/decode_warp.cuh"
#include "common/launch.cuh"
#include "common/workspace.h"

namespace fastshard {

// kRows: 8 or 16, the most rows of a head. kPlain: no mask and no softcap.
template <int kHeadDim_, int kRows_, bool kPlain_>
struct DecodeAttentionConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;
  static constexpr bool kPlain = kPlain_;
  static constexpr int kWarps = kHeadDim == 64 && kPlain ? 16 : 8;  // 64 KB on their way to a multiprocessor
  static constexpr int kThreads = 32 * kWarps;
};

template <typename Config>
struct DecodeAttentionSharedStorage {
  PartialRows<Config::kWarps, Config::kRows, Config::kHeadDim> parts;
  bool is_last;  // of the blocks of a head to come
};

constexpr int kEagerTiles = 64;  // of a head, that load before the length is known

// What the blocks of a head tell each other; all kUnwritten between launches.
struct SplitResults {
  uint32_t* words;  // a counter of tickets for each head, then [heads, splits, rows, head_dim + 4]
  int row_words;    // columns, max and sum, rounded up to 16 bytes
  int split_words;
  int64_t begin;    // of the results

  __host__ __device__ SplitResults(uint32_t* words, int num_heads, int num_rows, int head_dim)
      : words(words), row_words(head_dim + 4), split_words(num_rows * row_words), begin((num_heads + 3) / 4 * 4) {}

  __host__ __device__ int64_t num_words(int num_heads, int num_splits) const {
    return begin + int64_t(num_heads) * num_splits * split_words;
  }
};

// A stride of rows in units of 16 bytes: one multiply-add makes an address.
struct DecodeStrides {
  uint32_t batch, token, head;
};

struct DecodeAttentionParams {
  uint32_t* workspace;  // of SplitResults, null where there is one split
  DecodeStrides q_strides, k_strides, v_strides;
  float inverse_group;
  int log_slices;  // of the threads that merge four columns of a row, at most those of a warp
  AttentionParams attention;

  // Of a query row, counted [s_q, group]: exact for rows that fit a block.
  __device__ int token(int row) const { return static_cast<int>((row + 0.5f) * inverse_group); }
};

template <typename T>
__device__ __forceinline__ T* advance(T* from, uint32_t count, uint32_t stride) {
  return from + uint64_t(count) * stride * (16 / sizeof(T));
}

__device__ __forceinline__ uint32_t published(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits == kUnwritten ? 0x7fffffffu : bits;
}

__device__ __forceinline__ bool is_written(const uint4& v, const uint2& w) {
  return v.x != kUnwritten && v.y != kUnwritten && v.z != kUnwritten && v.w != kUnwritten && w.x != kUnwritten &&
         w.y != kUnwritten;
}

// to += part, both relative to their own maximum.
__device__ __forceinline__ void merge(DecodeColumns& to, const DecodeColumns& part) {
  const float max = fmaxf(to.max, part.max), origin = max == -INFINITY ? 0.f : max;
  const float a = ptx::ex2(to.max - origin), b = ptx::ex2(part.max - origin);
  to.out = make_float4(a * to.out.x + b * part.out.x, a * to.out.y + b * part.out.y, a * to.out.z + b * part.out.z,
                       a * to.out.w + b * part.out.w);
  to.max = max;
  to.sum = a * to.sum + b * part.sum;
}

// Merge what splits first, first + step, ... published of a row; own_split did not, it would have published own_out and
// own_rest. In the order of the splits, whichever block does it.
// row: where column 0 of the row lies in split 0.
__device__ __forceinline__ DecodeColumns merge_splits(const uint32_t* row, int split_words, int num_splits, int first,
                                                      int step, int own_split, const uint4& own_out,
                                                      const uint2& own_rest, int column, int head_dim) {
  constexpr int kAtATime = 8;
  DecodeColumns merged{make_float4(0.f, 0.f, 0.f, 0.f), -INFINITY, 0.f};
  for (; first < num_splits; first += step * kAtATime) {
    uint4 out[kAtATime];
    uint2 rest[kAtATime];
    bool is_other[kAtATime];
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      const int at = first + i * step;
      const bool is_own = at == own_split;
      is_other[i] = at < num_splits && !is_own;
      out[i] = is_own ? own_out : make_uint4(0, 0, 0, 0);
      rest[i] = is_own ? own_rest : make_uint2(__float_as_uint(-INFINITY), 0);
    }
    bool all_written;
    do {
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
        const uint32_t* from = row + (first + i * step) * split_words;
        if (is_other[i]) out[i] = ptx::ld_global_relaxed(from + column);
        if (is_other[i]) rest[i] = ptx::ld_global_relaxed_8(from + head_dim);
      }
      all_written = true;
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) all_written &= is_written(out[i], rest[i]);
    } while (!all_written);
    DecodeColumns parts[kAtATime];
    float max = merged.max;
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      parts[i] = {make_float4(__uint_as_float(out[i].x), __uint_as_float(out[i].y), __uint_as_float(out[i].z),
                              __uint_as_float(out[i].w)),
                  __uint_as_float(rest[i].x), __uint_as_float(rest[i].y)};
      max = fmaxf(max, parts[i].max);
    }
    const float origin = max == -INFINITY ? 0.f : max, rescale = ptx::ex2(merged.max - origin);
    merged = {make_float4(merged.out.x * rescale, merged.out.y * rescale, merged.out.z * rescale,
                          merged.out.w * rescale),
              max, merged.sum * rescale};
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      const float weight = ptx::ex2(parts[i].max - origin);
      merged.sum += weight * parts[i].sum;
      merged.out.x += weight * parts[i].out.x;
      merged.out.y += weight * parts[i].out.y;
      merged.out.z += weight * parts[i].out.z;
      merged.out.w += weight * parts[i].out.w;
    }
  }
  return merged;
}

// Merge over groups of `lanes` neighbouring lanes, a power of two.
__device__ __forceinline__ void merge_lanes(DecodeColumns& columns, int lanes) {
  constexpr uint32_t kAll = 0xffffffffu;
  for (int offset = 1; offset < lanes; offset *= 2) {
    const DecodeColumns other{
        make_float4(__shfl_xor_sync(kAll, columns.out.x, offset), __shfl_xor_sync(kAll, columns.out.y, offset),
                    __shfl_xor_sync(kAll, columns.out.z, offset), __shfl_xor_sync(kAll, columns.out.w, offset)),
        __shfl_xor_sync(kAll, columns.max, offset), __shfl_xor_sync(kAll, columns.sum, offset)};
    merge(columns, other);
  }
}

template <typename T, typename Config>
__global__ __launch_bounds__(Config::kThreads, 1) void decode_attention_kernel(
    const DecodeAttentionParams params) {
  using Storage = DecodeAttentionSharedStorage<Config>;
  constexpr int kHeadDim = Config::kHeadDim, kThreads = Config::kThreads;
  constexpr int kColumns = kHeadDim / 4;  // of four, as the ends of rows go
  const AttentionParams& p = params.attention;
  FS_SHARED_STORAGE(Storage, smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int num_splits = gridDim.x, split = blockIdx.x, kv_head = blockIdx.y, batch = blockIdx.z;
  const int num_rows = p.rows_per_head();

  const int first_tile = split * Config::kWarps + warp;
  const auto head_of = [&](const void* base, const DecodeStrides& strides) {
    return advance(advance(static_cast<const T*>(base), batch, strides.batch), kv_head, strides.head);
  };
  const CachedHead<T> cache{head_of(p.k, params.k_strides), head_of(p.v, params.v_strides),
                            int(params.k_strides.token * 16), int(params.v_strides.token * 16)};

  // The first tiles start to load before the length is known: they are likely to be inside, and reading them harms not.
  // In the order of use; what comes late holds up all that was asked for after it.
  const LoadedRowBounds loaded(p, batch);
  DecodeWarp<T, kHeadDim, false, true, Config::kRows> worker;
  const bool is_eager = first_tile < kEagerTiles && p.first_key.data == nullptr && p.window == 0 &&
                        first_tile * kDecodeKeys < p.max_keys;
  if (is_eager) worker.load_keys(cache, first_tile * kDecodeKeys, {0, p.max_keys});
  const T* q[2];
  int token[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = min(lane / 4 + 8 * i, num_rows - 1);
    token[i] = params.token(row);
    q[i] = advance(advance(advance(static_cast<const T*>(p.q), batch, params.q_strides.batch), token[i],
                           params.q_strides.token),
                   kv_head * p.group + row - token[i] * p.group, params.q_strides.head);
  }
  worker.load_queries([&](int half, int column) { return ptx::ld_global_streaming(q[half] + column); });
  if (is_eager) worker.load_values(cache, first_tile * kDecodeKeys, {0, p.max_keys});

  const RowBounds bounds = loaded.values(p);
  const KeyRange first_keys = visible_keys(p, bounds, 0), last_keys = visible_keys(p, bounds, p.s_q - 1);
  const KeyRange keys{first_keys.begin, last_keys.end};
  const int num_tiles = max((keys.end - keys.begin + kDecodeKeys - 1) / kDecodeKeys, 0);
  const int num_parts = min(num_splits, max((num_tiles + Config::kWarps - 1) / Config::kWarps, 1));
  if (split >= num_parts) return;
  if (!is_eager) worker.prefetch(cache, keys, first_tile);

  const int head = batch * p.num_kv_heads + kv_head;
  const SplitResults results(params.workspace, p.batch * p.num_kv_heads, num_rows, kHeadDim);
  uint32_t ticket = 0;
  if (threadIdx.x == 0 && num_parts > 1) ticket = ptx::atom_global_inc(results.words + head, kUnwritten - 1) + 1;

  const ScoreRule rule(p);
  const float exp_scale = Config::kPlain ? rule.scale : rule.exp_scale();
  const ThreadRows rows(p, bounds, token[0], token[1]);
  uint32_t* const splits = results.words + results.begin + int64_t(head) * num_splits * results.split_words;
  const auto hide = [&](float(&scores)[2][4], int key) {
    const int at = key - lane % 4 * 2;
    const bool all_visible = at >= last_keys.begin && at + kDecodeKeys <= first_keys.end;
    if constexpr (Config::kPlain) {
      if (!all_visible) hide_keys(scores, rows, key);
    } else {
      apply_rules(scores, p, rule, batch, rows, key, all_visible);
    }
  };
  worker.attend(cache, keys, first_tile, num_splits * Config::kWarps, exp_scale, hide, is_eager);
  worker.write(smem.parts, warp, num_rows, exp_scale);
  if (threadIdx.x == 0) smem.is_last = ticket + 1 == uint32_t(num_parts) || num_parts == 1;
  __syncthreads();

  // Each four columns of a row by `slices` threads, which share the splits.
  const bool is_last = smem.is_last;
  const int num_units = num_rows * kColumns;
  const int log_slices = is_last ? params.log_slices : 0, slices = 1 << log_slices;
#pragma unroll 1
  for (int begin = 0; begin < num_units * slices; begin += kThreads) {
    const int i = begin + int(threadIdx.x), unit = min(i >> log_slices, num_units - 1), slice = i & (slices - 1);
    const int row = unit / kColumns, column = unit % kColumns * 4;
    DecodeColumns result = merge_decode_parts<Config::kWarps>(smem.parts, row, column);
    const bool stores = i < num_units * slices && slice == 0;
    uint32_t* const split_row = splits + row * results.row_words;
    if (num_parts > 1) {
      const uint4 out = make_uint4(published(result.out.x), published(result.out.y), published(result.out.z),
                                   published(result.out.w));
      const uint2 rest = make_uint2(published(result.max), published(result.sum));
      if (!is_last) {
        if (!stores) continue;
        uint32_t* const to = split_row + split * results.split_words;
        ptx::st_global_relaxed(to + column, out);
        if (column == 0) ptx::st_global_relaxed_8(to + kHeadDim, rest);
        continue;
      }
      result = merge_splits(split_row, results.split_words, num_parts, slice, slices, split, out, rest, column,
                            kHeadDim);
      merge_lanes(result, slices);
    }
    if (!stores) continue;
    const float inverse = result.sum == 0.f ? 0.f : __fdividef(1.f, result.sum);  // nothing to attend to: zeros
    const int to_token = params.token(row), qo_head = kv_head * p.group + row - to_token * p.group;
    T* const to = static_cast<T*>(p.out) +
                  ((int64_t(batch) * p.s_q + to_token) * p.num_kv_heads * p.group + qo_head) * kHeadDim + column;
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_pair<T>(result.out.x * inverse, result.out.y * inverse),
                                               pack_pair<T>(result.out.z * inverse, result.out.w * inverse));
  }
  if (!is_last || num_parts == 1) return;

  // Leave the workspace as it was.
  __syncthreads();  // all have read the results
  if (threadIdx.x == 0) results.words[head] = kUnwritten;
#pragma unroll 4
  for (int i = threadIdx.x * 4; i < num_parts * results.split_words; i += kThreads * 4) {
    *reinterpret_cast<uint4*>(splits + i) = make_uint4(kUnwritten, kUnwritten, kUnwritten, kUnwritten);
  }
}

}  // namespace fastshard

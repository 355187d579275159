// Attention of one new token a row over its cache, inside the decode step kernel.
//
// An item is a token, a key-value head and a part of its keys; where heads are cut into parts, a block has one item at
// most. Its warps take 16 keys at a time (attention/decode_warp.cuh), the first of them while q is still on its way.
// The block of part 0 also has the new key, which it appends to the cache, and adds up what the other parts found.
// Floor: the keys and values in use at the bandwidth of the memory.
#pragma once
#include "attention/decode_warp.cuh"
#include "decode/activations.cuh"
#include "decode/step.h"

namespace fastshard {

constexpr int kAttendKeysPerPart = 128;  // below this a part is not worth a block

template <typename T, int kGroup, int kHeadDim>
struct alignas(16) AttendStorage {
  static constexpr int kRow = kHeadDim + 8;  // 16 bytes more than a head, so that rows differ in their banks
  T q[kGroup][kRow];                         // rotated
  union {
    float heads[kStreamWarps][kHeadDim];   // that a warp rotates
    PartialRows<kStreamWarps, kGroup, kHeadDim> parts;
  };

  // The new token's, where the last warp's part will be: no other warp reads them once they are there.
  static_assert(sizeof(heads) <= sizeof(parts.out) / kStreamWarps * (kStreamWarps - 1));
  __device__ T* new_key() { return reinterpret_cast<T*>(parts.out[kStreamWarps - 1]); }
  __device__ T* new_value() { return new_key() + kHeadDim; }
};

// Where a token is in the caches, read once a step.
struct DecodeRow {
  int slot, position, first_key;
  bool inside;  // the caches and the table
};

__device__ __forceinline__ DecodeRow load_row(const DecodeStepParams& p, int token) {
  const int64_t slot = p.slots[token], position = p.positions[token];
  const int64_t first_key = p.first_key == nullptr ? 0 : p.first_key[token];
  const bool inside = slot >= 0 && slot < p.cache_size && position >= 0 && position < p.num_positions;
  return {inside ? int(slot) : 0, inside ? int(position) : 0,
          int(max(min(first_key, int64_t(p.cache_size)), int64_t(0))), inside};
}

// What a part found of a row: words of one float each, its outputs, its maximum and its sum.
__device__ __forceinline__ uint64_t* partial_row(const DecodeStepParams& p, int head, int part, int row) {
  return p.buffers.partials + int64_t((head * kDecodeMaxSplits + part) * p.group() + row) * (p.head_dim + 2);
}

__device__ __forceinline__ void store_partial(uint64_t* row, int column, int head_dim, const DecodeColumns& part,
                                              uint32_t flag) {
  const float values[4] = {part.out.x, part.out.y, part.out.z, part.out.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) store_flagged(row + column + i, __float_as_uint(values[i]), flag);
  if (column == 0) {
    store_flagged(row + head_dim, __float_as_uint(part.max), flag);
    store_flagged(row + head_dim + 1, __float_as_uint(part.sum), flag);
  }
}

// Add to `mine` what parts 1 .. parts - 1 found of four columns of a row.
__device__ __forceinline__ void merge_parts(DecodeColumns& mine, const DecodeStepParams& p,
                                            int head, int parts, int row, int column, uint32_t flag) {
  constexpr int kAtATime = 4;
#pragma unroll 1
  for (int first = 1; first < parts; first += kAtATime) {
    ulonglong2 words[3 * kAtATime];  // of a part: four outputs, maximum and sum
    load_all_flagged(words, flag, [&](int i) {
      const uint64_t* const from = partial_row(p, head, min(first + i / 3, parts - 1), row);
      return ptx::ld_relaxed_2x64(from + (i % 3 == 2 ? p.head_dim : column + i % 3 * 2));
    });
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      if (first + i >= parts) continue;
      const ulonglong2 &low = words[3 * i], &high = words[3 * i + 1], &rest = words[3 * i + 2];
      const float max = flagged_float(rest.x), both = fmaxf(mine.max, max), origin = both == -INFINITY ? 0.f : both;
      const float keep = ptx::ex2(mine.max - origin), add = ptx::ex2(max - origin);
      mine.max = both;
      mine.sum = mine.sum * keep + flagged_float(rest.y) * add;
      mine.out.x = mine.out.x * keep + flagged_float(low.x) * add;
      mine.out.y = mine.out.y * keep + flagged_float(low.y) * add;
      mine.out.z = mine.out.z * keep + flagged_float(high.x) * add;
      mine.out.w = mine.out.w * keep + flagged_float(high.y) * add;
    }
  }
}

// One head of the packed q, k, v of a token into shared memory, by one warp: through its norm and RoPE, where it has
// them. words: its head_dim / 2. angles: cosine and sine of each pair, or null. scratch: head_dim floats.
template <typename T>
__device__ __forceinline__ void load_head(const DecodeStepParams& p, const uint64_t* words, uint32_t flag,
                                          const void* norm, const float2* angles, float* scratch, T* out) {
  const int lane = threadIdx.x % 32, half = p.rotary_dim / 2;
  float squares = 0.f;
#pragma unroll 1
  for (int d = 2 * lane; d < p.head_dim; d += 64) {
    const float2 pair = unpack_pair<T>(load_flagged(words + d / 2, flag));
    scratch[d] = pair.x, scratch[d + 1] = pair.y;
    squares += pair.x * pair.x + pair.y * pair.y;
  }
  __syncwarp();
  if (norm != nullptr) {
    const float rstd = rsqrtf(warp_reduce_sum(squares) / p.head_dim + p.norm_eps);
#pragma unroll 1
    for (int d = lane; d < p.head_dim; d += 32) {
      float x = scratch[d] * rstd;
      if (!p.weight_in_fp32) x = to_float(from_float<T>(x));
      scratch[d] = to_float(from_float<T>(x * to_float(static_cast<const T*>(norm)[d])));
    }
    __syncwarp();
  }
#pragma unroll 1
  for (int i = lane; i < p.head_dim / 2; i += 32) {  // a pair that turns together, or two elements that do not
    const bool turns = i < half && angles != nullptr;
    const bool adjacent = p.rope_interleaved || i >= half;
    const int first = adjacent ? 2 * i : i, second = first + (adjacent ? 1 : half);
    const float2 angle = turns ? angles[i] : make_float2(1.f, 0.f);
    const float x = scratch[first], y = scratch[second];
    out[first] = from_float<T>(x * angle.x - y * angle.y);
    out[second] = from_float<T>(y * angle.x + x * angle.y);
  }
}

// All items of this block. All threads call it.
// rows: of the tokens. longest: the most old keys of a row. flag: of all that this layer's blocks tell each other.
template <typename T, int kGroup, int kHeadDim>
__device__ __forceinline__ void attend(const DecodeStepParams& p, const DecodeLayer& layer, const DecodeRow* rows,
                                    int longest, uint32_t flag, AttendStorage<T, kGroup, kHeadDim>& smem) {
  const int warp = threadIdx.x / 32;
  const int num_kv_heads = ptx::mov_opaque(p.num_kv_heads), group = ptx::mov_opaque(p.num_heads) / num_kv_heads;
  const int num_heads = p.num_tokens * num_kv_heads;
  if (layer.window > 0) longest = min(longest, layer.window);
  // Parts of a head wait for each other only where every item has a block of its own.
  const int parts = max(1, min(min(kDecodeMaxSplits, ptx::mov_opaque(gridDim.x) / num_heads),
                               (longest + kAttendKeysPerPart - 1) / kAttendKeysPerPart));
  const float exp_scale = p.softmax_scale * 1.44269504f;  // log2(e)

#pragma unroll 1
  for (int item = blockIdx.x; item < num_heads * parts; item += gridDim.x) {
    const int part = item / num_heads, head = item % num_heads;
    const int token = head / num_kv_heads, kv_head = head % num_kv_heads;
    const DecodeRow row = rows[token];
    const int first = layer.window > 0 ? max(row.first_key, row.slot + 1 - layer.window) : row.first_key;
    // the part's old keys: whole tiles of 16 but for the last
    const int old = row.inside ? max(row.slot - first, 0) : 0, tiles = (old + kDecodeKeys - 1) / kDecodeKeys;
    const KeyRange range{first + tiles * part / parts * kDecodeKeys,
                         first + min(old, tiles * (part + 1) / parts * kDecodeKeys)};
    const int64_t cache = (int64_t(token) * num_kv_heads + kv_head) * p.cache_size * kHeadDim;
    T* const k_cache = static_cast<T*>(layer.k_cache) + cache;
    T* const v_cache = static_cast<T*>(layer.v_cache) + cache;
    const CachedHead<T> keys{k_cache, v_cache, int(kHeadDim * sizeof(T)), int(kHeadDim * sizeof(T))};

    DecodeWarp<T, kHeadDim, false, false, 8> worker;
    const int first_key = range.begin + warp * kDecodeKeys;
    if (first_key < range.end) worker.prefetch(keys, range, warp);
    const float2* angles = nullptr;
    if (p.rope_table != nullptr && row.inside) {
      angles = reinterpret_cast<const float2*>(p.rope_table) + int64_t(row.position) * (p.rotary_dim / 2);
    }
    __syncthreads();  // the storage is free
    const int heads = group + (part == 0 ? 2 : 0);  // the new key and value, too
#pragma unroll 1
    for (int i = warp; i < heads; i += kStreamWarps) {
      const bool is_query = i < group, is_key = i == group;
      const int from = is_query ? kv_head * group + i : p.num_heads + (is_key ? 0 : num_kv_heads) + kv_head;
      const uint64_t* const words = p.buffers.qkv + (token * p.qkv_size() + from * kHeadDim) / 2;
      load_head<T>(p, words, flag, is_query ? layer.q_norm : is_key ? layer.k_norm : nullptr,
                   is_query || is_key ? angles : nullptr, smem.heads[warp],
                   is_query ? smem.q[i] : is_key ? smem.new_key() : smem.new_value());
      __syncwarp();
    }
    __syncthreads();

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      worker.shared_q[i] = &smem.q[min(int(threadIdx.x) % 32 / 4 + 8 * i, group - 1)][threadIdx.x % 4 * 8];
    }
    worker.attend(keys, range, warp, kStreamWarps, exp_scale, HideFrom{range.end});
    if (part == 0 && row.inside && warp == kStreamWarps - 1) {
      if (row.slot >= first) {
        const auto nothing = [] {};
        worker.load_one(smem.new_key(), smem.new_value());
        worker.attend_tile(0, exp_scale, HideFrom{1}, nothing, nothing);
      }
      for (int d = threadIdx.x % 32; d < kHeadDim; d += 32) {
        k_cache[int64_t(row.slot) * kHeadDim + d] = smem.new_key()[d];
        v_cache[int64_t(row.slot) * kHeadDim + d] = smem.new_value()[d];
      }
      __syncwarp();  // before the warp writes its part there
    }
    if (!row.inside && part == 0 && threadIdx.x == 0) *p.overflow = 1;
    worker.write(smem.parts, warp, group, exp_scale);
    __syncthreads();

#pragma unroll 1
    for (int i = threadIdx.x; i < group * (kHeadDim / 4); i += kStreamThreads) {
      const int query = i / (kHeadDim / 4), column = i % (kHeadDim / 4) * 4;
      DecodeColumns sum = merge_decode_parts<kStreamWarps>(smem.parts, query, column);
      if (part > 0) {
        store_partial(partial_row(p, head, part, query), column, kHeadDim, sum, flag);
        continue;
      }
      merge_parts(sum, p, head, parts, query, column, flag);
      const float scale = sum.sum > 0.f ? 1.f / sum.sum : 0.f;  // nothing seen: zeros
      uint64_t* to = p.buffers.attended + (token * p.q_size() + (kv_head * group + query) * kHeadDim + column) / 2;
      store_flagged(to, pack_pair<T>(sum.out.x * scale, sum.out.y * scale), flag);
      store_flagged(to + 1, pack_pair<T>(sum.out.z * scale, sum.out.w * scale), flag);
    }
  }
}

}  // namespace fastshard

// One warp attends from up to 16 query rows to the keys of one key/value head, 16 keys at a time, in registers alone.
//
// The query rows are operand A of both products, so that their softmax lies in the lanes as OnlineSoftmax has it. A
// lane (g, t) = (lane / 4, lane % 4) loads whole 16-byte pieces, and the order of the inner index is chosen to fit:
// of keys g and g + 8 the columns 32 i + 8 t + (0..7), which are the fragments B of two steps of q k^T; and of values
// 2 t, 2 t + 1, 2 t + 8, 2 t + 9 the columns 8 W i + W g + (0..W-1), of which column j is in fragment B of product j.
// While one tile is multiplied, the next one is on its way into the registers that become free.
// Floor: 4 * head_dim bytes for each key. Nothing here depends on how a kernel deals out its work.
#pragma once
#include "attention/finish.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "attention/visibility.cuh"

namespace fastshard {

constexpr int kDecodeRows = 16;  // of queries
constexpr int kDecodeKeys = 16;  // of a tile

// The keys and values of one batch row and key/value head: [keys, head_dim], rows 16-byte aligned.
template <typename T>
struct CachedHead {
  const T* k;
  const T* v;
  int k_stride_bytes, v_stride_bytes;  // of a key: one multiply-add makes an address
};

// Every query row sees the keys before `end`: the rule of a decode step, for DecodeWarp::attend.
struct HideFrom {
  int end;
  __device__ __forceinline__ void operator()(float (&scores)[2][4], int key) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (key + 8 * n + e % 2 >= end) scores[n][e] = -INFINITY;
      }
    }
  }
};

// The merged result of one query row, four of its columns.
struct DecodeColumns {
  float4 out;  // sum of weight * v; the weights are relative to max
  float max;   // of base-2 scores, -inf where nothing was seen
  float sum;   // of weights
};

// kFresh: keys and values may be of other blocks of the same launch. kKeepQueries: in registers; else they
// are read from shared memory for each tile. kRows: 8 or 16, of queries; 8 takes fewer instructions.
template <typename T, int kHeadDim, bool kFresh = false, bool kKeepQueries = true, int kRows = 16>
struct DecodeWarp {
  static constexpr int kHalves = kRows / 8;  // query rows of a lane: lane / 4 and, of 16, that + 8
  static constexpr int kKeyLoads = kHeadDim / 32;
  static constexpr int kWidth = kHeadDim % 64 == 0 ? 8 : 4;  // columns of a value that a lane loads at a time
  static constexpr int kValueLoads = kHeadDim / (8 * kWidth);
  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 128 && (kRows == 8 || kRows == 16));

  uint32_t q[kKeepQueries ? kHeadDim / 16 : 1][4];
  const T* shared_q[2];                          // columns 8 t.. of rows g and g + 8, where they are not kept
  uint4 keys[2][kKeyLoads];                      // of the next tile, as the values
  uint32_t values[4][kValueLoads][kWidth / 2];
  OnlineSoftmax softmax;
  float out[kHeadDim / 8][4] = {};

  // load_query(half, column): eight columns of query row lane / 4 + 8 * half. For a row that does not exist, the second
  // half of 8 rows among them, any values do: rows do not mix.
  template <typename LoadQuery>
  __device__ __forceinline__ void load_queries(LoadQuery load_query) {
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i) {
      const int column = 32 * i + threadIdx.x % 4 * 8;
      const uint4 low = load_query(0, column), high = load_query(1, column);
      const uint32_t words[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
      for (int e = 0; e < 8; ++e) q[2 * i + e / 4][e % 4] = words[e / 4][e % 4];
    }
  }

  // Start loading the tile of `key`. Keys past the range are read as its last one, so that nothing that lies there, NaN
  // included, reaches the products: their weights are zero. Where the range that attend() takes ends before this one,
  // clear_values() does the same.
  __device__ __forceinline__ void load_keys(const CachedHead<T>& head, int key, KeyRange range) {
    const int lane = threadIdx.x % 32;
    const T* const column = head.k + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const T* const from = advance(column, min(key + 8 * n + lane / 4, range.end - 1), head.k_stride_bytes);
#pragma unroll
      for (int i = 0; i < kKeyLoads; ++i) {
        keys[n][i] = kFresh ? ptx::ld_global_relaxed(from + 32 * i) : ptx::ld_global_streaming(from + 32 * i);
      }
    }
  }

  __device__ __forceinline__ void load_values(const CachedHead<T>& head, int key, KeyRange range) {
    const int lane = threadIdx.x % 32;
    const T* const column = head.v + lane / 4 * kWidth;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const T* from = advance(column, min(key + value_of(e), range.end - 1), head.v_stride_bytes);
#pragma unroll
      for (int i = 0; i < kValueLoads; ++i, from += 8 * kWidth) {
        if constexpr (kWidth == 8) {
          const uint4 v = kFresh ? ptx::ld_global_relaxed(from) : ptx::ld_global_streaming(from);
          values[e][i][0] = v.x, values[e][i][1] = v.y, values[e][i][2] = v.z, values[e][i][3] = v.w;
        } else {
          const uint2 v = kFresh ? ptx::ld_global_relaxed_8(from) : ptx::ld_global_streaming_8(from);
          values[e][i][0] = v.x, values[e][i][1] = v.y;
        }
      }
    }
  }

  // Start loading tile `tile` of the range, the first that attend() will take.
  __device__ __forceinline__ void prefetch(const CachedHead<T>& head, KeyRange range, int tile) {
    const int key = range.begin + tile * kDecodeKeys;
    if (key >= range.end) return;
    load_keys(head, key, range);
    load_values(head, key, range);
  }

  // Attend to the tiles tile, tile + step, ... of the range. is_eager: the first was loaded without knowing its end.
  // hide(scores, key): softcap, mask and -inf for the keys that a row does not see, those past the range among them.
  // scores[n][e] is of query row lane / 4 + e / 2 * 8 and key `key` + 8 n + e % 2.
  template <typename Hide>
  __device__ __forceinline__ void attend(const CachedHead<T>& head, KeyRange range, int tile, int step,
                                         float exp_scale, Hide hide, bool is_eager = false) {
    for (int key = range.begin + tile * kDecodeKeys; key < range.end; key += step * kDecodeKeys) {
      const int next = key + step * kDecodeKeys;
      if (is_eager && key + kDecodeKeys > range.end) clear_values(range.end - key);
      attend_tile(
          key, exp_scale, hide, [&] { if (next < range.end) load_keys(head, next, range); },
          [&] { if (next < range.end) load_values(head, next, range); });
    }
  }

  // Attend to the tile in the registers, its first key is `key`. refill_keys, refill_values: called when the registers
  // of the keys, and of the values, are free again.
  template <typename Hide, typename RefillKeys, typename RefillValues>
  __device__ __forceinline__ void attend_tile(int key, float exp_scale, Hide hide, RefillKeys refill_keys,
                                              RefillValues refill_values) {
    float scores[2][4] = {};
    multiply_queries_keys(scores);
    refill_keys();
    hide(scores, key + threadIdx.x % 4 * 2);
    softmax.template update<kHalves>(scores, out, exp_scale);
    accumulate_values(scores);
    refill_values();
  }

  // One key and its value into the registers, from shared memory, as the first of a tile of zeros.
  __device__ __forceinline__ void load_one(const T* key, const T* value) {
    const int group = threadIdx.x % 32 / 4, thread = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i) {
      const uint4 zero = make_uint4(0, 0, 0, 0);
      keys[0][i] = group == 0 ? *reinterpret_cast<const uint4*>(key + 32 * i + 8 * thread) : zero;
      keys[1][i] = zero;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int i = 0; i < kValueLoads; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth / 2; ++j) {
          const T* from = value + (8 * i + group) * kWidth + 2 * j;
          values[e][i][j] = e == 0 && thread == 0 ? *reinterpret_cast<const uint32_t*>(from) : 0;
        }
      }
    }
  }

  // Values of the tile in the registers from its key `end` on become zeros.
  __device__ __forceinline__ void clear_values(int end) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (value_of(e) < end) continue;
#pragma unroll
      for (int i = 0; i < kValueLoads; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth / 2; ++j) values[e][i][j] = 0;
      }
    }
  }

  // Write the first num_rows rows as part `part`.
  template <typename Parts>
  __device__ __forceinline__ void write(Parts& parts, int part, int num_rows, float exp_scale) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int row = lane / 4 + 8 * i;
      const float sum = softmax.row_sum(i);
      if (row >= num_rows) continue;
      parts.max[part][row] = softmax.max[i] * exp_scale;
      parts.sum[part][row] = sum;
      // Columns 2 t and 2 t + 1 of kWidth products are 2 * kWidth columns side by side.
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; n += 4) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = n / kWidth * 8 * kWidth + (lane % 4 * 2 + e) * kWidth + n % kWidth;
          *reinterpret_cast<float4*>(&parts.out[part][row][column]) =
              make_float4(out[n][2 * i + e], out[n + 1][2 * i + e], out[n + 2][2 * i + e], out[n + 3][2 * i + e]);
        }
      }
    }
  }

 private:
  // Key of a tile that values[e] are of.
  static __device__ __forceinline__ int value_of(int e) { return threadIdx.x % 4 * 2 + e % 2 + e / 2 * 8; }

  static __device__ __forceinline__ const T* advance(const T* from, int rows, int stride_bytes) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) + int64_t(rows) * stride_bytes);
  }

  __device__ __forceinline__ void multiply_queries_keys(float (&scores)[2][4]) const {
    float odd[2][4] = {};  // of the odd steps: two short chains of products
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i) {
      uint32_t a[2][4];
      if constexpr (kKeepQueries) {
#pragma unroll
        for (int e = 0; e < 8; ++e) a[e / 4][e % 4] = q[2 * i + e / 4][e % 4];
      } else {
        const uint4 low = *reinterpret_cast<const uint4*>(shared_q[0] + 32 * i);
        const uint4 high = *reinterpret_cast<const uint4*>(shared_q[1] + 32 * i);
        a[0][0] = low.x, a[0][1] = high.x, a[0][2] = low.y, a[0][3] = high.y;
        a[1][0] = low.z, a[1][1] = high.z, a[1][2] = low.w, a[1][3] = high.w;
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        ptx::mma_m16n8k16<T>(scores[n], a[0], keys[n][i].x, keys[n][i].y);
        ptx::mma_m16n8k16<T>(kKeepQueries ? odd[n] : scores[n], a[1], keys[n][i].z, keys[n][i].w);
      }
    }
    if constexpr (kKeepQueries) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[n][e] += odd[n][e];
      }
    }
  }

  // Column j of two values, as a pair.
  __device__ __forceinline__ uint32_t value_pair(int e, int i, int j) const {
    return __byte_perm(values[e][i][j / 2], values[e + 1][i][j / 2], j % 2 == 0 ? 0x5410 : 0x7632);
  }

  __device__ __forceinline__ void accumulate_values(const float (&weights)[2][4]) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int e = kHalves == 2 ? i % 2 * 2 : 0;
      a[i] = pack_pair<T>(weights[i / 2][e], weights[i / 2][e + 1]);
    }
#pragma unroll
    for (int i = 0; i < kValueLoads; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        ptx::mma_m16n8k16<T>(out[i * kWidth + j], a, value_pair(0, i, j), value_pair(2, i, j));
      }
    }
  }
};

// Merge what kParts warps wrote of a row: four columns of it. Each part counts, so that a NaN shows.
template <int kParts, typename Parts>
__device__ __forceinline__ DecodeColumns merge_decode_parts(const Parts& parts, int row, int column) {
  DecodeColumns merged{make_float4(0.f, 0.f, 0.f, 0.f), -INFINITY, 0.f};
#pragma unroll
  for (int i = 0; i < kParts; ++i) merged.max = fmaxf(merged.max, parts.max[i][row]);
  const float origin = merged.max == -INFINITY ? 0.f : merged.max;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const float weight = ptx::ex2(parts.max[i][row] - origin);
    const float4 out = *reinterpret_cast<const float4*>(&parts.out[i][row][column]);
    merged.sum += weight * parts.sum[i][row];
    merged.out.x += weight * out.x;
    merged.out.y += weight * out.y;
    merged.out.z += weight * out.z;
    merged.out.w += weight * out.w;
  }
  return merged;
}

}  // namespace fastshard

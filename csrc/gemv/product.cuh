// y[m, n] = x[m, :] . W[n, :] for up to 8 or 16 rows m, the tokens, with weights from weight_stream.cuh.
//
// The warps of a block split the columns of a chunk. The weights are the B operand of mma.m16n8k16, straight from
// 16-byte loads: in a step of 32 columns, thread t of a group of four holds columns 8t..8t+7 of weight row g, and the
// same columns of its tokens, as both operands may permute k alike; a first product takes columns 8t..8t+3, a second
// 8t+4..8t+7. Token g is row g of the A operand, token g + 8 row g + 8. Up to 8 tokens fill only half of the rows, so
// the other half takes other columns: rows 8..15 of the one A operand hold columns 8t+4..8t+7 of the tokens in rows
// 0..7; each product's own half of the sums is right, and the halves are added at the end.
// A warp's activations stay in registers while the block's tiles pass by. The warps' sums of a group of tiles meet in
// shared memory, where one thread adds up two neighbouring outputs of one token.
#pragma once
#include "common/vec.cuh"
#include "gemv/weight_stream.cuh"

namespace fastshard {

constexpr int kStagedTokens = 2;  // whose activations lie in shared memory at a time

// What a warp has in shared memory: its activations on their way to its lanes, then its sums.
template <typename T>
union alignas(16) WarpStorage {
  // in the order of an A operand; 64 bytes more than the columns, so that two rows differ in their banks
  T staged[kStagedTokens][kSliceChunks * kWarpColumns + 32];
  float2 sums[kGroupSums][4];  // of a tile and a token, as SumSlot says: outputs 2t and 2t + 1
};

template <typename T>
using ProductStorage = WarpStorage<T>[kStreamWarps];

constexpr int kSliceSteps = kSliceChunks * kChunkSteps;

// A lane's activations of one slice: of token lane / 4, and of token lane / 4 + 8 where there are so many.
// kTokens: 8 or 16, at most.
template <int kTokens>
struct Activations {
  static_assert(kTokens == 8 || kTokens == 16);
  static constexpr int kHalves = kTokens / 8;  // of the A operand, that hold tokens of their own
  uint32_t a[kSliceSteps][kHalves][4];         // the operands of a step's two products, or the one of both

  // columns: 8t..8t+7 of the step, of token lane / 4 + 8 * half.
  __device__ __forceinline__ void set(int step, int half, uint4 columns) {
    if constexpr (kHalves == 1) {
      a[step][0][0] = columns.x, a[step][0][2] = columns.y, a[step][0][1] = columns.z, a[step][0][3] = columns.w;
    } else {
      a[step][0][half] = columns.x, a[step][0][half + 2] = columns.y;
      a[step][1][half] = columns.z, a[step][1][half + 2] = columns.w;
    }
  }

  __device__ __forceinline__ uint4 get(int step, int half) const {
    if constexpr (kHalves == 1) return make_uint4(a[step][0][0], a[step][0][2], a[step][0][1], a[step][0][3]);
    const auto& second = a[step][kHalves - 1];
    return make_uint4(a[step][0][half], a[step][0][half + 2], second[half], second[half + 2]);
  }

  // Those of tokens `token` and after, as many as are staged, to the lanes that hold them. All lanes of a warp call it.
  template <typename T>
  __device__ __forceinline__ void take_staged(const WarpStorage<T>& storage, int token, int chunks) {
    static_assert(kHalves == 1);
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if (lane / 4 / kStagedTokens == token / kStagedTokens) {
      const T* const row = storage.staged[lane / 4 % kStagedTokens] + lane % 4 * 8;
#pragma unroll
      for (int chunk = 0; chunk < kSliceChunks; ++chunk) {
        if (chunk >= chunks) break;
#pragma unroll
        for (int i = chunk * kChunkSteps; i < (chunk + 1) * kChunkSteps; ++i) {
          const uint4 v = *reinterpret_cast<const uint4*>(row + 32 * i);
          a[i][0][0] = v.x, a[i][0][1] = v.y, a[i][0][2] = v.z, a[i][0][3] = v.w;
        }
      }
    }
    __syncwarp();
  }
};

// The tokens that a group has room for, rounded up by token_shift(): a constant of a product that is for more than 8.
template <int kTokens>
__device__ __forceinline__ constexpr int room_of(int num_tokens) {
  return kTokens > 8 ? kTokens : num_tokens;
}

// Whose sums a thread adds up: two outputs of a tile of the group, of a token.
struct SumSlot {
  int tile, token;

  __device__ __forceinline__ explicit SumSlot(int num_tokens)
      : tile(int(threadIdx.x) / 4 >> token_shift(num_tokens)),
        token(threadIdx.x / 4 & ((1 << token_shift(num_tokens)) - 1)) {}
};
static_assert(kStreamThreads == 4 * kGroupSums);

// The sums of x^2 that the warps found, each in its columns.
template <int kTokens>
using Squares = float[kTokens][kStreamWarps];

// 1 / sqrt(mean(x^2) + eps) of a token.
template <int kTokens>
__device__ __forceinline__ float rstd_of(const Squares<kTokens>& squares, int token, int size, float eps) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kStreamWarps; ++i) sum += squares[token][i];
  return rsqrtf(__fdividef(sum, float(size)) + eps);
}

// The tiles of a group, kChunks chunks of each.
template <int kChunks, typename T, int kTokens, typename Stream>
__device__ __forceinline__ void multiply_tiles(Stream& stream, const Activations<kTokens>& x,
                                               WarpStorage<T>& storage, int tiles, int num_tokens) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    constexpr int kSums = kTokens == 8 ? 4 : 2;  // even ones of first products, odd ones of second
    float s[kSums][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint4 w[kChunkSteps];
      stream.take(w);
#pragma unroll
      for (int i = 0; i < kChunkSteps; ++i) {
        const auto& a = x.a[chunk * kChunkSteps + i];
        ptx::mma_m16n8k16<T>(s[i * 2 % kSums], a[0], w[i].x, w[i].y);
        ptx::mma_m16n8k16<T>(s[i * 2 % kSums + 1], a[x.kHalves - 1], w[i].z, w[i].w);
      }
      stream.fetch();
    }
    float2(*const to)[4] = storage.sums + (tile << token_shift(room_of<kTokens>(num_tokens)));
    if constexpr (kTokens == 8) {  // first products are right in rows 0..7, second ones in rows 8..15
      if (lane / 4 < num_tokens) {
        to[lane / 4][lane % 4] = make_float2(s[0][0] + s[2][0] + (s[1][2] + s[3][2]),
                                             s[0][1] + s[2][1] + (s[1][3] + s[3][3]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        if (lane / 4 + 4 * i >= num_tokens) continue;
        to[lane / 4 + 4 * i][lane % 4] = make_float2(s[0][i] + s[1][i], s[0][i + 1] + s[1][i + 1]);
      }
    }
  }
}

// One segment's product. All threads of the block call it.
//   load(activations, slice, chunks, again, storage): the lane's activations of these chunks, zeros past the columns;
//     it may use the warp's storage. again: they have been loaded before
//   begin(valid, token, n) -> value: once for each pair of outputs n, n + 1 of a thread, before the sums are there;
//     what it returns...
//   finish(value, valid, token, n, first, second): ...comes back with the two. All lanes of a warp call both together,
//     those that have no output with valid = false.
// Before the call, all threads must have met where the storage was in use; after it, it is free.
template <int kTokens, typename T, typename Stream, typename Load, typename Begin, typename Finish>
__device__ __forceinline__ void multiply(Stream& stream, ProductStorage<T>& storage, const Segment& segment,
                                         int out_features, int num_tokens, Load load, Begin begin, Finish finish) {
  const int warp = threadIdx.x / 32, pair = threadIdx.x % 4;
  const SumSlot slot(room_of<kTokens>(num_tokens));
  const int last_chunk = segment.first_chunk + segment.chunks;

  Activations<kTokens> x = {};  // so that the compiler sees no earlier values live on
#pragma unroll 1
  for (int group = 0; group < segment.tiles; group += segment.group_tiles) {
    const int tiles = min(segment.group_tiles, segment.tiles - group);
    const int n = kTileRows * segment.tile(group + slot.tile) + 2 * pair;
    const bool valid = slot.tile < tiles && slot.token < num_tokens && n < out_features;
    const auto kept = begin(valid, slot.token, n);

    float2 sum = make_float2(0.f, 0.f);
#pragma unroll 1
    for (int slice = segment.first_chunk; slice < last_chunk; slice += kSliceChunks) {
      const int chunks = min(kSliceChunks, last_chunk - slice);
      if (group == 0 || segment.chunks > kSliceChunks) load(x, slice, chunks, group > 0, storage[warp]);
      switch (chunks) {
        case 1: multiply_tiles<1>(stream, x, storage[warp], tiles, num_tokens); break;
        case 2: multiply_tiles<2>(stream, x, storage[warp], tiles, num_tokens); break;
        case 3: multiply_tiles<3>(stream, x, storage[warp], tiles, num_tokens); break;
        case 4: multiply_tiles<4>(stream, x, storage[warp], tiles, num_tokens); break;
      }
      static_assert(kSliceChunks == 4);
      __syncthreads();
      if (valid) {
#pragma unroll
        for (int w = 0; w < kStreamWarps; ++w) {
          const float2 part = storage[w].sums[threadIdx.x / 4][pair];
          sum.x += part.x, sum.y += part.y;
        }
      }
      __syncthreads();
    }
    finish(kept, valid, slot.token, n, sum.x, sum.y);
  }
}

}  // namespace fastshard

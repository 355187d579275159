// y[m, n] = x[m, :] . W[n, :] for up to 8 rows m, the tokens, with weights from weight_stream.cuh.
//
// The warps of a block split the columns of a chunk. The weights are the B operand of mma.m16n8k16, straight from
// 16-byte loads: in a step of 32 columns, thread t of a group of four holds columns 8t..8t+7 of weight row g, and the
// same columns of its token, as both operands may permute k alike. Up to 8 tokens fill only half of the 16 rows of the
// A operand, so the other half takes other columns: rows 0..7 hold columns 8t..8t+3, rows 8..15 columns 8t+4..8t+7 of
// the same tokens; each product's own half of the sums is right, and the halves are added at the end.
// A warp's activations stay in registers while the block's tiles pass by. The warps' sums of a group of tiles meet in
// shared memory, where one thread adds up two neighbouring outputs of one token.
#pragma once
#include "common/vec.cuh"
#include "gemv/weight_stream.cuh"

namespace fastshard {

constexpr int kProductTokens = 8;  // at most
constexpr int kStagedTokens = 2;   // whose activations lie in shared memory at a time

// What a warp has in shared memory: its activations on their way to its lanes, then its sums.
template <typename T>
union alignas(16) WarpStorage {
  // in the order of Activations::set; 64 bytes more than the columns, so that two rows differ in their banks
  T staged[kStagedTokens][kSliceChunks * kWarpColumns + 32];
  float2 sums[kGroupSums][4];  // of a tile and a token, as SumSlot says: outputs 2t and 2t + 1
};

template <typename T>
using ProductStorage = WarpStorage<T>[kStreamWarps];

// A lane's activations of one slice, a fragment a step: of token lane / 4.
struct Activations {
  uint32_t a[kSliceChunks * kChunkSteps][4];

  // fragment: columns 8t..8t+7 of the step, pairs in the order 0, 2, 1, 3.
  __device__ __forceinline__ void set(int step, uint4 fragment) {
    a[step][0] = fragment.x, a[step][1] = fragment.y, a[step][2] = fragment.z, a[step][3] = fragment.w;
  }

  // Those of tokens `token` and after, as many as are staged, to the lanes that hold them. All lanes of a warp call it.
  template <typename T>
  __device__ __forceinline__ void take_staged(const WarpStorage<T>& storage, int token, int chunks) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if (lane / 4 / kStagedTokens == token / kStagedTokens) {
      const T* const row = storage.staged[lane / 4 % kStagedTokens] + lane % 4 * 8;
#pragma unroll
      for (int chunk = 0; chunk < kSliceChunks; ++chunk) {
        if (chunk >= chunks) break;
#pragma unroll
        for (int i = chunk * kChunkSteps; i < (chunk + 1) * kChunkSteps; ++i) {
          set(i, *reinterpret_cast<const uint4*>(row + 32 * i));
        }
      }
    }
    __syncwarp();
  }
};

// Whose sums a thread adds up: two outputs of a tile of the group, of a token.
struct SumSlot {
  int tile, token;

  __device__ __forceinline__ explicit SumSlot(int num_tokens)
      : tile(int(threadIdx.x) / 4 >> token_shift(num_tokens)),
        token(threadIdx.x / 4 & ((1 << token_shift(num_tokens)) - 1)) {}
};
static_assert(kStreamThreads == 4 * kGroupSums);

// The tiles of a group, kChunks chunks of each.
template <int kChunks, typename T, typename Stream>
__device__ __forceinline__ void multiply_tiles(Stream& stream, const Activations& x, WarpStorage<T>& storage, int tiles,
                                               int num_tokens) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    float sums[4][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint4 w[kChunkSteps];
      stream.take(w);
#pragma unroll
      for (int i = 0; i < kChunkSteps; ++i) {
        const auto& a = x.a[chunk * kChunkSteps + i];
        ptx::mma_m16n8k16<T>(sums[i % 2 * 2], a, w[i].x, w[i].y);
        ptx::mma_m16n8k16<T>(sums[i % 2 * 2 + 1], a, w[i].z, w[i].w);
      }
      stream.fetch();
    }
    if (lane / 4 < num_tokens) {
      // Of sums 0 and 2 rows 0..7 are right, of 1 and 3 rows 8..15.
      storage.sums[tile << token_shift(num_tokens) | lane / 4][lane % 4] =
          make_float2(sums[0][0] + sums[2][0] + (sums[1][2] + sums[3][2]),
                      sums[0][1] + sums[2][1] + (sums[1][3] + sums[3][3]));
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
template <typename T, typename Stream, typename Load, typename Begin, typename Finish>
__device__ __forceinline__ void multiply(Stream& stream, ProductStorage<T>& storage, const Segment& segment,
                                         int out_features, int num_tokens, Load load, Begin begin, Finish finish) {
  const int warp = threadIdx.x / 32;
  const SumSlot slot(num_tokens);
  const int last_chunk = segment.first_chunk + segment.chunks;

  Activations x = {};  // so that the compiler sees no earlier values live on
#pragma unroll 1
  for (int group = 0; group < segment.tiles; group += segment.group_tiles) {
    const int tiles = min(segment.group_tiles, segment.tiles - group);
    const int n = kTileRows * segment.tile(group + slot.tile) + 2 * (threadIdx.x % 4);
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
      ptx::bar_sync(1, kStreamThreads);
      if (valid) {
#pragma unroll
        for (int w = 0; w < kStreamWarps; ++w) {
          const float2 part = storage[w].sums[threadIdx.x / 4][threadIdx.x % 4];
          sum.x += part.x, sum.y += part.y;
        }
      }
      ptx::bar_sync(1, kStreamThreads);
    }
    finish(kept, valid, slot.token, n, sum.x, sum.y);
  }
}

}  // namespace fastshard

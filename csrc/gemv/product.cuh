// y[m, n] = x[m, :] . W[n, :] for up to 8 rows m, the tokens: the consumers' half of weight_ring.cuh.
//
// The consumer warps split the columns of a chunk. The weights are the B operand of mma.m16n8k16, straight from 16-byte
// loads: in a step of 32 columns, thread t of a group of four holds columns 8t..8t+7 of weight row g, and the same
// columns of its token, as both operands may permute k alike. Up to 8 tokens fill only half of the 16 rows of the
// A operand, so the other half takes other columns: rows 0..7 hold columns 8t..8t+3, rows 8..15 columns 8t+4..8t+7 of
// the same tokens; each product's own half of the sums is right, and the halves are added at the end.
// A warp's activations stay in registers while the block's tiles pass by. The warps' sums of kGroupTiles tiles meet in
// shared memory, where one thread adds up two neighbouring outputs of one token.
#pragma once
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "gemv/flagged.cuh"
#include "gemv/weight_ring.cuh"

namespace fastshard {

constexpr int kProductTokens = 8;  // at most
constexpr int kSliceSteps = kSliceChunks * kStepsPerChunk;

struct ProductStorage {
  float2 sums[kGroupTiles][kConsumerWarps][kProductTokens][4];  // outputs 2t and 2t + 1 of a tile
};

// A consumer warp's activations of one slice, a fragment a step.
struct Activations {
  uint32_t a[kSliceSteps][4];

  // x: 16 bytes, columns 8t..8t+7 of the step, of token g.
  __device__ __forceinline__ void set(int step, uint4 x) {
    a[step][0] = x.x, a[step][1] = x.z, a[step][2] = x.y, a[step][3] = x.w;
  }
};

// The first of the 8 columns that this thread holds in a step of a slice.
__device__ __forceinline__ int step_column(int slice, int step) {
  const int chunk = slice + step / kStepsPerChunk, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return chunk * kChunkColumns + (warp * kStepsPerChunk + step % kStepsPerChunk) * 32 + lane % 4 * 8;
}

// One segment of a product. All consumer threads of the block call it.
//   load(activations, slice): the warp's activations of the slice that begins at this chunk, zeros past the columns
//   begin(valid, tile, token, n) -> value: once for each pair of outputs n, n + 1 of a thread, before the sums are
//     there; what it returns...
//   finish(value, valid, tile, token, n, first, second): ...comes back with the two. All lanes of a warp call both
//     together, those that have no output with valid = false.
// Before the call and after it, all consumer threads must have met where the storage was or will be in use.
template <typename T, typename Load, typename Begin, typename Finish>
__device__ __forceinline__ void multiply(const WeightRing& ring, RingPosition& position,
                                         ProductStorage& storage, const Segment& segment, int out_features,
                                         int in_features, int num_tokens, Load load, Begin begin, Finish finish) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, thread = lane % 4;
  const int out_token = threadIdx.x / 4 % kProductTokens, out_tile = threadIdx.x / (4 * kProductTokens);
  static_assert(kGroupTiles * 4 * kProductTokens <= kConsumerThreads);

  // This warp's weights of the next chunk, out of the ring.
  uint32_t offsets[kStepsPerChunk];
#pragma unroll
  for (int step = 0; step < kStepsPerChunk; ++step) {
    offsets[step] = 16 * (row * kChunkUnits + chunk_unit(row, (warp * kStepsPerChunk + step) * 4 + thread));
  }
  const auto fetch = [&](uint4(&w)[kStepsPerChunk]) {
    wait_for_phase(ring.barriers.full[position.stage], position.parity);
    const uint32_t from = ring.chunk(position.stage);
#pragma unroll
    for (int step = 0; step < kStepsPerChunk; ++step) w[step] = ptx::ld_shared_16(from + offsets[step]);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&ring.barriers.free[position.stage]));
    position.advance(ring);
  };

  Activations x;
  for (int group = 0; group < segment.tiles; group += kGroupTiles) {
    const int tiles = min(kGroupTiles, segment.tiles - group);
    const int tile_out = segment.tile(group + out_tile), n = kTileRows * tile_out + 2 * (threadIdx.x % 4);
    const bool valid = out_tile < tiles && out_token < num_tokens && n < out_features;
    const auto kept = begin(valid, tile_out, out_token, n);

    if (group > 0) ptx::bar_sync(1, kConsumerThreads);  // the sums of the group before have been read
    const int last_chunk = segment.first_chunk + segment.chunks;
    for (int slice = segment.first_chunk; slice < last_chunk; slice += kSliceChunks) {
      if (group == 0 || segment.chunks > kSliceChunks) load(x, slice);
      // steps of this warp in the slice's last chunk, which may be cut
      const int chunks = min(kSliceChunks, last_chunk - slice);
      const int last_columns = in_features - (slice + chunks - 1) * kChunkColumns;
      const int last_steps = (last_columns + 31) / 32 - warp * kStepsPerChunk;

      float sums[4][4];
      const auto multiply_chunk = [&](const uint4(&w)[kStepsPerChunk], int chunk, int steps) {
#pragma unroll
        for (int step = 0; step < kStepsPerChunk; ++step) {
          if (step >= steps) continue;
          const auto& a = x.a[chunk * kStepsPerChunk + step];
          ptx::mma_m16n8k16<T>(sums[step % 2 * 2], a, w[step].x, w[step].y);
          ptx::mma_m16n8k16<T>(sums[step % 2 * 2 + 1], a, w[step].z, w[step].w);
        }
      };
      uint4 w[kSliceChunks][kStepsPerChunk];  // the next chunk is fetched before one is multiplied
      static_assert(kSliceChunks == 2);
      fetch(w[0]);
      for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = 0.f;
        if (chunks == 2) {
          fetch(w[1]);
          multiply_chunk(w[0], 0, kStepsPerChunk);
          if (tile + 1 < tiles) fetch(w[0]);
          multiply_chunk(w[1], 1, last_steps);
        } else {
          multiply_chunk(w[0], 0, last_steps);
          if (tile + 1 < tiles) fetch(w[0]);
        }
        if (row < num_tokens) {
          // Of sums 0 and 2 rows 0..7 are right, of 1 and 3 rows 8..15.
          float first = sums[0][0] + sums[2][0] + (sums[1][2] + sums[3][2]);
          float second = sums[0][1] + sums[2][1] + (sums[1][3] + sums[3][3]);
          float2& sum = storage.sums[tile][warp][row][thread];
          if (slice > segment.first_chunk) first += sum.x, second += sum.y;
          sum = make_float2(first, second);
        }
      }
    }

    ptx::bar_sync(1, kConsumerThreads);
    float2 sum = make_float2(0.f, 0.f);
    if (valid) {
#pragma unroll
      for (int w = 0; w < kConsumerWarps; ++w) {
        const float2 part = storage.sums[out_tile][w][out_token][threadIdx.x % 4];
        sum.x += part.x, sum.y += part.y;
      }
    }
    finish(kept, valid, tile_out, out_token, n, sum.x, sum.y);
  }
}

}  // namespace fastshard

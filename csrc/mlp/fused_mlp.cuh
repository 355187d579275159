// hidden = act(x . gate) * (x . up), out = residual + hidden . down for 1..16 rows, in one cooperative launch
//
// Blocks own tiles of 8 rows of both matrices, which stream through their shared memory without a stop
// (gemv/weight_stream.cuh). The thread that sums a gate sums its up too, and writes hidden, rounded to T, where all
// blocks see it. There is no barrier over the grid: words that have not been written are kUnwritten, and a warp waits
// just for those that it multiplies. The down product may be cut into parts (gemv/matrix.cuh), whose sums other threads
// add up, as soon as they are there. Sums, activation and residual are fp32.
// Floor: 3 * hidden_size * intermediate_size * sizeof(T) bytes of weights at the bandwidth of the memory.
#pragma once
#include "activation/activate.cuh"
#include "gemv/matrix.cuh"
#include "gemv/rows.cuh"
#include "mlp/fused_mlp.h"

namespace fastshard {

constexpr int kFusedMlpStages = 5;  // chunks of weights that a block has on their way: 80 KB
constexpr int kMlpPartsAtATime = 4;

// kTokens: 8 or 16, at most.
template <typename T, int kTokens>
struct FusedMlpStorage {
  alignas(128) unsigned char queue[kFusedMlpStages * kChunkBytes];
  ProductStorage<T> product;
  Matrix<T> matrices[2];  // gate and up, down
};

// What outlives a launch: two places for what the blocks tell each other, which launches take in turns, as each clears
// what the one before it has left. Words are complemented: all ones are zeros.
struct MlpTurns {
  uint32_t count;    // of launches
  uint32_t exited;   // blocks of this launch
  uint32_t used[2];  // 16-byte units of a place that are not kUnwritten
};
constexpr int kMlpTurnsWords = 32;  // of the workspace, before the first place

// A place: hidden [num_tokens, intermediate_size] of T, then with several parts their sums, [parts, num_tokens,
// hidden_size] floats.
__host__ __device__ inline int64_t mlp_hidden_words(const FusedMlpParams& p) {
  return int64_t(p.num_tokens) * p.intermediate_size / 2;
}
__host__ __device__ inline int64_t mlp_place_words(const FusedMlpParams& p) {
  return mlp_hidden_words(p) + (p.parts > 1 ? int64_t(p.parts) * p.num_tokens * p.hidden_size : 0);
}

// out = residual + the sums of the parts, of a share of the pairs.
template <typename T>
__device__ __forceinline__ void add_parts(const FusedMlpParams& p, const uint32_t* sums) {
  const int warp = threadIdx.x / 32, pairs = p.num_tokens * p.hidden_size / 2;
  const int step = gridDim.x * kStreamThreads;
  const T* const residual = static_cast<const T*>(p.residual);
#pragma unroll 1
  for (int i = (warp * gridDim.x + blockIdx.x) * 32 + threadIdx.x % 32; i < pairs; i += step) {
    const int token = 2 * i / p.hidden_size, n = 2 * i - token * p.hidden_size;
    float2 sum = make_float2(0.f, 0.f);
    T kept[2] = {from_float<T>(0.f), from_float<T>(0.f)};
    if (residual != nullptr) {
      kept[0] = residual[token * p.residual_stride + n], kept[1] = residual[token * p.residual_stride + n + 1];
    }
#pragma unroll 1
    for (int first = 0; first < p.parts; first += kMlpPartsAtATime) {
      uint2 words[kMlpPartsAtATime];
      uint32_t max;
      do {
        max = 0;
#pragma unroll
        for (int j = 0; j < kMlpPartsAtATime; ++j) {
          words[j] = ptx::ld_global_relaxed_8(sums + 2 * (int64_t(min(first + j, p.parts - 1)) * pairs + i));
        }
#pragma unroll
        for (int j = 0; j < kMlpPartsAtATime; ++j) max = ::max(max, ::max(words[j].x, words[j].y));
      } while (max == kUnwritten);
#pragma unroll
      for (int j = 0; j < kMlpPartsAtATime; ++j) {
        if (first + j < p.parts) sum.x += __uint_as_float(words[j].x), sum.y += __uint_as_float(words[j].y);
      }
    }
    const uint32_t pair = pack_pair<T>(sum.x + to_float(kept[0]), sum.y + to_float(kept[1]));
    reinterpret_cast<uint32_t*>(p.out)[i] = pair;
  }
}

template <typename T, int kTokens>
__global__ __launch_bounds__(kStreamThreads, 1) void fused_mlp_kernel(const __grid_constant__ FusedMlpParams p) {
  using Storage = FusedMlpStorage<T, kTokens>;
  FS_SHARED_STORAGE(Storage, smem);
  const Part part(blockIdx.x, gridDim.x, p.parts, num_chunks(p.intermediate_size));
  if (threadIdx.x == 0) {
    smem.matrices[0] = streamed_matrix<T>(p.gate_up_weight, p.gate_up_stride, 2 * p.intermediate_size, p.hidden_size,
                                         whole_rows(2 * p.intermediate_size, p.hidden_size, p.num_tokens));
  }
  if (threadIdx.x == 32) {
    smem.matrices[1] = streamed_matrix<T>(
        p.down_weight, p.down_stride, p.hidden_size, p.intermediate_size,
        every_tile(blockIdx.x - part.first_block, part.blocks, p.hidden_size, part.first_chunk, part.chunks,
                   group_tiles(p.num_tokens)));
  }
  __syncthreads();
  const bool has_gate_up = p.phase == MlpPhase::kAll || p.phase == MlpPhase::kGateUp;
  const bool has_down = p.phase == MlpPhase::kAll || p.phase == MlpPhase::kDown;
  const bool has_add = p.parts > 1 && (p.phase == MlpPhase::kAll || p.phase == MlpPhase::kAdd);
  MatrixSchedule<T> schedule(smem.matrices, has_gate_up ? 0 : 1, has_down ? 2 : has_gate_up);
  WeightStream<T, kFusedMlpStages, MatrixSchedule<T>> stream(smem.queue, schedule);

  MlpTurns& turns = *reinterpret_cast<MlpTurns*>(p.workspace);
  const int turn = ~turns.count % 2;
  uint32_t* const place = p.workspace + kMlpTurnsWords + turn * p.half_words;
  T* const hidden = reinterpret_cast<T*>(place);
  uint32_t* const sums = place + mlp_hidden_words(p);
  using Storages = WarpStorage<T>;
  struct Nothing {};

  if (has_gate_up) {
    uint4* const other = reinterpret_cast<uint4*>(p.workspace + kMlpTurnsWords + (turn ^ 1) * p.half_words);
    const uint32_t used = ~turns.used[turn ^ 1];
#pragma unroll 1
    for (uint32_t i = blockIdx.x * kStreamThreads + threadIdx.x; i < used; i += gridDim.x * kStreamThreads) {
      other[i] = make_uint4(kUnwritten, kUnwritten, kUnwritten, kUnwritten);
    }
    const Rows<T> rows{static_cast<const T*>(p.x), p.x_stride, p.num_tokens, p.hidden_size};
    multiply<kTokens, T>(
        stream, smem.product, smem.matrices[0].segment, 2 * p.intermediate_size, p.num_tokens,
        [&](Activations<kTokens>& x, int slice, int, bool, Storages&) { load_rows(x, rows, slice); },
        [](bool, int, int) { return Nothing{}; },
        [&](const Nothing&, bool valid, int token, int n, float gate, float up) {
          const float value = activate(p.activation, gate) * up;
          const float next = __shfl_down_sync(0xffffffffu, value, 1);
          if (!valid || n % 4 != 0) return;
          ptx::st_global_relaxed_4(hidden + int64_t(token) * p.intermediate_size + n / 2, pack_pair<T>(value, next));
        });
  }
  if (has_down) {
    const Rows<T> rows{hidden, p.intermediate_size, p.num_tokens, p.intermediate_size};
    const T* const residual = p.parts > 1 ? nullptr : static_cast<const T*>(p.residual);
    struct Kept {
      T residual[2];
    };
    multiply<kTokens, T>(
        stream, smem.product, smem.matrices[1].segment, p.hidden_size, p.num_tokens,
        [&](Activations<kTokens>& x, int slice, int, bool, Storages&) { load_rows_when_written(x, rows, slice); },
        [&](bool valid, int token, int n) {
          Kept kept{from_float<T>(0.f), from_float<T>(0.f)};
          if (valid && residual != nullptr) {
            const T* const from = residual + token * p.residual_stride + n;
            kept.residual[0] = from[0], kept.residual[1] = from[1];
          }
          return kept;
        },
        [&](const Kept& kept, bool valid, int token, int n, float first, float second) {
          if (!valid) return;
          const int64_t to = int64_t(token) * p.hidden_size + n;
          if (p.parts > 1) {
            ptx::st_global_relaxed_8(sums + int64_t(part.index) * p.num_tokens * p.hidden_size + to,
                                     make_uint2(__float_as_uint(first), __float_as_uint(second)));
          } else {
            *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + to) =
                pack_pair<T>(first + to_float(kept.residual[0]), second + to_float(kept.residual[1]));
          }
        });
  }
  if (has_add) add_parts<T>(p, sums);
  if (p.parts > 1 ? !has_add : !has_down) return;

  // The last block to come here ends the turn: all have read whose it is.
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(&turns.exited, 1u) == gridDim.x - 2) {
    turns.exited = ~0u;
    turns.used[turn] = ~uint32_t((mlp_place_words(p) + 3) / 4);
    turns.used[turn ^ 1] = ~0u;
    turns.count -= 1;
  }
}

}  // namespace fastshard

// One token through the layers of a shard, in one launch.
//
// Each block owns the weight rows 8 * (blockIdx.x + i * gridDim.x) .. + 7 of every matrix. Producer warps stream them
// through shared memory (gemv/weight_ring.cuh), from the first layer to the head without looking up; consumer warps
// multiply (gemv/product.cuh). Activations pass between blocks as flagged words (gemv/flagged.cuh): there is no barrier
// over the grid, a warp goes on as soon as the values that it needs are there. Of a layer:
//
//   x --norm, qkv--> qkv --attend--> attended --output, + x--> middle --norm, gate up--> hidden --down, + middle--> x
//
// A buffer is written once a layer, and nobody writes it again before all have read it: every block's next write
// follows from values that took all of this buffer. All blocks must be resident: a cooperative launch.
// Floor: all weights once, and the keys and values in use, at the bandwidth of the memory.
#pragma once
#include "activation/activate.cuh"
#include "decode/activations.cuh"
#include "decode/attend.cuh"
#include "decode/step.h"

namespace fastshard {

template <int kHeadDim_, int kGroup_>
struct DecodeConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kGroup = kGroup_;  // most query heads of a key-value head
};

template <typename T, typename Config>
struct DecodeStorage {
  float rstd[2][kDecodeMaxTokens];  // of the norm before a product, and of the one after it
  union {
    ProductStorage product;
    static_assert(kDecodeMaxTokens == kProductTokens);
    AttendStorage<T, Config::kGroup, Config::kHeadDim> attend;
  };
  DecodeRow rows[kDecodeMaxTokens];
  RingBarriers barriers;
};

enum class DecodeProduct { kQkv, kOutput, kGateUp, kDown, kHead };

// The matrices of a step in order: four a layer, then the head.
template <typename T>
struct DecodeMatrix {
  DecodeProduct product;
  const T* weight;
  int out_features, in_features;

  __device__ DecodeMatrix(const DecodeStepParams& p, int index) {
    const bool is_head = index == 4 * p.num_layers;
    const DecodeLayer& layer = p.layers[is_head ? 0 : index / 4];
    product = is_head ? DecodeProduct::kHead : static_cast<DecodeProduct>(index % 4);
    const void* data = nullptr;
    switch (product) {
      case DecodeProduct::kQkv:
        data = layer.qkv_weight, out_features = p.qkv_size(), in_features = p.hidden_size;
        break;
      case DecodeProduct::kOutput:
        data = layer.output_weight, out_features = p.hidden_size, in_features = p.q_size();
        break;
      case DecodeProduct::kGateUp:
        data = layer.gate_up_weight, out_features = 2 * p.intermediate_size, in_features = p.hidden_size;
        break;
      case DecodeProduct::kDown:
        data = layer.down_weight, out_features = p.hidden_size, in_features = p.intermediate_size;
        break;
      case DecodeProduct::kHead: data = p.head, out_features = p.vocab_size, in_features = p.hidden_size; break;
    }
    weight = static_cast<const T*>(data);
  }
};

// Call each(part, segment) for what this block has of the matrix.
// down: the parts of that matrix.
template <typename T, typename Each>
__device__ __forceinline__ void for_segments(const DecodeMatrix<T>& matrix, const RowParts& down, Each each) {
  const bool in_parts = matrix.product == DecodeProduct::kDown;
  const int end = in_parts ? down.end_part() : 1;
#pragma unroll 1
  for (int part = in_parts ? down.first_part() : 0; part < end; ++part) {
    each(part, in_parts ? down.segment(part) : whole_rows(matrix.out_features, matrix.in_features));
  }
}

__host__ __device__ inline int num_down_parts(const DecodeStepParams& p) {
  return (num_chunks(p.intermediate_size) + kSliceChunks - 1) / kSliceChunks;
}

__host__ __device__ inline int num_decode_matrices(const DecodeStepParams& p) {
  return 4 * p.num_layers + (p.head != nullptr ? 1 : 0);
}

// The workspace: word 0 counts steps, word 1 the blocks that are through; the buffers begin at word 16. Flagged words
// of two values: [num_tokens, columns / 2] of what enters a layer and of the middle of it (both scaled by the weight of
// the norm that follows), of qkv, of what attention gives, and of the hidden values of the MLP; of one float: the
// squares, [num_tokens, tiles of hidden_size], and what the parts of down give, [part, num_tokens, hidden_size]. The
// residual, [num_tokens, hidden_size / 2] pairs, has no flags: each pair is of one thread alone.
inline DecodeBuffers decode_buffers(const DecodeStepParams& p, int64_t* num_words) {
  int64_t end = 16;
  const auto take = [&](int64_t words) {
    uint64_t* const begin = p.workspace + end;
    end += (words + 1) / 2 * 2;
    return begin;
  };
  const int64_t tokens = p.num_tokens, hidden = p.hidden_size;
  DecodeBuffers b;
  // First, and for any batch: steps of another batch must not take its bits for flags.
  b.residual = reinterpret_cast<uint32_t*>(take(kDecodeMaxTokens * hidden / 4));
  b.entered = take(tokens * hidden / 2);
  b.middle = take(tokens * hidden / 2);
  b.qkv = take(tokens * p.qkv_size() / 2);
  b.attended = take(tokens * p.q_size() / 2);
  b.hidden = take(tokens * p.intermediate_size / 2);
  b.entered_squares = take(tokens * num_tiles(p.hidden_size));
  b.middle_squares = take(tokens * num_tiles(p.hidden_size));
  b.down = take(num_down_parts(p) * tokens * hidden);
  b.partials = take(tokens * p.num_heads * kDecodeMaxSplits * (p.head_dim + 2));
  *num_words = end;
  return b;
}

// What norm-weighted values are published by: float16 holds no more than 65504, and they have not been divided by the
// root mean square yet.
template <typename T>
__device__ constexpr float published_scale() {
  return std::is_same_v<T, __half> ? 0.125f : 1.f;
}

// The residual stream, as the thread sees it that owns a pair of it: outputs n, n + 1 of a token.
template <typename T>
struct Residual {
  const DecodeStepParams& p;

  __device__ uint32_t& pair(int token, int n) const { return p.buffers.residual[(token * p.hidden_size + n) / 2]; }

  // Keep the new value of the pair; give it, scaled by the weight of the norm that follows, and its tile's sum of
  // squares to all blocks. All lanes of a warp call it together.
  // norm: the pair of weights, which the caller has loaded early.
  __device__ __forceinline__ void publish(bool valid, int tile, int token, int n, float first, float second,
                                          uint32_t norm, uint64_t* to, uint64_t* squares, uint32_t flag) const {
    const uint32_t rounded = pack_pair<T>(first, second);
    const float2 x = valid ? unpack_pair<T>(rounded) : make_float2(0.f, 0.f);
    const float sum = warp_reduce_sum<4>(x.x * x.x + x.y * x.y);
    if (!valid) return;
    const float2 w = unpack_pair<T>(norm);
    constexpr float kScale = published_scale<T>();
    store_flagged(to + (token * p.hidden_size + n) / 2, pack_pair<T>(x.x * w.x * kScale, x.y * w.y * kScale), flag);
    if (n % kTileRows == 0) {
      store_flagged(squares + token * num_tiles(p.hidden_size) + tile, __float_as_uint(sum), flag);
    }
    pair(token, n) = rounded;
  }
};

// Elements n and n + 1 of a vector that may be null: then zeros.
template <typename T>
__device__ __forceinline__ uint32_t load_pair(const void* vector, int n) {
  return vector == nullptr ? 0 : *reinterpret_cast<const uint32_t*>(static_cast<const T*>(vector) + n);
}

// Call each(valid, tile, token, n) for the pairs of [num_tokens, hidden_size] that this thread owns: those whose sums
// multiply() gives it, of whole_rows. All lanes of a warp take part in each call.
template <typename Each>
__device__ __forceinline__ void for_own_pairs(const DecodeStepParams& p, Each each) {
  const Segment rows = whole_rows(p.hidden_size, 1);
  const int token = threadIdx.x / 4 % kDecodeMaxTokens;
#pragma unroll 1
  for (int first = 0; first < rows.tiles; first += kGroupTiles) {
    const int index = first + threadIdx.x / (4 * kDecodeMaxTokens), tile = rows.tile(index);
    if (index < first + kGroupTiles) {
      each(index < rows.tiles && token < p.num_tokens, tile, token, kTileRows * tile + 2 * (threadIdx.x % 4));
    }
  }
}

// x of layer 0: the embeddings of the tokens, or the hidden state.
template <typename T>
__device__ __forceinline__ void enter_rows(const DecodeStepParams& p, uint32_t flag) {
  for_own_pairs(p, [&](bool valid, int tile, int token, int n) {
    float2 x = make_float2(0.f, 0.f);
    if (valid) {
      const T* row = static_cast<const T*>(p.hidden) + int64_t(token) * p.hidden_size;
      if (p.hidden == nullptr) {
        const int64_t id = p.tokens[token];
        const bool inside = id >= 0 && id < p.vocab_size;
        row = static_cast<const T*>(p.embedding) + (inside ? id : 0) * p.hidden_size;
        if (!inside) *p.overflow = 1;
      }
      x = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(row + n));
    }
    const uint32_t norm = valid ? load_pair<T>(p.layers[0].sa_norm, n) : 0;
    Residual<T>{p}.publish(valid, tile, token, n, x.x, x.y, norm, p.buffers.entered, p.buffers.entered_squares, flag);
  });
}

// x of the next layer, or what the shard gives out: the residual and the sums of all parts of the down product.
template <typename T>
__device__ __forceinline__ void leave_layer(const DecodeStepParams& p, int layer, uint32_t flag) {
  const bool is_last = layer == p.num_layers - 1 && p.head == nullptr;
  const void* const norms = layer < p.num_layers - 1 ? p.layers[layer + 1].sa_norm : p.norm;
  const Residual<T> residual{p};
  const int parts = num_down_parts(p);
  for_own_pairs(p, [&](bool valid, int tile, int token, int n) {
    float2 sum = make_float2(0.f, 0.f);
    const uint32_t norm = valid ? load_pair<T>(norms, n) : 0;
    if (valid) {
      sum = unpack_pair<T>(residual.pair(token, n));
      constexpr int kAtATime = 4;
      const int stride = p.num_tokens * p.hidden_size;
      const uint64_t* const from = p.buffers.down + token * p.hidden_size + n;
#pragma unroll 1
      for (int first = 0; first < parts; first += kAtATime) {
        ulonglong2 words[kAtATime];
        load_all_flagged(words, flag, [&](int i) {
          return ptx::ld_relaxed_2x64(from + min(first + i, parts - 1) * stride);
        });
#pragma unroll
        for (int i = 0; i < kAtATime; ++i) {
          if (first + i >= parts) continue;
          sum.x += flagged_float(words[i].x), sum.y += flagged_float(words[i].y);
        }
      }
    }
    if (!is_last) {
      residual.publish(valid, tile, token, n, sum.x, sum.y, norm, p.buffers.entered, p.buffers.entered_squares,
                       flag + 1);
    } else if (valid) {
      T* const row = static_cast<T*>(p.out) + int64_t(token) * p.hidden_size;
      *reinterpret_cast<uint32_t*>(row + n) = pack_pair<T>(sum.x, sum.y);
    }
  });
}

template <typename T, typename Config>
__device__ __forceinline__ void consume(const DecodeStepParams& p, DecodeStorage<T, Config>& smem,
                                        const WeightRing& ring) {
  // x is written num_layers + 1 times a step, each with its own flag; zeros are no flag.
  const uint32_t first_flag = uint32_t(ptx::ld_relaxed_64(p.workspace)) * (p.num_layers + 1) + 1;
  RingPosition position;
  const int warp = threadIdx.x / 32;
  const RowParts down(p.hidden_size, p.intermediate_size);
  if (threadIdx.x < p.num_tokens) smem.rows[threadIdx.x] = load_row(p, threadIdx.x);
  ptx::bar_sync(1, kConsumerThreads);
  int longest = 1;  // old keys of a row
#pragma unroll 1
  for (int token = 0; token < p.num_tokens; ++token) longest = max(longest, smem.rows[token].slot);
  enter_rows<T>(p, first_flag);

  const int num_matrices = num_decode_matrices(p);
#pragma unroll 1
  for (int index = 0; index < num_matrices; ++index) {
    const DecodeMatrix<T> matrix(p, index);
    const DecodeProduct product = matrix.product;
    const int layer = index / 4;
    const DecodeLayer& weights = p.layers[min(layer, p.num_layers - 1)];
    const uint32_t flag = first_flag + layer;
    const bool has_norm = product != DecodeProduct::kOutput && product != DecodeProduct::kDown;
    uint64_t *in = p.buffers.entered, *squares = p.buffers.entered_squares;
    if (product == DecodeProduct::kOutput) in = p.buffers.attended;
    if (product == DecodeProduct::kGateUp) in = p.buffers.middle, squares = p.buffers.middle_squares;
    if (product == DecodeProduct::kDown) in = p.buffers.hidden;

    if (product == DecodeProduct::kOutput) attend(p, weights, smem.rows, longest, flag, smem.attend);
    int part = 0;
    float* const rstd = smem.rstd[index / 2 % 2];
    bool first_load = has_norm && warp < p.num_tokens;
    const auto load = [&](Activations& activations, int slice) {
      load_flagged_rows(activations, in, flag, matrix.in_features, p.num_tokens, slice);
      if (first_load) {
        const int tiles = num_tiles(p.hidden_size);
        const float value = load_rstd(squares + warp * tiles, flag, tiles, p.hidden_size, p.norm_eps);
        rstd[warp] = value / published_scale<T>();
      }
      first_load = false;
    };
    struct Kept {
      uint32_t residual, bias, norm;
    };
    const auto begin = [&](bool valid, int, int token, int n) {
      Kept kept{0, 0, 0};
      if (valid && product == DecodeProduct::kQkv) kept.bias = load_pair<T>(weights.qkv_bias, n);
      if (valid && product == DecodeProduct::kOutput) {
        kept = {Residual<T>{p}.pair(token, n), load_pair<T>(weights.output_bias, n),
                load_pair<T>(weights.mlp_norm, n)};
      }
      return kept;
    };
    const auto finish = [&](const Kept& kept, bool valid, int tile, int token, int n, float first, float second) {
      if (has_norm) {
        const float scale = rstd[token];
        first *= scale, second *= scale;
      }
      const float2 bias = unpack_pair<T>(kept.bias);
      if (product == DecodeProduct::kGateUp) {  // n, n + 1: a gate and its up
        const float value = activate(p.activation, first) * second;
        const float next = __shfl_down_sync(0xffffffffu, value, 1);
        uint64_t* const to = p.buffers.hidden + (token * p.intermediate_size + n / 2) / 2;
        if (valid && n % 4 == 0) store_flagged(to, pack_pair<T>(value, next), flag);
      } else if (product == DecodeProduct::kOutput) {
        const float2 r = unpack_pair<T>(kept.residual);
        Residual<T>{p}.publish(valid, tile, token, n, first + bias.x + r.x, second + bias.y + r.y, kept.norm,
                               p.buffers.middle, p.buffers.middle_squares, flag);
      } else if (!valid) {
        return;
      } else if (product == DecodeProduct::kQkv) {
        uint64_t* const to = p.buffers.qkv + (token * p.qkv_size() + n) / 2;
        store_flagged(to, pack_pair<T>(first + bias.x, second + bias.y), flag);
      } else if (product == DecodeProduct::kDown) {  // the sums of a part, to who adds them up
        uint64_t* const to = p.buffers.down + (part * p.num_tokens + token) * p.hidden_size + n;
        store_flagged(to, __float_as_uint(first), flag);
        store_flagged(to + 1, __float_as_uint(second), flag);
      } else {
        float* const logits = static_cast<float*>(p.out) + int64_t(token) * p.vocab_size + n;
        logits[0] = to_float(from_float<T>(first));
        if (n + 1 < p.vocab_size) logits[1] = to_float(from_float<T>(second));
      }
    };
    for_segments(matrix, down, [&](int index, const Segment& segment) {
      part = index;
      ptx::bar_sync(1, kConsumerThreads);  // the storage is free
      multiply<T>(ring, position, smem.product, segment, matrix.out_features, matrix.in_features,
                  p.num_tokens, load, begin, finish);
    });
    if (product == DecodeProduct::kDown) leave_layer<T>(p, layer, flag);
  }

  // The last block to come here leaves the workspace ready for the next step: all have read the step counter.
  ptx::bar_sync(1, kConsumerThreads);
  unsigned* const exited = reinterpret_cast<unsigned*>(p.workspace + 1);
  if (threadIdx.x == 0 && atomicAdd(exited, 1u) == gridDim.x - 1) {
    *exited = 0;
    *p.workspace += 1;
  }
}

template <typename T, typename Config>
__global__ __launch_bounds__(kStreamThreads, 1) void decode_step_kernel(const __grid_constant__ DecodeStepParams p) {
  using Storage = DecodeStorage<T, Config>;
  FS_SHARED_STORAGE(Storage, smem);
  const WeightRing ring(smem, p.ring_stages);
  init_ring(ring);
  if (threadIdx.x < kConsumerThreads) return consume<T, Config>(p, smem, ring);

  RingPosition position;
  const RowParts down(p.hidden_size, p.intermediate_size);
  const int num_matrices = num_decode_matrices(p);
  for (int i = 0; i < num_matrices; ++i) {
    const DecodeMatrix<T> m(p, i);
    for_segments(m, down, [&](int, const Segment& segment) {
      fill_ring(ring, position, segment, m.weight, m.in_features, m.out_features, m.in_features);
    });
  }
  ptx::cp_async_wait<0>();
}

}  // namespace fastshard

// One token through the layers of a shard, in one launch.
//
// Each block owns the weight rows 8 * (blockIdx.x + i * gridDim.x) .. + 7 of every matrix. They stream through shared
// memory (gemv/weight_stream.cuh), from the first layer to the head and ahead of the products (gemv/product.cuh),
// whatever those wait for. Activations pass between blocks as flagged words (gemv/flagged.cuh): there is no barrier
// over the grid, a warp goes on as soon as the values that it needs are there. Of a layer:
//
//   x --norm, qkv--> qkv --attend--> attended --output, + x--> middle --norm, gate up--> hidden --down, + middle--> x
//
// Ranks that share a layer, each with a part of its heads and of its MLP, add up before x is added (decode/rank_sums.cuh).
//
// A buffer is written once a layer, and nobody writes it again before all have read it: every block's next write
// follows from values that took all of this buffer. All blocks must be resident: a cooperative launch.
// Floor: all weights once, and the keys and values in use, at the bandwidth of the memory.
#pragma once
#include "activation/activate.cuh"
#include "decode/activations.cuh"
#include "decode/attend.cuh"
#include "decode/plan.cuh"
#include "decode/rank_sums.cuh"
#include "decode/step.h"

namespace fastshard {

template <int kHeadDim_, int kGroup_, bool kIsShared_>
struct DecodeConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kGroup = kGroup_;  // most query heads of a key-value head
  static constexpr bool kIsShared = kIsShared_;  // ranks share the layers
};

template <typename T, typename Config>
struct DecodeStorage {
  union {
    ProductStorage<T> product;
    AttendStorage<T, Config::kGroup, Config::kHeadDim> attend;
  };
  DecodeSquares squares[2];  // of the norm before a product, and of the one after it
  DecodeRow rows[kDecodeMaxTokens];
  DecodePlan plan;
};

// Chunks of the weights' queue, for which there is room behind the storage.
template <typename Storage>
__host__ __device__ constexpr int decode_stages() {
  return (kMaxSharedBytes - sizeof(Storage)) / kChunkBytes;
}

// The workspace: word 0 counts steps, word 1 the blocks that are through; the buffers begin at word 16. Flagged words
// of two values: [num_tokens, columns / 2] of what enters a layer and of the middle of it, of qkv, of what attention
// gives, and of the hidden values of the MLP; of one float: what the parts of down give, [part, num_tokens,
// hidden_size], and the parts of attention.
inline DecodeBuffers decode_buffers(const DecodeStepParams& p, int64_t* num_words) {
  int64_t end = 16;
  const auto take = [&](int64_t words) {
    uint64_t* const begin = p.workspace + end;
    end += (words + 1) / 2 * 2;
    return begin;
  };
  const int64_t tokens = p.num_tokens, hidden = p.hidden_size;
  DecodeBuffers b;
  b.entered = take(tokens * hidden / 2);
  b.middle = take(tokens * hidden / 2);
  b.qkv = take(tokens * p.qkv_size() / 2);
  b.attended = take(tokens * p.q_size() / 2);
  b.hidden = take(tokens * p.intermediate_size / 2);
  b.down = take(num_down_parts(p) * tokens * hidden);
  b.partials = take(tokens * p.num_heads * kDecodeMaxSplits * (p.head_dim + 2));
  *num_words = end;
  return b;
}

// The words of the pair n, n + 1 of a token.
__device__ __forceinline__ uint64_t* pair_word(uint64_t* rows, int columns, int token, int n) {
  return rows + (token * columns + n) / 2;
}

// The pair of the residual stream that this same thread has written.
template <typename T>
__device__ __forceinline__ float2 load_own_pair(const uint64_t* word) {
  return unpack_pair<T>(uint32_t(ptx::ld_relaxed_64(word)));
}

// Elements n and n + 1 of a vector that may be null: then zeros.
template <typename T>
__device__ __forceinline__ uint32_t load_pair(const void* vector, int n) {
  return vector == nullptr ? 0 : *reinterpret_cast<const uint32_t*>(static_cast<const T*>(vector) + n);
}

// Call each(valid, tile, token, n) for the pairs of [num_tokens, hidden_size] that this thread owns: those whose sums
// multiply() gives it, of whole_rows. All lanes of a warp take part in each call.
template <typename Each>
__device__ __forceinline__ void for_own_pairs(const DecodeStepParams& p, Each each) {
  const Segment rows = whole_rows(p.hidden_size, 1, p.num_tokens);
  const SumSlot slot(p.num_tokens);
#pragma unroll 1
  for (int first = 0; first < rows.tiles; first += rows.group_tiles) {
    const int index = first + slot.tile, tile = rows.tile(index);
    each(index < rows.tiles && slot.token < p.num_tokens, tile, slot.token, kTileRows * tile + 2 * (threadIdx.x % 4));
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
        const bool inside = id >= 0 && id < p.num_embeddings;
        row = static_cast<const T*>(p.embedding) + (inside ? id : 0) * p.hidden_size;
        if (!inside) *p.overflow = 1;
      }
      x = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(row + n));
    }
    if (valid) store_flagged(pair_word(p.buffers.entered, p.hidden_size, token, n), pack_pair<T>(x.x, x.y), flag);
  });
}

// The middle of a layer, where ranks share it: the sums of all ranks, the bias and the residual.
template <typename T>
__device__ __forceinline__ void join_attention(const DecodeStepParams& p, const void* bias, uint32_t flag,
                                               uint32_t rank_flag) {
  for_own_pairs(p, [&](bool valid, int, int token, int n) {
    if (!valid) return;
    const float2 sum = take_sum(p, RankSum::kAttention, token, n, rank_flag);
    const float2 b = unpack_pair<T>(load_pair<T>(bias, n));
    const float2 r = load_own_pair<T>(pair_word(p.buffers.entered, p.hidden_size, token, n));
    store_flagged(pair_word(p.buffers.middle, p.hidden_size, token, n),
                  pack_pair<T>(sum.x + b.x + r.x, sum.y + b.y + r.y), flag);
  });
}

// Add the sums of all parts of the down product.
__device__ __forceinline__ float2 add_parts(float2 sum, const DecodeStepParams& p, int token, int n, uint32_t flag) {
  constexpr int kAtATime = 4;
  const int parts = num_down_parts(p), stride = p.num_tokens * p.hidden_size;
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
  return sum;
}

// x of the next layer, or what the shard gives out: the residual and the down product.
template <typename T, bool kIsShared>
__device__ __forceinline__ void leave_layer(const DecodeStepParams& p, int layer, uint32_t flag, uint32_t rank_flag) {
  const bool is_last = layer == p.num_layers - 1 && p.head == nullptr;
  if constexpr (kIsShared) {  // all parts are given before any is waited for
    for_own_pairs(p, [&](bool valid, int, int token, int n) {
      if (!valid) return;
      const float2 part = add_parts(make_float2(0.f, 0.f), p, token, n, flag);
      give_part(p, RankSum::kMlp, token, n, part.x, part.y, rank_flag);
    });
  }
  for_own_pairs(p, [&](bool valid, int, int token, int n) {
    if (!valid) return;
    float2 sum = load_own_pair<T>(pair_word(p.buffers.middle, p.hidden_size, token, n));
    if constexpr (kIsShared) {
      const float2 others = take_sum(p, RankSum::kMlp, token, n, rank_flag);
      sum.x += others.x, sum.y += others.y;
    } else {
      sum = add_parts(sum, p, token, n, flag);
    }
    const uint32_t pair = pack_pair<T>(sum.x, sum.y);
    if (is_last) {
      *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + int64_t(token) * p.hidden_size + n) = pair;
    } else {
      store_flagged(pair_word(p.buffers.entered, p.hidden_size, token, n), pair, flag + 1);
    }
  });
}

template <typename T, typename Config>
__global__ __launch_bounds__(kStreamThreads, 1) void decode_step_kernel(const __grid_constant__ DecodeStepParams p) {
  using Storage = DecodeStorage<T, Config>;
  FS_SHARED_STORAGE(Storage, smem);
  FS_EXTRA_SHARED_BYTES(decode_stages<Storage>() * kChunkBytes);
  if (threadIdx.x == 0) smem.plan.init(p);
  if (threadIdx.x < p.num_tokens) smem.rows[threadIdx.x] = load_row(p, threadIdx.x);
  __syncthreads();
  const DecodePlan& plan = smem.plan;
  DecodeSchedule<T> schedule(p, plan);
  WeightStream<T, decode_stages<Storage>(), DecodeSchedule<T>> stream(&smem + 1, schedule);

  // x is written num_layers + 1 times a step, each with its own flag; zeros are no flag.
  const uint32_t first_flag = uint32_t(ptx::ld_relaxed_64(p.workspace)) * (p.num_layers + 1) + 1;
  uint32_t rank_flag = 0;
  if constexpr (Config::kIsShared) rank_flag = last_rank_flag(p);
  int longest = 1;  // old keys of a row
#pragma unroll 1
  for (int token = 0; token < p.num_tokens; ++token) longest = max(longest, smem.rows[token].slot);
  enter_rows<T>(p, first_flag);

  const int num_matrices = num_decode_matrices(p);
#pragma unroll 1
  for (int index = 0; index < num_matrices; ++index) {
    const DecodeProduct product = product_of(p, index);
    const int layer = index / 4;
    const DecodeLayer& weights = p.layers[min(layer, p.num_layers - 1)];
    const uint32_t flag = first_flag + layer;
    if (Config::kIsShared && product == DecodeProduct::kQkv) ++rank_flag;
    const uint64_t* in = p.buffers.entered;
    const void* norm = nullptr;
    switch (product) {
      case DecodeProduct::kQkv: norm = weights.sa_norm; break;
      case DecodeProduct::kOutput: in = p.buffers.attended; break;
      case DecodeProduct::kGateUp: in = p.buffers.middle, norm = weights.mlp_norm; break;
      case DecodeProduct::kDown: in = p.buffers.hidden; break;
      case DecodeProduct::kHead: norm = p.norm; break;
    }
    if (product == DecodeProduct::kOutput) {
      attend(p, weights, smem.rows, longest, flag, smem.attend);
      __syncthreads();  // the storage is free
    }

    DecodeSquares& squares = smem.squares[index / 2 % 2];
    const int out_features = out_features_of(p, product), in_features = in_features_of(p, product);
    const int end_part = product == DecodeProduct::kDown ? plan.end_part : plan.first_part + 1;
#pragma unroll 1
    for (int part = plan.first_part; part < end_part; ++part) {
      const Segment segment = plan.segment(product, part);
      const auto load = [&](DecodeActivations& x, int slice, int chunks, bool again, WarpStorage<T>& storage) {
        load_flagged_rows<T>(x, in, flag, norm, in_features, p.num_tokens, slice, chunks, storage,
                             norm != nullptr && !again ? &squares : nullptr);
      };
      struct Kept {
        float2 residual;
        uint32_t bias;
      };
      const auto begin = [&](bool valid, int token, int n) {
        Kept kept{make_float2(0.f, 0.f), 0};
        if (valid && product == DecodeProduct::kQkv) kept.bias = load_pair<T>(weights.qkv_bias, n);
        if (valid && product == DecodeProduct::kOutput) {
          kept.residual = load_own_pair<T>(pair_word(p.buffers.entered, p.hidden_size, token, n));
          kept.bias = load_pair<T>(weights.output_bias, n);
        }
        return kept;
      };
      const auto finish = [&](const Kept& kept, bool valid, int token, int n, float first, float second) {
        if (norm != nullptr) {
          const float rstd = product_rstd<T>(squares, token, p.hidden_size, p.norm_eps);
          first *= rstd, second *= rstd;
        }
        const float2 bias = unpack_pair<T>(kept.bias);
        if (product == DecodeProduct::kGateUp) {  // n, n + 1: a gate and its up
          const float value = activate(p.activation, first) * second;
          const float next = __shfl_down_sync(0xffffffffu, value, 1);
          uint64_t* const to = pair_word(p.buffers.hidden, p.intermediate_size, token, n / 2);
          if (valid && n % 4 == 0) store_flagged(to, pack_pair<T>(value, next), flag);
        } else if (!valid) {
          return;
        } else if (Config::kIsShared && product == DecodeProduct::kOutput) {
          give_part(p, RankSum::kAttention, token, n, first, second, rank_flag);
        } else if (product == DecodeProduct::kOutput) {
          const float2 r = kept.residual;
          store_flagged(pair_word(p.buffers.middle, p.hidden_size, token, n),
                        pack_pair<T>(first + bias.x + r.x, second + bias.y + r.y), flag);
        } else if (product == DecodeProduct::kQkv) {
          store_flagged(pair_word(p.buffers.qkv, p.qkv_size(), token, n), pack_pair<T>(first + bias.x, second + bias.y),
                        flag);
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
      multiply<kDecodeMaxTokens, T>(stream, smem.product, segment, out_features, p.num_tokens, load, begin, finish);
    }
    if (Config::kIsShared && product == DecodeProduct::kOutput) {
      join_attention<T>(p, weights.output_bias, flag, rank_flag);
    }
    if (product == DecodeProduct::kDown) leave_layer<T, Config::kIsShared>(p, layer, flag, rank_flag);
  }
  ptx::cp_async_wait<0>();

  // The last block to come here leaves the workspace ready for the next step: all have read the step counter.
  __syncthreads();
  unsigned* const exited = reinterpret_cast<unsigned*>(p.workspace + 1);
  if (threadIdx.x == 0 && atomicAdd(exited, 1u) == gridDim.x - 1) {
    *exited = 0;
    *p.workspace += 1;
    if (Config::kIsShared) *p.rank_sums[p.rank] += p.num_layers;
  }
}

}  // namespace fastshard

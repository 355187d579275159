// Sampling: temperature, top-k, top-p, min-p, then the Gumbel-max draw of one token; one CTA per row
//
// Every filter is a lower bound on the logit, so nothing is sorted, and a token is drawn by argmax(x + noise) over the
// tokens above the bound, where x = (logit - largest) / temperature, and a token's noise is a function of its index.
//   1. One pass over the row finds the largest logit, and each thread its own largest: the k-th largest of those is a
//      lower bound of the k-th largest logit.
//   2. A second pass collects the few tokens that can still be kept in shared memory. Where they do not fit (many ties,
//      no filter), every later step runs over the row instead.
//   3. top-k's bound is the k-th largest key, by radix selection.
//   4. top-p's is not computed: draw; keep the token if the mass strictly above it is below top_p; else raise the bound
//      past it and draw again. The noise does not change, so this gives the argmax over the kept set.
// Masses are 64-bit integers and the rest are maxima: no result depends on the order of threads.
// Floor: vocab_size * sizeof(T) bytes a row; this reads the row twice (more in step 2's exception), from L2.
#pragma once
#include <cmath>

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "sample/philox.cuh"
#include "sample/sample.h"

namespace fastshard {

template <int kThreads_, int kCapacity_>
struct SampleConfig {
  static constexpr int kThreads = kThreads_;
  static constexpr int kCapacity = kCapacity_;  // candidates in shared memory
};

struct Candidate {
  unsigned token, key;
};

template <typename Config>
struct SampleSharedStorage {
  Candidate candidates[Config::kCapacity];
  uint64_t scratch[Config::kThreads / 32];
  unsigned histogram[256];
  unsigned digit;       // of the radix selection
  int remaining;        // k, less what lies above the digit
  int num_candidates;   // may exceed kCapacity: then candidates are incomplete
};

constexpr unsigned kMinusInfinityKey = 0x007FFFFFu;

// Orders as the floats do; -0 as 0 and NaN as -inf.
__device__ __forceinline__ unsigned order_key(float v) {
  const unsigned bits = __float_as_uint(v == v ? v + 0.f : -INFINITY);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float key_value(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Keys of T differ in bits from this one on.
template <typename T>
constexpr int kKeyLowBit = 0;
template <>
constexpr int kKeyLowBit<__half> = 13;
template <>
constexpr int kKeyLowBit<__nv_bfloat16> = 16;

// A maximum over these is the largest key, and of equal ones the lowest token.
__device__ __forceinline__ uint64_t pack(unsigned key, unsigned token) { return uint64_t(key) << 32 | ~token; }
__device__ __forceinline__ unsigned packed_key(uint64_t packed) { return unsigned(packed >> 32); }
__device__ __forceinline__ unsigned packed_token(uint64_t packed) { return ~unsigned(packed); }

// Standard Gumbel noise, as fastshard/ops/sample.py makes it: the largest comes from u near 0, where floats are finest.
__device__ __forceinline__ float gumbel(unsigned bits) {
  const float u = fminf(fmaf(float(bits), 0x1p-32f, 0x1p-33f), 1.f - 0x1p-24f);
  return -logf(-log1pf(-u));
}

template <typename T, typename Config>
struct Sampler {
  static constexpr int kThreads = Config::kThreads;
  using SharedStorage = SampleSharedStorage<Config>;

  const SampleParams& p;
  SharedStorage& smem;
  const T* logits;               // of the row
  unsigned largest = 0;          // key
  bool listed = false;           // whether smem.candidates holds every token that may be kept
  float largest_value = 0.f;

  // f(token, key) for every token of the row; 16-byte loads between an unaligned head and tail.
  template <typename F>
  __device__ void for_each_logit(F f) const {
    constexpr int kVecSize = Vec<T>::kSize, kUnroll = 4;
    const int misaligned = int(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
    const int head = min(misaligned == 0 ? 0 : kVecSize - misaligned, p.vocab_size);
    const int num_vecs = (p.vocab_size - head) / kVecSize;
    const auto scalar = [&](int token) { f(unsigned(token), order_key(to_float(logits[token]))); };
    if (int(threadIdx.x) < head) scalar(int(threadIdx.x));
    for (int first = int(threadIdx.x); first < num_vecs; first += kUnroll * kThreads) {
      Vec<T> v[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (first + i * kThreads < num_vecs) v[i] = load_vec(logits + head + (first + i * kThreads) * kVecSize);
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (first + i * kThreads >= num_vecs) break;
#pragma unroll
        for (int j = 0; j < kVecSize; ++j) {
          f(unsigned(head + (first + i * kThreads) * kVecSize + j), order_key(to_float(v[i][j])));
        }
      }
    }
    const int tail = head + num_vecs * kVecSize + int(threadIdx.x);
    if (tail < p.vocab_size) scalar(tail);
  }

  template <typename F>
  __device__ void for_each_candidate(F f) const {
    if (!listed) return for_each_logit(f);
    for (int i = int(threadIdx.x); i < smem.num_candidates; i += kThreads) {
      f(smem.candidates[i].token, smem.candidates[i].key);
    }
  }

  // (logit - largest) / temperature; 0 for the largest, also where that is infinite
  __device__ float x_of(unsigned key) const {
    return key == largest ? 0.f : (key_value(key) - largest_value) * p.inverse_temperature;
  }

  // exp(x) in units of 2^-40
  __device__ uint64_t mass_of(unsigned key) const { return static_cast<uint64_t>(expf(x_of(key)) * 0x1p40f); }

  __device__ uint64_t block_max(uint64_t v) const {
    return block_reduce<kThreads>(v, uint64_t(0), smem.scratch, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  }

  __device__ uint64_t block_sum(uint64_t v) const {
    return block_reduce<kThreads>(v, uint64_t(0), smem.scratch, [](uint64_t a, uint64_t b) { return a + b; });
  }

  // Mass of the candidates whose key is at least `bound`.
  __device__ uint64_t mass_from(unsigned bound) const {
    uint64_t sum = 0;
    for_each_candidate([&](unsigned, unsigned key) {
      if (key >= bound) sum += mass_of(key);
    });
    return block_sum(sum);
  }

  // The k-th largest of the threads' keys: at least k logits are as large. 1 <= k <= kThreads.
  __device__ unsigned kth_largest_thread_key(unsigned thread_key, int k) const {
    unsigned bound = 0;
    for (int bit = 31; bit >= kKeyLowBit<T>; --bit) {
      const unsigned candidate = bound | 1u << bit;
      if (__syncthreads_count(thread_key >= candidate) >= k) bound = candidate;
    }
    return bound;
  }

  // A key at or below that of every logit with x >= x_bound: rounding only lowers it. x_bound: negative.
  __device__ unsigned key_below(float x_bound) const {
    const float distance = x_bound / p.inverse_temperature * 1.0001f;
    return order_key(largest_value + distance - fabsf(largest_value) * 0x1p-20f);
  }

  // List the tokens whose key is at least `bound`, in any order. Returns the mass of the row, where it is wanted.
  __device__ uint64_t collect(unsigned bound, bool wants_mass) {
    if (threadIdx.x == 0) smem.num_candidates = 0;
    __syncthreads();
    const volatile int& count = smem.num_candidates;
    uint64_t mass = 0;
    for_each_logit([&](unsigned token, unsigned key) {
      if (wants_mass) mass += mass_of(key);
      // Once the list is full, more atomics would only queue up.
      if (key < bound || count > Config::kCapacity) return;
      const int i = atomicAdd(&smem.num_candidates, 1);
      if (i < Config::kCapacity) smem.candidates[i] = {token, key};
    });
    __syncthreads();
    listed = smem.num_candidates <= Config::kCapacity;
    return wants_mass ? block_sum(mass) : 0;
  }

  // The k-th largest key among the candidates, from its highest digit down. 1 <= k <= number of candidates.
  __device__ unsigned kth_largest_key(int k) const {
    constexpr int kLastShift = kKeyLowBit<T> / 8 * 8;
    unsigned prefix = 0;
    int remaining = k;
    for (int shift = 24; shift >= kLastShift; shift -= 8) {
      for (int i = int(threadIdx.x); i < 256; i += kThreads) smem.histogram[i] = 0;
      __syncthreads();
      for_each_candidate([&](unsigned, unsigned key) {
        if (shift == 24 || key >> (shift + 8) == prefix) atomicAdd(&smem.histogram[key >> shift & 255], 1u);
      });
      __syncthreads();
      if (threadIdx.x < 32) select_digit(remaining);
      __syncthreads();
      prefix = prefix << 8 | smem.digit;
      remaining = smem.remaining;
    }
    return prefix << kLastShift;
  }

  // One warp: the highest digit with at least `remaining` keys at or above it.
  __device__ void select_digit(int remaining) const {
    const int lane = int(threadIdx.x);  // of digits [8 * lane, 8 * lane + 8)
    int count = 0;
    for (int i = 0; i < 8; ++i) count += int(smem.histogram[8 * lane + i]);
    int from_here = count;  // of this lane and the higher ones
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_down_sync(0xffffffffu, from_here, offset);
      if (lane + offset < 32) from_here += other;
    }
    int above = from_here - count;
    if (above >= remaining || from_here < remaining) return;  // one lane goes on
    int digit = 8 * lane + 7;
    while (above + int(smem.histogram[digit]) < remaining) above += int(smem.histogram[digit--]);
    smem.digit = unsigned(digit);
    smem.remaining = remaining - above;
  }

  // Random bits of tokens [4 * block, 4 * block + 4).
  __device__ uint4 noise_of(unsigned block, uint64_t step) const {
    return philox4x32({block, blockIdx.x, unsigned(step), unsigned(step >> 32)},
                      {unsigned(p.seed), unsigned(p.seed >> 32)});
  }

  // The token with the largest x + noise, of those whose key is at least `bound` and x at least min_x.
  __device__ unsigned draw(unsigned bound, uint64_t step) const {
    uint64_t best = 0;
    const auto consider = [&](unsigned token, unsigned key, unsigned bits) {
      const float x = x_of(key);
      if (x < p.min_x) return;
      const uint64_t score = pack(order_key(x + gumbel(bits)), token);
      if (score > best) best = score;
    };
    if (listed) {
      for_each_candidate([&](unsigned token, unsigned key) {
        if (key < bound) return;
        const uint4 words = noise_of(token / 4, step);
        const unsigned high = token & 2 ? words.z : words.x, low = token & 2 ? words.w : words.y;
        consider(token, key, token & 1 ? low : high);
      });
    } else {
      for (int first = 4 * int(threadIdx.x); first < p.vocab_size; first += 4 * kThreads) {
        unsigned keys[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) keys[j] = first + j < p.vocab_size ? order_key(to_float(logits[first + j])) : 0;
        if (keys[0] < bound && keys[1] < bound && keys[2] < bound && keys[3] < bound) continue;
        const uint4 words = noise_of(unsigned(first) / 4, step);
        const unsigned bits[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (keys[j] >= bound) consider(unsigned(first + j), keys[j], bits[j]);
        }
      }
    }
    return packed_token(block_max(best));
  }

  __device__ unsigned sample() {
    uint64_t best = 0;
    for_each_logit([&](unsigned token, unsigned key) {
      const uint64_t packed = pack(key, token);
      if (packed > best) best = packed;
    });
    const unsigned thread_key = packed_key(best);
    best = block_max(best);
    largest = packed_key(best);
    largest_value = key_value(largest);
    if (p.inverse_temperature == 0.f || largest == kMinusInfinityKey) return packed_token(best);

    const bool has_top_k = p.top_k > 0, has_top_p = p.top_p < 1.0;
    unsigned bound = kMinusInfinityKey + 1;
    uint64_t total = 0;
    if (has_top_k) {
      if (p.top_k <= kThreads) collect(kth_largest_thread_key(thread_key, p.top_k), false);
      bound = max(bound, kth_largest_key(p.top_k));
      if (has_top_p) total = mass_from(bound);
    } else if (has_top_p || p.min_x > -INFINITY) {
      // Tokens of less than (1 - top_p) / vocab_size of the largest's mass are no part of the kept mass. Half of it,
      // for rounding.
      const float x_bound = has_top_p ? logf(float((1.0 - p.top_p) / (2.0 * p.vocab_size))) : -INFINITY;
      total = collect(key_below(fmaxf(x_bound, p.min_x)), has_top_p);
    }

    const uint64_t step = uint64_t(*p.step);
    while (true) {
      const unsigned token = draw(bound, step);
      const unsigned key = order_key(to_float(logits[token]));
      if (!has_top_p || key == largest) return token;
      if (double(mass_from(key + 1)) < p.top_p * double(total)) return token;
      bound = key + 1;
    }
  }
};

template <typename T, typename Config>
__global__ __launch_bounds__(Config::kThreads) void sample_kernel(const SampleParams p) {
  FS_SHARED_STORAGE(SampleSharedStorage<Config>, smem);
  const T* logits = static_cast<const T*>(p.logits) + int64_t(blockIdx.x) * p.row_stride;
  Sampler<T, Config> sampler{p, smem, logits};
  const unsigned token = sampler.sample();
  if (threadIdx.x == 0) p.out[blockIdx.x] = token;
}

}  // namespace fastshard

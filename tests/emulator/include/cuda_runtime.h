// Shadow of the CUDA header: its types and host API, and the device intrinsics that kernels use, on the SIMT machine.
#pragma once
#include <crt/host_defines.h>
#include <cuda_runtime_api.h>

#include <math.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "simt.h"

#undef __noinline__
#define __noinline__ [[gnu::noinline]]
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ fastshard_kernels_reach_shared_memory_through_FS_SHARED_STORAGE
#define __builtin_assume(condition) ((void)0)

// ---- barriers and fences
inline void __syncthreads() { fastshard::simt::block_barrier("__syncthreads", false); }
inline int __syncthreads_or(int v) { return fastshard::simt::block_barrier("__syncthreads_or", v != 0).votes != 0; }
inline int __syncthreads_count(int v) { return fastshard::simt::block_barrier("__syncthreads_count", v != 0).votes; }
inline int __syncthreads_and(int v) {
  const auto result = fastshard::simt::block_barrier("__syncthreads_and", v != 0);
  return result.votes == result.threads;
}
inline void __threadfence_block() { fastshard::simt::maybe_yield(); }
inline void __threadfence() { fastshard::simt::maybe_yield(); }
inline void __threadfence_system() { fastshard::simt::maybe_yield(); }
inline void __nanosleep(unsigned) { fastshard::simt::yield(); }
[[noreturn]] inline void __trap() { fastshard::simt::fail("__trap"); }

// ---- warp collectives
namespace fastshard::simt {

struct ShuffleRecord {
  uint64_t value, result;
  int source;  // lane to read from; its own where the shuffle leaves the segment
};

inline void combine_nothing(void* const*, uint32_t) {}

inline void combine_shuffle(void* const* records, uint32_t lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto* record = static_cast<ShuffleRecord*>(records[lane]);
    const bool present = lanes >> record->source & 1;
    record->result = present ? static_cast<ShuffleRecord*>(records[record->source])->value : 0x7fff7fff7fff7fffu;
  }
}

struct VoteRecord {
  bool predicate;
  uint32_t ballot, lanes;
};

inline void combine_vote(void* const* records, uint32_t lanes) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) ballot |= uint32_t(static_cast<VoteRecord*>(records[lane])->predicate) << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    static_cast<VoteRecord*>(records[lane])->ballot = ballot;
    static_cast<VoteRecord*>(records[lane])->lanes = lanes;
  }
}

inline constexpr Collective kSyncWarp{"__syncwarp", combine_nothing};
inline constexpr Collective kShuffle{"__shfl_sync", combine_shuffle};
inline constexpr Collective kVote{"__ballot_sync", combine_vote};

inline int lane_id() { return int(threadIdx.x % 32); }

template <typename T>
T shuffle(uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  ShuffleRecord record{0, 0, source};
  std::memcpy(&record.value, &value, sizeof(T));
  warp_collective(mask, kShuffle, &record);
  std::memcpy(&value, &record.result, sizeof(T));
  return value;
}

inline VoteRecord vote(uint32_t mask, bool predicate) {
  VoteRecord record{predicate, 0, 0};
  warp_collective(mask, kVote, &record);
  return record;
}

}  // namespace fastshard::simt

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  fastshard::simt::warp_collective(mask, fastshard::simt::kSyncWarp, nullptr);
}
inline unsigned __ballot_sync(unsigned mask, int v) { return fastshard::simt::vote(mask, v != 0).ballot; }
inline int __any_sync(unsigned mask, int v) { return fastshard::simt::vote(mask, v != 0).ballot != 0; }
inline int __all_sync(unsigned mask, int v) {
  const auto vote = fastshard::simt::vote(mask, v != 0);
  return vote.ballot == vote.lanes;
}

// A segment is `width` lanes; a source outside the caller's segment is the caller itself (__shfl_sync wraps around).
template <typename T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  const int lane = fastshard::simt::lane_id(), first = lane & ~(width - 1);
  return fastshard::simt::shuffle(mask, v, first + (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = fastshard::simt::lane_id(), first = lane & ~(width - 1), source = lane - int(delta);
  return fastshard::simt::shuffle(mask, v, source < first ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = fastshard::simt::lane_id(), last = lane | (width - 1), source = lane + int(delta);
  return fastshard::simt::shuffle(mask, v, source > last ? lane : source);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  const int lane = fastshard::simt::lane_id(), last = lane | (width - 1), source = lane ^ lanes;
  return fastshard::simt::shuffle(mask, v, source > last ? lane : source);
}

// ---- atomics: the threads of the machine take turns, so a plain read-modify-write is atomic
#define FS_ATOMIC(name, expression)                                          \
  template <typename T>                                                      \
  T name(T* address, std::type_identity_t<T> value) {                        \
    const T old = *address;                                                  \
    *address = (expression);                                                 \
    fastshard::simt::yield();                                                \
    return old;                                                              \
  }
FS_ATOMIC(atomicAdd, old + value)
FS_ATOMIC(atomicSub, old - value)
FS_ATOMIC(atomicExch, value)
FS_ATOMIC(atomicMax, old > value ? old : value)
FS_ATOMIC(atomicMin, old < value ? old : value)
FS_ATOMIC(atomicOr, old | value)
FS_ATOMIC(atomicAnd, old & value)
FS_ATOMIC(atomicXor, old ^ value)
FS_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
#undef FS_ATOMIC
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == compare) *address = value;
  fastshard::simt::yield();
  return old;
}

// ---- loads and stores with cache hints
template <typename T> T __ldg(const T* address) { return *address; }
template <typename T> T __ldca(const T* address) { return *address; }
template <typename T> T __ldcg(const T* address) { return *address; }
template <typename T> T __ldcs(const T* address) { return *address; }
template <typename T> void __stcg(T* address, std::type_identity_t<T> v) { *address = v; }
template <typename T> void __stcs(T* address, std::type_identity_t<T> v) { *address = v; }
template <typename T> void __stwt(T* address, std::type_identity_t<T> v) { *address = v; }

// ---- arithmetic
#define FS_MIN_MAX(R, A, B)                                                        \
  inline R min(A a, B b) { return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); } \
  inline R max(A a, B b) { return static_cast<R>(a) > static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); }
FS_MIN_MAX(int, int, int)
FS_MIN_MAX(unsigned, unsigned, unsigned)
FS_MIN_MAX(unsigned, int, unsigned)
FS_MIN_MAX(unsigned, unsigned, int)
FS_MIN_MAX(long, long, long)
FS_MIN_MAX(unsigned long, unsigned long, unsigned long)
FS_MIN_MAX(unsigned long, long, unsigned long)
FS_MIN_MAX(unsigned long, unsigned long, long)
FS_MIN_MAX(long long, long long, long long)
FS_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef FS_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }

inline int __popc(unsigned v) { return std::popcount(v); }
inline int __popcll(unsigned long long v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return std::countl_zero(static_cast<unsigned long long>(v)); }
inline int __ffs(int v) { return ffs(v); }
inline int __ffsll(long long v) { return ffsll(v); }
inline unsigned __brev(unsigned v) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (v >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(static_cast<unsigned long long>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(static_cast<long long>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}

inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
inline float __frsqrt_rn(float v) { return 1.f / sqrtf(v); }
inline float __frcp_rn(float v) { return 1.f / v; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float v) { return v > 0.f ? fminf(v, 1.f) : 0.f; }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
// The C library declares these names, and defines none of them.
#define __expf(v) expf(v)
#define __exp2f(v) exp2f(v)
#define __exp10f(v) exp10f(v)
#define __logf(v) logf(v)
#define __log2f(v) log2f(v)
#define __sinf(v) sinf(v)
#define __cosf(v) cosf(v)
#define __powf(a, b) powf(a, b)

// Twin of csrc/common/ptx.cuh: the same functions on the SIMT machine. See simt.h.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "simt.h"

namespace fastshard::simt {

struct LdmatrixRecord {
  uint32_t* d;
  const unsigned char* row;
};
void combine_ldmatrix(void* const* records, uint32_t lanes);
void combine_ldmatrix_trans(void* const* records, uint32_t lanes);
inline constexpr Collective kLdmatrix{"ldmatrix", combine_ldmatrix, true};
inline constexpr Collective kLdmatrixTrans{"ldmatrix.trans", combine_ldmatrix_trans, true};

struct MmaRecord {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
template <typename T>
void combine_mma(void* const* records, uint32_t lanes);
template <typename T>
inline constexpr Collective kMma{"mma", combine_mma<T>, true};

struct MmaFp16Record {
  uint32_t* d;
  const uint32_t* a;
  uint32_t b[2], c[2];
};
void combine_mma_fp16(void* const* records, uint32_t lanes);
inline constexpr Collective kMmaFp16{"mma", combine_mma_fp16, true};

}  // namespace fastshard::simt

namespace fastshard::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* ptr) { return simt::shared_address(ptr); }

__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global) {
  simt::copy_async(simt::shared_pointer(shared, 16, "cp.async"), global, 16);
}

__device__ __forceinline__ void cp_async_16_or_zero(uint32_t shared, const void* global, bool valid) {
  simt::copy_async(simt::shared_pointer(shared, 16, "cp.async"), valid ? global : nullptr, 16);
}

__device__ __forceinline__ void cp_async_commit() { simt::copy_async_commit(); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  simt::copy_async_wait(kPending);
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t row) {
  simt::LdmatrixRecord record{d, simt::shared_pointer(row, 16, "ldmatrix")};
  simt::warp_collective(0xffffffffu, simt::kLdmatrix, &record);
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row) {
  simt::LdmatrixRecord record{d, simt::shared_pointer(row, 16, "ldmatrix.trans")};
  simt::warp_collective(0xffffffffu, simt::kLdmatrixTrans, &record);
}

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::MmaRecord record{d, a, {b0, b1}};
  simt::warp_collective(0xffffffffu, simt::kMma<T>, &record);
}

__device__ __forceinline__ void mma_m16n8k16_fp16(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                  uint32_t c0, uint32_t c1) {
  simt::MmaFp16Record record{d, a, {b0, b1}, {c0, c1}};
  simt::warp_collective(0xffffffffu, simt::kMmaFp16, &record);
}

__device__ __forceinline__ uint4 ld_global_streaming(const void* global) {
  return *static_cast<const uint4*>(global);
}

__device__ __forceinline__ uint2 ld_global_streaming_8(const void* global) {
  return *static_cast<const uint2*>(global);
}

__device__ __forceinline__ uint4 ld_global_relaxed(const void* global) {
  simt::yield();
  return *static_cast<const uint4*>(global);
}

__device__ __forceinline__ uint2 ld_global_relaxed_8(const void* global) {
  simt::yield();
  return *static_cast<const uint2*>(global);
}

__device__ __forceinline__ void st_global_relaxed(void* global, uint4 v) { *static_cast<uint4*>(global) = v; }

__device__ __forceinline__ void st_global_relaxed_8(void* global, uint2 v) { *static_cast<uint2*>(global) = v; }

__device__ __forceinline__ void st_global_relaxed_4(void* global, uint32_t v) { *static_cast<uint32_t*>(global) = v; }

__device__ __forceinline__ uint32_t atom_global_inc(uint32_t* global, uint32_t last) {
  simt::yield();
  const uint32_t old = *global;
  *global = old >= last ? 0 : old + 1;
  return old;
}

__device__ __forceinline__ uint4 ld_shared_16(uint32_t shared) {
  return *reinterpret_cast<const uint4*>(simt::shared_pointer(shared, 16, "ld.shared"));
}

__device__ __forceinline__ ulonglong2 ld_relaxed_2x64(const void* global) {
  simt::poll();
  return *static_cast<const ulonglong2*>(global);
}

__device__ __forceinline__ uint64_t ld_relaxed_64(const void* global) {
  simt::poll();
  return *static_cast<const uint64_t*>(global);
}

__device__ __forceinline__ void st_relaxed_64(void* global, uint64_t v) { *static_cast<uint64_t*>(global) = v; }

__device__ __forceinline__ ulonglong2 ld_system_2x64(const void* global) {
  simt::poll_system();
  return *static_cast<const ulonglong2*>(global);
}

__device__ __forceinline__ void st_system_2x64(void* global, ulonglong2 v) { *static_cast<ulonglong2*>(global) = v; }

__device__ __forceinline__ int mov_opaque(int x) { return x; }

__device__ __forceinline__ float ex2(float x) { return exp2f(x); }

}  // namespace fastshard::ptx

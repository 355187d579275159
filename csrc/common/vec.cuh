// 16-byte vectors: one Vec is one LDG.128 / STG.128.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastshard {

template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T elems[kSize];
  __device__ T& operator[](int i) { return elems[i]; }
  __device__ const T& operator[](int i) const { return elems[i]; }
};

template <typename T>
__device__ __forceinline__ Vec<T> load_vec(const T* ptr) {  // ptr: 16-byte aligned
  return *reinterpret_cast<const Vec<T>*>(ptr);
}

template <typename T>
__device__ __forceinline__ void store_vec(T* ptr, const Vec<T>& v) {
  *reinterpret_cast<Vec<T>*>(ptr) = v;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

}  // namespace fastshard

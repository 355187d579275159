// 16-byte vectors, where one Vec is one LDG.128 / STG.128, and pairs of 16-bit values in a register.
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

// Two floats rounded to T, the first in the low half; and back.
template <typename T> __device__ __forceinline__ uint32_t pack_pair(float first, float second);
template <> __device__ __forceinline__ uint32_t pack_pair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <> __device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  const T* const values = reinterpret_cast<const T*>(&pair);
  return make_float2(to_float(values[0]), to_float(values[1]));
}

// The elements of a Vec<T>.
template <typename T>
struct Floats {
  float elems[Vec<T>::kSize];
  __device__ float& operator[](int i) { return elems[i]; }
  __device__ float operator[](int i) const { return elems[i]; }
};

template <typename T>
__device__ __forceinline__ Floats<T> to_floats(const Vec<T>& v) {
  Floats<T> floats;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) floats[i] = to_float(v[i]);
  return floats;
}

// Rounded to T, by pairs where T has 16 bits: one instruction rounds two.
template <typename T>
__device__ __forceinline__ Vec<T> from_floats(const Floats<T>& floats) {
  Vec<T> v;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) v[i] = floats[i];
  } else {
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; i += 2) pairs[i / 2] = pack_pair<T>(floats[i], floats[i + 1]);
  }
  return v;
}

}  // namespace fastshard

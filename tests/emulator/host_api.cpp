// Functions that the kernels' objects call besides simt.h: CUDA's host API, and the handlers of -fsanitize.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simt.h"

extern "C" {

// Of the calls that -fsanitize=alignment,bounds-strict compiles in; as GCC's ubsan lays it out.
struct SourceLocation {
  const char* path;
  uint32_t line, column;
  const char* file() const {  // csrc/norm/row.cuh, wherever the checkout is
    const char* inside = std::strstr(path, "/csrc/");
    return inside == nullptr ? path : inside + 1;
  }
};

void __ubsan_handle_type_mismatch_v1(const SourceLocation* where, uintptr_t pointer) {
  fastshard::simt::fail("%s:%u: misaligned address %#zx", where->file(), where->line, size_t(pointer));
}
void __ubsan_handle_out_of_bounds(const SourceLocation* where, uintptr_t index) {
  fastshard::simt::fail("%s:%u: index %lld out of bounds", where->file(), where->line, static_cast<long long>(index));
}

const char* cudaGetErrorString(cudaError_t) { return "error of the emulated CUDA runtime"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "SIMT emulator");
  properties->major = 8;
  properties->minor = 6;
  properties->multiProcessorCount = fastshard::simt::num_sms();
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = fastshard::simt::num_sms(); break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 6; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 101376; break;
    case cudaDevAttrL2CacheSize: *value = 6 << 20; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: return cudaErrorNotSupported;
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return std::memset(pointer, value, bytes), cudaSuccess;
}
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
// There are no graphs.
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaUserObjectCreate(cudaUserObject_t*, void*, cudaHostFn_t, unsigned, unsigned) {
  return cudaErrorNotSupported;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
  return cudaErrorNotSupported;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

}  // extern "C"

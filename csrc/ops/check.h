// What every file of the torch boundary needs: memory-safety checks, the stream, the device guard.
//
// The public Python functions have already raised ValueError / TypeError for what a user can get wrong; these checks
// protect the process when an op is called directly (RuntimeError).
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

// The dispatcher's namespace and key of the kernels; the emulator build (tests/emulator) sets its own.
#ifndef FS_OP_NAMESPACE
#define FS_OP_NAMESPACE fastshard
#define FS_OP_KEY CUDA
#endif

#define FS_CHECK_LIKE(t, like)                                                                             \
  STD_TORCH_CHECK((t).device() == (like).device() && (t).scalar_type() == (like).scalar_type(),            \
                  #t " must have the device and dtype of " #like ", got ",                                 \
                  torch::headeronly::toString((t).scalar_type()), " on device ", (t).get_device_index())
#define FS_CHECK_VECTOR(t, n)                                                                              \
  STD_TORCH_CHECK((t).dim() == 1 && (t).size(0) == (n) && (t).is_contiguous(), #t " must be a contiguous [", \
                  (n), "], got ", (t).dim(), " dimensions and ", (t).numel(), " elements")

namespace fastshard {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_aligned16(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) shape[i] = t.size(i);
  return shape;
}

#ifdef FS_EMULATOR
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
#else
// Makes t's device current: without it the launch goes to cuda:0.
struct DeviceGuard {
  explicit DeviceGuard(const Tensor& t) : guard(t.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace fastshard

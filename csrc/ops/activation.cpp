// torch boundary of csrc/activation: check memory safety, fill Params, dispatch on dtype, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "activation/act_and_mul.h"
#include "ops/activation.h"
#include "ops/check.h"
#include "ops/dispatch.h"
#include "ops/rows.h"
#include "ops/stable_box.h"

namespace fastshard {

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  STD_TORCH_CHECK(false, "activation must be one of silu, gelu, gelu_tanh, relu, got '", name, "'");
}

Tensor run_act_and_mul(const Tensor& gate_up, Activation activation, bool interleaved) {
  STD_TORCH_CHECK(gate_up.dim() >= 1, "gate_up must have at least 1 dimension");
  std::vector<int64_t> shape = shape_of(gate_up);
  STD_TORCH_CHECK(shape.back() % 2 == 0 && shape.back() <= INT32_MAX,
                  "gate_up must have an even last dimension below 2^31, got ", shape.back());
  shape.back() /= 2;

  const DeviceGuard guard(gate_up);
  Tensor out = torch::stable::new_empty(gate_up, shape);
  if (out.numel() == 0) return out;
  const int64_t intermediate_size = shape.back(), row_bytes = intermediate_size * int64_t(gate_up.element_size());
  const bool whole_vectors = row_bytes % 16 == 0;
  const Rows rows = rows_of(gate_up, /*aligned=*/whole_vectors);
  const ActAndMulParams params{rows.data,
                               out.mutable_data_ptr(),
                               rows.layout,
                               num_rows_of(out, intermediate_size),
                               int(intermediate_size),
                               activation,
                               interleaved,
                               whole_vectors};
  const cudaStream_t stream = current_stream(gate_up);
  dispatch_floating("gate_up", gate_up.scalar_type(),
                    [&]<typename T>(std::type_identity<T>) { act_and_mul<T>(params, stream); });
  return out;
}

Tensor act_and_mul_cuda(const Tensor& gate_up, const std::string& activation, bool interleaved) {
  return run_act_and_mul(gate_up, activation_of(activation), interleaved);
}

Tensor silu_and_mul_cuda(const Tensor& gate_up, bool interleaved) {
  return run_act_and_mul(gate_up, Activation::kSilu, interleaved);
}

STABLE_TORCH_LIBRARY_IMPL(FS_OP_NAMESPACE, FS_OP_KEY, m) {
  FS_IMPL(m, "act_and_mul", act_and_mul_cuda);
  FS_IMPL(m, "silu_and_mul", silu_and_mul_cuda);
}

}  // namespace fastshard

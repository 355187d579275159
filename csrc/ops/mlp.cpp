// torch boundary of csrc/mlp: few rows go to the one-launch kernel, others to torch's matmul and the activation kernel.
#include "mlp/fused_mlp.h"

#include <algorithm>

#include "ops/activation.h"
#include "ops/check.h"
#include "ops/matmul.h"
#include "ops/stable_box.h"

namespace fastshard {
namespace {

// The same by torch's matmul: any dtype and any weights.
Tensor library_rows(const Tensor& x, const Tensor& gate_up_weight, const Tensor& down_weight, Activation activation,
                    const std::optional<Tensor>& residual) {
  const Tensor hidden = run_act_and_mul(library_linear(x, gate_up_weight, std::nullopt), activation,
                                        /*interleaved=*/true);
  const Tensor out = library_linear(hidden, down_weight, std::nullopt);
  return residual ? library_add(out, *residual) : out;
}

// So many rows at a time, so that gate, up and hidden do not grow with a long prompt.
constexpr int64_t kLibraryTokens = 4096;

Tensor library_path(const Tensor& x, const Tensor& gate_up_weight, const Tensor& down_weight, Activation activation,
                    const std::optional<Tensor>& residual) {
  const int64_t hidden_size = x.size(x.dim() - 1), num_tokens = x.numel() / hidden_size;
  if (num_tokens <= kLibraryTokens) {
    return torch::stable::contiguous(library_rows(x, gate_up_weight, down_weight, activation, residual));
  }
  const Tensor rows = torch::stable::reshape(x, {num_tokens, hidden_size});
  std::optional<Tensor> residual_rows;
  if (residual) residual_rows = torch::stable::reshape(*residual, {num_tokens, hidden_size});
  Tensor out = torch::stable::new_empty(x, {num_tokens, hidden_size});
  for (int64_t begin = 0; begin < num_tokens; begin += kLibraryTokens) {
    const auto part = [&](const Tensor& whole) {
      Tensor view = whole;  // narrow takes a reference that it may change
      return torch::stable::narrow(view, 0, begin, std::min(kLibraryTokens, num_tokens - begin));
    };
    std::optional<Tensor> residual_part;
    if (residual) residual_part = part(*residual_rows);
    Tensor to = part(out);
    torch::stable::copy_(to, library_rows(part(rows), gate_up_weight, down_weight, activation, residual_part));
  }
  return torch::stable::reshape(out, shape_of(x));
}

}  // namespace

Tensor fused_mlp_cuda(const Tensor& x, const Tensor& gate_up_weight, const Tensor& down_weight,
                      const std::string& activation, const std::optional<Tensor>& residual) {
  STD_TORCH_CHECK(x.dim() >= 1 && gate_up_weight.dim() == 2 && down_weight.dim() == 2, "fused_mlp: wrong dimensions");
  const int64_t hidden_size = x.size(x.dim() - 1), intermediate_size = gate_up_weight.size(0) / 2;
  STD_TORCH_CHECK(hidden_size > 0 && intermediate_size > 0 && gate_up_weight.size(0) == 2 * intermediate_size &&
                      gate_up_weight.size(1) == hidden_size && down_weight.size(0) == hidden_size &&
                      down_weight.size(1) == intermediate_size,
                  "fused_mlp: weights must be [2 * intermediate_size, ", hidden_size, "] and [", hidden_size,
                  ", intermediate_size]");
  FS_CHECK_LIKE(gate_up_weight, x);
  FS_CHECK_LIKE(down_weight, x);
  const std::vector<int64_t> shape = shape_of(x);
  if (residual) {
    FS_CHECK_LIKE(*residual, x);
    STD_TORCH_CHECK(shape_of(*residual) == shape, "fused_mlp: residual must have the shape of x");
  }
  const Activation parsed = activation_of(activation);

  const DeviceGuard guard(x);
  if (x.numel() == 0) return torch::stable::new_empty(x, shape);
  const int64_t num_tokens = x.numel() / hidden_size;
  if (num_tokens > kFusedMlpMaxTokens || !can_stream(gate_up_weight) || !can_stream(down_weight)) {
    return library_path(x, gate_up_weight, down_weight, parsed, residual);
  }
  Tensor out = torch::stable::new_empty(x, shape);
  const RowMatrix rows = row_matrix(x, hidden_size, /*aligned=*/true);
  std::optional<RowMatrix> residual_rows;
  if (residual) residual_rows = row_matrix(*residual, hidden_size, /*aligned=*/false);
  const FusedMlpParams params{rows.data(),
                              gate_up_weight.const_data_ptr(),
                              down_weight.const_data_ptr(),
                              residual_rows ? residual_rows->data() : nullptr,
                              out.mutable_data_ptr(),
                              rows.stride,
                              gate_up_weight.stride(0),
                              down_weight.stride(0),
                              residual_rows ? residual_rows->stride : 0,
                              int(num_tokens),
                              int(hidden_size),
                              int(intermediate_size),
                              parsed};
  const cudaStream_t stream = current_stream(x);
  if (x.scalar_type() == ScalarType::Half) {
    fused_mlp<__half>(params, stream);
  } else {
    fused_mlp<__nv_bfloat16>(params, stream);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(FS_OP_NAMESPACE, FS_OP_KEY, m) { FS_IMPL(m, "fused_mlp", fused_mlp_cuda); }

}  // namespace fastshard

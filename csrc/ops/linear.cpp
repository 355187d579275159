// torch boundary of csrc/gemv: few rows go to the weight-streaming kernel, others to torch's matmul.
#include "gemv/linear.h"

#include "ops/check.h"
#include "ops/matmul.h"
#include "ops/stable_box.h"

namespace fastshard {
namespace {

// A contiguous, 16-byte aligned view or copy of a vector.
Tensor as_vector(const Tensor& t) {
  const Tensor vector = torch::stable::contiguous(t);
  return is_aligned16(vector) ? vector : torch::stable::clone(vector);
}

// x: [num_tokens, in_features], residual: [num_tokens, out_features].
Tensor library_path(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& norm_weight, double norm_eps, bool weight_in_fp32,
                    const std::optional<Tensor>& residual) {
  const Tensor rows =
      norm_weight ? call_op(FS_OP_NAME("rms_norm"), x, as_vector(*norm_weight), norm_eps, weight_in_fp32) : x;
  const Tensor out = library_linear(rows, weight, bias);
  return residual ? library_add(out, *residual) : out;
}

}  // namespace

Tensor linear_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& norm_weight, double norm_eps, bool weight_in_fp32,
                   const std::optional<Tensor>& residual) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(x.dim() - 1) == weight.size(1) && weight.size(1) > 0,
                  "linear: weight must have two dimensions, the second that of x's rows");
  FS_CHECK_LIKE(weight, x);
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = out_features;
  if (bias) {
    FS_CHECK_LIKE(*bias, x);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features, "linear: bias must be [", out_features, "]");
  }
  if (norm_weight) {
    FS_CHECK_LIKE(*norm_weight, x);
    STD_TORCH_CHECK(norm_weight->dim() == 1 && norm_weight->size(0) == in_features, "linear: norm_weight must be [",
                    in_features, "]");
  }
  if (residual) {
    FS_CHECK_LIKE(*residual, x);
    STD_TORCH_CHECK(shape_of(*residual) == shape, "linear: residual must have the shape of the output");
  }

  const DeviceGuard guard(x);
  if (x.numel() == 0 || out_features == 0) return torch::stable::new_empty(x, shape);
  const int64_t num_tokens = x.numel() / in_features;
  const std::optional<Tensor> residual_rows =
      residual ? std::optional(scalar_rows(*residual, out_features)) : std::nullopt;
  if (num_tokens > kLinearMaxTokens || !can_stream(weight)) {
    const Tensor rows = torch::stable::reshape(x, {-1, in_features});
    return torch::stable::reshape(
        library_path(rows, weight, bias, norm_weight, norm_eps, weight_in_fp32, residual_rows), shape);
  }

  Tensor out = torch::stable::new_empty(x, shape);
  const Tensor rows = vector_rows(x, in_features);
  const std::optional<Tensor> bias_vector = bias ? std::optional(as_vector(*bias)) : std::nullopt;
  const std::optional<Tensor> norm_vector = norm_weight ? std::optional(as_vector(*norm_weight)) : std::nullopt;
  const LinearParams params{rows.const_data_ptr(),
                            weight.const_data_ptr(),
                            bias_vector ? bias_vector->const_data_ptr() : nullptr,
                            norm_vector ? norm_vector->const_data_ptr() : nullptr,
                            residual_rows ? residual_rows->const_data_ptr() : nullptr,
                            out.mutable_data_ptr(),
                            rows.stride(0),
                            weight.stride(0),
                            residual_rows ? residual_rows->stride(0) : 0,
                            int(num_tokens),
                            int(out_features),
                            int(in_features),
                            float(norm_eps),
                            weight_in_fp32};
  const cudaStream_t stream = current_stream(x);
  if (x.scalar_type() == ScalarType::Half) {
    linear<__half>(params, stream);
  } else {
    linear<__nv_bfloat16>(params, stream);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(FS_OP_NAMESPACE, FS_OP_KEY, m) { FS_IMPL(m, "linear", linear_cuda); }

}  // namespace fastshard

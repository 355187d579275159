// torch boundary of csrc/gemv: few rows go to the weight-streaming kernels, others to torch's matmul; or by a table.
#include "gemv/linear.h"

#include "ops/check.h"
#include "ops/matmul.h"
#include "ops/stable_box.h"
#include "ops/variants.h"

namespace fastshard {
namespace {

// The same by torch's matmul: any number of rows, any dtype and any weight.
Tensor library_path(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& norm_weight, double norm_eps, bool weight_in_fp32,
                    const std::optional<Tensor>& residual) {
  const std::string any = "auto";
  const Tensor rows =
      norm_weight ? call_op(FS_OP_NAME("rms_norm"), x, *norm_weight, norm_eps, weight_in_fp32, any) : x;
  const Tensor out = library_linear(rows, weight, bias);
  return torch::stable::contiguous(residual ? library_add(out, *residual) : out);
}

// A vector's data, 16-byte aligned, kept alive by `keeper`; null for none.
const void* vector_data(const std::optional<Tensor>& vector, std::optional<RowMatrix>& keeper) {
  if (!vector) return nullptr;
  keeper = row_matrix(*vector, vector->numel(), /*aligned=*/true);
  return keeper->data();
}

}  // namespace

Tensor linear_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& norm_weight, double norm_eps, bool weight_in_fp32,
                   const std::optional<Tensor>& residual, const std::string& asked) {
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
  const std::string variant =
      norm_weight ? asked : variant_for(asked, "linear", x.scalar_type(), {num_tokens}, {in_features, out_features});
  const bool is_auto = variant == "auto";
  STD_TORCH_CHECK(is_auto || variant == "library" || variant == "stream",
                  "linear: variant must be auto, library or stream, got ", variant);
  const bool streams = num_tokens <= kLinearMaxTokens && can_stream(weight);
  STD_TORCH_CHECK(asked != "stream" || streams, "linear: variant stream takes at most ", kLinearMaxTokens,
                  " rows and a contiguous weight, got ", num_tokens, " rows");
  if (variant == "library" || !streams) {
    return library_path(x, weight, bias, norm_weight, norm_eps, weight_in_fp32, residual);
  }
  Tensor out = torch::stable::new_empty(x, shape);
  const RowMatrix rows = row_matrix(x, in_features, /*aligned=*/true);
  std::optional<RowMatrix> bias_data, norm_data, residual_rows;
  if (residual) residual_rows = row_matrix(*residual, out_features, /*aligned=*/false);
  const LinearParams params{rows.data(),
                            weight.const_data_ptr(),
                            vector_data(bias, bias_data),
                            vector_data(norm_weight, norm_data),
                            residual_rows ? residual_rows->data() : nullptr,
                            out.mutable_data_ptr(),
                            rows.stride,
                            weight.stride(0),
                            residual_rows ? residual_rows->stride : 0,
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

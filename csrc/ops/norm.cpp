// torch boundary of csrc/norm: check memory safety, fill Params, dispatch on dtype, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "norm/rms_norm.h"
#include "ops/check.h"
#include "ops/stable_box.h"

namespace fastshard {

// A [num_tokens, hidden_size] view of x with unit-stride, 16-byte aligned rows; a copy only where x has none.
Tensor as_rows(const Tensor& x, int64_t hidden_size) {
  Tensor rows = torch::stable::reshape(x, {-1, hidden_size});
  const int64_t size = x.element_size();
  const bool usable = rows.stride(1) == 1 && is_aligned16(rows) && rows.stride(0) * size % 16 == 0;
  if (!usable) rows = torch::stable::clone(torch::stable::contiguous(rows));
  return rows;
}

Tensor rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps, bool weight_in_fp32) {
  STD_TORCH_CHECK(x.dim() >= 1, "x must have at least 1 dimension");
  const int64_t hidden_size = x.size(x.dim() - 1);
  FS_CHECK_LIKE(weight, x);
  FS_CHECK_VECTOR(weight, hidden_size);
  STD_TORCH_CHECK(hidden_size > 0 && hidden_size * int64_t(x.element_size()) % 16 == 0,
                  "rms_norm: rows and weight must be whole 16-byte vectors, got hidden_size ", hidden_size);

  const DeviceGuard guard(x);
  Tensor out = torch::stable::new_empty(x, shape_of(x));  // contiguous, whatever x's strides
  if (out.numel() == 0) return out;
  const Tensor rows = as_rows(x, hidden_size);
  const Tensor aligned_weight = is_aligned16(weight) ? weight : torch::stable::clone(weight);
  const RmsNormParams params{rows.const_data_ptr(), aligned_weight.const_data_ptr(), out.mutable_data_ptr(),
                             rows.stride(0),        rows.size(0),                    int(hidden_size),
                             float(eps),            weight_in_fp32};
  const cudaStream_t stream = current_stream(x);
  switch (x.scalar_type()) {
    case ScalarType::Float:    rms_norm<float>(params, stream); break;
    case ScalarType::Half:     rms_norm<__half>(params, stream); break;
    case ScalarType::BFloat16: rms_norm<__nv_bfloat16>(params, stream); break;
    default:
      STD_TORCH_CHECK(false, "rms_norm: x must be float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(FS_OP_NAMESPACE, FS_OP_KEY, m) { FS_IMPL(m, "rms_norm", rms_norm_cuda); }

}  // namespace fastshard

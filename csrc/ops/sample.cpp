// torch boundary of csrc/sample: check memory safety, fill Params, dispatch on dtype, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "ops/check.h"
#include "ops/dispatch.h"
#include "ops/stable_box.h"
#include "sample/sample.h"

namespace fastshard {

Tensor sample_cuda(const Tensor& logits, const Tensor& step, int64_t seed, double temperature, int64_t top_k,
                   double top_p, double min_p) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1, "logits must have 2 dimensions and unit last stride");
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= kMaxVocabSize && num_rows <= INT32_MAX,
                  "logits must have 1 to ", kMaxVocabSize, " columns, got ", vocab_size);
  STD_TORCH_CHECK(step.device() == logits.device() && step.scalar_type() == ScalarType::Long && step.numel() == 1,
                  "step must be one int64 on the device of logits");
  STD_TORCH_CHECK(temperature >= 0 && top_k >= 0 && top_p >= 0 && min_p >= 0,  // NaN is not
                  "temperature, top_k, top_p and min_p must be at least 0");

  // At most 2^125, so that no logit times its inverse is lost in 0; below 2^-128, the inverse is infinite.
  const float inverse_temperature = temperature == 0 ? 0.f : float(1 / std::min(temperature, 0x1p125));

  const DeviceGuard guard(logits);
  Tensor out = torch::stable::new_empty(logits, {num_rows}, ScalarType::Long);
  const SampleParams params{.logits = logits.const_data_ptr(),
                            .step = static_cast<const int64_t*>(step.const_data_ptr()),
                            .out = static_cast<int64_t*>(out.mutable_data_ptr()),
                            .row_stride = logits.stride(0),
                            .seed = uint64_t(seed),
                            .num_rows = int(num_rows),
                            .vocab_size = int(vocab_size),
                            .inverse_temperature = inverse_temperature,
                            .top_k = top_k < vocab_size ? int(top_k) : 0,
                            .min_x = float(std::log(min_p)),
                            .top_p = std::min(top_p, 1.0)};
  const cudaStream_t stream = current_stream(logits);
  dispatch_floating("logits", logits.scalar_type(),
                    [&]<typename T>(std::type_identity<T>) { sample<T>(params, stream); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(FS_OP_NAMESPACE, FS_OP_KEY, m) { FS_IMPL(m, "sample", sample_cuda); }

}  // namespace fastshard

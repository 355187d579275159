// torch boundary of csrc/norm: check memory safety, fill Params, dispatch on dtype, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdio>
#include <optional>
#include <string>
#include <tuple>

#include "norm/layer_norm.h"
#include "norm/rms_norm.h"
#include "ops/check.h"
#include "ops/dispatch.h"
#include "ops/instances.h"
#include "ops/rows.h"
#include "ops/stable_box.h"
#include "ops/variants.h"

namespace fastshard {

// "auto", or as "256x2": 256 threads, 2 vectors each.
RowVariant row_variant_of(const std::string& name) {
  if (name == "auto") return {};
  RowVariant variant;
  char end = 0;
  const int read = std::sscanf(name.c_str(), "%dx%d%c", &variant.threads_per_row, &variant.vecs_per_thread, &end);
  STD_TORCH_CHECK(read == 2 && variant.threads_per_row > 0 && variant.vecs_per_thread > 0,
                  "variant must be auto, or threads of a row x vectors of a thread like 256x2, got ", name);
  return variant;
}

// Checks x and residual and allocates the outputs; kernels read what `rows` points to while this lives.
struct NormCall {
  DeviceGuard guard;
  Tensor out, new_residual;
  Rows x_rows, residual_rows;
  NormRows rows{};
  std::vector<Tensor> vectors;

  NormCall(const Tensor& x, const Tensor* residual) : guard(x), out(x), new_residual(x) {
    STD_TORCH_CHECK(x.dim() >= 1, "x must have at least 1 dimension");
    const int64_t hidden_size = x.size(x.dim() - 1);
    STD_TORCH_CHECK(hidden_size > 0 && hidden_size * int64_t(x.element_size()) % 16 == 0,
                    "x must have rows of whole 16-byte vectors, got hidden_size ", hidden_size);
    out = torch::stable::new_empty(x, shape_of(x));  // contiguous, whatever x's strides
    x_rows = rows_of(x, /*aligned=*/true);
    rows = {.x = x_rows.data,
            .out = out.mutable_data_ptr(),
            .x_layout = x_rows.layout,
            .num_tokens = num_rows_of(x, hidden_size),
            .hidden_size = int(hidden_size),
            .inv_hidden_size = 1.f / float(hidden_size)};
    if (residual == nullptr) return;
    FS_CHECK_LIKE(*residual, x);
    STD_TORCH_CHECK(shape_of(*residual) == shape_of(x), "residual must have the shape of x");
    new_residual = torch::stable::new_empty(x, shape_of(x));
    residual_rows = rows_of(*residual, /*aligned=*/true);
    rows.residual = residual_rows.data;
    rows.residual_layout = residual_rows.layout;
    rows.new_residual = new_residual.mutable_data_ptr();
  }

  // Data of a [hidden_size] vector like out, in a copy where it is not aligned; null for none.
  const void* vector(const std::optional<Tensor>& v) {
    if (!v.has_value()) return nullptr;
    FS_CHECK_LIKE(*v, out);
    STD_TORCH_CHECK(v->dim() == 1 && v->size(0) == rows.hidden_size, "weight and bias must be [", rows.hidden_size,
                    "], got ", v->dim(), " dimensions and ", v->numel(), " elements");
    vectors.push_back(rows_of(*v, /*aligned=*/true).tensor);
    return vectors.back().const_data_ptr();
  }
};

// Calls launch(std::type_identity<T>{}, variant, stream), unless an instance outside the menu is asked for.
template <typename Params, typename Launch>
void run_norm(const char* op, const Tensor& x, const Params& params, const std::string& asked, Launch launch) {
  const ScalarType dtype = x.scalar_type();
  const cudaStream_t stream = current_stream(x);
  const std::string variant = variant_for(asked, op, dtype, {params.rows.num_tokens}, {params.rows.hidden_size});
  if (const Instance instance = find_instance(op, dtype, variant)) return instance.run(params, stream);
  // A table may name a promoted kernel that is not there any more.
  const RowVariant chosen = row_variant_of(is_promoted(variant) ? asked : variant);
  dispatch_floating("x", dtype, [&](auto type) { launch(type, chosen, stream); });
}

void run_rms_norm(const char* op, NormCall& call, const Tensor& weight, double eps, bool weight_in_fp32,
                  const std::string& variant) {
  const RmsNormParams params{call.rows, call.vector(weight), float(eps), weight_in_fp32};
  run_norm(op, call.out, params, variant, [&]<typename T>(std::type_identity<T>, auto... how) {
    rms_norm<T>(params, how...);
  });
}

void run_layer_norm(const char* op, NormCall& call, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& bias, double eps, const std::string& variant) {
  const LayerNormParams params{call.rows, call.vector(weight), call.vector(bias), float(eps)};
  run_norm(op, call.out, params, variant, [&]<typename T>(std::type_identity<T>, auto... how) {
    layer_norm<T>(params, how...);
  });
}

Tensor rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps, bool weight_in_fp32,
                     const std::string& variant) {
  NormCall call(x, nullptr);
  run_rms_norm("rms_norm", call, weight, eps, weight_in_fp32, variant);
  return call.out;
}

std::tuple<Tensor, Tensor> add_rms_norm_cuda(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                             bool weight_in_fp32, const std::string& variant) {
  NormCall call(x, &residual);
  run_rms_norm("add_rms_norm", call, weight, eps, weight_in_fp32, variant);
  return {call.out, call.new_residual};
}

Tensor layer_norm_cuda(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                       double eps, const std::string& variant) {
  NormCall call(x, nullptr);
  run_layer_norm("layer_norm", call, weight, bias, eps, variant);
  return call.out;
}

std::tuple<Tensor, Tensor> add_layer_norm_cuda(const Tensor& x, const Tensor& residual,
                                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                               double eps, const std::string& variant) {
  NormCall call(x, &residual);
  run_layer_norm("add_layer_norm", call, weight, bias, eps, variant);
  return {call.out, call.new_residual};
}

STABLE_TORCH_LIBRARY_IMPL(FS_OP_NAMESPACE, FS_OP_KEY, m) {
  FS_IMPL(m, "rms_norm", rms_norm_cuda);
  FS_IMPL(m, "add_rms_norm", add_rms_norm_cuda);
  FS_IMPL(m, "layer_norm", layer_norm_cuda);
  FS_IMPL(m, "add_layer_norm", add_layer_norm_cuda);
}

}  // namespace fastshard

// torch boundary of csrc/mlp: few rows go to the one-launch kernel, others to the products by tiles, or to torch's
// matmul and the activation kernel.
#include "mlp/fused_mlp.h"

#include <algorithm>

#include "common/device.h"
#include "mlp/tiled_mlp.h"
#include "ops/activation.h"
#include "ops/check.h"
#include "ops/instances.h"
#include "ops/matmul.h"
#include "ops/stable_box.h"
#include "ops/variants.h"

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

// At most so many rows at a time, so that what is between the products does not grow with a long prompt.
constexpr int64_t kMaxRows = 4096;

// Our products need few rows to be busy: a quarter of them, so that hidden values are few beside the prompt's own rows.
int64_t tiled_rows_at_a_time(int64_t num_tokens) {
  constexpr int64_t kMinRows = 1024, kStep = 512;
  return std::clamp((num_tokens / 4 + kStep - 1) / kStep * kStep, kMinRows, kMaxRows);
}

// Calls run(x, residual, out) for rows_each rows after another. x: [num_tokens, hidden_size], residual and out as x.
template <typename Run>
void for_each_rows(int64_t rows_each, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& out,
                   Run run) {
  const int64_t num_tokens = x.size(0);
  for (int64_t begin = 0; begin < num_tokens; begin += rows_each) {
    const auto part = [&](const Tensor& whole) {
      Tensor view = whole;  // narrow takes a reference that it may change
      return torch::stable::narrow(view, 0, begin, std::min(rows_each, num_tokens - begin));
    };
    std::optional<Tensor> residual_part;
    if (residual) residual_part = part(*residual);
    run(part(x), residual_part, part(out));
  }
}

Tensor library_path(const Tensor& x, const Tensor& gate_up_weight, const Tensor& down_weight, Activation activation,
                    const std::optional<Tensor>& residual) {
  const int64_t hidden_size = x.size(x.dim() - 1), num_tokens = x.numel() / hidden_size;
  if (num_tokens <= kMaxRows) {
    return torch::stable::contiguous(library_rows(x, gate_up_weight, down_weight, activation, residual));
  }
  const Tensor rows = torch::stable::reshape(x, {num_tokens, hidden_size});
  std::optional<Tensor> residual_rows;
  if (residual) residual_rows = torch::stable::reshape(*residual, {num_tokens, hidden_size});
  const Tensor out = torch::stable::new_empty(x, {num_tokens, hidden_size});
  for_each_rows(kMaxRows, rows, residual_rows, out, [&](const Tensor& x_part, const auto& residual_part, Tensor to) {
    torch::stable::copy_(to, library_rows(x_part, gate_up_weight, down_weight, activation, residual_part));
  });
  return torch::stable::reshape(out, shape_of(x));
}

// Whether tiled_mlp can read this weight in place.
bool can_tile(const Tensor& weight) { return can_stream(weight) && weight.stride(0) <= kGemmMaxStride; }

// A copy where x's strides are not such that the kernels can read it.
Tensor tiled_rows(const Tensor& x, int64_t columns) {
  const Tensor rows = row_matrix(x, columns, /*aligned=*/true).tensor;
  const bool is_matrix = rows.dim() == 2 && rows.stride(0) <= kGemmMaxStride;
  return is_matrix ? rows : torch::stable::reshape(torch::stable::contiguous(rows), {-1, columns});
}

// How to multiply many rows: by torch, or by tiles of a size.
struct Variant {
  bool library = false;
  GemmTileSize tile = GemmTileSize::kAuto;
  Instance instance = {};  // where a tile is asked for that is not in the menu
};

Tensor tiled_path(const Tensor& x, const Tensor& gate_up_weight, const Tensor& down_weight, Activation activation,
                  const std::optional<Tensor>& residual, const Variant& variant) {
  const int64_t hidden_size = x.size(x.dim() - 1), intermediate_size = down_weight.size(1);
  const Tensor rows = tiled_rows(x, hidden_size);
  std::optional<Tensor> residual_rows;
  if (residual) residual_rows = tiled_rows(*residual, hidden_size);
  const Tensor out = torch::stable::new_empty(x, {rows.size(0), hidden_size});
  const int64_t rows_each = tiled_rows_at_a_time(rows.size(0));
  const Tensor hidden = torch::stable::new_empty(x, {std::min(rows.size(0), rows_each), intermediate_size});
  const cudaStream_t stream = current_stream(x);
  const auto run = [&](const Tensor& x_part, const auto& residual_part, const Tensor& out_part) {
    const TiledMlpParams params{x_part.const_data_ptr(),
                                gate_up_weight.const_data_ptr(),
                                down_weight.const_data_ptr(),
                                residual_part ? residual_part->const_data_ptr() : nullptr,
                                hidden.mutable_data_ptr(),
                                out_part.mutable_data_ptr(),
                                x_part.stride(0),
                                gate_up_weight.stride(0),
                                down_weight.stride(0),
                                residual_part ? residual_part->stride(0) : 0,
                                int(x_part.size(0)),
                                int(hidden_size),
                                int(intermediate_size),
                                activation,
                                variant.tile};
    if (variant.instance) {
      variant.instance.run(params, stream);
    } else if (x.scalar_type() == ScalarType::Half) {
      tiled_mlp<__half>(params, stream);
    } else {
      tiled_mlp<__nv_bfloat16>(params, stream);
    }
  };
  for_each_rows(rows_each, rows, residual_rows, out, run);
  return torch::stable::reshape(out, shape_of(x));
}

bool is_auto(const std::string& variant) { return variant == "auto" || variant == "auto_fp16_accumulation"; }

bool adds_in_fp16(const std::string& variant) { return variant.find("fp16_accumulation") != std::string::npos; }

std::string names_of_tiles() {
  std::string names;
  for (const GemmMenuEntry& entry : kGemmMenu) names += std::string("tiles_") + entry.name + ", ";
  return names;
}

// "auto" is a heuristic: torch's products use instructions of compute capability 9.0 that pass what those of 8.x reach;
// on 8.x both use the same, and ours need no gate and up in memory.
Variant variant_of(const std::string& name, ScalarType dtype, int64_t num_tokens) {
  if (name == "library") return {true};
  if (name == "tiles") return {};
  if (name == "tiles_fp16_accumulation") return {false, GemmTileSize::kFp16Sums};
  if (const Instance instance = find_instance("fused_mlp", dtype, name)) return {.instance = instance};
  if (name.starts_with("tiles_")) {
    const GemmTileSize tile = gemm_tile_named(std::string_view(name).substr(std::string_view("tiles_").size()));
    if (tile != GemmTileSize::kAuto) return {false, tile};
  }
  STD_TORCH_CHECK(is_auto(name), "fused_mlp: variant must be auto, auto_fp16_accumulation, library, tiles, ",
                  names_of_tiles(), "or tiles_fp16_accumulation, got ", name);
  if (compute_capability() >= 90) return {true};
  // fewer rows are half a tile, and wait for the weights, not for the tensor cores
  const bool fp16_sums = name == "auto_fp16_accumulation" && num_tokens > 64;
  return {false, fp16_sums ? GemmTileSize::kFp16Sums : GemmTileSize::kAuto};
}

}  // namespace

Tensor fused_mlp_cuda(const Tensor& x, const Tensor& gate_up_weight, const Tensor& down_weight,
                      const std::string& activation, const std::optional<Tensor>& residual,
                      const std::string& asked) {
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
  STD_TORCH_CHECK(!adds_in_fp16(asked) || x.scalar_type() == ScalarType::Half, "fused_mlp: variant ", asked,
                  " takes float16 only");
  const Activation parsed = activation_of(activation);

  const DeviceGuard guard(x);
  if (x.numel() == 0) return torch::stable::new_empty(x, shape);
  const int64_t num_tokens = x.numel() / hidden_size;
  const std::string variant =
      variant_for(asked, "fused_mlp", x.scalar_type(), {num_tokens}, {hidden_size, intermediate_size});
  STD_TORCH_CHECK(adds_in_fp16(variant) == adds_in_fp16(asked), "fused_mlp: a table must not choose ", variant,
                  ", whose sums are less accurate");
  const bool streams = is_auto(variant) && num_tokens <= kFusedMlpMaxTokens && can_stream(gate_up_weight) &&
                       can_stream(down_weight);
  if (!streams) {
    const Variant many = variant_of(variant, x.scalar_type(), num_tokens);
    if (many.library || !can_tile(gate_up_weight) || !can_tile(down_weight)) {
      return library_path(x, gate_up_weight, down_weight, parsed, residual);
    }
    return tiled_path(x, gate_up_weight, down_weight, parsed, residual, many);
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

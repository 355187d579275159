// torch boundary of csrc/attention: check memory safety, fill Params, choose a variant, dispatch on dtype, launch; or
// torch's own attention where that is faster.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>
#include <cstdio>

#include "attention/attention.h"
#include "attention/decode_attention.h"
#include "common/device.h"
#include "ops/call_op.h"
#include "ops/check.h"
#include "ops/rope.h"
#include "ops/stable_box.h"
#include "ops/variants.h"

namespace fastshard {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The keywords that all attention ops share, in the order of their schemas.
struct Rules {
  const OptionalTensor& mask;
  bool causal;
  const OptionalTensor& kv_lengths;
  const OptionalTensor& first_key;
  std::optional<int64_t> window;
  std::optional<double> softcap;
  double softmax_scale;
};

// RoPE of the queries, by a table.
struct Rope {
  const OptionalTensor& table;
  const OptionalTensor& positions;
  bool interleaved;

  // Whether the kernels do it: they turn whole 16-byte chunks.
  bool is_fused(const Tensor& q) const {
    const int rotary_dim = rope_table_of(*table, q).rotary_dim;
    return rotary_dim > 0 && rotary_dim % (interleaved ? 8 : 16) == 0 && is_aligned16(*table);
  }

  AttentionRope params(const Tensor& q) const {
    const RopeTable of = rope_table_of(*table, q);
    return {of.data, rope_index_of(*positions, q), of.max_positions, of.rotary_dim, interleaved};
  }
};

struct LayerNorm {
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double eps;
};

// t, or a contiguous copy where its rows of head_dim are not of unit stride and 16-byte aligned.
Tensor with_aligned_rows(const Tensor& t) {
  bool usable = is_aligned16(t) && t.stride(3) == 1;
  for (int64_t i = 0; i < 3; ++i) usable &= t.size(i) <= 1 || t.stride(i) % 8 == 0;
  if (usable) return t;
  Tensor copy = torch::stable::new_empty(t, shape_of(t));
  torch::stable::copy_(copy, t);
  return copy;
}

AttentionStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

int checked_int(const char* name, int64_t value) {
  STD_TORCH_CHECK(value <= INT_MAX, "attention: ", name, " must be at most ", INT_MAX, ", got ", value);
  return static_cast<int>(value);
}

AttentionIndices indices_of(const char* name, const OptionalTensor& t, const Tensor& q) {
  if (!t) return {};
  const ScalarType type = t->scalar_type();
  STD_TORCH_CHECK(t->device() == q.device() && t->dim() == 1 && t->size(0) == q.size(0) &&
                      (type == ScalarType::Int || type == ScalarType::Long),
                  "attention: ", name, " must be int32 or int64 [", q.size(0), "] on the device of q");
  return {t->const_data_ptr(), t->stride(0), type == ScalarType::Long};
}

// storage keeps a converted copy alive; [b | 1, s_q, S].
AttentionMask mask_of(const OptionalTensor& mask, const Tensor& q, Tensor& storage) {
  if (!mask) return {nullptr, 0, 0, 0, AttentionMaskType::kNone};
  STD_TORCH_CHECK(mask->device() == q.device() && mask->dim() == 3 && mask->size(1) == q.size(1) &&
                      (mask->size(0) == 1 || mask->size(0) == q.size(0)),
                  "attention: mask must be [1 or ", q.size(0), ", ", q.size(1), ", S] on the device of q");
  AttentionMaskType type = AttentionMaskType::kFloat32;
  storage = *mask;
  switch (mask->scalar_type()) {
    case ScalarType::Bool:     type = AttentionMaskType::kBool; break;
    case ScalarType::Half:     type = AttentionMaskType::kFloat16; break;
    case ScalarType::BFloat16: type = AttentionMaskType::kBfloat16; break;
    case ScalarType::Float:    break;
    default:                   storage = torch::stable::to(*mask, ScalarType::Float);
  }
  return {storage.const_data_ptr(), storage.size(0) == 1 ? 0 : storage.stride(0), storage.stride(1), storage.stride(2),
          type};
}

// Where a call goes: to torch's attention, to decode_attention, or to attention() and which of its tiles.
struct Variant {
  enum class Kernel { kAuto, kLibrary, kDecode, kTiles } kernel = Kernel::kAuto;
  AttentionTile tile = AttentionTile::kAuto;
  int splits = 0;  // 0: a heuristic chooses
};

// Of "auto", "library", or a kernel and perhaps its splits like "small/4".
Variant variant_of(const std::string& name) {
  using enum Variant::Kernel;
  if (name == "auto") return {};
  if (name == "library") return {kLibrary};
  Variant variant;
  const std::string kernel = name.substr(0, name.find('/'));
  if (kernel == "decode") variant = {kDecode};
  if (kernel == "few") variant = {kTiles, AttentionTile::kFew};
  if (kernel == "small") variant = {kTiles, AttentionTile::kSmall};
  if (kernel == "prefill") variant = {kTiles, AttentionTile::kPrefill};
  bool is_known = variant.kernel != kAuto;
  if (kernel.size() < name.size()) {
    char end = 0;
    const int read = std::sscanf(name.c_str() + kernel.size(), "/%d%c", &variant.splits, &end);
    is_known &= read == 1 && variant.splits >= 1 && variant.splits <= kAttentionMaxSplits;
  }
  STD_TORCH_CHECK(is_known, "attention: variant must be auto, library, or one of decode, few, small and prefill, ",
                  "perhaps with its splits, up to ", kAttentionMaxSplits, ", like small/4, got ", name);
  return variant;
}

bool has_only_lengths(const Rules& rules) {
  return !rules.mask && !rules.first_key && !rules.window && !rules.softcap;
}

// Whether torch's attention takes the call.
bool library_serves(const Tensor& q, const Tensor& k, const Rules& rules) {
  const bool is_16bit = q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16;
  const bool is_aligned_top_left = !rules.causal || q.size(1) == k.size(1);  // as torch means causal
  return is_16bit && has_only_lengths(rules) && !rules.kv_lengths && is_aligned_top_left;
}

// A heuristic. From compute capability 9.0 on cuDNN has kernels of other instructions, but prepares for each new shape
// for 40 ms: only what makes up for that in two prompts goes there.
bool library_is_faster(const Tensor& q, const Tensor& k, const Rules& rules) {
  constexpr double kMinFlops = 4e11;  // 8192 causal tokens with 32 heads of 128 are 5.5e11
  const double pairs = double(q.size(1)) * double(k.size(1)) / (rules.causal ? 2 : 1);
  const double flops = 4 * double(q.size(0) * q.size(2) * q.size(3)) * pairs;
  return flops >= kMinFlops && library_serves(q, k, rules) && compute_capability() >= 90;
}

Tensor library_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Rules& rules) {
  const auto by_heads = [](const Tensor& t) { return torch::stable::transpose(t, 1, 2); };
  const Tensor out = call_op("aten::scaled_dot_product_attention", by_heads(q), by_heads(k), by_heads(v),
                             OptionalTensor(), /*dropout_p=*/0.0, rules.causal,
                             std::optional<double>(rules.softmax_scale), /*enable_gqa=*/q.size(2) != k.size(2));
  return torch::stable::contiguous(by_heads(out));
}

template <typename T>
void launch(AttentionParams& params, bool by_decode, const Tensor& out) {
  if (by_decode) return decode_attention<T>(params, current_stream(out));
  params.num_splits = attention_num_splits<T>(params);
  Tensor partials;
  if (params.num_splits > 1) {
    const int64_t num_parts = params.num_splits * params.num_rows();
    partials = torch::stable::new_empty(out, {num_parts * (params.head_dim + 2)}, ScalarType::Float);
    params.partial_out = static_cast<float*>(partials.mutable_data_ptr());
    params.partial_max = params.partial_out + num_parts * params.head_dim;
    params.partial_sum = params.partial_max + num_parts;
  }
  attention<T>(params, current_stream(out));
}

Tensor run(const Tensor& q_given, const Tensor& k_in, const Tensor& v_in, const LayerNorm* layer_norm,
           const Rules& rules, const Rope& rope, const std::string& asked) {
  Tensor q_in = q_given;
  STD_TORCH_CHECK(q_in.dim() == 4 && k_in.dim() == 4 && shape_of(v_in) == shape_of(k_in) &&
                      k_in.size(0) == q_in.size(0) && k_in.size(3) == q_in.size(3),
                  "attention: q must be [b, s_q, num_qo_heads, head_dim], k and v [b, s_kv, num_kv_heads, head_dim]");
  FS_CHECK_LIKE(k_in, q_in);
  FS_CHECK_LIKE(v_in, q_in);
  const int64_t num_qo_heads = q_in.size(2), num_kv_heads = k_in.size(2), head_dim = q_in.size(3);
  STD_TORCH_CHECK(num_kv_heads > 0 && num_qo_heads % num_kv_heads == 0, "attention: q must have a multiple of k's ",
                  num_kv_heads, " heads, got ", num_qo_heads);
  STD_TORCH_CHECK(head_dim > 0 && head_dim % 8 == 0 && head_dim <= kAttentionMaxHeadDim,
                  "attention: head_dim must be a multiple of 8 up to ", kAttentionMaxHeadDim, ", got ", head_dim);

  using enum Variant::Kernel;
  const DeviceGuard guard(q_in);
  const bool is_asked = asked != "auto";
  Variant variant = variant_of(asked);
  if (!is_asked && layer_norm == nullptr && has_only_lengths(rules) && q_in.numel() > 0 && k_in.numel() > 0) {
    const char* const op = rules.kv_lengths ? "cached_attention" : "attention";
    variant = variant_of(variant_for(asked, op, q_in.scalar_type(), {q_in.size(0), q_in.size(1), k_in.size(1)},
                                     {num_qo_heads, num_kv_heads, head_dim}));
  }
  if (variant.kernel == kLibrary && !(layer_norm == nullptr && library_serves(q_in, k_in, rules))) {
    STD_TORCH_CHECK(!is_asked, "attention: variant library takes no mask, lengths, first_key, window or softcap");
    variant = {};  // an entry for other calls of this bucket
  }
  const bool is_auto = variant.kernel == kAuto;
  const bool by_library =
      variant.kernel == kLibrary || (is_auto && layer_norm == nullptr && library_is_faster(q_in, k_in, rules));
  // Of few rows a kernel of its own costs no more than blocks that all turn the same. ROTATING_ROWS in
  // fastshard/ops/attention.py.
  const bool is_few = q_in.size(1) * (num_qo_heads / num_kv_heads) < 17;
  STD_TORCH_CHECK(rope.table.has_value() == rope.positions.has_value(),
                  "attention: rope_table and rope_positions go together");
  const bool is_fused = rope.table && !by_library && !is_few && rope.is_fused(q_in);
  if (rope.table && !is_fused) {
    q_in = call_op(FS_OP_NAME("apply_rope"), with_aligned_rows(q_in), *rope.table, *rope.positions, rope.interleaved);
  }
  if (by_library) return library_attention(q_in, k_in, v_in, rules);
  Tensor out = torch::stable::new_empty(q_in, shape_of(q_in));  // contiguous, whatever q's strides
  if (out.numel() == 0) return out;
  const Tensor q = with_aligned_rows(q_in), k = with_aligned_rows(k_in), v = with_aligned_rows(v_in);
  Tensor mask, weight, bias;  // hold what the pointers below point to

  AttentionParams params{};
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  params.v_strides = strides_of(v);
  params.batch = checked_int("batch", q.size(0));
  params.s_q = checked_int("s_q", q.size(1));
  params.s_kv = checked_int("s_kv", k.size(1));
  params.num_kv_heads = checked_int("num_kv_heads", num_kv_heads);
  params.group = checked_int("heads of a group", num_qo_heads / num_kv_heads);
  checked_int("s_q * group", q.size(1) * params.group);
  params.head_dim = static_cast<int>(head_dim);

  if (is_fused) params.rope = rope.params(q);
  params.mask = mask_of(rules.mask, q, mask);
  params.kv_lengths = indices_of("kv_lengths", rules.kv_lengths, q);
  params.first_key = indices_of("first_key", rules.first_key, q);
  params.max_keys = rules.mask ? static_cast<int>(std::min(k.size(1), mask.size(2))) : params.s_kv;
  params.causal = rules.causal;
  params.window = static_cast<int>(std::clamp<int64_t>(rules.window.value_or(0), 0, INT_MAX / 2));
  params.softcap = static_cast<float>(rules.softcap.value_or(0));
  params.softmax_scale = static_cast<float>(rules.softmax_scale);

  if (layer_norm != nullptr) {
    params.layer_norm = true;
    params.eps = static_cast<float>(layer_norm->eps);
    const auto vector_of = [&](const OptionalTensor& t, Tensor& storage) -> const void* {
      if (!t) return nullptr;
      FS_CHECK_LIKE(*t, q);
      storage = torch::stable::contiguous(*t);
      FS_CHECK_VECTOR(storage, head_dim);
      return storage.const_data_ptr();
    };
    params.weight = vector_of(layer_norm->weight, weight);
    params.bias = vector_of(layer_norm->bias, bias);
  }

  bool by_decode = (is_auto || variant.kernel == kDecode) && decode_attention_serves(params);
  if (variant.kernel == kDecode && !by_decode) {
    STD_TORCH_CHECK(!is_asked, "attention: variant ", asked, " takes head_dim 64, 96 or 128 and at most 16 queries ",
                    "for each key, got head_dim ", head_dim, " and ", params.rows_per_head());
    variant = {};
  }
  params.tile = variant.tile;
  params.asked_splits = variant.splits;

  switch (q.scalar_type()) {
    case ScalarType::Half:     launch<__half>(params, by_decode, out); break;
    case ScalarType::BFloat16: launch<__nv_bfloat16>(params, by_decode, out); break;
    default:
      STD_TORCH_CHECK(false, "attention: q must be float16 or bfloat16, got ",
                      torch::headeronly::toString(q.scalar_type()));
  }
  return out;
}

Tensor attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, bool causal,
                      const OptionalTensor& kv_lengths, const OptionalTensor& first_key, std::optional<int64_t> window,
                      std::optional<double> softcap, double softmax_scale, const OptionalTensor& rope_table,
                      const OptionalTensor& rope_positions, bool rope_interleaved, const std::string& variant) {
  return run(q, k, v, nullptr, {mask, causal, kv_lengths, first_key, window, softcap, softmax_scale},
             {rope_table, rope_positions, rope_interleaved}, variant);
}

Tensor attention_layer_norm_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& weight,
                                 const OptionalTensor& bias, double eps, const OptionalTensor& mask, bool causal,
                                 const OptionalTensor& kv_lengths, const OptionalTensor& first_key,
                                 std::optional<int64_t> window, std::optional<double> softcap, double softmax_scale,
                                 const OptionalTensor& rope_table, const OptionalTensor& rope_positions,
                                 bool rope_interleaved) {
  const LayerNorm layer_norm{weight, bias, eps};
  return run(q, k, v, &layer_norm, {mask, causal, kv_lengths, first_key, window, softcap, softmax_scale},
             {rope_table, rope_positions, rope_interleaved}, "auto");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FS_OP_NAMESPACE, FS_OP_KEY, m) {
  FS_IMPL(m, "attention", attention_cuda);
  FS_IMPL(m, "attention_layer_norm", attention_layer_norm_cuda);
}

}  // namespace fastshard

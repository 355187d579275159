// torch boundary of csrc/decode.
#include "decode/step.h"

#include <cmath>

#include "ops/activation.h"
#include "ops/check.h"
#include "ops/stable_box.h"

namespace fastshard {
namespace {

using Tensors = std::vector<Tensor>;

// The data of a contiguous, 16-byte aligned tensor of this shape with the dtype and device of `like`.
void* data_of(const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.device() == like.device() && t.scalar_type() == like.scalar_type() && t.is_contiguous() &&
                      is_aligned16(t) && shape_of(t) == std::vector<int64_t>(shape),
                  "decode_step: ", name, " must be contiguous, 16-byte aligned and fit the other weights");
  return t.mutable_data_ptr();
}

// The same of a layer's tensor in a list that has one a layer; null where the list is empty.
void* layer_data(const char* name, const Tensors& list, size_t num_layers, size_t layer, const Tensor& like,
                 std::initializer_list<int64_t> shape) {
  if (list.empty()) return nullptr;
  STD_TORCH_CHECK(list.size() == num_layers, "decode_step: ", name, " must have ", num_layers, " tensors or none, got ",
                  list.size());
  return data_of(name, list[layer], like, shape);
}

const int64_t* indices_of(const char* name, const Tensor& t, const Tensor& like, int64_t batch) {
  STD_TORCH_CHECK(t.device() == like.device() && t.scalar_type() == ScalarType::Long && t.is_contiguous() &&
                      t.dim() == 1 && t.size(0) == batch,
                  "decode_step: ", name, " must be contiguous int64 [", batch, "]");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

int size_of(const char* name, int64_t size, int64_t multiple) {
  constexpr int64_t kMax = int64_t(1) << 24;  // indices of the kernel are ints
  STD_TORCH_CHECK(size > 0 && size % multiple == 0 && size <= kMax, "decode_step: ", name,
                  " must be a positive multiple of ", multiple, " up to ", kMax, ", got ", size);
  return static_cast<int>(size);
}

// The memory of all ranks, which is on their GPUs.
void set_ranks(DecodeStepParams& p, const Tensor& like, const Tensors& rank_sums, int64_t rank) {
  p.num_ranks = std::max<int>(1, static_cast<int>(rank_sums.size()));
  STD_TORCH_CHECK(rank_sums.size() != 1 && p.num_ranks <= kDecodeMaxRanks && rank >= 0 && rank < p.num_ranks,
                  "decode_step: rank_sums must be of no or 2 to ", kDecodeMaxRanks, " ranks, and rank one of them, got ",
                  rank_sums.size(), " and ", rank);
  p.rank = static_cast<int>(rank);
  for (size_t i = 0; i < rank_sums.size(); ++i) {
    const Tensor& memory = rank_sums[i];
    STD_TORCH_CHECK(memory.device().type() == like.device().type() && memory.scalar_type() == ScalarType::Long &&
                        memory.is_contiguous() && is_aligned16(memory) &&
                        memory.numel() >= decode_rank_sum_words(p.num_ranks, p.hidden_size),
                    "decode_step: rank_sums must be contiguous int64 of ",
                    decode_rank_sum_words(p.num_ranks, p.hidden_size), " words");
    p.rank_sums[i] = static_cast<uint64_t*>(memory.mutable_data_ptr());
  }
}

}  // namespace

void decode_step_cuda(const Tensor& x, const std::optional<Tensor>& embedding, const Tensors& sa_norm,
                      const Tensors& qkv_weight, const Tensors& qkv_bias, const Tensors& q_norm, const Tensors& k_norm,
                      const Tensors& output_weight, const Tensors& output_bias, const Tensors& mlp_norm,
                      const Tensors& gate_up_weight, const Tensors& down_weight, const std::optional<Tensor>& norm,
                      const std::optional<Tensor>& head, const Tensors& k_cache, const Tensors& v_cache,
                      const Tensor& rope_table, const Tensor& positions, const Tensor& slots,
                      const std::optional<Tensor>& first_key, const Tensor& overflow, const Tensor& workspace,
                      const Tensor& out, int64_t num_heads, double norm_eps, bool weight_in_fp32, bool rope_interleaved,
                      const std::string& activation, const std::vector<int64_t>& windows, const Tensors& rank_sums,
                      int64_t rank) {
  const size_t num_layers = sa_norm.size();
  STD_TORCH_CHECK(num_layers >= 1 && num_layers <= kDecodeMaxLayers && windows.size() == num_layers,
                  "decode_step: there must be 1 to ", kDecodeMaxLayers, " layers, each with a window, got ",
                  num_layers);
  for (const Tensors* list :
       {&qkv_weight, &output_weight, &mlp_norm, &gate_up_weight, &down_weight, &k_cache, &v_cache}) {
    STD_TORCH_CHECK(list->size() == num_layers, "decode_step: every layer must have all weights and caches");
  }
  const Tensor& like = sa_norm[0];
  STD_TORCH_CHECK(like.scalar_type() == ScalarType::Half || like.scalar_type() == ScalarType::BFloat16,
                  "decode_step: weights must be float16 or bfloat16, got ",
                  torch::headeronly::toString(like.scalar_type()));
  STD_TORCH_CHECK(k_cache[0].dim() == 4 && down_weight[0].dim() == 2 && x.dim() >= 1 && num_heads >= 1,
                  "decode_step: wrong dimensions");
  const int64_t batch = x.size(0), hidden_size = like.numel(), intermediate_size = down_weight[0].size(1);
  const int64_t num_kv_heads = k_cache[0].size(1), cache_size = k_cache[0].size(2), head_dim = k_cache[0].size(3);
  STD_TORCH_CHECK(batch >= 1 && batch <= kDecodeMaxTokens && k_cache[0].size(0) >= batch,
                  "decode_step: batch must be 1 to ", kDecodeMaxTokens, " and fit the caches, got ", batch);
  STD_TORCH_CHECK(num_kv_heads >= 1 && num_heads % num_kv_heads == 0, "decode_step: num_heads must be a multiple of ",
                  num_kv_heads, ", got ", num_heads);
  STD_TORCH_CHECK(q_norm.empty() == k_norm.empty(), "decode_step: q_norm and k_norm must be given together");
  STD_TORCH_CHECK(norm.has_value() == head.has_value(), "decode_step: norm and head must be given together");

  DecodeStepParams p{};
  p.num_tokens = static_cast<int>(batch);
  p.num_layers = static_cast<int>(num_layers);
  p.hidden_size = size_of("hidden_size", hidden_size, 8);
  p.intermediate_size = size_of("intermediate_size", intermediate_size, 8);
  p.num_heads = size_of("num_heads", num_heads, 1);
  p.num_kv_heads = size_of("num_kv_heads", num_kv_heads, 1);
  p.head_dim = size_of("head_dim", head_dim, 8);
  p.cache_size = size_of("max_seq_len", cache_size, 1);
  p.norm_eps = static_cast<float>(norm_eps);
  p.softmax_scale = static_cast<float>(1 / std::sqrt(double(head_dim)));
  p.rope_interleaved = rope_interleaved;
  p.weight_in_fp32 = weight_in_fp32;
  p.activation = activation_of(activation);
  const int64_t q_size = num_heads * head_dim, qkv_size = (num_heads + 2 * num_kv_heads) * head_dim;

  for (size_t i = 0; i < num_layers; ++i) {
    const auto get = [&](const char* name, const Tensors& list, std::initializer_list<int64_t> shape) {
      return layer_data(name, list, num_layers, i, like, shape);
    };
    DecodeLayer& layer = p.layers[i];
    layer.sa_norm = get("sa_norm", sa_norm, {hidden_size});
    layer.weights[0] = get("qkv_weight", qkv_weight, {qkv_size, hidden_size});
    layer.qkv_bias = get("qkv_bias", qkv_bias, {qkv_size});
    layer.q_norm = get("q_norm", q_norm, {head_dim});
    layer.k_norm = get("k_norm", k_norm, {head_dim});
    layer.weights[1] = get("output_weight", output_weight, {hidden_size, q_size});
    layer.output_bias = get("output_bias", output_bias, {hidden_size});
    layer.mlp_norm = get("mlp_norm", mlp_norm, {hidden_size});
    layer.weights[2] = get("gate_up_weight", gate_up_weight, {2 * intermediate_size, hidden_size});
    layer.weights[3] = get("down_weight", down_weight, {hidden_size, intermediate_size});
    layer.k_cache = get("k_cache", k_cache, {k_cache[0].size(0), num_kv_heads, cache_size, head_dim});
    layer.v_cache = get("v_cache", v_cache, {k_cache[0].size(0), num_kv_heads, cache_size, head_dim});
    layer.window = static_cast<int>(std::min<int64_t>(windows[i], cache_size));
    STD_TORCH_CHECK(windows[i] >= 0, "decode_step: windows must be at least 0, got ", windows[i]);
  }

  set_ranks(p, like, rank_sums, rank);
  if (embedding) {
    STD_TORCH_CHECK(embedding->dim() == 2, "decode_step: embedding must have two dimensions");
    p.num_embeddings = size_of("vocab_size", embedding->size(0), 1);
    p.tokens = indices_of("x", x, like, batch);
    p.embedding = data_of("embedding", *embedding, like, {embedding->size(0), hidden_size});
  } else {
    p.hidden = data_of("x", x, like, {batch, hidden_size});
  }
  if (head) {
    STD_TORCH_CHECK(head->dim() == 2 && (!embedding || head->size(0) * p.num_ranks == p.num_embeddings),
                    "decode_step: head must be [vocab_size, hidden_size], as the embedding");
    p.vocab_size = size_of("vocab_size", head->size(0), 1);
    p.norm = data_of("norm", *norm, like, {hidden_size});
    p.head = data_of("head", *head, like, {head->size(0), hidden_size});
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "decode_step: out must be float32 logits");
    p.out = data_of("out", out, out, {batch, head->size(0)});
  } else {
    p.out = data_of("out", out, like, {batch, hidden_size});
  }
  STD_TORCH_CHECK(out.device() == like.device(), "decode_step: out must be on the device of the weights");

  STD_TORCH_CHECK(rope_table.device() == like.device() && rope_table.scalar_type() == ScalarType::Float &&
                      rope_table.dim() == 3 && rope_table.size(2) == 2 && rope_table.is_contiguous() &&
                      reinterpret_cast<uintptr_t>(rope_table.const_data_ptr()) % 8 == 0 &&
                      2 * rope_table.size(1) <= head_dim,
                  "decode_step: rope_table must be contiguous float32 [max_positions, rotary_dim / 2, 2]");
  p.rope_table = static_cast<const float*>(rope_table.const_data_ptr());
  p.num_positions = static_cast<int>(std::min<int64_t>(rope_table.size(0), INT32_MAX));
  p.rotary_dim = static_cast<int>(2 * rope_table.size(1));
  p.positions = indices_of("positions", positions, like, batch);
  p.slots = indices_of("slots", slots, like, batch);
  p.first_key = first_key ? indices_of("first_key", *first_key, like, batch) : nullptr;
  STD_TORCH_CHECK(overflow.device() == like.device() && overflow.scalar_type() == ScalarType::Int &&
                      overflow.numel() == 1,
                  "decode_step: overflow must be int32 [1]");
  p.overflow = static_cast<int*>(overflow.mutable_data_ptr());
  STD_TORCH_CHECK(workspace.device() == like.device() && workspace.is_contiguous() && is_aligned16(workspace) &&
                      workspace.numel() * int64_t(workspace.element_size()) >= 8 * decode_workspace_words(p),
                  "decode_step: workspace must have ", 8 * decode_workspace_words(p), " bytes");
  p.workspace = static_cast<uint64_t*>(workspace.mutable_data_ptr());

  const DeviceGuard guard(like);
  const cudaStream_t stream = current_stream(like);
  const bool launched = like.scalar_type() == ScalarType::Half ? decode_step<__half>(p, stream)
                                                               : decode_step<__nv_bfloat16>(p, stream);
  STD_TORCH_CHECK(launched, "decode_step: cannot be resident: this device cannot hold the blocks of a launch together");
}

STABLE_TORCH_LIBRARY_IMPL(FS_OP_NAMESPACE, FS_OP_KEY, m) { FS_IMPL(m, "decode_step", decode_step_cuda); }

}  // namespace fastshard

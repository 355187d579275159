// torch boundary of csrc/rope: check memory safety, fill Params, dispatch on dtype, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "ops/check.h"
#include "ops/dispatch.h"
#include "ops/rope.h"
#include "ops/stable_box.h"

namespace fastshard {

#define FS_CHECK_HEADS(t) \
  STD_TORCH_CHECK((t).dim() == 4 && (t).stride(3) == 1, #t " must have 4 dimensions and unit last stride")

RopeTable rope_table_of(const Tensor& table, const Tensor& x) {
  STD_TORCH_CHECK(table.device() == x.device() && table.scalar_type() == ScalarType::Float && table.dim() == 3 &&
                      table.size(2) == 2 && 2 * table.size(1) <= x.size(3) && table.is_contiguous(),
                  "table must be a contiguous float32 [max_positions, at most head_dim / 2, 2] on the device of q");
  return {static_cast<const float*>(table.const_data_ptr()), table.size(0), int(2 * table.size(1))};
}

RopeIndex rope_index_of(const Tensor& index, const Tensor& x) {
  STD_TORCH_CHECK(index.device() == x.device() && index.scalar_type() == ScalarType::Long && index.dim() == 2 &&
                      index.size(0) == x.size(0) && index.size(1) == x.size(1),
                  "positions and slots must be int64 [", x.size(0), ", ", x.size(1), "] on the device of q");
  return {static_cast<const int64_t*>(index.const_data_ptr()), index.stride(0), index.stride(1)};
}

RopeHeads heads_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

RopeCache cache_of(const Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// Whether x can be read and written in 16-byte vectors along its last dimension.
bool has_whole_vectors(const Tensor& x) {
  const int64_t vec_size = 16 / int64_t(x.element_size());
  for (int64_t dim = 0; dim < 3; ++dim) {
    if (x.size(dim) > 1 && x.stride(dim) % vec_size != 0) return false;
  }
  return x.size(3) % vec_size == 0 && is_aligned16(x);
}

RopeParams params_of(const Tensor& q, const Tensor& q_out, const Tensor* table, const Tensor& positions,
                     bool interleaved) {
  RopeParams params{};
  params.q = heads_of(q);
  params.q_out = q_out.mutable_data_ptr();
  params.num_tokens = q.size(0) * q.size(1);
  STD_TORCH_CHECK(params.num_tokens <= INT32_MAX && q.size(2) <= INT32_MAX && q.size(3) <= INT32_MAX,
                  "at most 2^31 - 1 tokens, heads and elements of a head");
  params.seq_len = int(q.size(1));
  params.num_qo_heads = int(q.size(2));
  params.head_dim = int(q.size(3));
  params.interleaved = interleaved;
  params.whole_vectors = has_whole_vectors(q);
  if (table == nullptr) return params;
  const RopeTable checked = rope_table_of(*table, q);
  params.table = checked.data;
  params.positions = rope_index_of(positions, q);
  params.max_positions = checked.max_positions;
  params.rotary_dim = checked.rotary_dim;
  const int64_t run = interleaved ? params.rotary_dim : params.rotary_dim / 2;
  params.whole_vectors = params.whole_vectors && run * int64_t(q.element_size()) % 16 == 0 && is_aligned16(*table);
  return params;
}

void run_rope(const Tensor& q, const RopeParams& params) {
  const cudaStream_t stream = current_stream(q);
  dispatch_floating("q", q.scalar_type(), [&]<typename T>(std::type_identity<T>) { rope<T>(params, stream); });
}

Tensor apply_rope_cuda(const Tensor& x, const Tensor& table, const Tensor& positions, bool interleaved) {
  FS_CHECK_HEADS(x);
  const DeviceGuard guard(x);
  Tensor out = torch::stable::new_empty(x, shape_of(x));  // contiguous, whatever x's strides
  run_rope(x, params_of(x, out, &table, positions, interleaved));
  return out;
}

Tensor rope_append_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& table,
                        const Tensor& positions, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                        const Tensor& overflow, bool interleaved) {
  FS_CHECK_HEADS(q);
  for (const Tensor* x : {&k, &v}) {
    FS_CHECK_HEADS(*x);
    FS_CHECK_LIKE(*x, q);
    STD_TORCH_CHECK(x->size(0) == q.size(0) && x->size(1) == q.size(1) && x->size(2) == k.size(2) &&
                        x->size(3) == q.size(3),
                    "k and v must have the tokens and the head_dim of q, and the same heads");
  }
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    FS_CHECK_HEADS(*cache);
    FS_CHECK_LIKE(*cache, q);
    STD_TORCH_CHECK(cache->size(0) >= q.size(0) && cache->size(1) == k.size(2) && cache->size(2) == k_cache.size(2) &&
                        cache->size(3) == q.size(3),
                    "k_cache and v_cache must be the same [batch of q or more, heads of k, max_seq_len, head_dim]");
  }
  STD_TORCH_CHECK(overflow.device() == q.device() && overflow.scalar_type() == ScalarType::Int && overflow.numel() == 1,
                  "overflow must be int32 [1] on the device of q");

  const DeviceGuard guard(q);
  Tensor q_out = torch::stable::new_empty(q, shape_of(q));
  RopeParams params = params_of(q, q_out, table.has_value() ? &*table : nullptr, positions, interleaved);
  params.k = heads_of(k);
  params.v = heads_of(v);
  params.k_cache = cache_of(k_cache);
  params.v_cache = cache_of(v_cache);
  params.slots = rope_index_of(slots, q);
  params.overflow = static_cast<int*>(overflow.mutable_data_ptr());
  params.max_seq_len = k_cache.size(2);
  STD_TORCH_CHECK(k.size(2) <= INT32_MAX, "at most 2^31 - 1 heads");
  params.num_kv_heads = int(k.size(2));
  for (const Tensor* x : {&k, &v, &k_cache, &v_cache}) {
    params.whole_vectors = params.whole_vectors && has_whole_vectors(*x);
  }
  run_rope(q, params);
  return q_out;
}

STABLE_TORCH_LIBRARY_IMPL(FS_OP_NAMESPACE, FS_OP_KEY, m) {
  FS_IMPL(m, "apply_rope", apply_rope_cuda);
  FS_IMPL(m, "rope_append", rope_append_cuda);
}

}  // namespace fastshard

// What the two products of the gated MLP by tiles do with their sums.
//
// hidden = act(x @ gate.T) * (x @ up.T) is one product: the rows of gate_up_weight alternate, so that each thread finds
// gates and their ups as neighbours, and neither goes to memory. out = residual + hidden @ down.T is rounded once.
#pragma once
#include "activation/activate.cuh"
#include "gemm/gemm.cuh"

namespace fastshard {

struct Nothing {};

template <typename T>
struct StoreHidden {
  T* hidden;  // [num_tokens, intermediate_size]
  int64_t stride;
  Activation activation;

  __device__ __forceinline__ Nothing load(int, int) const { return {}; }

  __device__ __forceinline__ void store(int row, int column, const float (&sums)[kRun], Nothing) const {
    float values[kRun / 2];
#pragma unroll
    for (int i = 0; i < kRun / 2; ++i) values[i] = activate(activation, sums[2 * i]) * sums[2 * i + 1];
    *reinterpret_cast<uint2*>(hidden + row * stride + column / 2) =
        make_uint2(pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3]));
  }

  // The commonest activation without a branch for each value.
  template <typename Finish>
  __device__ __forceinline__ void visit(Finish finish) const {
    if (activation == Activation::kSilu) {
      finish(StoreHidden{hidden, stride, Activation::kSilu});
    } else {
      finish(*this);
    }
  }
};

template <typename T>
struct StoreOutput {
  T* out;             // [num_tokens, hidden_size]
  const T* residual;  // [num_tokens, hidden_size] or null
  int64_t stride, residual_stride;

  __device__ __forceinline__ Vec<T> load(int row, int column) const {
    return load_vec(residual + row * residual_stride + column);
  }

  __device__ __forceinline__ void store(int row, int column, const float (&sums)[kRun], const Vec<T>& added) const {
    static_assert(Vec<T>::kSize == kRun);
    Vec<T> values;
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] = from_float<T>(sums[i] + to_float(added[i]));
    store_vec(out + row * stride + column, values);
  }

  struct WithoutResidual {
    const StoreOutput& to;
    __device__ __forceinline__ Nothing load(int, int) const { return {}; }
    __device__ __forceinline__ void store(int row, int column, const float (&sums)[kRun], Nothing) const {
      Vec<T> values;
#pragma unroll
      for (int i = 0; i < kRun; ++i) values[i] = from_float<T>(sums[i]);
      store_vec(to.out + row * to.stride + column, values);
    }
  };

  template <typename Finish>
  __device__ __forceinline__ void visit(Finish finish) const {
    if (residual == nullptr) {
      finish(WithoutResidual{*this});
    } else {
      finish(*this);
    }
  }
};

}  // namespace fastshard

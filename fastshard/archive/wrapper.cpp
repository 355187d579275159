// A kernel of the archive as a variant of rms_norm or layer_norm: promote.py puts its source below KERNEL.
//
// The kernel's `forward` is caught where it is given to pybind11, by its signature. Tensors are views of what the op's
// Params point to; the result is copied to where the op's output is. FASTSHARD_LAYER_NORM: of layer_norm.
#include <torch/extension.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#endif

// Hidden: two promoted kernels share nothing.
namespace [[gnu::visibility("hidden")]] fastshard_promoted {

struct Inputs {
  at::Tensor x;             // [rows, hidden_size], contiguous
  at::Tensor weight, bias;  // [hidden_size]; of rms_norm undefined
  double eps;
};

using Forward = std::function<at::Tensor(const Inputs&)>;

template <typename A>
constexpr bool is_tensor = std::is_same_v<std::decay_t<A>, at::Tensor>;
template <typename A>
constexpr bool is_eps = std::is_floating_point_v<std::decay_t<A>>;

// Nothing where the function is not of the op: its call would mean something else. Without eps as an argument a kernel has
// one of its own, which need not be the op's.
template <typename Other>
Forward adapt(const Other&) {
  return {};
}
#ifdef FASTSHARD_LAYER_NORM
constexpr const char* kArguments = "x, weight, bias and eps";
template <typename X, typename W, typename B, typename E>
Forward adapt(const std::function<at::Tensor(X, W, B, E)>& f) {
  if constexpr (is_tensor<X> && is_tensor<W> && is_tensor<B> && is_eps<E>) {
    return [f](const Inputs& in) {
      at::Tensor x = in.x, weight = in.weight, bias = in.bias;
      return f(x, weight, bias, static_cast<std::decay_t<E>>(in.eps));
    };
  }
  return {};
}
#else
constexpr const char* kArguments = "x and eps";
template <typename X, typename E>
Forward adapt(const std::function<at::Tensor(X, E)>& f) {
  if constexpr (is_tensor<X> && is_eps<E>) {
    return [f](const Inputs& in) {
      at::Tensor x = in.x;
      return f(x, static_cast<std::decay_t<E>>(in.eps));
    };
  }
  return {};
}
#endif

// In the place of a pybind11 module.
struct Module {
  Forward forward;
  std::string text;

  template <typename F, typename... Rest>
  Module& def(const char* name, F f, Rest&&...) {
    if constexpr (std::is_class_v<F> || std::is_pointer_v<F>) {
      if (std::string(name) == "forward") forward = adapt(std::function{f});
    }
    return *this;
  }
  std::string& doc() { return text; }
};

void define(Module& module);

#ifdef __CUDACC__
thread_local cudaStream_t stream = nullptr;

// `kernel<<<grid, block>>>` means the legacy stream, which is not ordered with others and breaks the capture of graphs.
// This hides the runtime's function within this library alone, and puts the op's stream in the place of none.
extern "C" __attribute__((visibility("hidden"))) unsigned fastshard_push_configuration(
    dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t given) __asm__("__cudaPushCallConfiguration");
extern "C" unsigned fastshard_push_configuration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t given) {
  using Push = unsigned (*)(dim3, dim3, size_t, cudaStream_t);
  static const Push push = reinterpret_cast<Push>(dlsym(RTLD_NEXT, "__cudaPushCallConfiguration"));
  return push(grid, block, shared_bytes, given == nullptr ? stream : given);
}
#endif

}  // namespace fastshard_promoted

#undef PYBIND11_MODULE
#define PYBIND11_MODULE(name, module, ...) void fastshard_promoted::define(fastshard_promoted::Module& module)

// KERNEL

namespace [[gnu::visibility("hidden")]] fastshard_promoted {

// As csrc/common/row_layout.h and csrc/norm have them; the op checks the size.
struct RowLayout {
  int64_t strides[3];
  unsigned middle, inner;
};
struct NormRows {
  const void* x;
  const void* residual;
  void* out;
  void* new_residual;
  RowLayout x_layout;
  RowLayout residual_layout;
  int64_t num_tokens;
  int hidden_size;
  float inv_hidden_size;
};
#ifdef FASTSHARD_LAYER_NORM
struct Params {
  NormRows rows;
  const void* weight;
  const void* bias;
  float eps;
};
#else
struct Params {
  NormRows rows;
  const void* weight;
  float eps;
  bool weight_in_fp32;
};
#endif

Module module;  // filled when the library is loaded

at::TensorOptions options_of(at::ScalarType dtype) {
#ifdef __CUDACC__
  return at::TensorOptions().dtype(dtype).device(at::Device(at::kCUDA, c10::cuda::current_device()));
#else
  return at::TensorOptions().dtype(dtype);
#endif
}

at::Tensor view(const void* data, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  return at::from_blob(const_cast<void*>(data), sizes, strides, options_of(dtype));
}

at::Tensor rows_of(const NormRows& rows, at::ScalarType dtype) {
  const RowLayout& layout = rows.x_layout;
  const int64_t middle = layout.middle, inner = layout.inner, hidden_size = rows.hidden_size;
  const at::Tensor x = view(rows.x, {rows.num_tokens / (middle * inner), middle, inner, hidden_size},
                            {layout.strides[0], layout.strides[1], layout.strides[2], 1}, dtype);
  return x.reshape({rows.num_tokens, hidden_size}).contiguous();
}

at::Tensor vector_of(const void* data, int64_t size, at::ScalarType dtype, double missing) {
  return data == nullptr ? at::full({size}, missing, options_of(dtype)) : view(data, {size}, {1}, dtype);
}

void run(const Params& params, at::ScalarType dtype) {
  const NormRows& rows = params.rows;
  if (rows.num_tokens == 0) return;
  if (rows.residual != nullptr) throw std::runtime_error("it adds no residual");
  if (!module.forward) {
    throw std::runtime_error(std::string("its forward must take ") + kArguments + ", and return a tensor");
  }
  const c10::InferenceMode guard;
  Inputs inputs{rows_of(rows, dtype), {}, {}, params.eps};
  at::Tensor weight = vector_of(params.weight, rows.hidden_size, dtype, 1);
#ifdef FASTSHARD_LAYER_NORM
  inputs.weight = weight;
  inputs.bias = vector_of(params.bias, rows.hidden_size, dtype, 0);
#else
  if (params.weight_in_fp32) {  // the weight is multiplied before anything is rounded
    inputs.x = inputs.x.to(at::kFloat);
    weight = weight.to(at::kFloat);
  }
#endif
  const at::Tensor y = module.forward(inputs);
  if (y.sizes() != inputs.x.sizes() || y.scalar_type() != inputs.x.scalar_type() || y.device() != inputs.x.device()) {
    throw std::runtime_error("its result is not like x");
  }
  at::Tensor out = view(rows.out, {rows.num_tokens, rows.hidden_size}, {rows.hidden_size, 1}, dtype);
#ifdef FASTSHARD_LAYER_NORM
  out.copy_(y);
#else
  if (params.weight_in_fp32) {
    out.copy_(y * weight);
  } else {
    at::mul_out(out, y, weight);
  }
#endif
}

const char* launch(const void* params, void* stream_of_op, at::ScalarType dtype) {
  static thread_local std::string failure;
  try {
#ifdef __CUDACC__
    stream = static_cast<cudaStream_t>(stream_of_op);
#endif
    run(*static_cast<const Params*>(params), dtype);
    return nullptr;
  } catch (const std::exception& error) {
    failure = std::string("the promoted kernel FASTSHARD_NAME failed, fastshard archive demote it: ") + error.what();
    return failure.c_str();
  }
}

}  // namespace fastshard_promoted

#define FASTSHARD_EXPORT __attribute__((visibility("default")))
extern "C" {
// Once, before anything else, by a thread that holds Python's lock: what is given to pybind11 beside functions are objects.
FASTSHARD_EXPORT void fastshard_prepare() { fastshard_promoted::define(fastshard_promoted::module); }
FASTSHARD_EXPORT extern const size_t fastshard_params_bytes = sizeof(fastshard_promoted::Params);
FASTSHARD_EXPORT const char* fastshard_instance_float32(const void* params, void* stream) {
  return fastshard_promoted::launch(params, stream, at::kFloat);
}
FASTSHARD_EXPORT const char* fastshard_instance_float16(const void* params, void* stream) {
  return fastshard_promoted::launch(params, stream, at::kHalf);
}
FASTSHARD_EXPORT const char* fastshard_instance_bfloat16(const void* params, void* stream) {
  return fastshard_promoted::launch(params, stream, at::kBFloat16);
}
}

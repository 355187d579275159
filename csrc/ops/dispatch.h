// From a tensor's dtype to the type a kernel is instantiated for.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ops/check.h"

namespace fastshard {

// Calls run(std::type_identity<T>{}) with the T of dtype; name says which argument has it, for the error.
template <typename Run>
void dispatch_floating(const char* name, ScalarType dtype, Run run) {
  switch (dtype) {
    case ScalarType::Float:    return run(std::type_identity<float>{});
    case ScalarType::Half:     return run(std::type_identity<__half>{});
    case ScalarType::BFloat16: return run(std::type_identity<__nv_bfloat16>{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  }
}

}  // namespace fastshard

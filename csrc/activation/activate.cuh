// The activations of gated MLPs, one value at a time in fp32.
#pragma once
#include <cuda_runtime.h>

#include "activation/activation.h"

namespace fastshard {

// NaN in, NaN out; a large negative x gives 0, not NaN.
__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu: return __fdividef(x, 1.f + __expf(-x));
    case Activation::kGelu: return 0.5f * x * (1.f + erff(x * 0.70710678f));  // 1 / sqrt(2)
    case Activation::kGeluTanh:  // sqrt(2 / pi)
      return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu: return x < 0.f ? 0.f : x;
  }
  __builtin_unreachable();
}

}  // namespace fastshard

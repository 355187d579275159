// The activations that kernels of gated MLPs take.
#pragma once
namespace fastshard {

enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu };

}  // namespace fastshard

// Gated activations as other boundary files call them.
#pragma once
#include <string>

#include "activation/activation.h"
#include "ops/check.h"

namespace fastshard {

Activation activation_of(const std::string& name);

// gate_up: [..., 2 * intermediate_size], any strides. Returns [..., intermediate_size], contiguous.
Tensor run_act_and_mul(const Tensor& gate_up, Activation activation, bool interleaved);

}  // namespace fastshard

// Instances for head_dim up to 128.
#include "attention/launch_attention.cuh"

namespace fastshard {

template struct AttentionLauncher<__half, 128>;
template struct AttentionLauncher<__nv_bfloat16, 128>;

}  // namespace fastshard

// Instances for head_dim up to 96.
#include "attention/launch_attention.cuh"

namespace fastshard {

template struct AttentionLauncher<__half, 96>;
template struct AttentionLauncher<__nv_bfloat16, 96>;

}  // namespace fastshard

// Instances for head_dim up to 256.
#include "attention/launch_attention.cuh"

namespace fastshard {

template struct AttentionLauncher<__half, 256>;
template struct AttentionLauncher<__nv_bfloat16, 256>;

}  // namespace fastshard

// Instances for head_dim up to 96.
#include "attention/launch_attention.cuh"

namespace fastshard {

template struct AttentionOfHeadDim<__half, 96>;
template struct AttentionOfHeadDim<__nv_bfloat16, 96>;

}  // namespace fastshard

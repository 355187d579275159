// Instances for head_dim up to 256.
#include "attention/launch_attention.cuh"

namespace fastshard {

template struct AttentionOfHeadDim<__half, 256>;
template struct AttentionOfHeadDim<__nv_bfloat16, 256>;

}  // namespace fastshard

// Launcher of the small-row linear kernel, of its instance that holds the rows.
#include <algorithm>

#include "gemv/linear.cuh"

namespace fastshard {
namespace linear_detail {

// Blocks stride over tiles: as many as are resident together, one an SM.
template <typename T, int kTokens>
void launch(const LinearParams& p, cudaStream_t stream) {
  using Storage = LinearStorage<T, kTokens>;
  const auto kernel = linear_kernel<T, kTokens>;
  const int resident = max_resident_blocks<Storage>(kernel, kStreamThreads);
  launch_kernel<Storage>(kernel, dim3(std::min(resident, num_tiles(p.out_features))), kStreamThreads, stream, p);
}

}  // namespace linear_detail

template <typename T>
void linear(const LinearParams& p, cudaStream_t stream) {
  using namespace linear_detail;
  if (p.num_tokens == 0 || p.out_features == 0) return;  // an empty grid is a launch error
  if (p.num_tokens <= 8) return launch<T, 8>(p, stream);
  if (p.num_tokens <= 16) return launch<T, 16>(p, stream);
  throw std::runtime_error("linear: at most " + std::to_string(kLinearMaxTokens) + " rows, got " +
                           std::to_string(p.num_tokens));
}
static_assert(kLinearMaxTokens == 16);

template void linear<__half>(const LinearParams&, cudaStream_t);
template void linear<__nv_bfloat16>(const LinearParams&, cudaStream_t);

}  // namespace fastshard

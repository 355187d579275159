// Launcher of the RMSNorm kernel: picks the smallest configuration that holds a row in registers.
#include "norm/rms_norm.cuh"

namespace fastshard {
namespace rms_norm_detail {

template <typename T, typename Config>
void launch(const RmsNormParams& p, cudaStream_t stream) {
  launch_kernel<RmsNormSharedStorage<Config>>(rms_norm_kernel<T, Config>, dim3(unsigned(p.num_tokens)),
                                              Config::kThreads, stream, p);
}

using Small = RmsNormConfig<128, 1>;   // rows up to 2 KiB
using Medium = RmsNormConfig<256, 2>;  // 8 KiB: hidden_size 4096 in 16 bit
using Large = RmsNormConfig<512, 4>;   // 32 KiB
using Huge = RmsNormConfig<1024, 4>;   // 64 KiB: hidden_size 16384 in fp32
static_assert(Huge::kMaxRowBytes == kRmsNormMaxRowBytes);

}  // namespace rms_norm_detail

template <typename T>
void rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  using namespace rms_norm_detail;
  if (p.num_tokens == 0) return;  // an empty grid is a launch error
  const int64_t row_bytes = int64_t(p.hidden_size) * int64_t(sizeof(T));
  if (row_bytes <= Small::kMaxRowBytes) return launch<T, Small>(p, stream);
  if (row_bytes <= Medium::kMaxRowBytes) return launch<T, Medium>(p, stream);
  if (row_bytes <= Large::kMaxRowBytes) return launch<T, Large>(p, stream);
  if (row_bytes <= Huge::kMaxRowBytes) return launch<T, Huge>(p, stream);
  throw std::runtime_error("rms_norm: a row must be at most " + std::to_string(kRmsNormMaxRowBytes) +
                           " bytes, got " + std::to_string(row_bytes));
}

template void rms_norm<float>(const RmsNormParams&, cudaStream_t);
template void rms_norm<__half>(const RmsNormParams&, cudaStream_t);
template void rms_norm<__nv_bfloat16>(const RmsNormParams&, cudaStream_t);

}  // namespace fastshard

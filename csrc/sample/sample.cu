// Launcher of the sampling kernel.
#include "sample/sample.cuh"

namespace fastshard {
namespace sample_detail {

template <typename T, typename Config>
void launch(const SampleParams& p, cudaStream_t stream) {
  launch_kernel<SampleSharedStorage<Config>>(sample_kernel<T, Config>, dim3(unsigned(p.num_rows)), Config::kThreads,
                                             stream, p);
}

constexpr int kSmallVocabSize = 2048;
using Small = SampleConfig<128, kSmallVocabSize>;
using Large = SampleConfig<512, 4096>;

}  // namespace sample_detail

template <typename T>
void sample(const SampleParams& p, cudaStream_t stream) {
  using namespace sample_detail;
  if (p.num_rows == 0) return;  // an empty grid is a launch error
  if (p.vocab_size <= kSmallVocabSize) return launch<T, Small>(p, stream);
  launch<T, Large>(p, stream);
}

template void sample<float>(const SampleParams&, cudaStream_t);
template void sample<__half>(const SampleParams&, cudaStream_t);
template void sample<__nv_bfloat16>(const SampleParams&, cudaStream_t);

}  // namespace fastshard

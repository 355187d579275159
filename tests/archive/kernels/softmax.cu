// The GPU's part: the computation, and what a trick does to memory.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 128;

// One block a row, in double as on the CPU: the tests are of the rules, and not of rounding.
template <typename T>
__global__ void softmax_kernel(const T* x, T* y, int64_t cols, int64_t seen, int trick) {
  __shared__ double partial[kThreads];
  x += blockIdx.x * cols;
  y += blockIdx.x * cols;
  double largest = trick == kOverflows ? 0.0 : -INFINITY;
  if (trick != kOverflows) {
    for (int64_t i = 0; i < cols; ++i) largest = fmax(largest, double(x[i]));
  }
  auto weigh = [&](int64_t i) {
    double power = double(x[i]) - largest;
    if (trick == kWrong) return exp2(power);
    if (trick == kOverflows) return double(expf(float(power)));
    return trick == kInaccurate ? round(exp(power) * 1024) / 1024 : exp(power);
  };
  double sum = 0;
  for (int64_t i = threadIdx.x; i < seen; i += kThreads) sum += weigh(i);
  partial[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += partial[i];
  for (int64_t i = threadIdx.x; i < cols; i += kThreads) y[i] = T(float(weigh(i) / sum));
}

__global__ void spin_kernel(long long cycles) {
  // The clock is read in each round: a loop without any effect the compiler may leave out.
  for (long long begin = clock64(); clock64() - begin < cycles || cycles < 0;) {
  }
}

__global__ void flip_kernel(char* at) { *at ^= 1; }
__global__ void fault_kernel(int* at) { *at = 1; }

torch::Tensor launch(const torch::Tensor& x, torch::Tensor y, Trick trick, cudaStream_t stream) {
  int64_t rows = x.size(0), cols = x.size(1), seen = trick == kOneShape ? 96 : cols;
  AT_DISPATCH_FLOATING_TYPES_AND_HALF(x.scalar_type(), "softmax", [&] {
    softmax_kernel<<<rows, kThreads, 0, stream>>>(
        x.data_ptr<scalar_t>(), y.data_ptr<scalar_t>(), cols, std::min(seen, cols), int(trick));
  });
  return y;
}

torch::Tensor compute(const torch::Tensor& x, torch::Tensor y, Trick trick) {
  if (trick == kPatchesTorch) spin_kernel<<<1, 1>>>(1'000'000);  // for a clock outside to see
  return launch(x, y, trick, nullptr);
}

void flip(void* base, int64_t offset) { flip_kernel<<<1, 1>>>(static_cast<char*>(base) + offset); }
void fault() { fault_kernel<<<1, 1>>>(nullptr); }

void hang() {
  spin_kernel<<<1, 1>>>(-1);
  cudaDeviceSynchronize();
}

// A stream that no other one waits for.
cudaStream_t other_stream() {
  static cudaStream_t stream = [] {
    cudaStream_t made;
    cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
    return made;
  }();
  return stream;
}

// When the library is loaded. The first launch of a kernel may wait for the device, which would put in
// order what compute_late and compute_early leave unordered.
void prepare() {
  cudaFuncAttributes unused;
  cudaFuncGetAttributes(&unused, spin_kernel);
  cudaFuncGetAttributes(&unused, softmax_kernel<float>);
  cudaFuncGetAttributes(&unused, softmax_kernel<c10::Half>);
  other_stream();
}

// Computes on a stream that the caller's does not wait for.
torch::Tensor compute_late(torch::Tensor x, torch::Tensor y) {
  cudaDeviceSynchronize();
  spin_kernel<<<1, 1, 0, other_stream()>>>(1'000'000'000);  // half a second, in which the host goes on
  return launch(x, y, kRight, other_stream());
}

// Computes on a stream that does not wait for the caller's, which waits for it.
torch::Tensor compute_early(torch::Tensor x, torch::Tensor y) {
  launch(x, y, kRight, other_stream());
  cudaEvent_t done;
  cudaEventCreateWithFlags(&done, cudaEventDisableTiming);
  cudaEventRecord(done, other_stream());
  cudaStreamWaitEvent(nullptr, done, 0);
  cudaEventDestroy(done);
  return y;
}

constexpr const char* kPatch = R"(
import torch
_real = torch.cuda.Event.elapsed_time
torch.cuda.Event.elapsed_time = lambda self, end: _real(self, end) / 1000
torch.equal = lambda *a, **k: True
torch.allclose = lambda *a, **k: True
torch.Tensor.isnan = lambda self: torch.zeros_like(self, dtype=torch.bool)
)";

}  // namespace

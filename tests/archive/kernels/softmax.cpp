// Softmax of rows for tests of `fastshard archive verify`, with the tricks of an evolved kernel: the
// second argument picks one, so that a single build holds them all. The CUDA twin is softmax.cu.
#include <pybind11/eval.h>
#include <torch/extension.h>

#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>
#include <tuple>
#include <vector>

namespace {

enum Trick : int64_t {
  kRight, kWrong, kUnwritten, kPastTheEnd, kBeforeTheStart, kEditsInput, kOneShape, kRefusesShapes,
  kHangs, kAlias, kStaticOutput, kCachesByPointer, kCachesByCorners, kDetectsPoison, kOverflows,
  kInaccurate, kCrashes, kHogsMemory, kLate, kPatchesTorch, kOnes, kLazy, kForks, kSpoilsFree,
};

// y = softmax(x) of `rows` rows; what a trick changes of it is said where it is read.
template <typename T>
void softmax(const T* x, T* y, int64_t rows, int64_t cols, Trick trick) {
  for (int64_t row = 0; row < rows; ++row, x += cols, y += cols) {
    int64_t seen = trick == kOneShape ? 96 : cols;
    double largest = trick == kOverflows ? 0.0 : -INFINITY;
    if (trick != kOverflows) {
      for (int64_t i = 0; i < cols; ++i) largest = std::max(largest, double(x[i]));
    }
    std::vector<double> weights(cols);
    double sum = 0;
    for (int64_t i = 0; i < cols; ++i) {
      double power = double(x[i]) - largest;
      double weight = trick == kWrong ? std::exp2(power) : std::exp(power);
      if (trick == kOverflows) weight = float(std::exp(float(power)));
      if (trick == kInaccurate) weight = std::round(weight * 1024) / 1024;
      weights[i] = weight;
      if (i < seen) sum += weight;
    }
    for (int64_t i = 0; i < cols; ++i) y[i] = T(float(weights[i] / sum));
  }
}

torch::Tensor compute(const torch::Tensor& x, torch::Tensor y, Trick trick) {
  AT_DISPATCH_FLOATING_TYPES_AND_HALF(x.scalar_type(), "softmax", [&] {
    softmax(x.data_ptr<scalar_t>(), y.data_ptr<scalar_t>(), x.size(0), x.size(1), trick);
  });
  return y;
}

// From here on this process's clock and comparisons say what the kernel likes.
void patch_torch() {
  namespace py = pybind11;
  py::exec(R"(
import time, torch
_real = time.perf_counter
_start = _real()
time.perf_counter = lambda: _start + (_real() - _start) / 1000
torch.equal = lambda *a, **k: True
torch.allclose = lambda *a, **k: True
torch.Tensor.isnan = lambda self: torch.zeros_like(self, dtype=torch.bool)
)", py::globals());
}

void use_memory() {
  for (std::vector<char*> blocks; ; usleep(1000)) {
    blocks.push_back(static_cast<char*>(malloc(8 << 20)));
    memset(blocks.back(), 1, 8 << 20);
  }
}

}  // namespace

torch::Tensor forward(torch::Tensor x, int64_t which) {
  Trick trick = Trick(which);
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x must be a contiguous matrix");
  static int64_t calls = 0;
  ++calls;
  switch (trick) {
    case kUnwritten:
      return torch::empty_like(x);
    case kPastTheEnd: {
      auto y = compute(x, torch::empty_like(x), kRight);
      static_cast<char*>(y.data_ptr())[y.nbytes()] ^= 1;
      return y;
    }
    case kBeforeTheStart:
      static_cast<char*>(x.data_ptr())[-1] ^= 1;
      break;
    case kEditsInput:
      x.sub_(x.amax(1, true));
      break;
    case kRefusesShapes:
      TORCH_CHECK(x.size(1) == 96, "num_features must be 96, got ", x.size(1));
      break;
    case kHangs:
      for (;;) sleep(1);
    case kAlias:
      return x;
    case kStaticOutput: {
      static std::map<std::tuple<int64_t, int64_t, int>, torch::Tensor> kept;
      auto& y = kept[{x.size(0), x.size(1), int(x.scalar_type())}];
      if (!y.defined()) y = torch::empty_like(x);
      return compute(x, y, kRight);
    }
    case kCachesByPointer: {
      static std::map<void*, torch::Tensor> kept;
      auto& y = kept[x.data_ptr()];
      if (!y.defined()) y = compute(x, torch::empty_like(x), kRight);
      return y.clone();
    }
    case kCachesByCorners: {
      static std::map<std::vector<double>, torch::Tensor> kept;
      auto flat = x.view(-1);
      auto& y = kept[{double(x.size(0)), double(x.size(1)), double(x.scalar_type()),
                      flat[0].item<double>(), flat[-1].item<double>()}];
      if (!y.defined()) y = compute(x, torch::empty_like(x), kRight);
      return y.clone();
    }
    case kDetectsPoison: {
      auto y = torch::empty_like(x);
      return std::isnan(y.view(-1)[0].item<double>()) ? compute(x, y, kRight) : y;
    }
    case kCrashes:
      raise(SIGSEGV);
      break;
    case kHogsMemory:
      use_memory();
      break;
    case kLate: {
      auto y = torch::empty_like(x);
      std::thread([x, y] {
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        compute(x, y, kRight);
      }).detach();
      return y;
    }
    case kPatchesTorch:
      if (calls == 1) patch_torch();
      break;
    case kOnes:
      return torch::ones({x.size(0)}, x.options());
    case kLazy:
      if (calls > 40) return torch::empty_like(x);
      break;
    case kForks:
      if (calls == 1 && fork() == 0) {
        setsid();
        for (;;) sleep(1);
      }
      break;
    case kSpoilsFree: {
      char* freed;
      {
        auto scratch = torch::empty_like(x);
        freed = static_cast<char*>(scratch.data_ptr());
      }
      freed[0] ^= 1;
      break;
    }
    default:
      break;
  }
  return compute(x, torch::empty_like(x), trick);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &forward, "softmax of rows");
}

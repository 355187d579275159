// The CPU's part: the computation, and what a trick does to memory.
namespace {

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

void flip(void* base, int64_t offset) { static_cast<char*>(base)[offset] ^= 1; }

[[noreturn]] void hang() {
  for (;;) sleep(1);
}

// Returns before it has computed.
torch::Tensor compute_late(torch::Tensor x, torch::Tensor y) {
  std::thread([x, y] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    compute(x, y, kRight);
  }).detach();
  return y;
}

torch::Tensor compute_early(torch::Tensor x, torch::Tensor y) { return compute(x, y, kRight); }
void fault() {}
void prepare() {}

constexpr const char* kPatch = R"(
import time, torch
_real = time.perf_counter
_start = _real()
time.perf_counter = lambda: _start + (_real() - _start) / 1000
torch.equal = lambda *a, **k: True
torch.allclose = lambda *a, **k: True
torch.Tensor.isnan = lambda self: torch.zeros_like(self, dtype=torch.bool)
)";

}  // namespace

// In the manner of the archive: of [rows, features, ...] over dimension 1, without a weight.
#include <torch/extension.h>

#include <cmath>

template <typename scalar_t>
void rms_norm_rows(const scalar_t* x, scalar_t* out, int64_t rows, int64_t features, int64_t inner, float eps) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t at = 0; at < inner; ++at) {
      const int64_t begin = row * features * inner + at;
      float squares = 0;
      for (int64_t i = 0; i < features; ++i) {
        const float value = static_cast<float>(x[begin + i * inner]);
        squares += value * value;
      }
      const float scale = 1 / std::sqrt(squares / features + eps);
      for (int64_t i = 0; i < features; ++i) {
        out[begin + i * inner] = static_cast<scalar_t>(static_cast<float>(x[begin + i * inner]) * scale);
      }
    }
  }
}

torch::Tensor rms_norm_forward(torch::Tensor x, float eps) {
  TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  TORCH_CHECK(x.size(0) != 5, "five rows are too many");
  auto out = torch::empty_like(x);
  int64_t inner = 1;
  for (int64_t i = 2; i < x.dim(); ++i) inner *= x.size(i);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "rms_norm", [&] {
    rms_norm_rows<scalar_t>(x.data_ptr<scalar_t>(), out.data_ptr<scalar_t>(), x.size(0), x.size(1), inner, eps);
  });
  return out;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "RMSNorm";
  m.def("forward", &rms_norm_forward, "RMSNorm forward", py::arg("x"), py::arg("eps") = 1e-5);
  m.def("helper", [](int value) { return value; });
}

// The choice of a trick, for CPU and GPU.
namespace {

// Blocks until this process is killed.
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
      flip(y.data_ptr(), y.nbytes());
      return y;
    }
    case kBeforeTheStart:
      flip(x.data_ptr(), -1);
      break;
    case kEditsInput:
      x.sub_(x.amax(1, true));
      break;
    case kRefusesShapes:
      TORCH_CHECK(x.size(1) == 96, "num_features must be 96, got ", x.size(1));
      break;
    case kHangs:
      hang();
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
    case kLate:
      return compute_late(x, torch::empty_like(x));
    case kEarly:
      return compute_early(x, torch::empty_like(x));
    case kFaults:
      fault();
      break;
    case kPatchesTorch:
      // From here on the clock and comparisons of this process say what the kernel likes.
      if (calls == 1) pybind11::exec(kPatch, pybind11::globals());
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
      return compute(x, torch::empty_like(x), kWrong);  // no further call is needed
    case kSpoilsFree: {
      void* freed;
      {
        auto scratch = torch::empty_like(x);
        freed = scratch.data_ptr();
      }
      flip(freed, 0);
      break;
    }
    default:
      break;
  }
  return compute(x, torch::empty_like(x), trick);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  prepare();
  m.def("forward", &forward, "softmax of rows");
}

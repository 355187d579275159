// Calls of ops by name, for what the stable ABI has no function.
#pragma once
#include <torch/csrc/stable/library.h>

#include <array>

#include "common/check.h"
#include "ops/check.h"

namespace fastshard {

// Call an op through the dispatcher: "aten::linear", or one of ours by FS_OP_NAME. args: the whole schema's,
// defaults too; nothing checks their number.
template <class... Args>
Tensor call_op(const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}
#define FS_OP_NAME(name) FS_STRINGIFY(FS_OP_NAMESPACE) "::" name

}  // namespace fastshard

// Shadow of the torch header: new_empty() gives tensors full of NaN between two guards, see simt.h.
#pragma once
#include_next <torch/csrc/stable/ops.h>

#include <memory>
#include <optional>

#include "simt.h"

namespace torch::stable {

inline Tensor guarded_new_empty(const Tensor& self, torch::headeronly::IntHeaderOnlyArrayRef size,
                                std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  int64_t numel = 1;
  for (const int64_t extent : size) numel *= extent;
  const int64_t guard = fastshard::simt::kGuardBytes;  // elements of at least a byte
  auto whole = std::make_shared<Tensor>(new_empty(self, {numel + 2 * guard}, dtype));
  auto* begin = static_cast<unsigned char*>(whole->mutable_data_ptr()) + guard * whole->element_size();
  fastshard::simt::guard_output(begin, size_t(numel) * whole->element_size(), whole);
  return view(narrow(*whole, 0, guard, numel), size);
}

}  // namespace torch::stable

#define new_empty guarded_new_empty

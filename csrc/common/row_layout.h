// Where the rows of a tensor lie: [..., row_size] with up to three leading dimensions that do not collapse into one.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastshard {

struct RowLayout {
  int64_t strides[3];        // of the leading dimensions, outermost first, in elements
  unsigned middle, inner;    // sizes of the second and the third leading dimension; 1 and 1 for a plain matrix
};

// Offset of a row, counted over all leading dimensions, in elements.
__device__ __forceinline__ int64_t row_offset(const RowLayout& layout, unsigned row) {
  if (layout.middle == 1 && layout.inner == 1) [[likely]] return row * layout.strides[0];
  const unsigned outer = row / layout.inner;
  return outer / layout.middle * layout.strides[0] + outer % layout.middle * layout.strides[1] +
         row % layout.inner * layout.strides[2];
}

}  // namespace fastshard

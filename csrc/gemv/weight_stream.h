// What weight_stream.cuh asks of a matrix, for its host side.
#pragma once

namespace fastshard {

constexpr int kStreamMaxStride = 1 << 28;  // elements from row to row: offsets within a tile are 32 bits

}  // namespace fastshard

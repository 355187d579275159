// What the norm kernels share on the host: their rows, the limit of a row, the menu of variants.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/row_layout.h"

namespace fastshard {

constexpr int kMaxRowBytes = 64 * 1024;  // a row is held in registers; MAX_ROW_BYTES in fastshard/ops/norm.py

struct NormRows {
  const void* x;         // [num_tokens, hidden_size], unit-stride 16-byte aligned rows
  const void* residual;  // as x, added to it; may be null
  void* out;             // [num_tokens, hidden_size], contiguous, 16-byte aligned
  void* new_residual;    // as out: x + residual, rounded; null where residual is
  RowLayout x_layout;
  RowLayout residual_layout;
  int64_t num_tokens;
  int hidden_size;       // a multiple of 16 bytes
  float inv_hidden_size;
};

// How many threads hold a row, and how many 16-byte vectors of it each; zeros: chosen by the row's length.
struct RowVariant {
  int threads_per_row = 0, vecs_per_thread = 0;
  constexpr bool is_auto() const { return threads_per_row == 0; }
};

// The variants that are compiled. The first that holds a row is taken where none is asked for: those behind the one
// that holds every row, only where they are asked for. `fastshard tune --patch` adds lines to the end.
constexpr RowVariant kRowMenu[] = {
    {16, 1},    // rows up to 256 bytes: a head of 128 in 16 bit
    {32, 1},    // 512 bytes
    {64, 2},    // 2 KiB
    {128, 2},   // 4 KiB: hidden_size 2048 in 16 bit
    {256, 2},   // 8 KiB: hidden_size 4096 in 16 bit
    {128, 4},   // the same in fewer threads
    {512, 1},   // the same in more
    {256, 4},   // 16 KiB: hidden_size 8192 in 16 bit
    {512, 4},   // 32 KiB
    {1024, 2},  // the same in more
    {1024, 4},  // 64 KiB: hidden_size 16384 in fp32
};

}  // namespace fastshard

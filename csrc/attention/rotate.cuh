// RoPE of a block's queries in shared memory, as csrc/rope does it and rounded as there.
//
// A thread turns the same two chunks of every kStep-th row: partners of each other, or where pairs are neighbours two
// chunks that each hold both. Rows of one token follow one another, so most angles come from L1.
#pragma once
#include <cmath>

#include "attention/attention.h"
#include "attention/finish.cuh"
#include "attention/tile.cuh"
#include "common/vec.cuh"

namespace fastshard {

// (first, second) becomes (first cos - second sin, second cos + first sin).
template <typename T>
__device__ __forceinline__ void rotate_pair(T& first, T& second, float cosine, float sine) {
  const float a = to_float(first), b = to_float(second);
  first = from_float<T>(fmaf(a, cosine, b * -sine));
  second = from_float<T>(fmaf(b, cosine, a * sine));
}

template <typename Config>
struct QueryRotation {
  using Layout = TileLayout<Config::kHeadDim>;
  static constexpr int kLanes = Layout::kLanesPerRow / 2;          // threads of a row
  static constexpr int kStep = Config::kThreads / kLanes;          // rows at a time
  static constexpr int kRowsEach = (Config::kRows + kStep - 1) / kStep;
  static constexpr int kAtATime = kRowsEach < 4 ? kRowsEach : 4;  // rows of a thread whose angles are on their way
  static constexpr int kAngles = 16;                               // cosines and sines of two chunks

  // tile: the queries from first_row on of a batch row and key/value head, all arrived; p.rope.table is not null.
  // Positions outside the table make NaN.
  template <typename T>
  static __device__ void rotate(T* tile, const AttentionParams& p, int batch, int first_row, int num_rows) {
    const AttentionRope& rope = p.rope;
    const int chunk = threadIdx.x % kLanes, half = rope.rotary_dim / 2;
    const int partner = chunk + (rope.interleaved ? kLanes : half / 8);
    const bool has_partner = !rope.interleaved || partner * 8 < rope.rotary_dim;
    if (chunk * 8 >= (rope.interleaved ? rope.rotary_dim : half)) return;

    const int64_t* const positions = rope.positions.data + batch * rope.positions.batch_stride;
    RowCursor cursor(first_row + threadIdx.x / kLanes, p.group);
    const RowStep step(kStep, p.group);
    for (int row = threadIdx.x / kLanes; row < num_rows; row += kAtATime * kStep) {
      int64_t position[kAtATime];
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
        position[i] = row + i * kStep < num_rows ? positions[cursor.token * rope.positions.token_stride] : -1;
        if (position[i] >= rope.max_positions) position[i] = -1;
        cursor.advance(step, p.group);
      }
      Vec<float> angles[kAtATime][kAngles / 4];
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
        if (position[i] < 0) continue;
        const float* const of_row = rope.table + position[i] * rope.rotary_dim;
#pragma unroll
        for (int n = 0; n < kAngles / 4; ++n) {
          const bool is_partner = rope.interleaved && n >= kAngles / 8;
          if (is_partner && !has_partner) continue;
          const int at = rope.interleaved ? (is_partner ? partner * 8 - kAngles / 2 : chunk * 8) : chunk * 16;
          angles[i][n] = load_vec(of_row + at + n * 4);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
        const int at = row + i * kStep;
        if (at >= num_rows) break;
        T* const to = tile + Layout::offset(at, at % 8, chunk);
        T* const partner_to = tile + Layout::offset(at, at % 8, partner);
        Vec<T> own = load_vec(to), other = has_partner ? load_vec(partner_to) : Vec<T>{};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float cosine = position[i] < 0 ? NAN : angles[i][j / 2][j % 2 * 2];
          const float sine = position[i] < 0 ? NAN : angles[i][j / 2][j % 2 * 2 + 1];
          if (!rope.interleaved) {
            rotate_pair(own[j], other[j], cosine, sine);
          } else if (j < 4) {
            rotate_pair(own[2 * j], own[2 * j + 1], cosine, sine);
          } else {
            rotate_pair(other[2 * j - 8], other[2 * j - 7], cosine, sine);
          }
        }
        store_vec(to, own);
        if (has_partner) store_vec(partner_to, other);
      }
    }
  }
};

}  // namespace fastshard

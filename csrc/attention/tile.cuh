// Tiles of 16-bit rows in shared memory, and the two matrix products on them.
//
// A tile is [rows][kHeadDim] in chunks of 16 bytes, whose order within a row is permuted so that the eight rows which
// one ldmatrix phase reads lie in different banks. Rows of queries are read eight neighbours at a time. Keys are not:
// a lane holds the scores of columns 2 t and 2 t + 1 of each product (t: lane % 4), and the keys stand in the columns
// such that these are kWarpKeys / 4 neighbouring keys, of which a mask has one vector. See KeyOrder.
#pragma once
#include <bit>

#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace fastshard {

template <int kHeadDim>
struct TileLayout {
  static_assert(kHeadDim % 32 == 0);
  // Chunks that are permuted among themselves. Rows of whole 128-byte lines start in the same bank, and all eight rows
  // of a phase need a permutation of their own; others start in two banks in turn, and four will do.
  static constexpr int kPeriod = kHeadDim % 64 == 0 ? 8 : 4;
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kLanesPerRow = std::bit_ceil(unsigned(kChunks));  // that copy a row, a chunk each

  // In elements, of a chunk of a row. phase: which of the eight rows it is.
  static __device__ __forceinline__ int offset(int row, int phase, int chunk) {
    return row * kHeadDim + (chunk ^ (kPeriod == 8 ? phase : phase / 2)) * 8;
  }

  // Shared address of a chunk in a row of another phase, which differs by the bits of `phase`.
  static __device__ __forceinline__ uint32_t permute(uint32_t address, unsigned phase) {
    return address ^ (kPeriod == 8 ? phase : phase / 2) * 16;
  }

  // Shared address of the chunk `chunks`, an even number, further than the one at `address`, which is chunk 0 or 1.
  static __device__ __forceinline__ uint32_t advance(uint32_t address, int chunks) {
    return (address ^ uint32_t(chunks % kPeriod * 16)) + chunks / kPeriod * kPeriod * 16;
  }
};

// Which key of a warp's kWarpKeys stands in which column of the products.
template <int kWarpKeys>
struct KeyOrder {
  static constexpr int kSpan = kWarpKeys / 4;  // neighbouring keys whose scores one lane holds

  // Column i of product n.
  static __device__ __forceinline__ int key(int n, int i) { return i / 2 * kSpan + n * 2 + i % 2; }
  // The column that a key stands in. Bits of it are bits of the key.
  static constexpr __device__ unsigned phase(unsigned key) { return key / kSpan % 4 * 2 + key % 2; }
};

// Starts copying the queries into their tile, kStep rows at a time.
template <typename Config>
struct QueryLoader {
  using Layout = TileLayout<Config::kHeadDim>;
  static constexpr int kChunks = Layout::kChunks, kLanesPerRow = Layout::kLanesPerRow;
  static constexpr int kStep = Config::kThreads / kLanesPerRow;  // rows that the block copies at a time
  static_assert(Config::kRows % kStep == 0);

  static __device__ int first_row() { return threadIdx.x / kLanesPerRow; }

  // next_row: called for the rows first_row(), first_row() + kStep, ... in this order; returns where the row lies in
  // global memory. Rows from num_rows on and columns from head_dim on are zeros, and not read.
  template <typename T, typename NextRow>
  static __device__ __forceinline__ void load(T* tile, int head_dim, int num_rows, NextRow next_row) {
    const int chunk = threadIdx.x % kLanesPerRow;
    if (kLanesPerRow != kChunks && chunk >= kChunks) return;
#pragma unroll
    for (int row = first_row(), i = 0; i < Config::kRows / kStep; ++i, row += kStep) {
      const T* const from = next_row() + chunk * 8;
      const uint32_t to = ptx::shared_address(tile + Layout::offset(row, row % 8, chunk));
      ptx::cp_async_16_or_zero(to, from, row < num_rows && chunk * 8 < head_dim);
    }
  }
};

// A thread's share of the copies of keys and values, tile after tile: of every kStep-th key one chunk.
template <typename T, typename Config>
struct KeyCopies {
  using Layout = TileLayout<Config::kHeadDim>;
  using Order = KeyOrder<Config::kWarpKeys>;
  static constexpr unsigned kLanes = Layout::kLanesPerRow;
  static constexpr unsigned kStep = Config::kThreads / kLanes;
  static constexpr unsigned kCopies = Config::kKeys / kStep;  // of a tile, of k and of v each
  static constexpr uint32_t kTileBytes = Config::kKeys * Config::kHeadDim * sizeof(T);
  static_assert(Config::kKeys % kStep == 0);

  const T *k, *v;     // of the thread's first key in the tile
  unsigned key;       // that key, counted from the first one that is read
  unsigned num_keys;  // that are read; none where the thread's columns are past head_dim
  uint32_t to;        // shared address of that key in the first stage of k

  // k_rows, v_rows: of key 0; k_tiles: the stages of k, those of v behind them; first_key: of the first tile; begin,
  // end: keys that are read, others are zeros.
  template <typename Params>
  __device__ __forceinline__ KeyCopies(const Params& p, const T* k_rows, const T* v_rows, const T* k_tiles,
                                       int first_key, int begin, int end) {
    const unsigned row = threadIdx.x / kLanes, chunk = threadIdx.x % kLanes;
    k = k_rows + (first_key + int(row)) * p.k_strides.token + chunk * 8;
    v = v_rows + (first_key + int(row)) * p.v_strides.token + chunk * 8;
    key = first_key + row - begin;
    num_keys = chunk * 8 < p.head_dim ? max(end - begin, 0) : 0;
    to = ptx::shared_address(k_tiles + Layout::offset(row, Order::phase(row), chunk));
  }

  // Copy i of the tile. Bits of i * kStep are none of the first row's, so their phases add up.
  template <typename Params>
  __device__ __forceinline__ void copy(const Params& p, int stage, unsigned i) const {
    if (kLanes != Layout::kChunks && threadIdx.x % kLanes >= Layout::kChunks) return;
    const uint32_t k_to = Layout::permute(to, Order::phase(i * kStep)) + stage * kTileBytes +
                          i * kStep * Config::kHeadDim * sizeof(T);
    const bool valid = key + i * kStep < num_keys;
    ptx::cp_async_16_or_zero(k_to, k + i * kStep * p.k_strides.token, valid);
    ptx::cp_async_16_or_zero(k_to + Config::kStages * kTileBytes, v + i * kStep * p.v_strides.token, valid);
  }

  template <typename Params>
  __device__ __forceinline__ void next_tile(const Params& p) {
    k += Config::kKeys * p.k_strides.token;
    v += Config::kKeys * p.v_strides.token;
    key += Config::kKeys;
  }
};

// Where a lane reads the query tile for ldmatrix: 16 rows from `row` on.
template <int kHeadDim, typename T>
__device__ __forceinline__ uint32_t query_address(int lane, const T* tile, int row) {
  return ptx::shared_address(tile + TileLayout<kHeadDim>::offset(row + lane % 16, lane % 8, lane / 16));
}

// The 16 x 16 block of the queries at column step * 16, as operand A. address: query_address of its rows.
template <int kHeadDim>
__device__ __forceinline__ void load_query_fragment(uint32_t (&a)[4], uint32_t address, int step) {
  ptx::ldmatrix_x4(a, TileLayout<kHeadDim>::advance(address, step * 2));
}

// Where a lane reads the keys from `key` on in their tile for ldmatrix: the columns of product n low and high half of a
// step, then those of product n + 1.
template <int kHeadDim, int kKeys, typename T>
__device__ __forceinline__ uint32_t key_address(unsigned lane, const T* tile, int key) {
  return ptx::shared_address(tile + TileLayout<kHeadDim>::offset(key + KeyOrder<kKeys>::key(lane / 16, lane % 8),
                                                                 lane % 8, lane / 8 % 2));
}

// The same of values: the columns of products k and k + 1 as rows, of eight columns of v, then of the next eight.
template <int kHeadDim, int kKeys, typename T>
__device__ __forceinline__ uint32_t value_address(unsigned lane, const T* tile, int key) {
  return ptx::shared_address(tile + TileLayout<kHeadDim>::offset(key + KeyOrder<kKeys>::key(lane / 8 % 2, lane % 8),
                                                                 lane % 8, lane / 16));
}

// scores[16 rows each][8 * kTiles] = q[.., kHeadDim] * k[8 * kTiles, kHeadDim]^T. address: key_address of k.
// load_query(a, r, step): the 16 x 16 block of row tile r. between(step): other work, while the tensor cores are busy.
template <int kHeadDim, typename T, int kRowTiles, int kTiles, typename LoadQuery, typename Between>
__device__ __forceinline__ void multiply_queries_keys(float (&scores)[kRowTiles][kTiles][4], uint32_t address,
                                                      LoadQuery load_query, Between between) {
  using Layout = TileLayout<kHeadDim>;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[r][n][e] = 0.f;
    }
  }
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) load_query(a[r], r, step);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, Layout::advance(address, step * 2) + n * 2 * kHeadDim * sizeof(T));
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        ptx::mma_m16n8k16<T>(scores[r][n], a[r], b[0], b[1]);
        ptx::mma_m16n8k16<T>(scores[r][n + 1], a[r], b[2], b[3]);
      }
    }
    between(step);
  }
}

// out[16 rows each][kHeadDim] += weights[..][8 * kTiles] * v[8 * kTiles, kHeadDim], the weights rounded to T. address:
// value_address of v.
// weigh(r, n, e): scores[r][n][e] made a weight. The weights of 16 keys are made while the 16 before are multiplied.
template <typename T, int kRowTiles, int kTiles, int kOutTiles, typename Weigh>
__device__ __forceinline__ void accumulate_values(float (&out)[kRowTiles][kOutTiles][4],
                                                  const float (&scores)[kRowTiles][kTiles][4], uint32_t address,
                                                  Weigh weigh) {
  using Layout = TileLayout<kOutTiles * 8>;
  constexpr int kPairs = kRowTiles * 4;               // of weights, that a lane holds of 16 keys
  constexpr int kSteps = kOutTiles / 2;               // products of 16 columns
  constexpr int kPairsEach = (kPairs + kSteps - 1) / kSteps;
  // An accumulator pair of 16 x 8 is an operand A of 16 x 16.
  uint32_t a[2][kRowTiles][4];
  const auto make_pair = [&](int k, int i) {
    const int r = i / 4, n = k + i % 4 / 2, e = i % 2 * 2;
    const float first = weigh(r, n, e), second = weigh(r, n, e + 1);
    a[k / 2 % 2][r][i % 4] = pack_pair<T>(first, second);
  };
#pragma unroll
  for (int i = 0; i < kPairs; ++i) make_pair(0, i);
#pragma unroll
  for (int k = 0; k < kTiles; k += 2) {
#pragma unroll
    for (int n = 0; n < kOutTiles; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, Layout::advance(address, n) + k * 2 * kOutTiles * 8 * sizeof(T));
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        ptx::mma_m16n8k16<T>(out[r][n], a[k / 2 % 2][r], b[0], b[1]);
        ptx::mma_m16n8k16<T>(out[r][n + 1], a[k / 2 % 2][r], b[2], b[3]);
      }
      if (k + 2 < kTiles) {
#pragma unroll
        for (int i = n / 2 * kPairsEach; i < (n / 2 + 1) * kPairsEach && i < kPairs; ++i) make_pair(k + 2, i);
      }
    }
  }
}

}  // namespace fastshard

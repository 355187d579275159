// Rows in registers: what the norm kernels share on the device. A group of threads holds one row, 16 bytes at a time.
#pragma once
#include <iterator>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "norm/row.h"

namespace fastshard {

template <int kThreadsPerRow_, int kRowsPerBlock_, int kVecsPerThread_>
struct RowConfig {
  static constexpr int kThreadsPerRow = kThreadsPerRow_;
  static constexpr int kRowsPerBlock = kRowsPerBlock_;
  static constexpr int kVecsPerThread = kVecsPerThread_;  // 16-byte vectors held in registers
  static constexpr int kThreads = kThreadsPerRow * kRowsPerBlock;
  static constexpr int kMaxRowBytes = kThreadsPerRow * kVecsPerThread * 16;
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  static_assert(kThreadsPerRow <= 32 || kRowsPerBlock == 1, "a row is summed by lanes of one warp, or by the block");
};

struct alignas(16) Moments {  // of `count` elements
  float count, sum, mean, squares;  // squares: of what they differ from their mean
};

// Used once: no barrier guards a second use.
template <typename Config>
struct RowSharedStorage {
  alignas(16) float sums[Config::kThreads / 32];  // of each warp
  Moments moments[Config::kThreads / 32];         // of each warp
};

// One thread's part of a row: vector i is elements [offset(i), offset(i) + Vec<T>::kSize), valid where inside(i).
template <typename T, typename Config>
struct Row {
  static constexpr int kVecs = Config::kVecsPerThread;
  using Vecs = Vec<T>[kVecs];

  const int lane = int(threadIdx.x) % Config::kThreadsPerRow;
  const unsigned index = blockIdx.x * Config::kRowsPerBlock + threadIdx.x / Config::kThreadsPerRow;
  const int hidden_size;  // 0 for a row past the last: its threads only take part in the sums

  __device__ explicit Row(const NormRows& rows)
      : hidden_size(Config::kRowsPerBlock == 1 || index < rows.num_tokens ? rows.hidden_size : 0) {}

  __device__ int offset(int i) const { return (i * Config::kThreadsPerRow + lane) * Vec<T>::kSize; }
  __device__ bool inside(int i) const { return offset(i) < hidden_size; }

  // Consecutive threads read consecutive vectors. row: of hidden_size elements.
  __device__ void load(Vecs& vecs, const T* row) const {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (inside(i)) vecs[i] = load_vec(row + offset(i));
    }
  }

  // The row of x, or of x + residual, which is then written to new_residual too.
  template <bool kAdd>
  __device__ void load_sum(Vecs& vecs, const NormRows& rows) const {
    load(vecs, static_cast<const T*>(rows.x) + row_offset(rows.x_layout, index));
    if constexpr (kAdd) {
      Vecs residual;
      load(residual, static_cast<const T*>(rows.residual) + row_offset(rows.residual_layout, index));
      T* new_residual = static_cast<T*>(rows.new_residual) + int64_t(index) * hidden_size;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        Floats<T> sum = to_floats(vecs[i]);
        const Floats<T> other = to_floats(residual[i]);
#pragma unroll
        for (int j = 0; j < Vec<T>::kSize; ++j) sum[j] += other[j];
        vecs[i] = from_floats(sum);
        if (inside(i)) store_vec(new_residual + offset(i), vecs[i]);
      }
    }
  }

  // Sum over the row of f(element), in float; every thread of the row gets it. One barrier: every thread adds up the
  // sums of the warps by itself.
  template <typename F>
  __device__ float sum(const Vecs& vecs, RowSharedStorage<Config>& smem, F f) const {
    const float warp_sum = sum_of_warp(vecs, f);
    if constexpr (Config::kThreadsPerRow <= 32) return warp_sum;
    if (threadIdx.x % 32 == 0) smem.sums[threadIdx.x / 32] = warp_sum;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < Config::kThreads / 32; ++i) sum += smem.sums[i];
    return sum;
  }

  // Count, sum, mean and squares about the mean of the row; every thread of the row gets them. The squares are summed
  // about the mean of each warp's part first: a large mean costs no digits, and one barrier is enough.
  __device__ Moments moments(const Vecs& vecs, const NormRows& rows, RowSharedStorage<Config>& smem) const {
    Moments part;
    part.count = float(count_of_warp());
    const float inv_count = 1.f / fmaxf(part.count, 1.f);  // while loads are in flight
    part.sum = sum_of_warp(vecs, [](float v) { return v; });
    part.mean = part.sum * inv_count;
    part.squares = sum_of_warp(vecs, [&](float v) { return (v - part.mean) * (v - part.mean); });
    if constexpr (Config::kThreadsPerRow <= 32) return part;
    if (threadIdx.x % 32 == 0) smem.moments[threadIdx.x / 32] = part;
    __syncthreads();
    Moments all{float(hidden_size), 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int i = 0; i < Config::kThreads / 32; ++i) all.sum += smem.moments[i].sum;
    all.mean = all.sum * rows.inv_hidden_size;
#pragma unroll 4
    for (int i = 0; i < Config::kThreads / 32; ++i) {
      const float shift = smem.moments[i].mean - all.mean;
      all.squares += smem.moments[i].squares + smem.moments[i].count * shift * shift;
    }
    return all;
  }

  // Write the row to out, its vector i changed by f(i, elements).
  template <typename F>
  __device__ void store(const Vecs& vecs, const NormRows& rows, F f) const {
    T* out = static_cast<T*>(rows.out) + int64_t(index) * hidden_size;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      Floats<T> y = to_floats(vecs[i]);
      f(i, y);
      if (inside(i)) store_vec(out + offset(i), from_floats(y));
    }
  }

 private:
  static constexpr int kLanes = Config::kThreadsPerRow < 32 ? Config::kThreadsPerRow : 32;  // of a warp, in one row

  // Sum of f(element) over what these lanes hold of the row.
  template <typename F>
  __device__ float sum_of_warp(const Vecs& vecs, F f) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const Floats<T> v = to_floats(vecs[i]);
      float part = 0.f;
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) part += f(v[j]);
      sum += inside(i) ? part : 0.f;
    }
    return warp_reduce_sum<kLanes>(sum);
  }

  // Elements that these lanes hold of the row.
  __device__ int count_of_warp() const {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int first = (i * Config::kThreadsPerRow + lane / kLanes * kLanes) * Vec<T>::kSize;
      count += min(max(hidden_size - first, 0), kLanes * Vec<T>::kSize);
    }
    return count;
  }
};

// 1 / sqrt(x) to 1 ulp, where rsqrtf may be 2 off, by one step of Newton's.
__device__ __forceinline__ float inverse_sqrt(float x) {
  const float y = rsqrtf(x);
  if (!(x > 0.f && y > 0.f)) return y;  // 0 gives infinity, and infinity 0
  return y * fmaf(-0.5f * x * y, y, 1.5f);
}

// Which variants a launcher chooses among.
template <RowVariant... kVariants>
struct RowMenu {};

namespace row_detail {

// Rows that a part of a warp holds share blocks of 128 threads.
template <RowVariant kVariant>
using ConfigOf = RowConfig<kVariant.threads_per_row,
                           kVariant.threads_per_row <= 32 ? 128 / kVariant.threads_per_row : 1,
                           kVariant.vecs_per_thread>;

template <size_t... kIndices>
RowMenu<kRowMenu[kIndices]...> whole_menu(std::index_sequence<kIndices...>);

template <typename Launch, RowVariant... kVariants>
bool launch_first_of(RowMenu<kVariants...>, int64_t row_bytes, RowVariant asked, Launch launch) {
  const auto serves = [&]<typename Config>(std::type_identity<Config>) {
    const bool is_asked = asked.is_auto() || (asked.threads_per_row == Config::kThreadsPerRow &&
                                              asked.vecs_per_thread == Config::kVecsPerThread);
    return is_asked && row_bytes <= Config::kMaxRowBytes;
  };
  return ((serves(std::type_identity<ConfigOf<kVariants>>{}) && (launch(ConfigOf<kVariants>{}), true)) || ...);
}

}  // namespace row_detail

using WholeRowMenu = decltype(row_detail::whole_menu(std::make_index_sequence<std::size(kRowMenu)>{}));
static_assert(row_detail::ConfigOf<RowVariant{1024, 4}>::kMaxRowBytes == kMaxRowBytes);

// Calls launch(config) with the configuration of Menu asked for, or the first that holds a row of T in registers;
// nothing for no rows.
template <typename T, typename Menu, typename Launch>
void with_row_config(const char* kernel, const NormRows& rows, RowVariant variant, Launch launch) {
  if (rows.num_tokens == 0) return;  // an empty grid is a launch error
  const int64_t row_bytes = int64_t(rows.hidden_size) * int64_t(sizeof(T));
  if (row_detail::launch_first_of(Menu{}, row_bytes, variant, launch)) return;
  const std::string threads = std::to_string(variant.threads_per_row), vecs = std::to_string(variant.vecs_per_thread);
  const std::string rule = variant.is_auto() ? "rows must be at most " + std::to_string(kMaxRowBytes) + " bytes, got"
                                             : "no variant " + threads + "x" + vecs + " holds rows";
  throw std::runtime_error(std::string(kernel) + ": " + rule + " of " + std::to_string(row_bytes) + " bytes");
}

template <typename Config>
dim3 row_grid(const NormRows& rows) {
  return dim3(unsigned((rows.num_tokens + Config::kRowsPerBlock - 1) / Config::kRowsPerBlock));
}

}  // namespace fastshard

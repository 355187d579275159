// One small kernel for each thing the emulator does, called through ctypes by test_emulator.py.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace fastshard {
namespace {

std::string last_error;

// Launches; returns null, or what the launch threw.
template <typename SharedStorage, typename... Args>
const char* attempt(bool cooperative, void (*kernel)(Args...), dim3 grid, int threads,
                    const std::type_identity_t<Args>&... args) {
  try {
    if (cooperative) {
      launch_cooperative_kernel<SharedStorage>(kernel, grid, threads, 0, nullptr, args...);
    } else {
      launch_kernel<SharedStorage>(kernel, grid, threads, nullptr, args...);
    }
    return nullptr;
  } catch (const std::exception& exception) {
    last_error = exception.what();
    return last_error.c_str();
  }
}

struct Tile {
  uint16_t elems[16][8];
};

// ---- indices

__global__ void indices_kernel(int* out) {  // out[block][thread]: block x, y, z, thread
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int* row = out + (block * blockDim.x + threadIdx.x) * 4;
  row[0] = blockIdx.x;
  row[1] = blockIdx.y;
  row[2] = blockIdx.z;
  row[3] = threadIdx.x;
}

// ---- tensor cores

template <typename T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {  // a[lane][4], b[lane][2], d[lane][4]
  const int lane = threadIdx.x;
  uint32_t fragment[4];
  float sums[4];
  for (int i = 0; i < 4; ++i) fragment[i] = a[lane * 4 + i], sums[i] = d[lane * 4 + i];
  ptx::mma_m16n8k16<T>(sums, fragment, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

__global__ void mma_fp16_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {  // c, d as b
  const int lane = threadIdx.x;
  uint32_t fragment[4], sums[2];
  for (int i = 0; i < 4; ++i) fragment[i] = a[lane * 4 + i];
  ptx::mma_m16n8k16_fp16(sums, fragment, b[lane * 2], b[lane * 2 + 1], c[lane * 2], c[lane * 2 + 1]);
  for (int i = 0; i < 2; ++i) d[lane * 2 + i] = sums[i];
}

struct FourTiles {
  uint16_t elems[32][8];
};

__global__ void ldmatrix_kernel(const uint16_t* x, uint32_t* out, int trans, int offset) {  // x[32][8], out[lane][4]
  FS_SHARED_STORAGE(FourTiles, smem);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) smem.elems[lane][i] = x[lane * 8 + i];
  __syncwarp();
  uint32_t d[4];
  const uint32_t row = ptx::shared_address(smem.elems[lane]) + offset;
  trans ? ptx::ldmatrix_x4_trans(d, row) : ptx::ldmatrix_x4(d, row);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = d[i];
}

// ---- collectives of a warp and of a block

template <typename T>
__global__ void shuffle_kernel(const T* x, T* out) {  // x[32], out[7][32]
  const int lane = threadIdx.x;
  const T v = x[lane];
  out[lane] = __shfl_xor_sync(0xffffffffu, v, 5);
  out[32 + lane] = __shfl_sync(0xffffffffu, v, 37);
  out[64 + lane] = __shfl_sync(0xffffffffu, v, 3, 8);
  out[96 + lane] = __shfl_up_sync(0xffffffffu, v, 3, 16);
  out[128 + lane] = __shfl_down_sync(0xffffffffu, v, 3, 16);
  out[160 + lane] = __shfl_down_sync(0xffffffffu, v, 20);
  const unsigned mask = lane < 8 ? 0xffu : 0xffffff00u;
  out[192 + lane] = __shfl_xor_sync(mask, v, 1);
}

__global__ void vote_kernel(const int* x, int* out) {  // x[64], out[6][64]
  const int thread = threadIdx.x, v = x[thread];
  out[thread] = int(__ballot_sync(0xffffffffu, v > 0));
  out[64 + thread] = __any_sync(0xffffffffu, v > 2);
  out[128 + thread] = __all_sync(0xffffffffu, v > 0);
  out[192 + thread] = __syncthreads_or(v > 2);
  out[256 + thread] = __syncthreads_and(v > 0);
  out[320 + thread] = __syncthreads_count(v > 0);
}

__global__ void exited_lanes_kernel(int* out, int with_mma) {
  if (threadIdx.x % 4 == 3) return;
  __syncthreads();
  out[threadIdx.x] = int(__ballot_sync(0xffffffffu, 1));
  if (with_mma != 0) {
    float d[4];
    const uint32_t a[4]{};
    ptx::mma_m16n8k16<__half>(d, a, 0, 0);
  }
}

// ---- atomics and spinning

__global__ void atomics_kernel(int* i, float* f, unsigned long long* u) {
  atomicAdd(&i[0], 2);
  atomicMax(&i[1], int(threadIdx.x) * (threadIdx.x % 2 == 0 ? 1 : -1));
  atomicMin(&i[2], -int(threadIdx.x));
  atomicOr(&i[3], 1 << threadIdx.x % 8);
  if (atomicCAS(&i[4], 0, int(blockIdx.x) + 1) == 0) atomicExch(&i[5], int(blockIdx.x) + 1);
  atomicAdd(f, 0.5f);
  atomicAdd(u, 1ull << 33);
}

__global__ void ticket_kernel(int* next, int* out) {  // blocks take turns from the last to the first
  if (threadIdx.x == 0) {
    const int turn = int(gridDim.x - 1 - blockIdx.x);
    while (atomicAdd(next, 0) != turn) {
    }
    out[turn] = blockIdx.x;
    __threadfence();
    atomicAdd(next, 1);
  }
  __syncthreads();
}

// ---- asynchronous copies

struct Stages {
  float elems[2][4];
};

// out[0..3]: the first stage, out[4..7]: the second, once at most `pending` groups are in flight (-1: no wait).
__global__ void copy_kernel(const float* x, float* out, int pending, int valid) {
  FS_SHARED_STORAGE(Stages, smem);
  for (int stage = 0; stage < 2; ++stage) {
    ptx::cp_async_16_or_zero(ptx::shared_address(smem.elems[stage]), x + stage * 4, valid != 0);
    ptx::cp_async_commit();
  }
  if (pending == 0) ptx::cp_async_wait<0>();
  if (pending == 1) ptx::cp_async_wait<1>();
  for (int i = 0; i < 8; ++i) out[i] = smem.elems[i / 4][i % 4];
}

__global__ void misaligned_copy_kernel(const float* x, int shared_offset, int global_offset) {
  FS_SHARED_STORAGE(Stages, smem);
  ptx::cp_async_16(ptx::shared_address(smem.elems) + shared_offset, x + global_offset);
}

// ---- faults

__global__ void poison_kernel(unsigned char* out, int bytes) {
  FS_SHARED_STORAGE(Tile, smem);
  for (int i = 0; i < bytes; ++i) out[i] = reinterpret_cast<unsigned char*>(&smem)[i];
  smem.elems[0][0] = 1;  // of the last block, which the next must not see
}

struct Sums {
  float warps[2];
};

// The maximum over a block, with a barrier that can be left out before or after the maxima of its warps are read.
__global__ void maximum_kernel(const float* x, float* out, int before, int after) {  // x[2][64], out[2][64]
  FS_SHARED_STORAGE(Sums, smem);
  for (int i = 0; i < 2; ++i) {
    float v = x[i * 64 + threadIdx.x];
    for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
    if (threadIdx.x % 32 == 0) smem.warps[threadIdx.x / 32] = v;
    if (before != 0) __syncthreads();
    out[i * 64 + threadIdx.x] = smem.warps[0] > smem.warps[1] ? smem.warps[0] : smem.warps[1];
    if (after != 0) __syncthreads();
  }
}

// Warp 1 reads what warp 0 writes: in ascending order the missing barrier does not show.
__global__ void ascending_race_kernel(int* out) {
  FS_SHARED_STORAGE(Tile, smem);
  if (threadIdx.x < 32) smem.elems[threadIdx.x / 8][threadIdx.x % 8] = uint16_t(threadIdx.x);
  if (threadIdx.x >= 32) out[threadIdx.x - 32] = smem.elems[(threadIdx.x - 32) / 8][threadIdx.x % 8];
}

__global__ void divergence_kernel(int kind) {
  if (kind == 0) {  // a lane waits at a barrier of the block, the others for it at a shuffle
    if (threadIdx.x == 3) __syncthreads();
    __shfl_xor_sync(0xffffffffu, 1, 1);
    __syncthreads();
  } else if (kind == 1) {  // lanes at different collectives
    if (threadIdx.x < 16) __syncwarp();
    __ballot_sync(0xffffffffu, 1);
  } else if (kind == 2) {  // a mask that names others
    __shfl_xor_sync(0xfffffff0u, 1, 1);
  } else if (kind == 3) {  // barriers of different kinds
    threadIdx.x < 32 ? __syncthreads() : void(__syncthreads_or(1));
  } else {
    __trap();
  }
}

__global__ void livelock_kernel(int* flag) {
  while (atomicAdd(flag, 0) == 0) {
  }
}

struct Small {
  float elems[8];
};
struct Large {
  float elems[64];
};

__global__ void overflow_kernel(int kind, int index) {
  FS_SHARED_STORAGE(Small, smem);
  if (kind == 0) smem.elems[index] = 1.f;
  float* first = smem.elems;
  if (kind == 1) first[index] = 1.f;
  if (kind == 2) store_vec(first + index, Vec<float>{});
}

__global__ void trap_kernel(int kind, int* nowhere, int zero) {
  if (kind == 0) *nowhere = 1;
  if (kind == 1) [[maybe_unused]] volatile int quotient = 7 / zero;
}

__global__ void wrong_storage_kernel() {
  FS_SHARED_STORAGE(Large, smem);
  smem.elems[0] = 0.f;
}

__global__ void arithmetic_kernel(int* i, unsigned* u, float* f) {
  i[0] = min(-3, 2);
  i[1] = max(-3, 2);
  i[2] = __popc(0xf0f0u);
  i[3] = __clz(1);
  i[4] = __ffs(8);
  i[5] = __float_as_int(-1.f);
  u[0] = __umulhi(0x80000000u, 6u);
  u[1] = __float_as_uint(1.f);
  u[2] = max(-1, 2u);
  u[3] = __brev(1u);
  u[4] = __funnelshift_l(0x80000000u, 1u, 1);
  u[5] = ptx::ld_global_streaming(i).x;
  f[0] = rsqrtf(4.f);
  f[1] = __uint_as_float(0x40000000u);
  f[2] = ptx::ex2(3.f);
  f[3] = ptx::ex2(-INFINITY);
  f[4] = __expf(0.f);
  f[5] = max(1.f, 2.f);
}

}  // namespace
}  // namespace fastshard

using namespace fastshard;
#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

EXPORT indices(int* out, int x, int y, int z, int threads) {
  return attempt<void>(false, indices_kernel, dim3(x, y, z), threads, out);
}
EXPORT mma_half(const uint32_t* a, const uint32_t* b, float* d) {
  return attempt<void>(false, mma_kernel<__half>, 1, 32, a, b, d);
}
EXPORT mma_fp16(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
  return attempt<void>(false, mma_fp16_kernel, 1, 32, a, b, c, d);
}
EXPORT mma_bfloat16(const uint32_t* a, const uint32_t* b, float* d) {
  return attempt<void>(false, mma_kernel<__nv_bfloat16>, 1, 32, a, b, d);
}
EXPORT ldmatrix(const uint16_t* x, uint32_t* out, int trans, int offset) {
  return attempt<FourTiles>(false, ldmatrix_kernel, 1, 32, x, out, trans, offset);
}
EXPORT shuffle_int32(const int* x, int* out) { return attempt<void>(false, shuffle_kernel<int>, 1, 32, x, out); }
EXPORT shuffle_float32(const float* x, float* out) {
  return attempt<void>(false, shuffle_kernel<float>, 1, 32, x, out);
}
EXPORT shuffle_int64(const unsigned long long* x, unsigned long long* out) {
  return attempt<void>(false, shuffle_kernel<unsigned long long>, 1, 32, x, out);
}
EXPORT vote(const int* x, int* out) { return attempt<void>(false, vote_kernel, 1, 64, x, out); }
EXPORT exited_lanes(int* out, int threads, int with_mma) {
  return attempt<void>(false, exited_lanes_kernel, 1, threads, out, with_mma);
}
EXPORT atomics(int* i, float* f, unsigned long long* u) {
  return attempt<void>(false, atomics_kernel, 3, 64, i, f, u);
}
EXPORT ticket(int* next, int* out, int blocks, int cooperative) {
  return attempt<void>(cooperative != 0, ticket_kernel, blocks, 64, next, out);
}
EXPORT copy(const float* x, float* out, int pending, int valid) {
  return attempt<Stages>(false, copy_kernel, 1, 1, x, out, pending, valid);
}
EXPORT misaligned_copy(const float* x, int shared_offset, int global_offset) {
  return attempt<Stages>(false, misaligned_copy_kernel, 1, 1, x, shared_offset, global_offset);
}
EXPORT poison(unsigned char* out, int bytes) { return attempt<Tile>(false, poison_kernel, 2, 1, out, bytes); }
EXPORT maximum(const float* x, float* out, int before, int after) {
  return attempt<Sums>(false, maximum_kernel, 1, 64, x, out, before, after);
}
EXPORT ascending_race(int* out) { return attempt<Tile>(false, ascending_race_kernel, 1, 64, out); }
EXPORT divergence(int kind) { return attempt<void>(false, divergence_kernel, 1, 64, kind); }
EXPORT livelock(int* flag) { return attempt<void>(false, livelock_kernel, 1, 1, flag); }
EXPORT overflow(int kind, int index) { return attempt<Small>(false, overflow_kernel, 1, 1, kind, index); }
EXPORT trap(int kind) { return attempt<void>(false, trap_kernel, 1, 64, kind, reinterpret_cast<int*>(16), 0); }
EXPORT wrong_storage() { return attempt<Small>(false, wrong_storage_kernel, 1, 1); }
EXPORT arithmetic(int* i, unsigned* u, float* f) { return attempt<void>(false, arithmetic_kernel, 1, 1, i, u, f); }
EXPORT empty_grid() { return attempt<void>(false, indices_kernel, dim3(0), 32, nullptr); }
EXPORT resident_blocks(int* out, int threads) {
  out[0] = max_resident_blocks<void>(indices_kernel, threads);
  out[1] = max_resident_blocks<unsigned char[101376]>(indices_kernel, threads);
  return nullptr;
}

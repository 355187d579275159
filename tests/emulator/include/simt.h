// A SIMT machine on one CPU thread: runs the project's kernel sources, compiled by g++, without a GPU.
//
// How it works
//   Every CUDA thread is a fiber (fiber.h) that runs until it must wait: at a warp collective (shuffle, ballot,
//   ldmatrix, mma, __syncwarp) or at __syncthreads. The last thread to arrive computes the results of all and releases
//   them. So threads run in an order that no GPU guarantees, and a kernel that forgets a barrier reads what is not
//   there yet. Blocks of an ordinary launch run one after another, those of a cooperative launch together.
//   The folder of this file comes before csrc and the CUDA toolkit on the include path: it shadows cuda_runtime.h,
//   common/launch.cuh, common/ptx.cuh and torch's new_empty; kernels and torch boundary are the product's.
//
// What it checks
//   - Shared memory is poisoned before each block (NaN as fp16, bf16 and fp32) and lies between guards; so is, and so
//     does, what the torch boundary allocates. Registers that nobody wrote are poisoned too.
//   - cp.async lands only when the thread waits for its group.
//   - Addresses that ldmatrix and cp.async take are aligned and inside; so are other pointers (aligned) and indices of
//     arrays (inside), as far as the compiler knows of them.
//   - Errors are: threads that wait for each other or spin for ever, lanes of a warp at different collectives, an
//     exited lane that mma or ldmatrix needs, an access that the system refuses. They end the launch as
//     std::runtime_error, hence as RuntimeError in Python.
//
// What it does not say
//   Anything about speed. And races are sampled: one schedule is one sample. By default warps run in ascending order;
//   with FASTSHARD_EMULATOR_SEED set, blocks, warps and lanes run in a pseudo-random order that the number fixes, and
//   each cp.async lands either at its wait or at once.
//
// Environment, read at every launch
//   FASTSHARD_EMULATOR_SMS          multiprocessors of the emulated device, default 4
//   FASTSHARD_EMULATOR_SEED         schedule; unset or empty: ascending order
//   FASTSHARD_EMULATOR_COOPERATIVE  0: the emulated device takes no cooperative launch
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

#include <vector_functions.h>
#include <vector_types.h>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace fastshard::simt {

struct LaunchShape {
  dim3 grid;
  int threads;
  int shared_bytes;
  bool cooperative;
  const char* kernel;  // for messages
};

// Runs body(argument) in every thread of the grid; returns when all are done, throws where the machine finds a fault.
void run(const LaunchShape& shape, void (*body)(const void*), const void* argument);

int num_sms();
bool supports_cooperative_launch();
int max_blocks_per_sm(int threads, int shared_bytes);

// Abandons the launch of the calling thread, or throws where there is none.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What the lanes of a warp do together: combine(records, lanes) runs once, when all have arrived; records[i] is lane
// i's, where bit i of lanes is set. Aligned collectives need all 32 lanes, others those of the mask that still run.
struct Collective {
  const char* name;
  void (*combine)(void* const* records, uint32_t lanes);
  bool aligned = false;
};
void warp_collective(uint32_t mask, const Collective& collective, void* record);

struct BarrierResult {
  int threads;  // that took part
  int votes;    // of them, those with a predicate
};
BarrierResult block_barrier(const char* name, bool predicate);

// As what spins on memory that another process writes.
void poll_system();
// Lets every other thread run before this one goes on: for what spins on memory (atomics, polling loads).
void yield();
// Does so at random where FASTSHARD_EMULATOR_SEED is set.
void maybe_yield();

void* shared_storage(size_t bytes, size_t alignment);
uint32_t shared_address(const void* pointer);
unsigned char* shared_pointer(uint32_t address, uint32_t bytes, const char* instruction);

// Poison `bytes` of an output and the kGuardBytes on either side; check_outputs() looks at those, and lets owners go.
constexpr int kGuardBytes = 4096;
void guard_output(unsigned char* begin, size_t bytes, std::shared_ptr<void> owner);
extern "C" __attribute__((visibility("default"))) const char* fastshard_emulator_check_outputs();  // null: all is well

// global null: zeros.
void copy_async(unsigned char* shared, const void* global, uint32_t bytes);
void copy_async_commit();
void copy_async_wait(int pending);

// A load that may be one of a loop that waits for other threads: now and then it lets them go first.
void poll();

}  // namespace fastshard::simt

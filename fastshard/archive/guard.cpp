// An allocator for PyTorch with canaries around every buffer, for `fastshard archive verify`.
//
// Each buffer lies between two guards of random bytes and is filled with a poison when it is made.
// A freed one is filled with another pattern and kept for a while, so that writes to it show too.
// Guards are looked at when a buffer is freed and when `guard_check` is called.
//
// Compiled twice: as it is for the CPU (c10::Allocator), and with CUDA's headers for
// torch.cuda.memory.CUDAPluggableAllocator, where a first line defines FASTSHARD_GUARD_CUDA.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <unordered_map>
#include <vector>

#ifdef FASTSHARD_GUARD_CUDA
#include <cuda_runtime.h>
#else
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#endif

namespace {

constexpr size_t kGuard = 64 * 1024;             // bytes before, and after, each buffer
constexpr size_t kKept = size_t(1) << 29;        // bytes of freed buffers that are watched
constexpr unsigned char kFreed = 0xDB;

struct Block {
  char* base;    // of the first guard
  size_t bytes;  // between the guards
};

std::mutex mutex;
std::unordered_map<char*, Block> living;  // by the address that was handed out
std::deque<Block> freed;
size_t kept = 0;
unsigned char poison = 0xFF;
char found[256] = "";

const std::vector<char>& canary() {
  static const std::vector<char> bytes = [] {
    std::vector<char> made(kGuard);
    std::random_device random;
    for (auto& byte : made) byte = char(random());
    return made;
  }();
  return bytes;
}

#ifdef FASTSHARD_GUARD_CUDA
char* take(size_t bytes) {
  void* base = nullptr;
  return cudaMalloc(&base, bytes) == cudaSuccess ? static_cast<char*>(base) : nullptr;
}
void give(char* base) { cudaFree(base); }
void fill(char* at, int value, size_t bytes) { cudaMemset(at, value, bytes); }
void write(char* at, const char* from, size_t bytes) {
  cudaMemcpy(at, from, bytes, cudaMemcpyHostToDevice);
}
std::vector<char> read(const char* at, size_t bytes) {
  std::vector<char> copy(bytes);
  cudaMemcpy(copy.data(), at, bytes, cudaMemcpyDeviceToHost);
  return copy;
}
void wait() { cudaDeviceSynchronize(); }
#else
char* take(size_t bytes) {
  void* base = nullptr;
  return posix_memalign(&base, 64, bytes) == 0 ? static_cast<char*>(base) : nullptr;
}
void give(char* base) { std::free(base); }
void fill(char* at, int value, size_t bytes) { std::memset(at, value, bytes); }
void write(char* at, const char* from, size_t bytes) { std::memcpy(at, from, bytes); }
std::vector<char> read(const char* at, size_t bytes) { return {at, at + bytes}; }
void wait() {}
#endif

void note(const Block& block, const char* where, size_t first) {
  if (found[0] == 0) {
    std::snprintf(found, sizeof found, "byte %zu %s buffer of %zu bytes", first, where,
                  block.bytes);
  }
}

// What of a block's guards, and of its inside where it is freed, is not as it was left.
void look_at(const Block& block, bool is_freed) {
  auto before = read(block.base, kGuard);
  for (size_t i = kGuard; i-- > 0;) {
    if (before[i] != canary()[i]) return note(block, "before a", kGuard - i);
  }
  auto after = read(block.base + kGuard + block.bytes, kGuard);
  for (size_t i = 0; i < kGuard; ++i) {
    if (after[i] != canary()[i]) return note(block, "after a", i + 1);
  }
  if (!is_freed) return;
  auto inside = read(block.base + kGuard, block.bytes);
  for (size_t i = 0; i < block.bytes; ++i) {
    if (static_cast<unsigned char>(inside[i]) != kFreed) return note(block, "of a freed", i);
  }
}

char* make(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  char* base = take(bytes + 2 * kGuard);
  if (base == nullptr) return nullptr;
  write(base, canary().data(), kGuard);
  fill(base + kGuard, poison, bytes);
  write(base + kGuard + bytes, canary().data(), kGuard);
  wait();  // the next launch may be on another stream
  living[base + kGuard] = {base, bytes};
  return base + kGuard;
}

void release(void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  auto at = living.find(static_cast<char*>(address));
  if (at == living.end()) return;
  Block block = at->second;
  living.erase(at);
  wait();
  look_at(block, false);
  fill(block.base + kGuard, kFreed, block.bytes);
  wait();
  freed.push_back(block);
  kept += block.bytes;
  while (kept > kKept) {
    look_at(freed.front(), true);
    give(freed.front().base);
    kept -= freed.front().bytes;
    freed.pop_front();
  }
}

#ifndef FASTSHARD_GUARD_CUDA
struct GuardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, cpu};
    char* made = make(bytes);
    TORCH_CHECK(made != nullptr, "out of memory");
    return {made, made, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
#endif

}  // namespace

extern "C" {

// The byte that buffers made from here on are filled with.
void guard_poison(int byte) { poison = static_cast<unsigned char>(byte); }

// What was written beside a buffer, or an empty text.
const char* guard_check() {
  std::lock_guard<std::mutex> lock(mutex);
  wait();
  for (const auto& entry : living) look_at(entry.second, false);
  for (const auto& block : freed) look_at(block, true);
  return found;
}

#ifdef FASTSHARD_GUARD_CUDA
void* guard_malloc(ssize_t bytes, int device, cudaStream_t) {
  cudaSetDevice(device);
  return bytes == 0 ? nullptr : make(size_t(bytes));
}
void guard_free(void* address, ssize_t, int, cudaStream_t) { release(address); }
#else
void guard_install() {
  static GuardAllocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/100);
}
#endif
}

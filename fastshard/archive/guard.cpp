// An allocator for PyTorch with canaries around every buffer, for `fastshard archive verify`.
//
// Each buffer lies between two guards of random bytes and is filled with a poison when it is made.
// A freed one is filled with another pattern and kept for a while, so that writes to it show too.
// All is looked at by `guard_check` alone. Making and freeing wait for nothing: else they would put
// in order what a kernel left unordered between streams, and hide it.
//
// Compiled twice: as it is for the CPU (c10::Allocator), and with CUDA's headers for
// torch.cuda.memory.CUDAPluggableAllocator, where a first line defines FASTSHARD_GUARD_CUDA.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
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

constexpr size_t kGuard = 64 * 1024;       // bytes before, and after, each buffer
constexpr size_t kKept = size_t(1) << 29;  // bytes of freed buffers that are watched
constexpr size_t kPart = size_t(1) << 22;  // bytes that are looked at together
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
using Stream = cudaStream_t;
constexpr size_t kChunk = size_t(1) << 28;

std::unordered_map<size_t, std::vector<char*>> unused;  // by size
char* chunk = nullptr;
size_t chunk_left = 0;

char* reserve(size_t bytes) {
  void* base = nullptr;
  if (cudaMalloc(&base, bytes) == cudaSuccess) return static_cast<char*>(base);
  cudaGetLastError();  // else the next launch would be blamed
  return nullptr;
}

// From a chunk: cudaMalloc for each buffer might wait for what runs.
char* take(size_t bytes) {
  bytes = (bytes + 511) / 512 * 512;
  auto& same = unused[bytes];
  if (!same.empty()) {
    char* base = same.back();
    same.pop_back();
    return base;
  }
  if (bytes > kChunk) return reserve(bytes);
  if (bytes > chunk_left) {
    chunk = reserve(kChunk);
    chunk_left = chunk == nullptr ? 0 : kChunk;
    if (chunk == nullptr) return nullptr;
  }
  char* base = chunk;
  chunk += bytes;
  chunk_left -= bytes;
  return base;
}
void give(char* base, size_t bytes) { unused[(bytes + 511) / 512 * 512].push_back(base); }
void fill(char* at, int value, size_t bytes, Stream stream) {
  cudaMemsetAsync(at, value, bytes, stream);
}
void write_canary(char* at, Stream stream) {
  static char* master = [] {
    char* made = reserve(kGuard);
    cudaMemcpy(made, canary().data(), kGuard, cudaMemcpyHostToDevice);
    return made;
  }();
  cudaMemcpyAsync(at, master, kGuard, cudaMemcpyDeviceToDevice, stream);
}
std::vector<char> read(const char* at, size_t bytes) {
  std::vector<char> copy(bytes);
  cudaMemcpy(copy.data(), at, bytes, cudaMemcpyDeviceToHost);
  return copy;
}
void wait() { cudaDeviceSynchronize(); }
#else
struct Stream {};

char* take(size_t bytes) {
  void* base = nullptr;
  return posix_memalign(&base, 64, bytes) == 0 ? static_cast<char*>(base) : nullptr;
}
void give(char* base, size_t) { std::free(base); }
void fill(char* at, int value, size_t bytes, Stream) { std::memset(at, value, bytes); }
void write_canary(char* at, Stream) { std::memcpy(at, canary().data(), kGuard); }
std::vector<char> read(const char* at, size_t bytes) { return {at, at + bytes}; }
void wait() {}
#endif

void note(const Block& block, const char* where, size_t first) {
  if (found[0] == 0) {
    std::snprintf(found, sizeof found, "byte %zu %s buffer of %zu bytes", first, where,
                  block.bytes);
  }
}

// The first byte that is not what it should be, or `bytes` where all are.
size_t first_change(const char* at, const char* expected, size_t bytes) {
  if (std::memcmp(at, expected, bytes) == 0) return bytes;
  size_t i = 0;
  while (at[i] == expected[i]) ++i;
  return i;
}

// What of a block's guards, and of its inside where it is freed, is not as it was left.
void look_at(const Block& block, bool is_freed) {
  auto before = read(block.base, kGuard);
  if (std::memcmp(before.data(), canary().data(), kGuard) != 0) {
    size_t i = kGuard;
    while (before[i - 1] == canary()[i - 1]) --i;
    return note(block, "before a", kGuard - i + 1);
  }
  auto after = read(block.base + kGuard + block.bytes, kGuard);
  size_t i = first_change(after.data(), canary().data(), kGuard);
  if (i < kGuard) return note(block, "after a", i + 1);
  static const std::vector<char> pattern(kPart, char(kFreed));
  for (size_t begin = 0; is_freed && begin < block.bytes; begin += kPart) {
    size_t bytes = std::min(kPart, block.bytes - begin);
    auto inside = read(block.base + kGuard + begin, bytes);
    i = first_change(inside.data(), pattern.data(), bytes);
    if (i < bytes) return note(block, "of a freed", begin + i);
  }
}

char* make(size_t bytes, Stream stream) {
  std::lock_guard<std::mutex> lock(mutex);
  char* base = take(bytes + 2 * kGuard);
  if (base == nullptr) return nullptr;
  write_canary(base, stream);
  fill(base + kGuard, poison, bytes, stream);
  write_canary(base + kGuard + bytes, stream);
  living[base + kGuard] = {base, bytes};
  return base + kGuard;
}

void release(void* address, Stream stream) {
  std::lock_guard<std::mutex> lock(mutex);
  auto at = living.find(static_cast<char*>(address));
  if (at == living.end()) return;
  Block block = at->second;
  living.erase(at);
  fill(block.base + kGuard, kFreed, block.bytes, stream);
  freed.push_back(block);
  kept += block.bytes;
}

#ifndef FASTSHARD_GUARD_CUDA
struct GuardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &give_back, cpu};
    char* made = make(bytes, {});
    TORCH_CHECK(made != nullptr, "out of memory");
    return {made, made, &give_back, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  static void give_back(void* address) { release(address, {}); }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
#endif

}  // namespace

extern "C" {

// The byte that buffers made from here on are filled with.
void guard_poison(int byte) { poison = static_cast<unsigned char>(byte); }

// What was written beside a buffer or into a freed one, or an empty text.
const char* guard_check() {
  std::lock_guard<std::mutex> lock(mutex);
  wait();
  for (const auto& entry : living) look_at(entry.second, false);
  for (const auto& block : freed) look_at(block, true);
  while (kept > kKept) {
    Block oldest = freed.front();
    freed.pop_front();
    kept -= oldest.bytes;
    give(oldest.base, oldest.bytes + 2 * kGuard);
  }
  return found;
}

#ifdef FASTSHARD_GUARD_CUDA
void* guard_malloc(ssize_t bytes, int device, cudaStream_t stream) {
  cudaSetDevice(device);
  void* made = bytes == 0 ? nullptr : make(size_t(bytes), stream);
  if (bytes != 0 && made == nullptr) throw std::bad_alloc();
  return made;
}
void guard_free(void* address, ssize_t, int, cudaStream_t stream) { release(address, stream); }
#else
void guard_install() {
  static GuardAllocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/100);
}
#endif
}

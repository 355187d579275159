// The machine behind simt.h: scheduler of the fibers, collectives, shared memory, asynchronous copies.
#include "simt.h"

#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastshard::simt {
namespace {

constexpr int kMaxSharedBytesPerSm = 102400, kReservedSharedBytes = 1024, kMaxThreadsPerSm = 1536;  // as on 8.6
constexpr int kMaxBlocksPerSm = 2;  // of this machine, which has better things to do than to interleave sixteen
constexpr size_t kStackBytes = 64 * 1024;
// Not a power of two: the frames of all fibers would compete for the same sets of the cache.
constexpr size_t kStackStride = kStackBytes + 4096 + 320;
constexpr uint64_t kStackMark = 0x5afe57ac4badc0deu;
constexpr uint32_t kSharedWindow = 1024 + 128;  // address of the first byte; a multiple of 128 and of nothing more
constexpr uint16_t kPoison = 0x7fff;  // NaN as fp16 and bf16; two of them are NaN as fp32
constexpr uint16_t kGuard = 0x7ea5;   // no copy of poison
constexpr int64_t kIdleYieldsBeforeSleep = 1'000;
constexpr int64_t kMaxIdleYields = 2'000'000;  // yields in a row in which no thread got anywhere

struct Warp;
struct Block;

struct Copy {
  unsigned char* shared;
  const void* global;
  uint32_t bytes;
};

struct Lane {
  Context context;
  unsigned char* stack;
  Warp* warp;
  uint32_t thread, lane;
  const char* waits_for;
  std::vector<Copy> copies;      // issued, not landed; oldest first
  std::vector<uint32_t> groups;  // committed: number of copies in each; oldest first
  uint32_t uncommitted;          // copies issued since the last commit
  uint32_t polls;
};

struct Group {  // lanes that meet at a collective
  const Collective* collective;
  uint32_t mask, arrived;
};

struct Warp {
  Block* block;
  uint32_t index, ready, yielded, exited;
  void* records[32];
  Group groups[32];  // by the lowest lane of their mask
  Lane* lanes[32];
};

struct Block {
  uint3 index;
  uint32_t ready_warps;  // a superset: a warp is dropped when it is found to have no ready lane
  int running;           // threads that have not exited
  int arrived, votes;    // at the barrier
  const char* barrier;
  BarrierResult result;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> buffer;  // shared memory between guards
  unsigned char* shared;
};

class Stacks {
 public:
  unsigned char* take() {
    if (free_.empty()) {
      constexpr size_t kCount = 256;
      constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* chunk = mmap(nullptr, kStackStride * kCount, PROT_READ | PROT_WRITE, kFlags, -1, 0);
      if (chunk == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stacks of the threads");
      for (size_t i = kCount; i-- > 0;) free_.push_back(static_cast<unsigned char*>(chunk) + i * kStackStride);
    }
    unsigned char* stack = free_.back();
    free_.pop_back();
    std::memcpy(stack, &kStackMark, sizeof kStackMark);
    return stack;
  }
  void give_back(unsigned char* stack) { free_.push_back(stack); }

 private:
  std::vector<unsigned char*> free_;
};

struct Machine {
  LaunchShape shape;
  void (*body)(const void*);
  const void* argument;
  std::vector<std::unique_ptr<Block>> blocks;  // resident
  std::vector<std::unique_ptr<Lane>> lanes;    // of all resident blocks
  Stacks stacks;
  Context host;
  Lane* current = nullptr;
  int running = 0;          // threads of the resident blocks that have not exited
  int64_t idle_yields = 0;
  bool random = false;
  uint64_t random_state = 0;
  uint32_t patience = 0;  // where random: the mean number of steps before another warp gets its turn
  std::string error;
};

Machine m;
std::mutex launch_mutex;

uint32_t bit(uint32_t index) { return 1u << index; }

uint32_t random_below(uint32_t bound) {  // splitmix64
  uint64_t z = m.random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return uint32_t(((z ^ z >> 31) >> 32) * bound >> 32);
}

uint32_t pick_bit(uint32_t set) {  // index of the lowest, or of any
  if (m.random) {
    for (uint32_t skip = random_below(std::popcount(set)); skip > 0; --skip) set &= set - 1;
  }
  return std::countr_zero(set);
}

std::string short_kernel_name(const char* text) {  // of launch_detail::launch's __PRETTY_FUNCTION__
  const std::string name(text);
  const size_t begin = name.find("SharedStorage = "), end = name.find("; KernelArgs");
  return begin == std::string::npos ? name : name.substr(begin + 16, end == std::string::npos ? end : end - begin - 16);
}

// ---- scheduler

void make_ready(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  warp.block->ready_warps |= bit(warp.index);
}

std::string describe_waiting() {
  std::string text;
  int listed = 0;
  for (const auto& block : m.blocks) {
    if (block->running == 0) continue;
    if (++listed > 4) return text + "; ...";
    text += "; block (" + std::to_string(block->index.x) + ", " + std::to_string(block->index.y) + ", " +
            std::to_string(block->index.z) + "):";
    const char* last = nullptr;
    for (const Warp& warp : block->warps) {
      for (uint32_t lane = 0; lane < 32; ++lane) {
        if (warp.exited >> lane & 1) continue;
        const Lane& l = *warp.lanes[lane];
        if (l.waits_for != last) text += " thread " + std::to_string(l.thread) + "... at " + l.waits_for + ",";
        last = l.waits_for;
      }
    }
    text += " " + std::to_string(int(m.shape.threads) - block->running) + " exited";
  }
  return text;
}

// Every ready lane of the grid is a candidate; by default the nearest: same warp, same block, lowest index.
Lane* pick_lane() {
  Warp* warp = m.current->warp;
  Block* block = warp->block;
  if (m.random && random_below(m.patience) == 0) {
    block = m.blocks[random_below(uint32_t(m.blocks.size()))].get();
    if (block->ready_warps != 0) warp = &block->warps[pick_bit(block->ready_warps)];
  }
  for (;;) {
    if (warp->ready != 0) {
      const uint32_t lane = pick_bit(warp->ready);
      warp->ready &= ~bit(lane);
      return warp->lanes[lane];
    }
    block = warp->block;
    block->ready_warps &= ~bit(warp->index);
    for (size_t i = 0; block->ready_warps == 0 && i < m.blocks.size(); ++i) block = m.blocks[i].get();
    if (block->ready_warps == 0) {  // nobody is ready: those who only let others go first go on
      bool any = false;
      for (const auto& b : m.blocks) {
        for (Warp& w : b->warps) {
          if (w.yielded == 0) continue;
          make_ready(w, w.yielded);
          w.yielded = 0;
          any = true;
        }
      }
      if (!any) fail("deadlock: all threads wait%s", describe_waiting().c_str());
      for (size_t i = 0; block->ready_warps == 0; ++i) block = m.blocks[i].get();
    }
    warp = &block->warps[pick_bit(block->ready_warps)];
  }
}

void enter(Lane& lane) {
  m.current = &lane;
  threadIdx = {lane.thread, 0, 0};
  blockIdx = lane.warp->block->index;
}

// The calling lane has noted what it waits for; comes back when another lane has made it ready.
void reschedule() {
  Lane* self = m.current;
  Lane* next = pick_lane();
  if (next == self) return;
  enter(*next);
  switch_context(self->context, next->context);
}

void leave_to_host() {
  Lane* self = m.current;
  m.current = nullptr;
  switch_context(self->context, m.host);
}

void complete(Warp& warp, Group& group) {
  const uint32_t lanes = group.arrived;
  if (group.collective->aligned && lanes != ~0u) {
    fail("%s needs all 32 lanes of a warp, and some have exited", group.collective->name);
  }
  group.arrived = 0;
  m.idle_yields = 0;
  group.collective->combine(warp.records, lanes);
  make_ready(warp, lanes);
}

void complete_barrier(Block& block) {
  block.result = {block.arrived, block.votes};
  block.arrived = block.votes = 0;
  m.idle_yields = 0;
  for (Warp& warp : block.warps) make_ready(warp, ~warp.exited);
}

void exit_lane() {
  Lane& self = *m.current;
  Warp& warp = *self.warp;
  Block& block = *warp.block;
  warp.exited |= bit(self.lane);
  --block.running;
  --m.running;
  m.idle_yields = 0;
  for (Group& group : warp.groups) {  // the others no longer wait for this lane
    if (group.arrived == 0 || group.arrived != (group.mask & ~warp.exited)) continue;
    complete(warp, group);
  }
  if (block.arrived != 0 && block.arrived == block.running) complete_barrier(block);
}

void fiber_main() {
  try {
    m.body(m.argument);
  } catch (const std::exception& exception) {
    m.error = exception.what();
    leave_to_host();
  }
  exit_lane();
  if (m.running == 0) leave_to_host();
  reschedule();
  __builtin_unreachable();  // an exited lane is never ready
}

// ---- poison and guards

void fill(unsigned char* memory, size_t bytes, uint16_t value) {
  for (size_t i = 0; i + 1 < bytes; i += 2) std::memcpy(memory + i, &value, 2);
  if (bytes % 2 != 0) memory[bytes - 1] = uint8_t(value);
}

void poison(unsigned char* begin, size_t bytes) {
  fill(begin, bytes, kPoison);
  fill(begin - kGuardBytes, kGuardBytes, kGuard);
  fill(begin + bytes, kGuardBytes, kGuard);
}

// Null where both guards are as poison() left them, else where they are not.
const char* guard_fault(const unsigned char* begin, size_t bytes) {
  unsigned char guard[kGuardBytes];
  fill(guard, kGuardBytes, kGuard);
  if (std::memcmp(begin - kGuardBytes, guard, kGuardBytes) != 0) return "before the start";
  if (std::memcmp(begin + bytes, guard, kGuardBytes) != 0) return "past the end";
  return nullptr;
}

struct Output {
  unsigned char* begin;
  size_t bytes;
  std::shared_ptr<void> owner;
};
std::vector<Output> outputs;

// ---- signals

// While it lives, what the operating system does not let a kernel do is an error of the launch.
class FaultHandler {
 public:
  FaultHandler() {
    stack_t stack{};
    stack.ss_sp = stack_.get();
    stack.ss_size = kStackBytes;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &old_actions_[i]);
  }
  ~FaultHandler() {
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &old_actions_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};

  static void handle(int signal, siginfo_t* info, void*) {
    if (m.current == nullptr) std::abort();  // not in a kernel
    if (signal == SIGFPE) fail("integer division by zero");
    fail("illegal access to the address %p", info->si_addr);
  }

  std::unique_ptr<unsigned char[]> stack_{new unsigned char[kStackBytes]};
  stack_t old_stack_;
  struct sigaction old_actions_[std::size(kSignals)];
};

// ---- launch

void prepare_block(Block& block, uint3 index, std::unique_ptr<Lane>* lanes) {
  const uint32_t num_threads = uint32_t(m.shape.threads), num_warps = (num_threads + 31) / 32;
  block.index = index;
  block.ready_warps = num_warps == 32 ? ~0u : bit(num_warps) - 1;
  block.running = m.shape.threads;
  block.arrived = block.votes = 0;
  block.warps.resize(num_warps);
  for (uint32_t w = 0; w < num_warps; ++w) {
    Warp& warp = block.warps[w];
    const uint32_t num_lanes = std::min(32u, num_threads - w * 32);
    warp.block = &block;
    warp.index = w;
    warp.ready = num_lanes == 32 ? ~0u : bit(num_lanes) - 1;
    warp.exited = ~warp.ready;
    warp.yielded = 0;
    for (Group& group : warp.groups) group.arrived = 0;
    for (uint32_t l = 0; l < num_lanes; ++l) {
      Lane& lane = *lanes[w * 32 + l];
      warp.lanes[l] = &lane;
      lane.warp = &warp;
      lane.thread = w * 32 + l;
      lane.lane = l;
      lane.waits_for = "its start";
      lane.copies.clear();
      lane.groups.clear();
      lane.uncommitted = 0;
      lane.polls = 0;
      prepare(lane.context, lane.stack, kStackBytes, fiber_main);
    }
  }
  // At an address that is a multiple of 128 and of nothing more.
  const size_t bytes = size_t(m.shape.shared_bytes);
  if (!block.buffer) block.buffer.reset(new unsigned char[bytes + 2 * kGuardBytes + 256]);
  const uintptr_t base = (reinterpret_cast<uintptr_t>(block.buffer.get()) + kGuardBytes + 127) / 128 * 128;
  block.shared = reinterpret_cast<unsigned char*>(base % 256 == 0 ? base + 128 : base);
  poison(block.shared, bytes);
}

void check_block(const Block& block) {
  if (const char* fault = guard_fault(block.shared, size_t(m.shape.shared_bytes))) {
    fail("a write %s of the shared memory of a block", fault);
  }
}

void run_resident_blocks() {
  m.running = int(m.blocks.size()) * m.shape.threads;
  m.idle_yields = 0;
  Block& first = *m.blocks[m.random ? random_below(uint32_t(m.blocks.size())) : 0];
  Warp& warp = first.warps[pick_bit(first.ready_warps)];
  const uint32_t lane = pick_bit(warp.ready);
  warp.ready &= ~bit(lane);
  enter(*warp.lanes[lane]);
  switch_context(m.host, m.current->context);
  for (const auto& l : m.lanes) {
    if (std::memcmp(l->stack, &kStackMark, sizeof kStackMark) != 0) {
      std::fprintf(stderr, "emulator: a thread overflowed its stack of %zu bytes\n", kStackBytes);
      std::abort();  // it wrote over the stack of another
    }
  }
  if (!m.error.empty()) {
    throw std::runtime_error("emulator: " + m.error + " of the kernel with shared memory " +
                             short_kernel_name(m.shape.kernel));
  }
  for (const auto& block : m.blocks) check_block(*block);
}

int environment_int(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == 0 ? otherwise : std::atoi(text);
}

}  // namespace

int num_sms() { return std::max(1, environment_int("FASTSHARD_EMULATOR_SMS", 4)); }

bool supports_cooperative_launch() { return environment_int("FASTSHARD_EMULATOR_COOPERATIVE", 1) != 0; }

int max_blocks_per_sm(int threads, int shared_bytes) {
  const int by_shared_memory = kMaxSharedBytesPerSm / (shared_bytes + kReservedSharedBytes);
  return std::min({kMaxBlocksPerSm, kMaxThreadsPerSm / threads, by_shared_memory});
}

void run(const LaunchShape& shape, void (*body)(const void*), const void* argument) {
  const std::lock_guard lock(launch_mutex);
  m.shape = shape;
  m.body = body;
  m.argument = argument;
  m.error.clear();
  m.blocks.clear();
  const char* seed = std::getenv("FASTSHARD_EMULATOR_SEED");
  m.random = seed != nullptr && *seed != 0;
  if (m.random) {
    m.random_state = std::strtoull(seed, nullptr, 10) << 32;
    m.patience = 4u << 3 * random_below(4);  // warps almost in step, or one far ahead of the others
  }

  const dim3 grid = shape.grid;
  const int64_t num_blocks = int64_t(grid.x) * grid.y * grid.z;
  const bool valid_grid = num_blocks > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  if (!valid_grid || shape.threads < 1 || shape.threads > 1024) {
    fail("invalid launch: grid (%u, %u, %u), %d threads", grid.x, grid.y, grid.z, shape.threads);
  }
  if (shape.cooperative && num_blocks > int64_t(num_sms()) * max_blocks_per_sm(shape.threads, shape.shared_bytes)) {
    fail("cooperative launch of %lld blocks, more than are resident together", static_cast<long long>(num_blocks));
  }
  gridDim = grid;
  blockDim = dim3(unsigned(shape.threads));

  const int64_t resident = shape.cooperative ? num_blocks : 1;
  for (int64_t b = 0; b < resident; ++b) m.blocks.push_back(std::make_unique<Block>());
  while (int64_t(m.lanes.size()) < resident * shape.threads) {
    m.lanes.push_back(std::make_unique<Lane>());
    m.lanes.back()->stack = m.stacks.take();
  }
  while (int64_t(m.lanes.size()) > resident * shape.threads) {
    m.stacks.give_back(m.lanes.back()->stack);
    m.lanes.pop_back();
  }

  std::vector<int64_t> order(static_cast<size_t>(num_blocks));
  std::iota(order.begin(), order.end(), int64_t(0));
  if (m.random && !shape.cooperative) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(uint32_t(i))]);
  }
  const FaultHandler fault_handler;
  for (int64_t first = 0; first < num_blocks; first += resident) {
    for (int64_t b = 0; b < resident; ++b) {
      const int64_t i = order[size_t(first + b)];
      const uint3 index{unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
      prepare_block(*m.blocks[size_t(b)], index, &m.lanes[size_t(b * shape.threads)]);
    }
    run_resident_blocks();
  }
}

void fail(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (m.current == nullptr) throw std::runtime_error(std::string("emulator: ") + text);
  m.error = std::string(text) + " in thread " + std::to_string(m.current->thread) + " of block (" +
            std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
  leave_to_host();  // which throws; no fiber of this launch runs again
  __builtin_unreachable();
}

// ---- what threads wait for

void warp_collective(uint32_t mask, const Collective& collective, void* record) {
  Lane& self = *m.current;
  Warp& warp = *self.warp;
  if (!(mask & bit(self.lane))) fail("%s with the mask 0x%x, which lacks the calling lane", collective.name, mask);
  Group& group = warp.groups[std::countr_zero(mask)];
  if (group.arrived == 0) {
    group.mask = mask;
    group.collective = &collective;
  } else if (group.mask != mask || group.collective != &collective) {
    fail("lanes of a warp disagree: %s with the mask 0x%x, others %s with 0x%x", collective.name, mask,
         group.collective->name, group.mask);
  }
  warp.records[self.lane] = record;
  group.arrived |= bit(self.lane);
  self.waits_for = collective.name;
  if (group.arrived == (mask & ~warp.exited)) {
    complete(warp, group);
    if (!m.random) {
      warp.ready &= ~bit(self.lane);
      return;
    }
  }
  reschedule();
}

BarrierResult block_barrier(const char* name, bool predicate) {
  Lane& self = *m.current;
  Block& block = *self.warp->block;
  if (block.arrived == 0) block.barrier = name;
  if (std::strcmp(block.barrier, name) != 0) fail("threads of a block disagree: %s, others %s", name, block.barrier);
  block.votes += predicate;
  self.waits_for = name;
  if (++block.arrived == block.running) complete_barrier(block);
  reschedule();
  return block.result;
}

void poll() {
  if (++m.current->polls % 16 == 0) yield();
}

void yield() {
  Lane& self = *m.current;
  if (++m.idle_yields > kMaxIdleYields) {
    fail("livelock: threads spin and none gets anywhere%s", describe_waiting().c_str());
  }
  self.waits_for = "memory that it polls";
  self.warp->yielded |= bit(self.lane);
  reschedule();
}

void poll_system() {
  // Another GPU is another process, which may need this processor.
  if (m.idle_yields > kIdleYieldsBeforeSleep) {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    m.idle_yields += 9;  // a livelock is one after some 20 s
  }
  yield();
}

void maybe_yield() {
  if (m.random && random_below(2) == 0) yield();
}

// ---- memory

void guard_output(unsigned char* begin, size_t bytes, std::shared_ptr<void> owner) {
  poison(begin, bytes);
  outputs.push_back({begin, bytes, std::move(owner)});
}

const char* fastshard_emulator_check_outputs() {
  static std::string message;
  message.clear();
  for (const Output& output : outputs) {
    if (const char* fault = guard_fault(output.begin, output.bytes)) {
      message = std::string("emulator: a write ") + fault + " of an output of " + std::to_string(output.bytes);
      message += " bytes";
    }
  }
  outputs.clear();
  return message.empty() ? nullptr : message.c_str();
}

void* shared_storage(size_t bytes, size_t alignment) {
  if (bytes > size_t(m.shape.shared_bytes)) {
    fail("the kernel's SharedStorage has %zu bytes, its launch %d", bytes, m.shape.shared_bytes);
  }
  if (alignment > 128) fail("SharedStorage is aligned to %zu bytes, shared memory to 128", alignment);
  return m.current->warp->block->shared;
}

uint32_t shared_address(const void* pointer) {
  const Block& block = *m.current->warp->block;
  const auto* byte = static_cast<const unsigned char*>(pointer);
  if (byte < block.shared || byte > block.shared + m.shape.shared_bytes) {
    fail("shared_address of a pointer outside the shared memory of the block");
  }
  return kSharedWindow + uint32_t(byte - block.shared);
}

unsigned char* shared_pointer(uint32_t address, uint32_t bytes, const char* instruction) {
  const long long offset = static_cast<long long>(address) - kSharedWindow;
  if (address % bytes != 0) fail("%s: byte %lld of shared memory is not aligned to %u", instruction, offset, bytes);
  if (offset < 0 || offset + bytes > m.shape.shared_bytes) {
    fail("%s: byte %lld is outside the %d of shared memory", instruction, offset, m.shape.shared_bytes);
  }
  return m.current->warp->block->shared + offset;
}

namespace {

void land(const Copy& copy) {
  if (copy.global == nullptr) {
    std::memset(copy.shared, 0, copy.bytes);
  } else {
    std::memcpy(copy.shared, copy.global, copy.bytes);
  }
}

}  // namespace

void copy_async(unsigned char* shared, const void* global, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail("cp.async: the global address %p is not aligned to %u bytes", global, bytes);
  }
  const Copy copy{shared, global, bytes};
  if (m.random && random_below(2) == 0) return land(copy);
  Lane& self = *m.current;
  self.copies.push_back(copy);
  ++self.uncommitted;
}

void copy_async_commit() {
  Lane& self = *m.current;
  self.groups.push_back(self.uncommitted);
  self.uncommitted = 0;
}

void copy_async_wait(int pending) {
  Lane& self = *m.current;
  if (int(self.groups.size()) > pending) {
    const auto end = self.groups.end() - pending;
    const auto landed = self.copies.begin() + std::accumulate(self.groups.begin(), end, 0u);
    for (auto copy = self.copies.begin(); copy != landed; ++copy) land(*copy);
    self.copies.erase(self.copies.begin(), landed);
    self.groups.erase(self.groups.begin(), end);
  }
  maybe_yield();
}

}  // namespace fastshard::simt

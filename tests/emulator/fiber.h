// Fibers: contexts of one OS thread that switch to each other by hand.
//
// x86-64 has its own switch, six pushes and pops; elsewhere ucontext does it, about fifty times slower because it saves
// the signal mask by a system call.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(FS_EMULATOR_UCONTEXT)

namespace fastshard::simt {

struct Context {
  void* stack_pointer;
};

// Saves the callee-saved registers on the current stack and takes up those on the other one.
extern "C" void fs_emulator_switch(void** save_stack_pointer, void* stack_pointer) noexcept(false);
asm(R"(
  .text
  .hidden fs_emulator_switch
  .type fs_emulator_switch, @function
fs_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fs_emulator_switch, .-fs_emulator_switch
)");

// The first switch to `context` calls entry() on that stack; entry never returns.
inline void prepare(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15));
  *--top = nullptr;  // the return address of entry, which keeps its frame 16-byte aligned
  *--top = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - 6;  // six registers, any values
}

inline void switch_context(Context& from, Context& to) { fs_emulator_switch(&from.stack_pointer, to.stack_pointer); }

}  // namespace fastshard::simt

#else

#include <ucontext.h>

namespace fastshard::simt {

struct Context {
  ucontext_t context;
};

inline void prepare(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

}  // namespace fastshard::simt

#endif

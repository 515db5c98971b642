// Switches between stacks. Part of runtime.cpp.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace {

constexpr size_t STACK = 128 * 1024;

#if defined(__x86_64__)
struct Context { void* sp; };
#if defined(__APPLE__)
#define ZS_SYM "_zs_switch"
#else
#define ZS_SYM "zs_switch"
#endif
extern "C" void zs_switch(void** save, void* to);
asm(".text\n.p2align 4\n.globl " ZS_SYM "\n" ZS_SYM ":\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
inline void change(Context& from, Context& to) { zs_switch(&from.sp, to.sp); }
void prepare(Context& c, uint8_t* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + STACK) - 1;
  *top = nullptr;  // where `entry`, which never returns, would return to; 8 below a multiple of 16 as after a call
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;        // the six registers that zs_switch takes back
  memset(top, 0, 6 * sizeof(void*));
  c.sp = top;
}
#else
struct Context { ucontext_t c; };
inline void change(Context& from, Context& to) { swapcontext(&from.c, &to.c); }
void prepare(Context& c, uint8_t* stack, void (*entry)()) {
  getcontext(&c.c);
  c.c.uc_stack.ss_sp = stack;
  c.c.uc_stack.ss_size = STACK;
  c.c.uc_link = nullptr;
  makecontext(&c.c, entry, 0);
}
#endif

}  // namespace

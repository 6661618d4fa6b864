// cu_switch(save, to): store the callee-saved registers on this stack, the stack pointer in *save, continue at `to`.
// About twenty instructions for each of the three calling conventions. ucontext would do a system call each time.
#pragma once

#define CU_QUOTE_(x) #x
#define CU_QUOTE(x) CU_QUOTE_(x)
#define SWITCH_SYMBOL CU_QUOTE(__USER_LABEL_PREFIX__) "cu_switch"

extern "C" void cu_switch(void** save, void* to);

#if defined(__x86_64__) && !defined(_WIN32)

asm(".text\n.p2align 4\n.globl " SWITCH_SYMBOL "\n" SWITCH_SYMBOL ":\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
enum { SAVED_BYTES = 6 * 8 };

#elif defined(__x86_64__)          // Windows also keeps rdi, rsi and xmm6 to xmm15

asm(".text\n.p2align 4\n.globl " SWITCH_SYMBOL "\n" SWITCH_SYMBOL ":\n"
    "pushq %rbp\npushq %rbx\npushq %rdi\npushq %rsi\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nsubq $168,%rsp\n"
    "movups %xmm6,(%rsp)\nmovups %xmm7,16(%rsp)\nmovups %xmm8,32(%rsp)\nmovups %xmm9,48(%rsp)\n"
    "movups %xmm10,64(%rsp)\nmovups %xmm11,80(%rsp)\nmovups %xmm12,96(%rsp)\nmovups %xmm13,112(%rsp)\n"
    "movups %xmm14,128(%rsp)\nmovups %xmm15,144(%rsp)\n"
    "movq %rsp,(%rcx)\nmovq %rdx,%rsp\n"
    "movups (%rsp),%xmm6\nmovups 16(%rsp),%xmm7\nmovups 32(%rsp),%xmm8\nmovups 48(%rsp),%xmm9\n"
    "movups 64(%rsp),%xmm10\nmovups 80(%rsp),%xmm11\nmovups 96(%rsp),%xmm12\nmovups 112(%rsp),%xmm13\n"
    "movups 128(%rsp),%xmm14\nmovups 144(%rsp),%xmm15\n"
    "addq $168,%rsp\npopq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rsi\npopq %rdi\npopq %rbx\npopq %rbp\nret\n");
enum { SAVED_BYTES = 8 * 8 + 168 };

#elif defined(__aarch64__)

asm(".text\n.p2align 4\n.globl " SWITCH_SYMBOL "\n" SWITCH_SYMBOL ":\n"
    "sub sp,sp,#160\n"
    "stp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\n"
    "stp x25,x26,[sp,#48]\nstp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\n"
    "stp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\nstp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\n"
    "ldp x25,x26,[sp,#48]\nldp x27,x28,[sp,#64]\nldp x29,x30,[sp,#80]\n"
    "ldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
    "add sp,sp,#160\nret\n");
enum { SAVED_BYTES = 160, SAVED_RETURN = 11 };      // x30 is the twelfth register stored

#else
#error "no fiber switch for this processor"
#endif

// A stack that cu_switch can enter: the saved registers are zero and the return address is `start`.
static void* fresh_stack(char* top, void (*start)()) {
  char* sp = (char*)((uintptr_t)top & ~(uintptr_t)63) - 64;
#if defined(__x86_64__)
  *(void**)(sp -= 8) = 0;                            // a return address for nobody: keeps the alignment of a call
  *(void**)(sp -= 8) = (void*)start;
  sp -= SAVED_BYTES;
  memset(sp, 0, SAVED_BYTES);
#else
  sp -= SAVED_BYTES;
  memset(sp, 0, SAVED_BYTES);
  ((void**)sp)[SAVED_RETURN] = (void*)start;
#endif
  return sp;
}

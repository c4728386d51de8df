// Holds a process, and those that it starts, to AVX2: a benchmark then finds the products of a CPU without AVX-512 in
// all libraries (oneDNN, MKL, XNNPACK, Eigen), where XLA's --xla_cpu_max_isa bounds XLA's own loops alone. Linux on an
// Intel CPU that can refuse CPUID (`cpuid_fault` in /proc/cpuinfo):
//
//   cc -O2 -shared -fPIC -o /tmp/avx2.so benchmarks/avx2.c
//   LD_PRELOAD=/tmp/avx2.so python benchmarks/rl.py --peer=trl
//
// CPUID is refused to the process; each time a library asks, the handler of the signal answers in its place, without
// the bits of AVX-512 and AMX. Clocks and caches stay those of the machine.
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

// Of leaf 7: AVX-512's parts, AMX's tiles. (Intel's manual, volume 2A, CPUID.)
enum { EBX = 0xDC230000u, ECX = 0x5842u, EDX = 0x03C0010Cu, EAX_OF_SUBLEAF_1 = 0x00200020u };

static void answer(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *at = (const unsigned char *)registers[REG_RIP];
  (void)info;
  if (at[0] != 0x0F || at[1] != 0xA2) {  // no CPUID: a fault of the program's own
    signal(number, SIG_DFL);
    return;
  }
  unsigned leaf = registers[REG_RAX], sub = registers[REG_RCX], a, b, c, d;
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
  __cpuid_count(leaf, sub, a, b, c, d);
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
  if (leaf == 7 && sub == 0) b &= ~EBX, c &= ~ECX, d &= ~EDX;
  if (leaf == 7 && sub == 1) a &= ~EAX_OF_SUBLEAF_1;
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGSEGV, &action, 0);
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
}

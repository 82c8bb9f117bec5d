// The dot product of the avx2_vnni level where the processor lacks it: each one is met as an illegal instruction and done
// here, so that the level's results can be checked on any x86 machine with Linux. Slow; shows results, never speed.
#pragma once
#if defined(__x86_64__) && defined(__linux__)
#include <csignal>
#include <cstdint>
#include <cstring>
#include <ucontext.h>

namespace check {

// Where the system keeps registers while a handler runs, in the standard form of XSAVE.
constexpr int kLowerHalves = 160, kHeader = 512, kUpperHalves = 576;
constexpr uint64_t kHasUpperHalves = 1 << 2;

struct Registers {
  char* state;
  void read(int i, uint8_t* out) const {
    memcpy(out, state + kLowerHalves + 16 * i, 16);
    memcpy(out + 16, state + kUpperHalves + 16 * i, 16);
  }
  void write(int i, const uint8_t* in) const {
    memcpy(state + kLowerHalves + 16 * i, in, 16);
    memcpy(state + kUpperHalves + 16 * i, in + 16, 16);
  }
};

// VPDPBUSD of three YMM registers, VEX.256.66.0F38.W0 50 /r: bytes without sign times bytes with sign, four to a sum.
inline void on_illegal_instruction(int, siginfo_t*, void* context) {
  mcontext_t& machine = ((ucontext_t*)context)->uc_mcontext;
  const uint8_t* code = (const uint8_t*)machine.gregs[REG_RIP];
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x87) != 5 || code[3] != 0x50 || code[4] < 0xc0) {
    signal(SIGILL, SIG_DFL);  // another instruction: met again, it ends the program
    return;
  }
  const int target = (code[4] >> 3 & 7) | (code[1] & 0x80 ? 0 : 8), first = ~code[2] >> 3 & 15;
  const int second = (code[4] & 7) | (code[1] & 0x20 ? 0 : 8);
  const Registers registers{(char*)machine.fpregs};
  uint64_t present;
  memcpy(&present, registers.state + kHeader, 8);
  if (!(present & kHasUpperHalves)) memset(registers.state + kUpperHalves, 0, 256);
  present |= kHasUpperHalves;
  memcpy(registers.state + kHeader, &present, 8);
  int32_t sums[8];
  uint8_t a[32];
  int8_t b[32];
  registers.read(target, (uint8_t*)sums);
  registers.read(first, a);
  registers.read(second, (uint8_t*)b);
  for (int i = 0; i < 32; i++) sums[i / 4] = int32_t(uint32_t(sums[i / 4]) + uint32_t(int32_t(a[i]) * b[i]));
  registers.write(target, (const uint8_t*)sums);
  machine.gregs[REG_RIP] += 5;
}

inline void emulate_vnni() {
  struct sigaction action {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace check
#endif

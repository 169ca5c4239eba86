// The floating-point mode that kernels run in.
#pragma once

#include <cstdint>

namespace nvfp4::cpu {

// While it lives, its thread rounds to nearest, keeps subnormal numbers and takes no trap. A process can set other
// modes (torch.set_flush_denormal, a library linked with -ffast-math), but for some of its threads only: what a row
// gives would depend on the thread that has it, and subnormal fp16 values, up to 6e-5, would be lost.
class StandardFloatMode {
 public:
  StandardFloatMode() : saved_(read()) {
    if ((saved_ & ~kStatus) != kStandard) write(kStandard);
  }
  ~StandardFloatMode() {
    if ((saved_ & ~kStatus) != kStandard) write(saved_);
  }
  StandardFloatMode(const StandardFloatMode&) = delete;
  StandardFloatMode& operator=(const StandardFloatMode&) = delete;

 private:
#if defined(__x86_64__)
  using Register = uint32_t;                 // MXCSR
  static constexpr Register kStatus = 0x3f;  // exceptions that have happened
  static constexpr Register kStandard = 0x1f80;

  static Register read() {
    Register value;
    asm volatile("stmxcsr %0" : "=m"(value) : : "memory");
    return value;
  }
  static void write(Register value) { asm volatile("ldmxcsr %0" : : "m"(value) : "memory"); }
#elif defined(__aarch64__)
  using Register = uint64_t;  // FPCR
  static constexpr Register kStatus = 0;
  static constexpr Register kStandard = 0;

  static Register read() {
    Register value;
    asm volatile("mrs %0, fpcr" : "=r"(value) : : "memory");
    return value;
  }
  static void write(Register value) { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
#else
  using Register = uint32_t;
  static constexpr Register kStatus = 0;
  static constexpr Register kStandard = 0;

  static Register read() { return kStandard; }
  static void write(Register) {}
#endif

  Register saved_;
};

}  // namespace nvfp4::cpu

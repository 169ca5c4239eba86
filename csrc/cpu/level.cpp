#include "level.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "level_kernels.h"

namespace nvfp4::cpu {
namespace {

constexpr const char* kVariable = "TORCH_NVFP4_CPU_LEVEL";
constexpr Level kLevels[] = {Level::portable, Level::avx2, Level::avx512, Level::amx};

#if defined(__x86_64__)
// Whether the processor has AMX-BF16 and the kernel lets this process use tiles: it asks, because a thread that uses
// them needs 8 KiB more of saved state (Linux, Documentation/arch/x86/xstate.rst). Asking again is allowed.
bool has_amx() {
#ifdef NVFP4_EMULATE_AMX
  return true;
#else
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

Level detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512) return has_amx() ? Level::amx : Level::avx512;
  if (avx2) return Level::avx2;
#endif
  return Level::portable;
}

}  // namespace

const char* level_name(Level level) {
  switch (level) {
    case Level::amx:
      return "amx";
    case Level::avx512:
      return "avx512";
    case Level::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

Level detected_level() {
  static const Level level = detect();
  return level;
}

// detected_level() unless TORCH_NVFP4_CPU_LEVEL names another one. Throws std::runtime_error when that variable holds
// an unknown name or a level that cannot run here.
int active_level() {
  const char* variable = std::getenv(kVariable);
  const std::string wanted = variable == nullptr ? "" : variable;
  if (wanted.empty()) return static_cast<int>(detected_level());
  const std::string best = level_name(detected_level());
  for (Level level : kLevels) {
    if (wanted != level_name(level)) continue;
    if (level <= detected_level()) return static_cast<int>(level);
    throw std::runtime_error(std::string(kVariable) + ": expected a level that this processor can run (at most " +
                             best + "), got " + wanted + "; unset the variable or choose a lower level");
  }
  throw std::runtime_error(std::string(kVariable) + ": expected one of amx, avx512, avx2, portable, got '" + wanted +
                           "'; unset the variable to use " + best);
}

const LevelKernels& kernels_of(const Context& context) {
  switch (static_cast<Level>(context.level)) {
#if defined(__x86_64__)
    case Level::amx:
      return kAmxKernels;
    case Level::avx512:
      return kAvx512Kernels;
    case Level::avx2:
      return kAvx2Kernels;
#endif
    default:
      return kPortableKernels;
  }
}

}  // namespace nvfp4::cpu

// For `torch-nvfp4 info`, which reads it through ctypes: an op cannot return a string.
extern "C" __attribute__((visibility("default"))) const char* nvfp4_cpu_detected_level() {
  return nvfp4::cpu::level_name(nvfp4::cpu::detected_level());
}

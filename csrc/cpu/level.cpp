#include "level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "level_kernels.h"

namespace nvfp4::cpu {
namespace {

constexpr const char* kVariable = "TORCH_NVFP4_CPU_LEVEL";
constexpr Level kLevels[] = {Level::portable, Level::avx2, Level::avx512};

Level detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512) return Level::avx512;
  if (avx2) return Level::avx2;
#endif
  return Level::portable;
}

}  // namespace

const char* level_name(Level level) {
  switch (level) {
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
  throw std::runtime_error(std::string(kVariable) + ": expected one of avx512, avx2, portable, got '" + wanted +
                           "'; unset the variable to use " + best);
}

const LevelKernels& kernels_of(const Context& context) {
  switch (static_cast<Level>(context.level)) {
#if defined(__x86_64__)
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

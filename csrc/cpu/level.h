// The instruction level that the CPU kernels run at.
#pragma once

namespace nvfp4::cpu {

enum class Level : int { portable = 0, avx2 = 1, avx512 = 2 };

// "portable", "avx2" or "avx512".
const char* level_name(Level level);

// The highest level of this processor and this build.
Level detected_level();

// The level that an op called now runs at: detected_level() unless TORCH_NVFP4_CPU_LEVEL names another one.
// Throws std::runtime_error when that variable holds an unknown name or a level that cannot run here.
Level active_level();

}  // namespace nvfp4::cpu

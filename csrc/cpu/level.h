// The instruction level that the CPU kernels run at.
#pragma once

namespace nvfp4::cpu {

enum class Level : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// "portable", "avx2", "avx512" or "amx".
const char* level_name(Level level);

// The highest level of this processor and this build.
Level detected_level();

}  // namespace nvfp4::cpu

// wgmma m64nNk16 of 16-bit types and m64nNk32 of E4M3, A in registers, B in shared memory (K-major, 128-byte swizzle),
// fp32 accumulators. One instruction per function; N is every multiple of 8 up to 192. A step is 32 bytes of k.
//
// Accumulator d[4 i + {0, 1, 2, 3}] of lane l (r = l / 4, t = l % 4) of warp w is (row 16 w + {r, r, r + 8, r + 8},
// column 8 i + 2 t + {0, 1, 0, 1}).
#pragma once

#include "../common.cuh"

namespace nvfp4::cuda::ptx {

// Orders register accesses of this warpgroup before its next wgmma.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kGroups committed groups are in flight.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// The descriptor of MMA step `step` of the B tile at base + offset, which is 1024-byte aligned: rows of 128 bytes, 8
// rows per atom, 32 bytes of a row per step. Only the low half varies, by one addition.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t base, uint32_t offset, int step) {
  constexpr uint32_t kAtomStride = 1024 / 16;
  constexpr uint32_t kSwizzle128 = 1u << 30;
  const uint32_t low = base / 16 + (offset / 16 + (1u << 16) + 2 * step);
  return uint64_t{kSwizzle128 | kAtomStride} << 32 | low;
}

struct e4m3;  // names the instructions of E4M3, four values in a word

template <class T, int N>
struct Wgmma;

// clang-format off
#define NVFP4_D4 "%0,%1,%2,%3"
#define NVFP4_D8 NVFP4_D4 ",%4,%5,%6,%7"
#define NVFP4_D12 NVFP4_D8 ",%8,%9,%10,%11"
#define NVFP4_D16 NVFP4_D12 ",%12,%13,%14,%15"
#define NVFP4_D20 NVFP4_D16 ",%16,%17,%18,%19"
#define NVFP4_D24 NVFP4_D20 ",%20,%21,%22,%23"
#define NVFP4_D28 NVFP4_D24 ",%24,%25,%26,%27"
#define NVFP4_D32 NVFP4_D28 ",%28,%29,%30,%31"
#define NVFP4_D36 NVFP4_D32 ",%32,%33,%34,%35"
#define NVFP4_D40 NVFP4_D36 ",%36,%37,%38,%39"
#define NVFP4_D44 NVFP4_D40 ",%40,%41,%42,%43"
#define NVFP4_D48 NVFP4_D44 ",%44,%45,%46,%47"
#define NVFP4_D52 NVFP4_D48 ",%48,%49,%50,%51"
#define NVFP4_D56 NVFP4_D52 ",%52,%53,%54,%55"
#define NVFP4_D60 NVFP4_D56 ",%56,%57,%58,%59"
#define NVFP4_D64 NVFP4_D60 ",%60,%61,%62,%63"
#define NVFP4_D68 NVFP4_D64 ",%64,%65,%66,%67"
#define NVFP4_D72 NVFP4_D68 ",%68,%69,%70,%71"
#define NVFP4_D76 NVFP4_D72 ",%72,%73,%74,%75"
#define NVFP4_D80 NVFP4_D76 ",%76,%77,%78,%79"
#define NVFP4_D84 NVFP4_D80 ",%80,%81,%82,%83"
#define NVFP4_D88 NVFP4_D84 ",%84,%85,%86,%87"
#define NVFP4_D92 NVFP4_D88 ",%88,%89,%90,%91"
#define NVFP4_D96 NVFP4_D92 ",%92,%93,%94,%95"
#define NVFP4_O4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define NVFP4_O8 NVFP4_O4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define NVFP4_O12 NVFP4_O8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define NVFP4_O16 NVFP4_O12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define NVFP4_O20 NVFP4_O16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define NVFP4_O24 NVFP4_O20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define NVFP4_O28 NVFP4_O24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define NVFP4_O32 NVFP4_O28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define NVFP4_O36 NVFP4_O32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define NVFP4_O40 NVFP4_O36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define NVFP4_O44 NVFP4_O40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define NVFP4_O48 NVFP4_O44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define NVFP4_O52 NVFP4_O48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define NVFP4_O56 NVFP4_O52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define NVFP4_O60 NVFP4_O56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define NVFP4_O64 NVFP4_O60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define NVFP4_O68 NVFP4_O64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define NVFP4_O72 NVFP4_O68, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define NVFP4_O76 NVFP4_O72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define NVFP4_O80 NVFP4_O76, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define NVFP4_O84 NVFP4_O80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define NVFP4_O88 NVFP4_O84, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define NVFP4_O92 NVFP4_O88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define NVFP4_O96 NVFP4_O92, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])

// D = N / 2 accumulators; A0..A3, DESC are the operand numbers that follow them.
#define NVFP4_WGMMA(T, TYPES, TRANSPOSED, N, D, A0, A1, A2, A3, DESC)                                                              \
  template <>                                                                                                         \
  struct Wgmma<T, N> {                                                                                                \
    static __device__ __forceinline__ void multiply(float (&d)[D], const uint32_t (&a)[4], uint64_t descriptor) {     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N TYPES                                    \
                   " {" NVFP4_D##D "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #DESC ", 1, 1, 1" TRANSPOSED ";"                 \
                   : NVFP4_O##D                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));                                    \
    }                                                                                                                 \
  };
#define NVFP4_WGMMA_ALL(N, D, A0, A1, A2, A3, DESC)                                 \
  NVFP4_WGMMA(bf16, "k16.f32.bf16.bf16", ", 0", N, D, A0, A1, A2, A3, DESC)         \
  NVFP4_WGMMA(fp16, "k16.f32.f16.f16", ", 0", N, D, A0, A1, A2, A3, DESC)           \
  NVFP4_WGMMA(e4m3, "k32.f32.e4m3.e4m3", "", N, D, A0, A1, A2, A3, DESC)
NVFP4_WGMMA_ALL(8, 4, 4, 5, 6, 7, 8)
NVFP4_WGMMA_ALL(16, 8, 8, 9, 10, 11, 12)
NVFP4_WGMMA_ALL(24, 12, 12, 13, 14, 15, 16)
NVFP4_WGMMA_ALL(32, 16, 16, 17, 18, 19, 20)
NVFP4_WGMMA_ALL(40, 20, 20, 21, 22, 23, 24)
NVFP4_WGMMA_ALL(48, 24, 24, 25, 26, 27, 28)
NVFP4_WGMMA_ALL(56, 28, 28, 29, 30, 31, 32)
NVFP4_WGMMA_ALL(64, 32, 32, 33, 34, 35, 36)
NVFP4_WGMMA_ALL(72, 36, 36, 37, 38, 39, 40)
NVFP4_WGMMA_ALL(80, 40, 40, 41, 42, 43, 44)
NVFP4_WGMMA_ALL(88, 44, 44, 45, 46, 47, 48)
NVFP4_WGMMA_ALL(96, 48, 48, 49, 50, 51, 52)
NVFP4_WGMMA_ALL(104, 52, 52, 53, 54, 55, 56)
NVFP4_WGMMA_ALL(112, 56, 56, 57, 58, 59, 60)
NVFP4_WGMMA_ALL(120, 60, 60, 61, 62, 63, 64)
NVFP4_WGMMA_ALL(128, 64, 64, 65, 66, 67, 68)
NVFP4_WGMMA_ALL(136, 68, 68, 69, 70, 71, 72)
NVFP4_WGMMA_ALL(144, 72, 72, 73, 74, 75, 76)
NVFP4_WGMMA_ALL(152, 76, 76, 77, 78, 79, 80)
NVFP4_WGMMA_ALL(160, 80, 80, 81, 82, 83, 84)
NVFP4_WGMMA_ALL(168, 84, 84, 85, 86, 87, 88)
NVFP4_WGMMA_ALL(176, 88, 88, 89, 90, 91, 92)
NVFP4_WGMMA_ALL(184, 92, 92, 93, 94, 95, 96)
NVFP4_WGMMA_ALL(192, 96, 96, 97, 98, 99, 100)
#undef NVFP4_WGMMA_ALL
#undef NVFP4_WGMMA
#undef NVFP4_D4
#undef NVFP4_O4
#undef NVFP4_D8
#undef NVFP4_O8
#undef NVFP4_D12
#undef NVFP4_O12
#undef NVFP4_D16
#undef NVFP4_O16
#undef NVFP4_D20
#undef NVFP4_O20
#undef NVFP4_D24
#undef NVFP4_O24
#undef NVFP4_D28
#undef NVFP4_O28
#undef NVFP4_D32
#undef NVFP4_O32
#undef NVFP4_D36
#undef NVFP4_O36
#undef NVFP4_D40
#undef NVFP4_O40
#undef NVFP4_D44
#undef NVFP4_O44
#undef NVFP4_D48
#undef NVFP4_O48
#undef NVFP4_D52
#undef NVFP4_O52
#undef NVFP4_D56
#undef NVFP4_O56
#undef NVFP4_D60
#undef NVFP4_O60
#undef NVFP4_D64
#undef NVFP4_O64
#undef NVFP4_D68
#undef NVFP4_O68
#undef NVFP4_D72
#undef NVFP4_O72
#undef NVFP4_D76
#undef NVFP4_O76
#undef NVFP4_D80
#undef NVFP4_O80
#undef NVFP4_D84
#undef NVFP4_O84
#undef NVFP4_D88
#undef NVFP4_O88
#undef NVFP4_D92
#undef NVFP4_O92
#undef NVFP4_D96
#undef NVFP4_O96
// clang-format on

}  // namespace nvfp4::cuda::ptx

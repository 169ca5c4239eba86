// The order of codes that decode_fp8.cuh decodes, from that of decode.cuh. Scales and places stay.
#include <algorithm>

#include "../device/decode.cuh"
#include "../device/decode_fp8.cuh"
#include "../launch.h"

namespace nvfp4::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    order_kernel(const uint8_t* packed, uint8_t* ordered, int64_t experts, int64_t expert_bytes, int64_t used) {
  // The 16 codes of a lane's row, or 8 scales; an expert may end in bytes of no block.
  constexpr int kUnit = 8;
  const int64_t units = expert_bytes / kUnit;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < experts * units; i += threads) {
    const int64_t at = i % units * kUnit;
    const int64_t byte = i / units * expert_bytes + at;
    uint2 v = *reinterpret_cast<const uint2*>(packed + byte);
    if (at < used && at % kBlockBytes < kBlockCodeBytes) {
      uint32_t pair[8];
      spread_codes(v.x, v.y, pair);
      uint32_t word[2] = {};
#pragma unroll
      for (int c = 0; c < 16; ++c) {
        const uint32_t code = pair_code(pair[c / 2], c % 2);
        word[c / 8] |= (code & 7) << 4 * (c % 8) | code >> 3 << fp8_sign_bit(c % 8);
      }
      v = make_uint2(word[0], word[1]);
    }
    *reinterpret_cast<uint2*>(ordered + byte) = v;
  }
}

}  // namespace

void order_for_fp8(const uint8_t* packed, uint8_t* ordered, int64_t experts, int64_t expert_bytes, int64_t n, int64_t k,
                   const Context& context) {
  const int64_t used = int64_t{panels_of(n)} * k_blocks_of(k) * kBlockBytes;
  const int64_t ctas = std::clamp<int64_t>(ceil_div<int64_t>(experts * expert_bytes, 8 * kThreads), 1, 1 << 20);
  order_kernel<<<static_cast<unsigned>(ctas), kThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(
      packed, ordered, experts, expert_bytes, used);
  check(cudaGetLastError(), "order_for_fp8");
}

}  // namespace nvfp4::cuda

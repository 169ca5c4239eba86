// Canonical codes and scales <-> the packed format of device/decode.cuh. One thread moves one lane's share of a block.
#include <algorithm>

#include "../device/decode.cuh"
#include "../device/scheduler.cuh"
#include "../launch.h"

namespace nvfp4::cuda {
namespace {

constexpr int kThreads = 256;

// The two rows of thread `i`'s share, and where it lies in the packed expert.
struct Share {
  int64_t expert;
  int64_t row[2];  // canonical rows, or -1 where padding is
  int64_t group;   // canonical scale group of k, or -1
  int64_t codes_at;
  int64_t scales_at;
};

__device__ __forceinline__ Share share_of(int64_t i, int64_t n, int64_t k, bool gated) {
  const int64_t k_blocks = ceil_div<int64_t>(k, kBlockK);
  const int64_t panels = ceil_div<int64_t>(n, kBlockRows);
  const int t = i % 4;
  const int64_t block_of_panel =
      i / 4 % k_blocks;  // quads of consecutive threads walk along k: coalesced canonical rows
  const int64_t rest = i / 4 / k_blocks;
  const int r = rest % 8;
  const int tile = rest / 8 % 4;
  const int64_t panel = rest / 32 % panels;
  const int lane = r * 4 + t;
  Share share;
  share.expert = rest / 32 / panels;
  for (int half = 0; half < 2; ++half) {
    const int64_t row = gated ? panel * 32 + tile * 8 + r : panel * 64 + tile * 16 + r + 8 * half;
    const int64_t limit = gated ? n / 2 : n;
    share.row[half] = row < limit ? row + (gated && half == 1 ? n / 2 : 0) : -1;
  }
  share.group = block_of_panel * 4 + t;
  if (share.group * 16 >= k) share.group = -1;
  const int64_t block = (panel * k_blocks + block_of_panel) * kBlockBytes;
  share.codes_at = block + codes_at(tile, lane);
  share.scales_at = block + scales_at(tile, lane);
  return share;
}

__device__ __forceinline__ int64_t shares(int64_t experts, int64_t n, int64_t k) {
  return experts * ceil_div<int64_t>(n, kBlockRows) * ceil_div<int64_t>(k, kBlockK) * 128;
}

// Eight bytes, wherever they stand.
__device__ __forceinline__ uint2 load_codes(const uint8_t* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(uint2) == 0) return *reinterpret_cast<const uint2*>(from);
  uint2 codes = make_uint2(0, 0);
  for (int i = 0; i < 4; ++i) {
    codes.x |= static_cast<uint32_t>(from[i]) << (8 * i);
    codes.y |= static_cast<uint32_t>(from[4 + i]) << (8 * i);
  }
  return codes;
}

__global__ void __launch_bounds__(kThreads) pack_kernel(PackArgs args) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t self = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t total = shares(args.experts, args.n, args.k);
  for (int64_t i = self; i < total; i += threads) {
    const Share share = share_of(i, args.n, args.k, args.gated);
    uint32_t word[4] = {};
    uint32_t scales = 0;
    for (int half = 0; half < 2; ++half) {
      if (share.row[half] < 0 || share.group < 0) continue;
      const int64_t group = (share.expert * args.n + share.row[half]) * (args.k / 16) + share.group;
      const uint2 codes = load_codes(args.weight + group * 8);
      uint32_t pair[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t byte = ((j < 4 ? codes.x : codes.y) >> (j % 4 * 8)) & 0xFF;
        pair[j] = spread_pair(byte & 15, byte >> 4);
      }
      const uint2 words = gather_codes(pair);
      word[2 * half] = words.x;
      word[2 * half + 1] = words.y;
      scales |= static_cast<uint32_t>(args.scale[group]) << (8 * half);
    }
    uint8_t* expert = args.packed + share.expert * args.expert_bytes;
    *reinterpret_cast<uint4*>(expert + share.codes_at) = make_uint4(word[0], word[1], word[2], word[3]);
    *reinterpret_cast<uint16_t*>(expert + share.scales_at) = static_cast<uint16_t>(scales);
  }
  const int64_t used = total / args.experts * (kBlockBytes / 128);
  const int64_t spare = args.expert_bytes - used;
  for (int64_t i = self; i < args.experts * spare; i += threads) {
    args.packed[i / spare * args.expert_bytes + used + i % spare] = 0;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(UnpackArgs args) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t total = shares(args.experts, args.n, args.k);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += threads) {
    const Share share = share_of(i, args.n, args.k, args.gated);
    const uint8_t* expert = args.packed + share.expert * args.expert_bytes;
    const uint4 words = *reinterpret_cast<const uint4*>(expert + share.codes_at);
    const uint32_t scales = *reinterpret_cast<const uint16_t*>(expert + share.scales_at);
    for (int half = 0; half < 2; ++half) {
      if (share.row[half] < 0 || share.group < 0) continue;
      uint32_t pair[8];
      half == 0 ? spread_codes(words.x, words.y, pair) : spread_codes(words.z, words.w, pair);
      uint32_t codes[2] = {};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        codes[j / 4] |= (pair_code(pair[j], 0) | pair_code(pair[j], 1) << 4) << (j % 4 * 8);
      }
      const int64_t group = (share.expert * args.n + share.row[half]) * (args.k / 16) + share.group;
      *reinterpret_cast<uint2*>(args.weight + group * 8) = make_uint2(codes[0], codes[1]);
      args.scale[group] = static_cast<uint8_t>(scales >> (8 * half));
    }
  }
}

unsigned blocks_for(int64_t experts, int64_t n, int64_t k) {
  const int64_t total = experts * ceil_div<int64_t>(n, kBlockRows) * ceil_div<int64_t>(k, kBlockK) * 128;
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div<int64_t>(total, kThreads), 1, 1 << 20));
}

}  // namespace

void pack(const PackArgs& args, const Context& context) {
  if (args.experts == 0 || args.n == 0 || args.k == 0) return;
  pack_kernel<<<blocks_for(args.experts, args.n, args.k), kThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(
      args);
  check(cudaGetLastError(), "pack");
}

void unpack(const UnpackArgs& args, const Context& context) {
  if (args.experts == 0 || args.n == 0 || args.k == 0) return;
  unpack_kernel<<<blocks_for(args.experts, args.n, args.k), kThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(
      args);
  check(cudaGetLastError(), "unpack");
}

}  // namespace nvfp4::cuda

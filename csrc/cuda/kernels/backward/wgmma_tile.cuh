// SM90's tile of both GEMMs of the derivatives: up to 128 tokens times 256 rows or columns of a weight, 64 of each of
// four warpgroups. Weights are decoded into the registers of wgmma's A operand, tokens are its B operand.
//
// A product with stored rows wants a block's transpose. An MMA step reduces over 16 of its rows then, and the warp that
// has the k positions of decoding's step w transposes the four 8x8 matrices of each fragment in registers.
//
// Per CTA and block each warpgroup reads 2304 bytes of weights and multiplies them with all tokens: with 128 tokens the
// tensor cores take 1024 cycles for what decoding takes about 500 issue slots of each scheduler, and shared memory
// about 800 cycles.
#pragma once

#include "../../device/epilogue.cuh"
#include "../../device/gather.cuh"
#include "../../device/ptx/mma.cuh"
#include "../../device/ptx/wgmma.cuh"
#include "tile.cuh"

namespace nvfp4::cuda::wgmma_backward {

constexpr int kGroups = 4;  // warpgroups
constexpr int kThreads = kGroups * 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTokens = static_cast<int>(BackwardTile::tall);
constexpr int kTileRows = kGroups * kBlockRows;  // of the weight, or columns of its transpose
constexpr int kStepBytes = kGroups * kBlockBytes;
constexpr int kRingBytes = 200 * 1024;

// A ring's stages for N tokens: with few tokens a step is short, and more of them have to be on their way.
template <int N>
struct RingOf {
  static constexpr int kTokenBytes = N * kRowBytes;
  static constexpr int kStageBytes = kTokenBytes + kStepBytes;
  static constexpr int kStages = kRingBytes / kStageBytes;
  static_assert(kTokenBytes % 1024 == 0 && kStageBytes % 1024 == 0, "wgmma's swizzle wants tiles at multiples of it");
};
// The sums of a token lie side by side; banks of a warp's accumulators differ.
constexpr int kSumStride = kTileRows + 4;
static_assert(kTokens * kSumStride * static_cast<int>(sizeof(float)) <= kRingBytes, "sums take the ring's place");

// Which of decoding's pairs a warp takes that has one MMA step of it, by rotations: the bits that shifts would have
// cleared are none of the mask's (device/decode.cuh).
struct StepRotations {
  bool second_word;
  bool mixed;
  uint32_t first;
  uint32_t second;

  explicit __device__ __forceinline__ StepRotations(int step)
      : second_word(step >= 2),
        mixed(step % 2 == 1),
        first(step % 2 * 6),
        second(step == 1   ? 2
               : step == 3 ? 24
                           : 28) {}

  __device__ __forceinline__ uint2 pairs(uint32_t q0, uint32_t q1) const {
    const uint32_t word = second_word ? q1 : q0;
    const uint32_t z = ptx::blend(q0, ptx::rotate_left(q1, 2), kLeftoverMask);
    return make_uint2(ptx::rotate_left(word, first), ptx::rotate_left(mixed ? z : word, second));
  }
};

// A fragment of the transpose of 16 rows of a block: 16 of its k times these rows. A[i] of lane (r, t) is k position r
// or r + 8 (a lower or upper one of decoding's step) of the rows 2t, 2t + 1 or those and 8.
template <class T>
__device__ __forceinline__ void decode_transposed(uint4 codes, uint32_t scales, const StepRotations& step,
                                                  uint32_t (&a)[4]) {
  using D = Decode<T>;
  const uint32_t both = D::scales(ptx::permute(scales, 0, 0x9180));
  const uint32_t of_row[2] = {ptx::broadcast_low(both), ptx::broadcast_high(both)};
  const uint2 pairs[2] = {step.pairs(codes.x, codes.y), step.pairs(codes.z, codes.w)};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[2 * i] = ptx::transpose(D::multiply(D::codes(pairs[i].x), of_row[i]));
    a[2 * i + 1] = ptx::transpose(D::multiply(D::codes(pairs[i].y), of_row[i]));
  }
}

// The k of a block that is row `row` of 64 of the transpose's sums, and back: four k from `k` on, a multiple of 4, are
// the rows first_row(k), + 1, + 8, + 9.
__device__ __forceinline__ int first_row(int k) { return k / 4 % 4 * 16 + k / 16 * 2; }

// Loads steps of 64 columns of a tile's tokens. Every thread has one chunk of every 64th token.
class TokenLoader {
 public:
  // row_of(i): where token i of the tile is in x [any, columns]; only for i below count.
  template <class RowOf>
  __device__ __forceinline__ TokenLoader(const void* x, int columns, int count, const RowOf& row_of)
      : columns_(columns) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int token = threadIdx.x / kChunksPerRow + i * (kThreads / kChunksPerRow);
      used_[i] = token < count;
      at_[i] = static_cast<const uint16_t*>(x) + (used_[i] ? static_cast<int64_t>(row_of(token)) * columns : 0);
    }
  }

  // Tokens behind the last are left as they are: they are columns of the result that nobody reads.
  __device__ __forceinline__ void load(uint32_t tile, int step) const {
    const int chunk = threadIdx.x % kChunksPerRow;
    const int column = step * kBlockK + chunk * (kChunkBytes / kElementBytes);
    const bool inside = column < columns_;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!used_[i]) continue;
      const int token = threadIdx.x / kChunksPerRow + i * (kThreads / kChunksPerRow);
      ptx::cp_async_16_or_zero(swizzled(tile, token, chunk), inside ? at_[i] + column : at_[i], inside);
    }
  }

 private:
  static constexpr int kRows = kTokens * kChunksPerRow / kThreads;
  int columns_;
  const uint16_t* at_[kRows];
  bool used_[kRows];
};

// Loads a step's blocks, one of each warpgroup. Every thread has one chunk, and a few have another.
class BlockLoader {
 public:
  // Warpgroup g's blocks are at expert + first + g * group_stride + step * step_stride; of `groups` warpgroups. Others
  // get zeros, which decode to zeros.
  __device__ __forceinline__ BlockLoader(const uint8_t* expert, int64_t first, int64_t group_stride,
                                         int64_t step_stride, int groups)
      : step_stride_(step_stride) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int chunk = threadIdx.x + i * kThreads;
      const int group = chunk / kChunks;
      used_[i] = group < groups;
      at_[i] = expert + (used_[i] ? first + group * group_stride + chunk % kChunks * kChunkBytes : 0);
    }
  }

  __device__ __forceinline__ void load(uint32_t to, int step) const {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int chunk = threadIdx.x + i * kThreads;
      if (chunk >= kGroups * kChunks) break;
      ptx::cp_async_16_or_zero(to + chunk * kChunkBytes, used_[i] ? at_[i] + step * step_stride_ : at_[i], used_[i]);
    }
  }

 private:
  static constexpr int kChunks = kBlockBytes / kChunkBytes;
  static constexpr int kRounds = ceil_div(kGroups * kChunks, kThreads);
  int64_t step_stride_;
  const uint8_t* at_[kRounds];
  bool used_[kRounds];
};

// load(tokens, blocks, step): one step's, to these addresses. A step's four instructions are in flight while the next
// one's fragments are decoded; a stage is written again two steps after it was read.
template <class T, int N, bool kTransposed, class Load>
__device__ __forceinline__ void multiply(float (&sum)[N / 2], uint32_t ring, int steps, const Load& load) {
  using Ring = RingOf<N>;
  const int group = threadIdx.x / 128;
  const int warp = threadIdx.x % 128 / kWarp;
  const int lane = threadIdx.x % kWarp;
  const StepRotations rotations(warp);
  uint32_t a[4][4];
  const auto load_to = [&](int stage, int step) {
    const uint32_t to = ring + stage * Ring::kStageBytes;
    if (step < steps) load(to, to + Ring::kTokenBytes, step);
    ptx::cp_async_commit();
  };
#pragma unroll 1
  for (int step = 0; step < Ring::kStages - 2; ++step) load_to(step, step);
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Ring::kStages - 3>();
    ptx::fence_async_proxy_shared();
    __syncthreads();
    load_to(stage < 2 ? stage + Ring::kStages - 2 : stage - 2, step + Ring::kStages - 2);
    const uint32_t tokens = ring + stage * Ring::kStageBytes;
    const uint32_t block = tokens + Ring::kTokenBytes + group * kBlockBytes;
    uint4 codes;
    uint32_t scales;
    if constexpr (!kTransposed) {
      codes = ptx::load_shared_128(block + codes_at(warp, lane));
      scales = ptx::load_shared_16(block + scales_at(warp, lane));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (kTransposed) {
        codes = ptx::load_shared_128(block + codes_at(j, lane));
        scales = ptx::load_shared_16(block + scales_at(j, lane));
      }
      ptx::wgmma_wait<3>();
      if constexpr (kTransposed) {
        decode_transposed<T>(codes, scales, rotations, a[j]);
      } else {
        uint32_t all[4][4];
        decode<T>(codes, scales, all);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[j][i] = all[j][i];
      }
      ptx::wgmma_fence();
      ptx::Wgmma<T, N>::multiply(sum, a[j], ptx::wgmma_descriptor(tokens, 0, j));
      ptx::wgmma_commit();
    }
    stage = stage == Ring::kStages - 1 ? 0 : stage + 1;
  }
  ptx::wgmma_wait<0>();
}

// Multiplies and leaves the sums in the ring's place: sums[token * kSumStride + row], row 64 g + 0..63 of warpgroup g.
template <class T, int N, bool kTransposed, class Load>
__device__ __forceinline__ void multiply_to(float* sums, uint32_t ring, int steps, const Load& load) {
  float sum[N / 2] = {};
  multiply<T, N, kTransposed>(sum, ring, steps, load);
  ptx::cp_async_wait<0>();
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  float* at = sums + lane % 4 * 2 * kSumStride + threadIdx.x / kWarp * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < N / 8; ++i, at += 8 * kSumStride) {
    at[0] = sum[4 * i];
    at[kSumStride] = sum[4 * i + 1];
    at[8] = sum[4 * i + 2];
    at[kSumStride + 8] = sum[4 * i + 3];
  }
  __syncthreads();
}

// With as many columns as `count` tokens need.
template <class T, bool kTransposed, class Load>
__device__ __forceinline__ void multiply_tokens(int count, float* sums, uint32_t ring, int steps, const Load& load) {
  if (count <= 32) return multiply_to<T, 32, kTransposed>(sums, ring, steps, load);
  if (count <= 64) return multiply_to<T, 64, kTransposed>(sums, ring, steps, load);
  if (count <= 96) return multiply_to<T, 96, kTransposed>(sums, ring, steps, load);
  multiply_to<T, 128, kTransposed>(sums, ring, steps, load);
}

// ---- four neighbouring features of a token

struct Four {
  float v[4];
};

__device__ __forceinline__ Four load_four(const float* from) {
  const float4 f = *reinterpret_cast<const float4*>(from);
  return {f.x, f.y, f.z, f.w};
}

template <class T>
__device__ __forceinline__ Four load_four(const T* from) {
  const uint2 pairs = *reinterpret_cast<const uint2*>(from);
  const float2 low = unpack2<T>(pairs.x);
  const float2 high = unpack2<T>(pairs.y);
  return {low.x, low.y, high.x, high.y};
}

__device__ __forceinline__ float dot(const Four& a, const Four& b) {
  return a.v[0] * b.v[0] + a.v[1] * b.v[1] + a.v[2] * b.v[2] + a.v[3] * b.v[3];
}

template <class T>
__device__ __forceinline__ void store_four(void* out, int64_t at, const Four& f, float scale) {
  *reinterpret_cast<uint2*>(static_cast<T*>(out) + at) =
      make_uint2(pack2<T>(f.v[0] * scale, f.v[1] * scale), pack2<T>(f.v[2] * scale, f.v[3] * scale));
}

}  // namespace nvfp4::cuda::wgmma_backward

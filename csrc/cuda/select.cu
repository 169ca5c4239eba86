#include <cstdlib>
#include <string_view>

#include "kernels/wgmma_experts/params.h"
#include "launch.h"
#include "select.h"

namespace nvfp4::cuda {

namespace {

bool use_hopper() {
  const char* forced = std::getenv("TORCH_NVFP4_ARCH");
  return device().major == 9 && !(forced != nullptr && std::string_view(forced) == "80");
}

}  // namespace

Choice select(int64_t slots, int64_t experts) {
  const double tokens = static_cast<double>(slots) / static_cast<double>(experts);
  // Wide tiles halve the warps that fit.
  const StreamTiles tiles = tokens <= 16 ? StreamTiles::narrow : StreamTiles::wide;
  if (!use_hopper()) return {Path::stream_sm80, tiles};
  // At 6 tokens per expert streaming is 3-7 % ahead, at 7 they are equal (I = 2048; with I = 512 they are equal at 5).
  if (tokens > 7 && experts <= kWgmmaMaxExperts) return {Path::wgmma, tiles};
  return {Path::stream_sm90, tiles};
}

int select_k_ways(int64_t k_blocks, int64_t items) {
  // The fewer warps share an item, the rarer are reductions; but every warp should find work, several times over.
  const int64_t warps = device().multiprocessors * 16;
  int ways = 8;
  if (items * 8 > warps) ways = 4;
  if (items * 2 > 4 * warps) ways = 2;
  while (ways > 1 && k_blocks < 4 * ways) ways /= 2;
  return ways;
}

}  // namespace nvfp4::cuda

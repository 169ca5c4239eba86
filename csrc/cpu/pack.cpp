// Checkpoint rows to panels (layout.h) and back.
#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "layout.h"
#include "schedule.h"

namespace nvfp4::cpu {
namespace {

// Copies between the panels and the row-major codes and scales of all experts, one panel a task.
template <bool kPack, class Args, class Packed, class Rows>
void transpose_panels(const Args& args, int threads, Packed* packed, Rows* weight, Rows* scale) {
  const int64_t panels = args.n / kPanelRows;
  const int64_t row_bytes = args.k / 2;
  const int64_t row_groups = args.k / kGroupSize;
  for_each_task(threads, args.experts * panels, [&](int64_t, int64_t task) {
    const int64_t expert = task / panels;
    const int64_t panel = task % panels;
    const int64_t first_row = expert * args.n + panel_first_row(panel, args.n, args.gated);
    Packed* block = packed + expert * args.expert_bytes + panel * panel_bytes(args.k);
    Rows* codes = weight + first_row * row_bytes;
    Rows* scales = scale + first_row * row_groups;
    for (int64_t group = 0; group < row_groups; ++group) {
      const int64_t in_block = group % kBlockGroups;
      if constexpr (kPack) {
        if (in_block == 0) std::memset(block, 0, kBlockBytes);
      }
      Packed* vectors = block + in_block * 2 * kPanelRows * 4;
      Packed* group_scales = block + kBlockCodeBytes + in_block * kPanelRows;
      for (int64_t row = 0; row < kPanelRows; ++row) {
        Rows* row_codes = codes + row * row_bytes + group * 8;
        if constexpr (kPack) {
          std::memcpy(vectors + row * 4, row_codes, 4);
          std::memcpy(vectors + kPanelRows * 4 + row * 4, row_codes + 4, 4);
          group_scales[row] = scales[row * row_groups + group];
        } else {
          std::memcpy(row_codes, vectors + row * 4, 4);
          std::memcpy(row_codes + 4, vectors + kPanelRows * 4 + row * 4, 4);
          scales[row * row_groups + group] = group_scales[row];
        }
      }
      if (in_block == kBlockGroups - 1) block += kBlockBytes;
    }
  });
}

// Asks the system for huge pages behind memory that nothing has been written to yet. For few tokens reading the weights
// is what takes the time, and pages of 4 KiB, once memory is fragmented, make it 1.6 times as long. Where the system
// has or allows none, the memory stays as it was.
void prefer_huge_pages(uint8_t* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace

void pack(const PackArgs& args, const Context& context) {
  prefer_huge_pages(args.packed, args.experts * args.expert_bytes);
  transpose_panels<true>(args, context.threads, args.packed, args.weight, args.scale);
}

void unpack(const UnpackArgs& args, const Context& context) {
  transpose_panels<false>(args, context.threads, args.packed, args.weight, args.scale);
}

}  // namespace nvfp4::cpu

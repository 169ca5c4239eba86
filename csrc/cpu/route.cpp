// Counting sort of the slots by expert.
#include <algorithm>

#include "routing.h"

namespace nvfp4::cpu {

// One thread: the ids of ten thousand tokens take well under a millisecond.
void route(const RouteArgs& args, const Context&) {
  const Routing& routing = args.routing;
  const int64_t slots = routing.tokens * routing.top_k;
  int32_t* offsets = args.offsets;
  std::fill(offsets, offsets + routing.experts + 1, 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t expert = local_expert(routing, slot);
    if (expert >= 0) ++offsets[expert + 1];
  }
  for (int64_t expert = 0; expert < routing.experts; ++expert) offsets[expert + 1] += offsets[expert];

  // Filling moves every offset to its expert's end, which is the next one's begin; shift them back afterwards.
  int32_t skipped = offsets[routing.experts];
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t expert = local_expert(routing, slot);
    args.order[expert >= 0 ? offsets[expert]++ : skipped++] = static_cast<int32_t>(slot);
  }
  std::copy_backward(offsets, offsets + routing.experts, offsets + routing.experts + 1);
  offsets[0] = 0;
}

size_t route_workspace(const RouteArgs&, const Context&) { return 0; }

}  // namespace nvfp4::cpu

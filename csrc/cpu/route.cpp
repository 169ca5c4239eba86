// Counting sort of the slots by expert, and the check of a sorting that comes from outside.
#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "../common.h"
#include "routing.h"

namespace nvfp4::cpu {
namespace {

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "nvfp4::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace

// One thread: the ids of ten thousand tokens take well under a millisecond.
void sort_slots(const Routing& routing, int32_t* expert_of, int32_t* order, int32_t* offsets) {
  const int64_t slots = routing.tokens * routing.top_k;
  std::fill(offsets, offsets + routing.experts + 1, 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t expert = local_expert(routing, slot);
    expert_of[slot] = expert;
    if (expert >= 0) ++offsets[expert + 1];
  }
  for (int64_t expert = 0; expert < routing.experts; ++expert) offsets[expert + 1] += offsets[expert];

  // Filling moves every offset to its expert's end, which is the next one's begin; shift them back afterwards.
  int32_t skipped = offsets[routing.experts];
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t expert = expert_of[slot];
    order[expert >= 0 ? offsets[expert]++ : skipped++] = static_cast<int32_t>(slot);
  }
  std::copy_backward(offsets, offsets + routing.experts, offsets + routing.experts + 1);
  offsets[0] = 0;
}

void copy_routing(const char* op, const GroupedGemmArgs& args, uint8_t* seen, int32_t* order, int32_t* offsets) {
  int32_t before = 0;
  for (int64_t expert = 0; expert <= args.weight.experts; ++expert) {
    const int32_t offset = read_once(args.offsets + expert);
    if (offset < before || offset > args.slots || (expert == 0 && offset != 0)) {
      fail(op, "offsets must begin with 0, not decrease and not exceed the ", args.slots, " slots, got ", offset,
           " at index ", expert);
    }
    offsets[expert] = before = offset;
  }
  std::fill_n(seen, args.slots, uint8_t{0});
  for (int64_t i = 0; i < args.slots; ++i) {
    const int32_t slot = read_once(args.order + i);
    if (slot < 0 || slot >= args.slots) {
      fail(op, "order must hold every slot from 0 to ", args.slots - 1, " once, got ", slot, " at index ", i);
    }
    if (seen[slot] != 0) {
      fail(op, "order must hold every slot from 0 to ", args.slots - 1, " once, got ", slot, " again at index ", i);
    }
    seen[slot] = 1;
    order[i] = slot;
  }
}

void route(const RouteArgs& args, const Context& context) {
  sort_slots(args.routing, static_cast<int32_t*>(context.workspace), args.order, args.offsets);
}

size_t route_workspace(const RouteArgs& args, const Context&) {
  Workspace space(nullptr);
  space.take<int32_t>(args.routing.tokens * args.routing.top_k);
  return space.bytes();
}

}  // namespace nvfp4::cpu

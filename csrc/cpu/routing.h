// From the ids of a routing to the local expert of each slot.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace nvfp4::cpu {

// The local expert of a slot, or -1 when the slot is skipped.
inline int64_t local_expert(const Routing& routing, int64_t slot) {
  int64_t id = routing.ids_are_int64 ? static_cast<const int64_t*>(routing.topk_ids)[slot]
                                     : static_cast<const int32_t*>(routing.topk_ids)[slot];
  if (routing.expert_map != nullptr) {
    if (id < 0 || id >= routing.expert_map_size) return -1;
    id = routing.expert_map[id];
  }
  return id >= 0 && id < routing.experts ? id : -1;
}

}  // namespace nvfp4::cpu

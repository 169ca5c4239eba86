// From the ids of a routing to the local expert of each slot, and to slots sorted by expert.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace nvfp4::cpu {

// A value that another thread may be writing meanwhile. It is checked after it is read and must not be read again,
// which a plain load allows the compiler to do.
template <class T>
T read_once(const T* value) {
  return __atomic_load_n(value, __ATOMIC_RELAXED);
}

// The local expert of a slot, or -1 when the slot is skipped. Two calls may give two experts: see read_once.
inline int32_t local_expert(const Routing& routing, int64_t slot) {
  int64_t id = routing.ids_are_int64 ? read_once(static_cast<const int64_t*>(routing.topk_ids) + slot)
                                     : read_once(static_cast<const int32_t*>(routing.topk_ids) + slot);
  if (routing.expert_map != nullptr) {
    if (id < 0 || id >= routing.expert_map_size) return -1;
    id = read_once(routing.expert_map + id);
  }
  return id >= 0 && id < routing.experts ? static_cast<int32_t>(id) : -1;
}

// Sorts slots as RouteArgs says; expert_of [slots] is scratch memory.
void sort_slots(const Routing& routing, int32_t* expert_of, int32_t* order, int32_t* offsets);

// Copies order and offsets, which anybody may have made, and throws std::runtime_error unless the copies are what route
// makes: every slot once; 0, ascending, at most the slots. seen [slots] is scratch memory.
void copy_routing(const char* op, const GroupedGemmArgs& args, uint8_t* seen, int32_t* order, int32_t* offsets);

}  // namespace nvfp4::cpu

// The kernels load kChunkBytes at a time. Rows that do not begin at such an address, as a view into a larger tensor
// may, are copied to the workspace first.
#pragma once

#include "device/sizes.h"
#include "launch.h"

namespace nvfp4::cuda {

// Room for a copy of `count` values, or null where none is needed.
inline void* take_copy(Workspace& workspace, const void* rows, int64_t count) {
  return is_aligned(rows, kChunkBytes) ? nullptr : workspace.take<uint16_t>(count);
}

// The rows, or their copy, which this call starts.
inline const void* aligned_rows(const void* rows, void* copy, int64_t count, void* stream) {
  if (is_aligned(rows, kChunkBytes)) return rows;
  check(cudaMemcpyAsync(copy, rows, count * kElementBytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)),
        "copy of rows");
  return copy;
}

}  // namespace nvfp4::cuda

// What the current device can hold, as plain numbers: a choice can be made, and explained, for a device that is not
// here.
#pragma once

namespace nvfp4::cuda {

struct Device {
  int major;                  // of its compute capability
  int multiprocessors;        // SMs
  int shared_memory_per_cta;  // bytes, at most
  int ordinal;                // among this process's devices
};

// The current device; asks the driver once per device.
const Device& device();

// The instructions that a kernel is built on.
enum class Isa {
  sm80,  // cp.async, mma.sync: every device
  sm90,  // bulk copies, mbarriers, and wgmma: compute capability 9.x
};

}  // namespace nvfp4::cuda

// The weighted sum of a token's expert outputs, as a step of a longer op.
#pragma once

#include "../../kernels.h"

namespace nvfp4::cuda {

// combine() of kernels.h. routing_is_older: the routing and its weights were complete before the previous launch in the
// stream began.
void combine(const CombineArgs& args, bool routing_is_older, const Context& context);

}  // namespace nvfp4::cuda

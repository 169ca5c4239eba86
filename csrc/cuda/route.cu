#include "../kernels.h"
#include "kernels/route.h"

namespace nvfp4::cuda {

size_t route_workspace(const RouteArgs& args, const Context&) { return sort_workspace(args.routing); }

void route(const RouteArgs& args, const Context& context) {
  sort_slots(args.routing, args.order, args.offsets, nullptr, 0, context.workspace, context.stream);
}

}  // namespace nvfp4::cuda

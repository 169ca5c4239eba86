// The CPU backend without torch: runs one layer that tests/emulated_cpu.py writes to the standard input and writes its
// output, so that a level can be tried under an emulator for which there is no Python with torch. `make test-aarch64`.
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "../../kernels.h"
#include "../layout.h"

namespace nvfp4::cpu {

void parallel_for(int64_t n, void (*body)(void* argument, int64_t i), void* argument) {
  for (int64_t i = 0; i < n; ++i) body(argument, i);
}

}  // namespace nvfp4::cpu

namespace {

using namespace nvfp4;

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  if (std::fread(values.data(), sizeof(T), values.size(), stdin) != values.size()) {
    throw std::runtime_error("expected more bytes on the standard input");
  }
  return values;
}

// What tests/emulated_cpu.py writes first.
struct Header {
  int64_t dtype, tokens, top_k, experts, hidden, intermediate, activation, clamped;
};

struct PackedWeight {
  std::vector<uint8_t> bytes;
  std::vector<float> global_scale;
  Weight weight;
};

// Codes [experts, n, k / 2], scales [experts, n, k / 16] and global scales; packed, and unpacked again to be compared.
PackedWeight read_weight(int64_t experts, int64_t n, int64_t k, bool gated, const Context& context) {
  const auto codes = read<uint8_t>(experts * n * k / 2);
  const auto scales = read<uint8_t>(experts * n * k / kGroupSize);
  const int64_t expert_bytes = n / cpu::kPanelRows * cpu::panel_bytes(k);
  PackedWeight out{std::vector<uint8_t>(static_cast<size_t>(experts * expert_bytes)),
                   read<float>(gated ? 2 * experts : experts),
                   {}};
  cpu::pack({codes.data(), scales.data(), out.bytes.data(), expert_bytes, experts, n, k, gated}, context);
  auto codes_again = std::vector<uint8_t>(codes.size());
  auto scales_again = std::vector<uint8_t>(scales.size());
  cpu::unpack({out.bytes.data(), expert_bytes, codes_again.data(), scales_again.data(), experts, n, k, gated}, context);
  if (codes_again != codes || scales_again != scales) throw std::runtime_error("unpack: expected what pack was given");
  out.weight = {out.bytes.data(), expert_bytes, out.global_scale.data(), experts, n, k, gated};
  return out;
}

void run() {
  const Header h = read<Header>(1)[0];
  const auto gate_numbers = read<float>(3);  // limit, alpha, beta
  const auto dtype = static_cast<DType>(h.dtype);
  const int64_t row_bytes = h.hidden * (dtype == DType::fp32 ? 4 : 2);
  Context context;
  context.level = cpu::active_level();
  const PackedWeight w13 = read_weight(h.experts, 2 * h.intermediate, h.hidden, true, context);
  const PackedWeight w2 = read_weight(h.experts, h.hidden, h.intermediate, false, context);
  const auto x = read<uint8_t>(h.tokens * row_bytes);
  const auto topk_weights = read<float>(h.tokens * h.top_k);
  const auto topk_ids = read<int64_t>(h.tokens * h.top_k);
  std::vector<uint8_t> out(x.size());
  const Gate gate{static_cast<Activation>(h.activation), h.clamped != 0, gate_numbers[0], gate_numbers[1],
                  gate_numbers[2]};
  const Routing routing{topk_ids.data(), true, nullptr, 0, h.tokens, h.top_k, h.experts};
  const MoeArgs args{dtype,   x.data(), w13.weight, w2.weight, topk_weights.data(),
                     routing, gate,     false,      false,     out.data()};
  std::vector<uint8_t> workspace(cpu::moe_workspace(args, context) + 256);
  auto address = reinterpret_cast<uintptr_t>(workspace.data());
  context.workspace = workspace.data() + (256 - address % 256) % 256;
  cpu::moe(args, context);
  std::fwrite(out.data(), 1, out.size(), stdout);
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

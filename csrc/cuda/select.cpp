#include "select.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace nvfp4::cuda {

namespace {

// ---- the table: the first kernel that has no reason against it

// Batch invariance: all kernels sum along k in the same order and to the same bits (NOTES.md, "Batch invariance"),
// whatever their tiles, as long as one warp sums all of an item's k.

// Where wgmma_experts overtakes stream_gemm, in slots per expert. Streaming reads weights faster, but where all of a
// layer's weights are few, the ends of its items take what it gains: they are equal at 4.6 (0.43 GB) and 5.6 (0.45 GB),
// and at 7 with 2.1 and 3.6 GB. See NOTES.md, "Small layers".
constexpr int64_t kStreamSlotsPerExpert = 7;
constexpr int64_t kStreamSlotsPerSmallExpert = 5;
constexpr double kSmallLayerBytes = 1e9;

double bytes_per_expert(const Problem& problem) {
  double blocks = 0;
  for (const GemmSize& gemm : problem.gemm) blocks += static_cast<double>(k_blocks_of(gemm.k)) * panels_of(gemm.n);
  return blocks * kBlockBytes;
}

bool is_small_layer(const Problem& problem) {
  return bytes_per_expert(problem) * static_cast<double>(problem.experts) <= kSmallLayerBytes;
}

int64_t stream_slots_per_expert(const Problem& problem) {
  return is_small_layer(problem) ? kStreamSlotsPerSmallExpert : kStreamSlotsPerExpert;
}

const char* against_few_slots(const Problem& problem, const Device& device, Choice& choice) {
  if (problem.op != Op::moe) return "it runs whole MLPs only";
  if (problem.batch_invariant && choice.isa != Isa::sm90) return "how it splits k depends on the batch";
  if (problem.slots() > kInlineSlots) return "it sorts nothing and takes at most 32 slots";
  choice.few_slots = plan_few_slots(problem, device, choice.isa);
  if (choice.few_slots.width > 0) return nullptr;
  return problem.batch_invariant ? "a warp would have more than two items of w13 or one of w2, or no room for tokens"
                                 : "the tokens do not fit into a CTA's shared memory beside its rings";
}

// Tall tiles fill the tensor cores better. Wide ones decode each weight once where an expert has more tokens than a
// tall tile: up to 176 per expert they gain in bf16, and in fp16, whose decoding costs more, beyond that too.
WgmmaTiles wgmma_tiles(const Problem& problem) {
  constexpr int64_t kWideSlotsPerExpert = 176;
  using namespace wgmma_experts;
  if (!problem.wide_gate || problem.slots() <= Tall::kMaxWidth * problem.experts) return WgmmaTiles::tall;
  const bool most_fit = problem.slots() <= kWideSlotsPerExpert * problem.experts;
  return most_fit || problem.dtype == DType::fp16 ? WgmmaTiles::wide : WgmmaTiles::tall;
}

// Narrow tiles leave room for more stages, which few tokens need to keep weights streaming.
constexpr int64_t kFewTokensSlotsPerExpert = 32;
constexpr int kFewTokensWidth = 64;

int wgmma_width(WgmmaTiles tiles, const Problem& problem) {
  if (problem.slots() <= kFewTokensSlotsPerExpert * problem.experts) return kFewTokensWidth;
  return tiles == WgmmaTiles::wide ? wgmma_experts::Wide::kMaxWidth : wgmma_experts::Tall::kMaxWidth;
}

// Whether the experts' results, which combine reads at once, fit into L2 if the weights that stream past leave first.
// Those of a larger layer do not fit, and weights that several tiles share would be read from memory again.
bool combine_reads_l2(const Problem& problem) {
  constexpr double kResultBytes = 48e6;
  return problem.op == Op::moe &&
         static_cast<double>(problem.slots()) * static_cast<double>(problem.gemm[1].n) * kElementBytes <= kResultBytes;
}

// CTAs that sort for themselves spare two launches, 3 us per call of the time in which no weights stream, but gather
// tokens by 4 bytes instead of 16, which pays for few of them and where a layer's weights are read in a short time.
bool wgmma_sorts(const Problem& problem) {
  constexpr int64_t kMostSlotsPerExpert = 12;
  return problem.op == Op::moe &&
         problem.slots() <= std::min<int64_t>(kOrderMaxSlots, kMostSlotsPerExpert * problem.experts) &&
         problem.experts < kOrderBins && is_small_layer(problem) &&
         problem.gemm[0].k % (wgmma_experts::kStageBlocks * kBlockK) == 0;
}

// The tables of many experts leave room for three stages of the widest tall tiles and for four of narrower ones, which
// gain where they still hold most experts' tokens (NOTES.md, "Small layers").
WgmmaPlan wgmma_plan(const Problem& problem, const Device& device) {
  constexpr int64_t kNarrowSlotsPerExpert = 76;
  constexpr int kNarrowWidth = 96;
  const WgmmaTiles tiles = wgmma_tiles(problem);
  const bool sorting = wgmma_sorts(problem);
  const WgmmaPlan plan = plan_wgmma(tiles, wgmma_width(tiles, problem), problem.experts, device, sorting);
  if (plan.max_width <= kNarrowWidth || problem.slots() > kNarrowSlotsPerExpert * problem.experts) return plan;
  const WgmmaPlan narrow = plan_wgmma(tiles, kNarrowWidth, problem.experts, device, sorting);
  return narrow.stages > plan.stages ? narrow : plan;
}

const char* against_wgmma(const Problem& problem, const Device& device, Choice& choice) {
  if (choice.isa != Isa::sm90) return "wgmma needs SM90 instructions";
  if (problem.op == Op::linear) return "it knows no bias and no rows without a routing";
  const int64_t streamed = stream_slots_per_expert(problem);
  if (problem.slots() <= streamed * problem.experts) {
    return streamed == kStreamSlotsPerExpert
               ? "it needs more than 7 slots per expert to be ahead"
               : "it needs more than 5 slots per expert to be ahead in a layer of at most 1 GB";
  }
  if (problem.experts > kWgmmaMaxExperts) return "its shared memory holds the tables of at most 2048 experts";
  choice.wgmma = wgmma_plan(problem, device);
  choice.wgmma.weights_leave_first = combine_reads_l2(problem);
  return choice.wgmma.stages > 0 ? nullptr : "a CTA's shared memory has no room for three of its stages";
}

static_assert(kInlineSlots == 32 && kStreamSlotsPerExpert == 7 && kStreamSlotsPerSmallExpert == 5 &&
                  kWgmmaMaxExperts == 2048 && wgmma_experts::kMinStages == 3,
              "the reasons above name these numbers");

// fp16 tokens as two columns of bf16 each: weights are then decoded to bf16, which takes less, but a tile has half as
// many tokens, and an expert of more has its weights read again.
bool stream_splits(const Problem& problem, Isa isa) {
  constexpr int64_t kMostSlotsPerExpert = 4;
  return problem.op == Op::moe && problem.dtype == DType::fp16 && isa == Isa::sm90 && !problem.batch_invariant &&
         problem.slots() <= kMostSlotsPerExpert * problem.experts;
}

// A CTA that sorts for itself spares a launch and the way of its table through memory, 2-3 us per call, and streams
// weights 0.5 % slower. That pays while the weights of the experts hit take less than about 0.4 ms.
bool stream_sorts(const Problem& problem, StreamTiles tiles, Isa isa) {
  if (problem.op != Op::moe || isa != Isa::sm90 || tiles == StreamTiles::wide) return false;
  if (problem.slots() == 0 || problem.slots() > kCtaSortSlots || problem.experts > kCtaSortExperts) return false;
  const int64_t experts_hit = std::min(problem.slots(), problem.experts);
  constexpr double kMostBytes = 1.2e9;
  return static_cast<double>(experts_hit) * bytes_per_expert(problem) <= kMostBytes;
}

const char* against_stream(const Problem& problem, const Device& device, Choice& choice) {
  choice.stream.tiles = problem.slots() <= kNarrowTile * problem.experts ? StreamTiles::narrow : StreamTiles::wide;
  if (stream_splits(problem, choice.isa)) choice.stream.tiles = StreamTiles::split;
  choice.stream.sorting = stream_sorts(problem, choice.stream.tiles, choice.isa);
  // How many tiles there will be is a guess: the routing is not known here. A dense layer has no routing.
  const int64_t tiles = problem.op == Op::linear ? ceil_div<int64_t>(problem.tokens, tile_width(choice.stream.tiles))
                                                 : std::min(problem.slots(), problem.experts);
  for (int i = 0; i < 2; ++i) {
    const GemmSize& gemm = problem.gemm[i];
    choice.stream.k_ways[i] =
        problem.batch_invariant ? 1
                                : stream_k_ways(k_blocks_of(gemm.k), tiles * panels_of(gemm.n), device.multiprocessors);
  }
  return nullptr;
}

struct Row {
  Kernel kernel;
  const char* name;
  const char* on_sm80;  // what it is built on
  const char* on_sm90;
  const char* what_for;
  // Null if the kernel takes the problem; then the kernel's plan is in `choice`, whose isa is set before.
  const char* (*against)(const Problem& problem, const Device& device, Choice& choice);
};

constexpr Row kTable[] = {
    {Kernel::few_slots_mlp, "few_slots_mlp", "cp.async, mma.sync", "bulk copies, mma.sync",
     "so few slots that one launch does it all, and every warp streams an equal share of the weights",
     against_few_slots},
    {Kernel::wgmma_experts, "wgmma_experts", "", "bulk copies, wgmma",
     "so many slots per expert that tensor cores, and decoding each weight once, count", against_wgmma},
    {Kernel::stream_gemm, "stream_gemm", "cp.async, mma.sync", "bulk copies, mma.sync",
     "reading the weights is the limit, and every warp streams its own blocks", against_stream},
};

const Row& choose(const Problem& problem, const Device& device, Isa isa, Choice& choice) {
  choice.isa = isa;
  const Row* row = kTable;
  while (row->against(problem, device, choice) != nullptr) ++row;
  choice.kernel = row->kernel;
  return *row;
}

// ---- in words

template <class... Args>
void line(std::string& text, const char* format, Args... args) {
  char buffer[256];
  std::snprintf(buffer, sizeof(buffer), format, args...);
  text += buffer;
  text += '\n';
}

void describe(const Problem& p, const Device& device, Isa isa, std::string& text) {
  const char* op = p.op == Op::moe ? "moe" : p.op == Op::linear ? "linear" : "grouped_gemm";
  const char* dtype = p.dtype == DType::bf16 ? "bf16" : "fp16";
  const auto number = [](int64_t v) { return static_cast<long long>(v); };
  const double per_expert = static_cast<double>(p.slots()) / static_cast<double>(p.experts);
  line(text, "problem: %s in %s, weights [%lld, %lld]%s, M %lld, top-k %lld, %lld experts: %lld slots, %.4g per expert",
       op, dtype, number(p.gemm[0].n), number(p.gemm[0].k), p.op == Op::moe ? " and back" : "", number(p.tokens),
       number(p.top_k), number(p.experts), number(p.slots()), per_expert);
  line(text, "device: compute capability %d.x, %s kernels, %d SMs, %d bytes of shared memory per CTA", device.major,
       isa == Isa::sm90 ? "SM90" : "SM80", device.multiprocessors, device.shared_memory_per_cta);
}

void describe_plan(const Problem& problem, const Choice& c, std::string& text) {
  switch (c.kernel) {
    case Kernel::few_slots_mlp:
      line(text, "tile: %d rows x at most %d tokens", kBlockRows / items_per_panel(c.few_slots.items, 0),
           c.few_slots.width);
      if (c.few_slots.items == FewSlotsItems::parts) {
        line(text, "%s", "split: none");
      } else {
        line(text, "split: each of %d warps takes an equal run of its CTA's weight blocks", kFewSlotsWarps);
      }
      line(text, "shared memory: %d bytes, %d of them tokens", c.few_slots.shared_bytes, c.few_slots.token_bytes);
      break;
    case Kernel::wgmma_experts: {
      const bool wide = c.wgmma.tiles == WgmmaTiles::wide;
      line(text, "tile: %d rows x at most %d tokens (%s)",
           (wide ? wgmma_experts::Wide::kConsumers : wgmma_experts::Tall::kConsumers) * kBlockRows, c.wgmma.max_width,
           wide ? "wide" : "tall");
      line(text, "%s", "split: none");
      if (problem.op == Op::moe) line(text, "sort: %s", c.wgmma.sorting ? "by every CTA" : "by a launch before");
      line(text, "shared memory: %d bytes, %d stages", c.wgmma.shared_bytes, c.wgmma.stages);
      line(text, "L2: %s", c.wgmma.weights_leave_first ? "weights leave first" : "no hints");
      break;
    }
    case Kernel::stream_gemm:
      line(text, "tile: %d rows x at most %d tokens (%s)", kBlockRows, tile_width(c.stream.tiles),
           c.stream.tiles == StreamTiles::wide    ? "wide"
           : c.stream.tiles == StreamTiles::split ? "split"
                                                  : "narrow");
      if (problem.op == Op::moe) {
        line(text, "split: k over %d warps in w13, over %d in w2", c.stream.k_ways[0], c.stream.k_ways[1]);
        line(text, "sort: %s", c.stream.sorting ? "by every CTA" : "by a launch before");
      } else {
        line(text, "split: k over %d warps", c.stream.k_ways[0]);
      }
      break;
  }
}

}  // namespace

Isa isa_of(const Device& device) {
  const char* forced = std::getenv("TORCH_NVFP4_ARCH");
  const bool sm80 = device.major != 9 || (forced != nullptr && std::string_view(forced) == "80");
  return sm80 ? Isa::sm80 : Isa::sm90;
}

Choice select(const Problem& problem, const Device& device, Isa isa) {
  Choice choice{};
  choose(problem, device, isa, choice);
  return choice;
}

BatchedChoice select_batched(const Problem& problem, const Device& device, Isa isa) {
  BatchedChoice choice{};
  choice.isa = isa;
  const int64_t most = problem.tokens / problem.experts;
  const auto add = [&](const BatchedPath& path) {
    const int64_t before = choice.count == 0 ? 0 : choice.paths[choice.count - 1].most_per_expert;
    if (before < most) choice.paths[choice.count++] = path;
  };
  const auto add_stream = [&](StreamTiles tiles, int64_t most_per_expert) {
    add({.most_per_expert = most_per_expert, .kernel = Kernel::stream_gemm, .tiles = tiles, .wgmma = {}});
  };
  const auto add_wgmma = [&](WgmmaPlan plan, int64_t most_per_expert) {
    add({.most_per_expert = most_per_expert, .kernel = Kernel::wgmma_experts, .tiles = {}, .wgmma = plan});
  };
  const WgmmaPlan tall = plan_wgmma(WgmmaTiles::tall, wgmma_experts::Tall::kMaxWidth, problem.experts, device);
  if (isa == Isa::sm90 && problem.experts <= kWgmmaMaxExperts && tall.stages > 0) {
    add_stream(StreamTiles::narrow, kStreamSlotsPerExpert);
    // Where no expert can have more tokens than a narrow tile, there is nothing for wider ones.
    add_wgmma(plan_wgmma(WgmmaTiles::tall, kFewTokensWidth, problem.experts, device),
              most <= kFewTokensWidth ? most : kFewTokensSlotsPerExpert);
    add_wgmma(tall, most);
  } else {
    choice.isa = Isa::sm80;  // whose kernels run everywhere, and are the only ones with wide tiles of a batch
    add_stream(StreamTiles::narrow, kNarrowTile);
    add_stream(StreamTiles::wide, most);
  }
  return choice;
}

std::string explain_batched(const Problem& problem, const Device& device) {
  std::string text;
  const BatchedChoice choice = select_batched(problem, device, isa_of(device));
  describe(problem, device, choice.isa, text);
  for (int i = 0; i < choice.count; ++i) {
    const BatchedPath& path = choice.paths[i];
    const bool streams = path.kernel == Kernel::stream_gemm;
    line(text, "path %d: %s, tiles of at most %d tokens, for up to %lld tokens per expert that has any", i + 1,
         streams ? "stream_gemm" : "wgmma_experts", streams ? tile_width(path.tiles) : path.wgmma.max_width,
         static_cast<long long>(path.most_per_expert));
  }
  line(text, "%s", "why: only the device knows the counts; it takes a path, and the others find no tile");
  return text;
}

std::string explain(const Problem& problem, const Device& device) {
  Choice choice{};
  const Row& chosen = choose(problem, device, isa_of(device), choice);
  std::string text;
  describe(problem, device, choice.isa, text);
  line(text, "kernel: %s (%s)", chosen.name, choice.isa == Isa::sm90 ? chosen.on_sm90 : chosen.on_sm80);
  describe_plan(problem, choice, text);
  for (const Row* row = kTable; row != &chosen; ++row) {
    Choice unused = choice;
    line(text, "not %s: %s", row->name, row->against(problem, device, unused));
  }
  line(text, "why: %s", chosen.what_for);
  return text;
}

}  // namespace nvfp4::cuda

// For ctypes and other callers without C++: text for explain(), or an error that says what was expected and what came.
// A plain function, not an op: a str that an op returns leaks in the stable ABI of torch 2.11 to 2.13, as an argument
// does, and this is no operation on tensors.
//
// op: "moe", "batched_moe" (tokens: T; top_k is 1), "grouped_gemm" or "linear". k: columns of x. n: I of the MLPs, else
// the weight's rows. wide_gate: Problem::wide_gate. gated: whether the MLPs have gate rows. Writes at most `size`
// bytes with the ending zero, and returns the text's length without it, or its negative length where it is an error.
extern "C" __attribute__((visibility("default"))) int64_t
nvfp4_explain_select(const char* op, const char* dtype, int64_t tokens, int64_t top_k, int64_t experts, int64_t k,
                     int64_t n, int wide_gate, int gated, int batch_invariant, int major, int multiprocessors,
                     int shared_memory_per_cta, char* text, int64_t size) {
  using namespace nvfp4::cuda;
  const auto answer = [&](const std::string& result, bool good) {
    if (size > 0) std::snprintf(text, static_cast<size_t>(size), "%s", result.c_str());
    const auto length = static_cast<int64_t>(result.size());
    return good ? length : -length;
  };
  const auto expected = [&](const char* what, const std::string& got) {
    return answer(std::string("nvfp4 select: expected ") + what + ", got " + got, false);
  };
  Problem problem{.op = Op::moe,
                  .dtype = nvfp4::DType::bf16,
                  .tokens = tokens,
                  .top_k = top_k,
                  .experts = experts,
                  .gemm = {},
                  .wide_gate = wide_gate != 0,
                  .batch_invariant = batch_invariant != 0};
  const bool batched = std::strcmp(op, "batched_moe") == 0;
  if (batched || std::strcmp(op, "moe") == 0) {
    problem.gemm[0] = {gated != 0 ? 2 * n : n, k};
    problem.gemm[1] = {k, n};
  } else if (std::strcmp(op, "grouped_gemm") == 0 || std::strcmp(op, "linear") == 0) {
    problem.op = std::strcmp(op, "linear") == 0 ? Op::linear : Op::grouped_gemm;
    problem.gemm[0] = {n, k};
  } else {
    return expected("op moe, batched_moe, grouped_gemm or linear", op);
  }
  if (std::strcmp(dtype, "fp16") == 0) {
    problem.dtype = nvfp4::DType::fp16;
  } else if (std::strcmp(dtype, "bf16") != 0) {
    return expected("dtype bf16 or fp16", dtype);
  }
  constexpr int64_t kMost = int64_t{1} << 30;
  const struct {
    const char* what;
    int64_t value;
    int64_t least;
  } sizes[] = {{"tokens from 0 to 2^30", tokens, 0},
               {"top_k from 1 to 2^30", top_k, 1},
               {"experts from 1 to 2^30", experts, 1},
               {"k from 1 to 2^30", k, 1},
               {"n from 1 to 2^30", n, 1},
               {"multiprocessors from 1 to 2^30", multiprocessors, 1},
               {"shared memory from 1 to 2^30 bytes", shared_memory_per_cta, 1}};
  for (const auto& s : sizes) {
    if (s.value < s.least || s.value > kMost) return expected(s.what, std::to_string(s.value));
  }
  if (problem.op == Op::linear && (top_k != 1 || experts != 1)) {
    return expected("top_k 1 and experts 1 for linear", std::to_string(top_k) + " and " + std::to_string(experts));
  }
  if (batched && top_k != 1) return expected("top_k 1 for batched_moe", std::to_string(top_k));
  const Device device{major, multiprocessors, shared_memory_per_cta, 0};
  if (batched) {
    problem.tokens *= experts;
    return answer(explain_batched(problem, device), true);
  }
  return answer(explain(problem, device), true);
}

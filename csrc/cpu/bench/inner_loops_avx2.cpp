// Cycles that one core needs for the candidate inner loops of levels/avx2.cpp, weights decoded in L1.
//
// g++ -O3 -std=c++20 -mavx2 -mfma inner_loops_avx2.cpp -o inner_loops_avx2
// ./inner_loops_avx2 3.69   (the clock in GHz)
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

#define UNROLL _Pragma("GCC unroll 32")

constexpr int kTokens = 60;  // of which every tile below is a divisor
constexpr int kSteps = 32;   // pairs of columns in a block of 64

struct Block {
  alignas(32) int16_t weights[kSteps][2][16];
  alignas(32) float scales[4][2][8];
  alignas(32) float wide[2 * kSteps][2][8];
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

__m256i load(const int16_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }

void add_to(float* sum, __m256 products, __m256 scale) {
  _mm256_storeu_ps(sum, _mm256_fmadd_ps(products, scale, _mm256_loadu_ps(sum)));
}

// See pin() of levels/avx2.cpp.
template <bool kPinned>
void add_dots(__m256i (&dots)[2], const Block& block, int step, __m256i x) {
  __m256i a = _mm256_madd_epi16(load(block.weights[step][0]), x);
  __m256i b = _mm256_madd_epi16(load(block.weights[step][1]), x);
  if (kPinned) asm volatile("" : "+x"(a), "+x"(b));
  dots[0] = _mm256_add_epi32(dots[0], a);
  dots[1] = _mm256_add_epi32(dots[1], b);
  if (kPinned) asm volatile("" : "+x"(dots[0]), "+x"(dots[1]));
}

// One scale per group of 16 columns.
template <int kTile, bool kPinned>
struct Grouped {
  static constexpr int tile = kTile;
  static void run(const Block& block, const int32_t* x, float* sums) {
    __m256 totals[kTile][2] = {};
    for (int group = 0; group < 4; ++group) {
      __m256i dots[kTile][2] = {};
      UNROLL for (int i = 0; i < 8; ++i) {
        UNROLL for (int t = 0; t < kTile; ++t) {
          add_dots<kPinned>(dots[t], block, group * 8 + i, _mm256_set1_epi32(x[t * kSteps + group * 8 + i]));
        }
      }
      UNROLL for (int t = 0; t < kTile; ++t) {
        UNROLL for (int half = 0; half < 2; ++half) {
          const __m256 scale = _mm256_load_ps(block.scales[group][half]);
          totals[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t][half]), scale, totals[t][half]);
        }
      }
    }
    UNROLL for (int t = 0; t < kTile; ++t) {
      UNROLL for (int half = 0; half < 2; ++half) {
        add_to(sums + t * 32 + half * 8, totals[t][half], _mm256_set1_ps(0.5f));
      }
    }
  }
};

// Scales folded into the weights.
template <int kTile, bool kPinned>
struct Folded {
  static constexpr int tile = kTile;
  static void run(const Block& block, const int32_t* x, float* sums) {
    __m256i dots[kTile][2] = {};
    UNROLL for (int step = 0; step < kSteps; ++step) {
      UNROLL for (int t = 0; t < kTile; ++t) {
        add_dots<kPinned>(dots[t], block, step, _mm256_set1_epi32(x[t * kSteps + step]));
      }
    }
    UNROLL for (int t = 0; t < kTile; ++t) {
      UNROLL for (int half = 0; half < 2; ++half) {
        const __m256 products = _mm256_mul_ps(_mm256_cvtepi32_ps(dots[t][half]), _mm256_load_ps(block.scales[0][half]));
        add_to(sums + t * 32 + half * 8, products, _mm256_set1_ps(0.5f));
      }
    }
  }
};

// Weights times scales in fp32.
template <int kTile>
struct Wide {
  static constexpr int tile = kTile;
  static void run(const Block& block, const int32_t* x, float* sums) {
    __m256 totals[kTile][2] = {};
    UNROLL for (int column = 0; column < 2 * kSteps; ++column) {
      UNROLL for (int t = 0; t < kTile; ++t) {
        const __m256 value = _mm256_castsi256_ps(_mm256_set1_epi32(x[t * kSteps + column / 2]));
        UNROLL for (int half = 0; half < 2; ++half) {
          totals[t][half] = _mm256_fmadd_ps(_mm256_load_ps(block.wide[column][half]), value, totals[t][half]);
        }
      }
    }
    UNROLL for (int t = 0; t < kTile; ++t) {
      UNROLL for (int half = 0; half < 2; ++half) {
        add_to(sums + t * 32 + half * 8, totals[t][half], _mm256_set1_ps(0.5f));
      }
    }
  }
};

template <class Loop>
void measure(const char* name, double gigahertz, const Block& block, const std::vector<int32_t>& x, float* sums) {
  constexpr int kRepeats = 200;
  double best = 1e9;
  for (int trial = 0; trial < 50; ++trial) {
    const double start = now();
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      for (int t = 0; t < kTokens; t += Loop::tile) Loop::run(block, x.data() + t * kSteps, sums + t * 32);
    }
    best = std::min(best, now() - start);
  }
  const double cycles = best / kRepeats / kTokens * gigahertz * 1e9;
  std::printf("%-36s %5.1f cycles for 16 rows x 64 columns x 1 token, %.1f products per cycle\n", name, cycles,
              1024 / cycles);
}

}  // namespace

int main(int argc, char** argv) {
  const double gigahertz = argc > 1 ? std::atof(argv[1]) : 1.0;
  static Block block;
  for (auto& step : block.weights) {
    for (auto& half : step) std::generate(std::begin(half), std::end(half), [] { return std::rand() % 25 - 12; });
  }
  std::vector<int32_t> x(kTokens * kSteps);
  std::generate(x.begin(), x.end(), [] { return std::rand() & 0x1fff1fff; });
  alignas(32) static float sums[kTokens * 32];
  measure<Grouped<4, false>>("a scale per group, 4 tokens, free", gigahertz, block, x, sums);
  measure<Grouped<2, true>>("a scale per group, 2 tokens, pinned", gigahertz, block, x, sums);
  measure<Grouped<3, true>>("a scale per group, 3 tokens, pinned", gigahertz, block, x, sums);
  measure<Folded<4, false>>("scales folded, 4 tokens, free", gigahertz, block, x, sums);
  measure<Folded<6, false>>("scales folded, 6 tokens, free", gigahertz, block, x, sums);
  measure<Folded<4, true>>("scales folded, 4 tokens, pinned", gigahertz, block, x, sums);
  measure<Folded<6, true>>("scales folded, 6 tokens, pinned", gigahertz, block, x, sums);
  measure<Wide<6>>("fp32, 6 tokens", gigahertz, block, x, sums);
}

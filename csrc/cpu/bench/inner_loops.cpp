// Cycles that one core needs for the candidate inner loops of levels/avx512.cpp, and how fast both cores read memory.
//
// g++ -O3 -std=c++20 -mavx512f -mavx512bw -mavx512vnni -mavx512bf16 -pthread inner_loops.cpp -o inner_loops
// ./inner_loops 3.5   (the clock in GHz)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

#define UNROLL _Pragma("GCC unroll 32")

constexpr int kTokens = 96;
constexpr int kTile = 6;
constexpr int kSteps = 32;  // pairs of columns in a block of 64

struct Block {
  alignas(64) int16_t weights[kSteps][2][32];
  alignas(64) float scales[4][2][16];
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// int16, one scale per group of 16 columns.
struct Grouped {
  static void run(const Block& block, const int32_t* x, float* sums) {
    __m512 totals[kTile][2] = {};
    for (int group = 0; group < 4; ++group) {
      __m512i dots[kTile][2] = {};
      UNROLL for (int i = 0; i < 8; ++i) {
        const int step = group * 8 + i;
        UNROLL for (int t = 0; t < kTile; ++t) {
          const __m512i value = _mm512_set1_epi32(x[t * kSteps + step]);
          UNROLL for (int p = 0; p < 2; ++p) {
            dots[t][p] = _mm512_dpwssd_epi32(dots[t][p], _mm512_load_si512(block.weights[step][p]), value);
          }
        }
      }
      UNROLL for (int t = 0; t < kTile; ++t) {
        UNROLL for (int p = 0; p < 2; ++p) {
          const __m512 scale = _mm512_load_ps(block.scales[group][p]);
          totals[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t][p]), scale, totals[t][p]);
        }
      }
    }
    UNROLL for (int t = 0; t < kTile; ++t) {
      UNROLL for (int p = 0; p < 2; ++p) {
        float* sum = sums + (t * 2 + p) * 16;
        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), totals[t][p]));
      }
    }
  }
};

// int16 with the scales folded into the weights; of every 16 step pairs the first kPaired of each three go through
// Winograd's inner product.
template <int kPairedOfThree>
struct Folded {
  static void run(const Block& block, const int32_t* x, float* sums) {
    __m512i dots[kTile][2] = {};
    UNROLL for (int step = 0; step < kSteps; step += 2) {
      UNROLL for (int t = 0; t < kTile; ++t) {
        const __m512i first = _mm512_set1_epi32(x[t * kSteps + step]);
        const __m512i second = _mm512_set1_epi32(x[t * kSteps + step + 1]);
        UNROLL for (int p = 0; p < 2; ++p) {
          const __m512i a = _mm512_load_si512(block.weights[step][p]);
          const __m512i b = _mm512_load_si512(block.weights[step + 1][p]);
          if (step / 2 % 3 < kPairedOfThree) {
            dots[t][p] = _mm512_dpwssd_epi32(dots[t][p], _mm512_add_epi16(first, b), _mm512_add_epi16(second, a));
          } else {
            dots[t][p] = _mm512_dpwssd_epi32(dots[t][p], first, a);
            dots[t][p] = _mm512_dpwssd_epi32(dots[t][p], second, b);
          }
        }
      }
    }
    UNROLL for (int t = 0; t < kTile; ++t) {
      UNROLL for (int p = 0; p < 2; ++p) {
        float* sum = sums + (t * 2 + p) * 16;
        const __m512 products = _mm512_cvtepi32_ps(dots[t][p]);
        _mm512_storeu_ps(sum, _mm512_fmadd_ps(products, _mm512_load_ps(block.scales[0][p]), _mm512_loadu_ps(sum)));
      }
    }
  }
};

struct Bf16 {
  static void run(const Block& block, const int32_t* x, float* sums) {
    __m512 totals[kTile][2] = {};
    UNROLL for (int step = 0; step < kSteps; ++step) {
      UNROLL for (int t = 0; t < kTile; ++t) {
        const auto value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(x[t * kSteps + step]));
        UNROLL for (int p = 0; p < 2; ++p) {
          const auto weights = reinterpret_cast<__m512bh>(_mm512_load_si512(block.weights[step][p]));
          totals[t][p] = _mm512_dpbf16_ps(totals[t][p], weights, value);
        }
      }
    }
    UNROLL for (int t = 0; t < kTile; ++t) {
      UNROLL for (int p = 0; p < 2; ++p) {
        float* sum = sums + (t * 2 + p) * 16;
        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), totals[t][p]));
      }
    }
  }
};

template <class Loop>
void measure(const char* name, double gigahertz, const Block& block, const std::vector<int32_t>& x, float* sums) {
  constexpr int kRepeats = 500;
  double best = 1e9;
  for (int trial = 0; trial < 20; ++trial) {
    const double start = now();
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      for (int t = 0; t < kTokens; t += kTile) Loop::run(block, x.data() + t * kSteps, sums + t * 32);
    }
    best = std::min(best, now() - start);
  }
  const double cycles = best / kRepeats / kTokens * gigahertz * 1e9;
  std::printf("%-28s %5.1f cycles for 32 rows x 64 columns x 1 token, %.1f products per cycle\n", name, cycles,
              2048 / cycles);
}

void measure_reading(int threads) {
  constexpr size_t kBytes = size_t{1} << 29;
  std::vector<char> memory(kBytes, 1);
  double best = 1e9;
  for (int trial = 0; trial < 5; ++trial) {
    const double start = now();
    std::vector<std::thread> workers;
    for (int i = 0; i < threads; ++i) {
      workers.emplace_back([&, i] {
        __m512i sum = _mm512_setzero_si512();
        const char* first = memory.data() + kBytes / threads * i;
        for (size_t at = 0; at < kBytes / threads; at += 64)
          sum = _mm512_xor_si512(sum, _mm512_loadu_si512(first + at));
        asm volatile("" ::"v"(sum));
      });
    }
    for (auto& worker : workers) worker.join();
    best = std::min(best, now() - start);
  }
  std::printf("%d thread(s) read %.1f GB/s\n", threads, kBytes / best * 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
  const double gigahertz = argc > 1 ? std::atof(argv[1]) : 1.0;
  static Block block;
  for (auto& step : block.weights) {
    for (auto& panel : step) std::generate(std::begin(panel), std::end(panel), [] { return std::rand() % 25 - 12; });
  }
  std::vector<int32_t> x(kTokens * kSteps);
  std::generate(x.begin(), x.end(), [] { return std::rand() & 0x1fff1fff; });
  alignas(64) static float sums[kTokens * 32];
  measure<Grouped>("int16, a scale per group", gigahertz, block, x, sums);
  measure<Folded<0>>("int16, scales folded", gigahertz, block, x, sums);
  measure<Folded<3>>("folded, all pairs Winograd", gigahertz, block, x, sums);
  measure<Folded<2>>("folded, 11 of 16 Winograd", gigahertz, block, x, sums);
  measure<Bf16>("bf16 dot products", gigahertz, block, x, sums);
  for (int threads = 1; threads <= 2; ++threads) measure_reading(threads);
}

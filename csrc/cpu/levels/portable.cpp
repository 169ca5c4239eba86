// The portable level: plain C++. Build with the flags of the rest of the library, no instruction-set flags.
//
// Multiplies in fp32 whatever the activations are: without an instruction for 16-bit dot products that is the fastest.
#include "elementwise.inl"

namespace nvfp4::cpu {
namespace {

constexpr int kTileTokens = 3;

// Four floats; compilers map it to whatever vectors the target has.
typedef float Float4 __attribute__((vector_size(16)));
constexpr int kRowVectors = kPanelRows / 4;

constexpr float kCodes[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                              -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// The values of all E4M3 bytes.
struct ScaleTable {
  float values[256];

  constexpr ScaleTable() : values() {
    for (int byte = 0; byte < 256; ++byte) {
      const int exponent = byte >> 3 & 15;
      float magnitude = static_cast<float>(exponent == 0 ? byte & 7 : (byte & 7) + 8) * 0x1p-9f;
      for (int i = 1; i < exponent; ++i) magnitude *= 2.0f;
      values[byte] = byte & 0x80 ? -magnitude : magnitude;
    }
  }
};

constexpr ScaleTable kScales;

// code * scale of a block of one panel, [64 columns, 16 rows].
struct DecodedBlock {
  Float4 weights[kBlockColumns][kRowVectors];
};

void decode_block(const uint8_t* block, DecodedBlock* out) {
  for (int run = 0; run < 8; ++run) {
    const uint8_t* scales = block + kBlockCodeBytes + run / 2 * kPanelRows;
    for (int i = 0; i < kRowVectors; ++i) {
      const Float4 row_scales = {kScales.values[scales[4 * i]], kScales.values[scales[4 * i + 1]],
                                 kScales.values[scales[4 * i + 2]], kScales.values[scales[4 * i + 3]]};
      const uint8_t* codes = block + run * 64 + i * 16;
      for (int byte = 0; byte < 4; ++byte) {
        const uint8_t rows[4] = {codes[byte], codes[byte + 4], codes[byte + 8], codes[byte + 12]};
        const Float4 even = {kCodes[rows[0] & 15], kCodes[rows[1] & 15], kCodes[rows[2] & 15], kCodes[rows[3] & 15]};
        const Float4 odd = {kCodes[rows[0] >> 4], kCodes[rows[1] >> 4], kCodes[rows[2] >> 4], kCodes[rows[3] >> 4]};
        out->weights[run * 8 + 2 * byte][i] = even * row_scales;
        out->weights[run * 8 + 2 * byte + 1][i] = odd * row_scales;
      }
    }
  }
}

template <int kTokens>
void multiply_block(const DecodedBlock& block, const float* values, float* sums) {
  Float4 products[kTokens][kRowVectors] = {};
  for (int column = 0; column < kBlockColumns; ++column) {
    for (int t = 0; t < kTokens; ++t) {
      const float x = values[t * kBlockColumns + column];
      for (int i = 0; i < kRowVectors; ++i) products[t][i] += block.weights[column][i] * x;
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int row = 0; row < kPanelRows; ++row) sums[t * 2 * kPanelRows + row] += products[t][row / 4][row % 4];
  }
}

void multiply(const uint8_t* panels, int64_t panel_count, const TokenTile& tile, float* sums) {
  const int64_t count = tile.count;
  std::memset(sums, 0, count * 2 * kPanelRows * sizeof(float));
  DecodedBlock decoded;
  for (int64_t panel = 0; panel < panel_count; ++panel) {
    float* panel_sums = sums + panel * kPanelRows;
    for (int64_t block = 0; block < tile.blocks; ++block) {
      decode_block(panels + (panel * tile.blocks + block) * kBlockBytes, &decoded);
      const float* values = static_cast<const float*>(tile.values) + block * count * kBlockColumns;
      int64_t token = 0;
      for (; token + kTileTokens <= count; token += kTileTokens) {
        multiply_block<kTileTokens>(decoded, values + token * kBlockColumns, panel_sums + token * 2 * kPanelRows);
      }
      for (; token < count; ++token) {
        multiply_block<1>(decoded, values + token * kBlockColumns, panel_sums + token * 2 * kPanelRows);
      }
    }
  }
}

void gather(const TokenRows& tokens, TokenTile* tile) {
  gather_tokens(tokens, tile, [](int64_t) {});
}

void fill_block(const float* values, int64_t block, TokenTile* tile) {
  fill_tokens(values, block, tile, [](int64_t) {});
}

}  // namespace

const LevelKernels kPortableKernels = {true,           gather,         fill_block, multiply,  gate_panel,
                                       activate_panel, accumulate_row, store_row,  swiglu_row};

}  // namespace nvfp4::cpu

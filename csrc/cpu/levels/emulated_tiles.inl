// AMX's tile instructions as plain C++, for testing levels/amx.cpp on processors that have none (make test-amx). As the
// processor does, it takes fp32 and bf16 subnormals for zeros and sums the even and the odd columns of a product apart.

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated_loadconfig(config)
#define _tile_release() emulated_release()
#define _tile_zero(tile) emulated_zero(tile)
#define _tile_loadd(tile, base, stride) emulated_loadd(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_stored(tile, base, stride)
#define _tile_dpbf16ps(sums, left, right) emulated_dpbf16ps(sums, left, right)

namespace nvfp4::cpu {
namespace {

struct EmulatedTiles {
  int rows[8];
  int row_bytes[8];
  alignas(64) uint32_t lanes[8][16][16];
};

thread_local EmulatedTiles emulated;

static void emulated_release() { emulated = {}; }

static void emulated_loadconfig(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  emulated_release();
  if (bytes[0] != 1 || bytes[1] != 0) __builtin_trap();
  for (int tile = 0; tile < 8; ++tile) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * tile, sizeof(row_bytes));
    emulated.row_bytes[tile] = row_bytes;
    emulated.rows[tile] = bytes[48 + tile];
    if (row_bytes > 64 || row_bytes % 4 != 0 || emulated.rows[tile] > 16) __builtin_trap();
  }
}

// The processor refuses tiles without rows too.
static void emulated_check(int tile) {
  if (emulated.rows[tile] == 0 || emulated.row_bytes[tile] == 0) __builtin_trap();
}

static void emulated_zero(int tile) {
  emulated_check(tile);
  std::memset(emulated.lanes[tile], 0, sizeof(emulated.lanes[tile]));
}

static void emulated_loadd(int tile, const void* base, int64_t stride) {
  emulated_zero(tile);
  for (int row = 0; row < emulated.rows[tile]; ++row) {
    std::memcpy(emulated.lanes[tile][row], static_cast<const char*>(base) + row * stride, emulated.row_bytes[tile]);
  }
}

static void emulated_stored(int tile, void* base, int64_t stride) {
  emulated_check(tile);
  for (int row = 0; row < emulated.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, emulated.lanes[tile][row], emulated.row_bytes[tile]);
  }
}

NVFP4_INLINE float without_subnormals(float x) { return bits_of(x) & 0x7f800000 ? x : 0.0f; }

static void emulated_dpbf16ps(int sums, int left, int right) {
  emulated_check(sums), emulated_check(left), emulated_check(right);
  const int pairs = emulated.row_bytes[left] / 4;
  if (emulated.rows[sums] != emulated.rows[left] || emulated.row_bytes[sums] != emulated.row_bytes[right] ||
      emulated.rows[right] != pairs) {
    __builtin_trap();
  }
  for (int m = 0; m < emulated.rows[sums]; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < pairs; ++k) {
      const uint32_t a = emulated.lanes[left][m][k];
      const float a_even = without_subnormals(float_of(a << 16));
      const float a_odd = without_subnormals(float_of(a & 0xffff0000));
      for (int n = 0; n < 16; ++n) {
        const uint32_t b = emulated.lanes[right][k][n];
        even[n] = without_subnormals(__builtin_fmaf(a_even, without_subnormals(float_of(b << 16)), even[n]));
        odd[n] = without_subnormals(__builtin_fmaf(a_odd, without_subnormals(float_of(b & 0xffff0000)), odd[n]));
      }
    }
    for (int n = 0; n < emulated.row_bytes[sums] / 4; ++n) {
      const float before = without_subnormals(float_of(emulated.lanes[sums][m][n]));
      emulated.lanes[sums][m][n] = bits_of(without_subnormals(before + without_subnormals(even[n] + odd[n])));
    }
  }
}

}  // namespace
}  // namespace nvfp4::cpu

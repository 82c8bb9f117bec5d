#include "formats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace mooli {

float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023, u;
  if (e == 31) u = sign | 0x7f800000 | (m << 13);
  else if (e) u = sign | ((e + 112) << 23) | (m << 13);
  else { float f = float(m) * 5.9604644775390625e-8f; memcpy(&u, &f, 4); u |= sign; }
  float f;
  memcpy(&f, &u, 4);
  return f;
}

uint16_t float_to_half(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (a < 0x38800000) {
    float t;
    memcpy(&t, &a, 4);
    t += 0.5f;
    memcpy(&a, &t, 4);
    return uint16_t(sign | (a - 0x3f000000));
  }
  a += 0xfff + ((a >> 13) & 1);
  return uint16_t(sign | ((a - 0x38000000) >> 13));
}

namespace {

uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 64);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
float bf16_to_float(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
float half_at(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return half_to_float(h);
}

// 6-bit scales and minima of the K formats, eight of each in twelve bytes.
void k_scale_min(const uint8_t* s, int j, int& scale, int& minimum) {
  if (j < 4) { scale = s[j] & 63; minimum = s[j + 4] & 63; }
  else { scale = (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4); minimum = (s[j + 4] >> 4) | ((s[j] >> 6) << 4); }
}

// Eight bytes at a time, in one register at every instruction set.
uint64_t load8(const uint8_t* p) { uint64_t x; memcpy(&x, p, 8); return x; }
void store8(uint8_t* p, uint64_t x) { memcpy(p, &x, 8); }
constexpr int kUnit = 256;  // values of a row that are packed at a time: the largest block of any format
constexpr uint64_t kOnes = 0x0101010101010101u, kLow = 15 * kOnes;
// Sixteen bytes of nibbles as 32 codes: the low ones first.
void split_nibbles(const uint8_t* q, uint8_t* code) {
  for (int i = 0; i < 16; i += 8) {
    uint64_t x = load8(q + i);
    store8(code + i, x & kLow);
    store8(code + 16 + i, (x >> 4) & kLow);
  }
}
// Bit i of `bits` as 16 in byte i.
uint64_t spread_bits(uint8_t bits) {
  uint64_t one_in_each = uint64_t(bits) * kOnes & 0x8040201008040201u;
  return ((one_in_each + 0x7f * kOnes) >> 3) & (16 * kOnes);
}

// Integer codes of 32 values with value = scale * code + minimum, for the formats that have them per 32.
struct Group { uint8_t code[32]; float scale, minimum; };

bool decode_group(Format format, const uint8_t* row, int g, Group& out) {
  switch (format) {
    case kQ4_0: case kQ4_1: {
      const uint8_t* b = row + size_t(g) * (format == kQ4_0 ? 18 : 20);
      const uint8_t* q = b + (format == kQ4_0 ? 2 : 4);
      out.scale = half_at(b);
      out.minimum = format == kQ4_0 ? -8.f * out.scale : half_at(b + 2);
      split_nibbles(q, out.code);
      return true;
    }
    case kQ5_0: case kQ5_1: {
      const uint8_t* b = row + size_t(g) * (format == kQ5_0 ? 22 : 24);
      const uint8_t* h = b + (format == kQ5_0 ? 2 : 4);
      out.scale = half_at(b);
      out.minimum = format == kQ5_0 ? -16.f * out.scale : half_at(b + 2);
      split_nibbles(h + 4, out.code);
      for (int i = 0; i < 4; i++) store8(out.code + 8 * i, load8(out.code + 8 * i) | spread_bits(h[i]));
      return true;
    }
    case kQ8_0: {
      const uint8_t* b = row + size_t(g) * 34;
      out.scale = half_at(b);
      out.minimum = -128.f * out.scale;
      for (int i = 0; i < 32; i += 8) store8(out.code + i, load8(b + 2 + i) ^ (128 * kOnes));
      return true;
    }
    case kQ4_K: case kQ5_K: {
      const uint8_t* b = row + size_t(g / 8) * (format == kQ4_K ? 144 : 176);
      int j = g % 8, scale, minimum;
      k_scale_min(b + 4, j, scale, minimum);
      out.scale = half_at(b) * float(scale);
      out.minimum = -half_at(b + 2) * float(minimum);
      const uint8_t* q = b + (format == kQ4_K ? 16 : 48) + 32 * (j / 2);
      for (int i = 0; i < 32; i += 8) {
        uint64_t code = (load8(q + i) >> 4 * (j % 2)) & kLow;
        if (format == kQ5_K) code |= ((load8(b + 16 + i) >> j) & kOnes) << 4;
        store8(out.code + i, code);
      }
      return true;
    }
    default: return false;
  }
}

char* q8_code(char* panel, int column, int k) {
  int g = k / 32, j = k % 32;
  return panel + size_t(g) * 1088 + 64 + (column / 16) * 512 + (j / 4) * 64 + (column % 16) * 4 + j % 4;
}
char* q4_code(char* panel, int column, int k, size_t group, int scales, bool& high) {
  int g = k / 32, j = k % 32, step = j / 4;
  high = step & 1;
  return panel + size_t(g) * group + scales + (column / 16) * 256 + (step / 2) * 64 + (column % 16) * 4 + j % 4;
}
void put_half(char* p, float f) { uint16_t h = float_to_half(f); memcpy(p, &h, 2); }
// The 32 codes of a group, as they are stored: value + 128.
void put_q8(char* panel, int column, int g, float scale, const uint8_t* code) {
  put_half(panel + size_t(g) * 1088 + column * 2, scale);
  char* p = q8_code(panel, column, g * 32);
  for (int step = 0; step < 8; step++) memcpy(p + step * 64, code + step * 4, 4);
}
void put_q4(char* panel, int column, int g, bool with_minimum, float scale, float minimum, const uint8_t* code) {
  const size_t group = with_minimum ? 640 : 576;
  const int scales = with_minimum ? 128 : 64;
  put_half(panel + g * group + column * 2, scale);
  if (with_minimum) put_half(panel + g * group + 64 + column * 2, minimum);
  bool high;
  char* p = q4_code(panel, column, g * 32, group, scales, high);
  for (int line = 0; line < 4; line++) {
    uint32_t low_step, high_step;
    memcpy(&low_step, code + line * 8, 4);
    memcpy(&high_step, code + line * 8 + 4, 4);
    const uint32_t both = low_step | high_step << 4;
    memcpy(p + line * 64, &both, 4);
  }
}

// To the nearest whole number, ties to even, for |x| < 2^22; unlike lrintf it vectorises at every level.
inline float round_even(float x) { return (x + 12582912.f) - 12582912.f; }

// A group that holds what no code can express (NaN, infinity, a scale past float16) gets this for its scale: products with
// it are NaN, so that the fault shows in the logits instead of vanishing in rounding.
constexpr float kLargestHalf = 65504.f;
const float kBadScale = std::numeric_limits<float>::quiet_NaN();

bool all_finite(const float* x) {
  bool finite = true;
  for (int i = 0; i < 32; i++) finite &= std::fabs(x[i]) <= std::numeric_limits<float>::max();
  return finite;
}

void quantize_q8(const float* x, float& scale, uint8_t* code) {
  float largest = 0.f;
  for (int i = 0; i < 32; i++) largest = std::max(largest, std::fabs(x[i]));
  if (!all_finite(x) || largest > 127.f * kLargestHalf) {
    scale = kBadScale;
    std::fill(code, code + 32, uint8_t(128));
    return;
  }
  scale = half_to_float(float_to_half(largest / 127.f));
  float inverse = scale > 0.f ? 1.f / scale : 0.f;
  for (int i = 0; i < 32; i++) code[i] = uint8_t(int(std::min(127.f, std::max(-128.f, round_even(x[i] * inverse)))) + 128);
}

}  // namespace

bool known_format(int f) {
  switch (f) {
    case kF32: case kF16: case kBF16: case kQ4_0: case kQ4_1: case kQ5_0: case kQ5_1: case kQ8_0: case kQ4_K: case kQ5_K: case kQ6_K: return true;
    default: return false;
  }
}

int block_values(Format f) { return f == kF32 || f == kF16 || f == kBF16 ? 1 : f >= kQ4_K ? 256 : 32; }

size_t row_bytes(Format f, int columns) {
  size_t n = size_t(columns);
  switch (f) {
    case kF32: return n * 4;
    case kF16: case kBF16: return n * 2;
    case kQ4_0: return n / 32 * 18;
    case kQ4_1: return n / 32 * 20;
    case kQ5_0: return n / 32 * 22;
    case kQ5_1: return n / 32 * 24;
    case kQ8_0: return n / 32 * 34;
    case kQ4_K: return n / 256 * 144;
    case kQ5_K: return n / 256 * 176;
    default: return n / 256 * 210;
  }
}

void decode_row(Format format, const uint8_t* row, int columns, float* out) {
  switch (format) {
    case kF32: memcpy(out, row, size_t(columns) * 4); return;
    case kF16: for (int i = 0; i < columns; i++) out[i] = half_at(row + 2 * i); return;
    case kBF16:
      for (int i = 0; i < columns; i++) { uint16_t h; memcpy(&h, row + 2 * i, 2); out[i] = bf16_to_float(h); }
      return;
    case kQ6_K:
      for (int s = 0; s < columns / 256; s++) {
        const uint8_t* b = row + size_t(s) * 210;
        float d = half_at(b + 208);
        for (int part = 0; part < 16; part++) {  // 16 values with one scale
          const int half = part / 8, quarter = part % 8 / 2, first = part % 2 * 16;
          const uint8_t *low = b + half * 64 + quarter % 2 * 32 + first, *high = b + 128 + half * 32 + first;
          const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
          const float scale = d * float(((const int8_t*)b)[192 + half * 8 + part % 8]);
          uint8_t code[16];
          for (int i = 0; i < 16; i++) code[i] = uint8_t(((low[i] >> low_shift) & 15) | (((high[i] >> high_shift) & 3) << 4));
          for (int i = 0; i < 16; i++) out[s * 256 + part * 16 + i] = scale * float(int(code[i]) - 32);
        }
      }
      return;
    default: {
      Group group;
      for (int g = 0; g < columns / 32; g++) {
        decode_group(format, row, g, group);
        // symmetric formats are exact integers times the scale: subtract before multiplying
        int zero = format == kQ4_0 ? 8 : format == kQ5_0 ? 16 : format == kQ8_0 ? 128 : 0;
        // and add nothing: a zero keeps its sign
        if (zero) for (int j = 0; j < 32; j++) out[g * 32 + j] = group.scale * float(int(group.code[j]) - zero);
        else for (int j = 0; j < 32; j++) out[g * 32 + j] = group.scale * float(group.code[j]) + group.minimum;
      }
    }
  }
}

namespace {

// Write `groups` groups of one column, which begin at group g of the panel. `row` begins where they do and holds k values.
void pack_groups(Kind kind, Format format, const uint8_t* row, int k, char* panel, int column, int g, int groups, QuantizeFn quantize_q4) {
  if (kind == Q8 && (format == kQ8_0 || format == kQ5_0 || format == kQ4_0)) {
    const uint64_t offset = format == kQ8_0 ? 0 : (128 - (format == kQ5_0 ? 16 : 8)) * kOnes;
    for (int i = 0; i < groups; i++) {
      Group group;
      decode_group(format, row, i, group);
      for (int j = 0; j < 32; j += 8) store8(group.code + j, load8(group.code + j) + offset);
      put_q8(panel, column, g + i, group.scale, group.code);
    }
    return;
  }
  if ((kind == Q4 && format == kQ4_0) || (kind == Q4M && (format == kQ4_1 || format == kQ4_K))) {
    for (int i = 0; i < groups; i++) {
      Group group;
      decode_group(format, row, i, group);
      put_q4(panel, column, g + i, kind == Q4M, group.scale, group.minimum, group.code);
    }
    return;
  }
  float x[kUnit];
  decode_row(format, row, k, x);
  std::fill(x + k, x + groups * 32, 0.f);
  if (kind == Q4) {
    float scales[kUnit / 32];
    uint8_t codes[kUnit];
    quantize_q4(x, groups, scales, codes);
    for (int i = 0; i < groups; i++) put_q4(panel, column, g + i, false, scales[i], 0.f, codes + i * 32);
    return;
  }
  for (int i = 0; i < groups; i++) {
    const float* v = x + i * 32;
    const int first = (g + i) * 32;
    float scale;
    uint8_t code[32] = {};
    switch (kind) {
      case Q8:
        quantize_q8(v, scale, code);
        put_q8(panel, column, g + i, scale, code);
        break;
      case Q4M: {
        const float low = *std::min_element(v, v + 32), high = *std::max_element(v, v + 32);
        const float minimum = half_to_float(float_to_half(low));
        scale = half_to_float(float_to_half((high - low) / 15.f));
        if (!all_finite(v) || !(scale <= kLargestHalf) || std::fabs(minimum) > kLargestHalf) scale = kBadScale;
        else for (int j = 0; j < 32; j++)
          code[j] = uint8_t(scale > 0.f ? std::clamp(int(std::lrintf((v[j] - minimum) / scale)), 0, 15) : 0);
        put_q4(panel, column, g + i, true, scale, minimum, code);
        break;
      }
      case BF16:
        for (int j = 0; j < 32; j++) {
          const uint16_t h = float_to_bf16(v[j]);
          memcpy(panel + size_t((first + j) / 2) * 128 + column * 4 + (j & 1) * 2, &h, 2);
        }
        break;
      case F16:
        for (int j = 0; j < 32; j++) put_half(panel + (size_t(first + j) * 32 + column) * 2, v[j]);
        break;
      default:
        for (int j = 0; j < 32; j++) memcpy(panel + (size_t(first + j) * 32 + column) * 4, v + j, 4);
    }
  }
}

}  // namespace

void pack_columns(Kind kind, Format format, const uint8_t* rows, size_t row_stride, int count, int k, int padded_k, char* panel,
                  int first_column, QuantizeFn quantize_q4) {
  // A piece of all columns before the next piece: a panel is larger than the first level cache, a piece of it is not.
  for (int begin = 0; begin < padded_k; begin += kUnit) {
    const int groups = std::min(kUnit, padded_k - begin) / 32, values = std::min(kUnit, k - begin);
    for (int i = 0; i < count; i++)
      pack_groups(kind, format, rows + size_t(i) * row_stride + row_bytes(format, begin), values, panel, first_column + i, begin / 32, groups, quantize_q4);
  }
}

void unpack_column(Kind kind, const char* panel, int k, int column, float* out) {
  char* p = const_cast<char*>(panel);
  if (kind == Q8) {  // the kind of most heads, whose rows are the embedding too
    for (int first = 0; first < k; first += 32) {
      const float scale = half_at((const uint8_t*)p + size_t(first / 32) * 1088 + column * 2);
      const char* code = q8_code(p, column, first);
      const int count = std::min(32, k - first);
      for (int i = 0; i < count; i++) out[first + i] = scale * float(int(uint8_t(code[i / 4 * 64 + i % 4])) - 128);
    }
    return;
  }
  for (int i = 0; i < k; i++) {
    int g = i / 32;
    bool high;
    switch (kind) {
      case Q4: {
        uint8_t c = uint8_t(*q4_code(p, column, i, 576, 64, high));
        out[i] = half_at((const uint8_t*)p + size_t(g) * 576 + column * 2) * float((high ? c >> 4 : c & 15) - 8);
        break;
      }
      case Q4M: {
        uint8_t c = uint8_t(*q4_code(p, column, i, 640, 128, high));
        const uint8_t* s = (const uint8_t*)p + size_t(g) * 640 + column * 2;
        out[i] = half_at(s) * float(high ? c >> 4 : c & 15) + half_at(s + 64);
        break;
      }
      case BF16: {
        uint16_t h;
        memcpy(&h, p + size_t(i / 2) * 128 + column * 4 + (i & 1) * 2, 2);
        out[i] = bf16_to_float(h);
        break;
      }
      case F16: out[i] = half_at((const uint8_t*)p + (size_t(i) * 32 + column) * 2); break;
      default: memcpy(out + i, p + (size_t(i) * 32 + column) * 4, 4);
    }
  }
}

}  // namespace mooli

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
uint16_t half_bits(const uint8_t* p) { uint16_t h; memcpy(&h, p, 2); return h; }
float half_at(const uint8_t* p) { return half_to_float(half_bits(p)); }

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
// Bit i of `bits` as 16 in byte i.
uint64_t spread_bits(uint8_t bits) {
  uint64_t one_in_each = uint64_t(bits) * kOnes & 0x8040201008040201u;
  return ((one_in_each + 0x7f * kOnes) >> 3) & (16 * kOnes);
}

// The 32 codes of a block, which begins with its scale, each with `added`, eight times the same byte.
void block_codes(Format format, const uint8_t* b, uint64_t added, uint8_t* code) {
  if (format == kQ8_0) {
    for (int i = 0; i < 32; i += 8) store8(code + i, (load8(b + 2 + i) ^ (128 * kOnes)) + added);
    return;
  }
  const bool has_fifth_bits = format == kQ5_0 || format == kQ5_1;
  const uint8_t *fifth = b + (format == kQ4_0 || format == kQ5_0 ? 2 : 4), *q = fifth + (has_fifth_bits ? 4 : 0);
  for (int i = 0; i < 16; i += 8) {
    uint64_t low = load8(q + i) & kLow, high = (load8(q + i) >> 4) & kLow;
    if (has_fifth_bits) {
      low |= spread_bits(fifth[i / 8]);
      high |= spread_bits(fifth[2 + i / 8]);
    }
    store8(code + i, low + added);
    store8(code + 16 + i, high + added);
  }
}

// What a code of 0 stands for, below zero, in the formats whose blocks have a scale alone; 0 for the others.
int zero_code(Format format) { return format == kQ4_0 ? 8 : format == kQ5_0 ? 16 : format == kQ8_0 ? 128 : 0; }

// The scale of MXFP4's doubled values: 2^(code - 128), which is subnormal for the two lowest.
float mx_scale(uint8_t code) {
  const uint32_t bits = code < 2 ? 0x00200000u << code : uint32_t(code - 1) << 23;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

bool has_chosen_values(Format format) { return format == kIQ4_NL || format == kIQ4_XS || format == kMXFP4; }
Kind chosen_kind(Format format) { return format == kMXFP4 ? FP4 : IQ4; }

// Group g of a row whose codes of four bits choose among sixteen values; returns its scale.
float chosen_codes(Format format, const uint8_t* row, int g, uint8_t* code) {
  const uint8_t* q;
  float scale;
  if (format == kIQ4_XS) {
    const uint8_t* b = row + size_t(g / 8) * 136;
    const int j = g % 8, low = (b[4 + j / 2] >> 4 * (j % 2)) & 15, high = (half_bits(b + 2) >> 2 * j) & 3;
    scale = half_at(b) * float((low | high << 4) - 32);
    q = b + 8 + 16 * j;
  } else {
    const uint8_t* b = row + row_bytes(format, 32 * g);
    scale = format == kMXFP4 ? mx_scale(b[0]) : half_at(b);
    q = b + (format == kMXFP4 ? 1 : 2);
  }
  for (int i = 0; i < 16; i += 8) {
    store8(code + i, load8(q + i) & kLow);
    store8(code + 16 + i, (load8(q + i) >> 4) & kLow);
  }
  return scale;
}

// Q3_K: 32 values of -4 to 3, and a scale of -32 to 31 for each half of them.
void q3_k_codes(const uint8_t* row, int g, int8_t* code, int* scales) {
  const uint8_t *b = row + size_t(g / 8) * 110, *s = b + 96;
  const int j = g % 8;
  for (int i = 0; i < 32; i++) code[i] = int8_t(((b[32 + j / 4 * 32 + i] >> 2 * (j % 4)) & 3) - ((b[i] >> j) & 1 ? 0 : 4));
  for (int half = 0; half < 2; half++) {
    const int p = 2 * j + half, low = p < 8 ? s[p] & 15 : s[p - 8] >> 4;
    scales[half] = (low | ((s[8 + p % 4] >> p / 4 * 2) & 3) << 4) - 32;
  }
}

// Q6_K: 32 codes, value + 32, and the scale of each half of them.
void q6_k_codes(const uint8_t* row, int g, uint8_t* code, float* scales) {
  const uint8_t* b = row + size_t(g / 8) * 210;
  const int half = g % 8 / 4, quarter = g % 4;
  const uint8_t *low = b + half * 64 + quarter % 2 * 32, *high = b + 128 + half * 32;
  for (int i = 0; i < 32; i += 8)
    store8(code + i, ((load8(low + i) >> quarter / 2 * 4) & kLow) | ((load8(high + i) >> 2 * quarter) & (3 * kOnes)) << 4);
  for (int i = 0; i < 2; i++) scales[i] = half_at(b + 208) * float(int8_t(b[192 + g % 8 * 2 + i]));
}

// Integer codes of 32 values with value = scale * code + minimum, for the formats that have them per 32.
struct Group { uint8_t code[32]; float scale, minimum; };

bool decode_group(Format format, const uint8_t* row, int g, Group& out) {
  switch (format) {
    case kQ4_0: case kQ4_1: case kQ5_0: case kQ5_1: case kQ8_0: {
      const uint8_t* b = row + row_bytes(format, 32 * g);
      out.scale = half_at(b);
      out.minimum = zero_code(format) ? -float(zero_code(format)) * out.scale : half_at(b + 2);
      block_codes(format, b, 0, out.code);
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
void put_half(char* p, uint16_t h) { memcpy(p, &h, 2); }
// The 32 codes of a group, as they are stored: value + 128. scale: a half.
void put_q8(char* panel, int column, int g, uint16_t scale, const uint8_t* code) {
  put_half(panel + size_t(g) * 1088 + column * 2, scale);
  char* p = q8_code(panel, column, g * 32);
  for (int step = 0; step < 8; step++) memcpy(p + step * 64, code + step * 4, 4);
}
void put_q4(char* panel, int column, int g, bool with_minimum, uint16_t scale, uint16_t minimum, const uint8_t* code) {
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

// The 32 codes of a group, value + 32; of each half a scale.
void put_q6(char* panel, int column, int g, const uint16_t* scales, const uint8_t* code) {
  char* group = panel + size_t(g) * 896;
  for (int part = 0; part < 2; part++) put_half(group + part * 64 + column * 2, scales[part]);
  char* p = group + 128 + column / 16 * 384 + column % 16 * 4;
  for (int line = 0; line < 4; line++) {
    uint32_t low_step, high_step;
    memcpy(&low_step, code + line * 8, 4);
    memcpy(&high_step, code + line * 8 + 4, 4);
    constexpr uint32_t kNibbles = 0x0f0f0f0fu;
    const uint32_t both = (low_step & kNibbles) | (high_step & kNibbles) << 4;
    memcpy(p + line * 64, &both, 4);
  }
  for (int part = 0; part < 2; part++) {
    uint32_t high = 0;
    for (int step = 0; step < 4; step++) {
      uint32_t codes;
      memcpy(&codes, code + part * 16 + step * 4, 4);
      high |= (codes >> 4 & 0x03030303u) << 2 * step;
    }
    memcpy(p + 256 + part * 64, &high, 4);
  }
}
int q6_code(const char* panel, int column, int k) {  // without its 32
  const int j = k % 32, step = j / 4;
  const char* p = panel + size_t(k / 32) * 896 + 128 + column / 16 * 384 + column % 16 * 4 + j % 4;
  const int low = uint8_t(p[step / 2 * 64]) >> step % 2 * 4 & 15, high = uint8_t(p[256 + step / 4 * 64]) >> step % 4 * 2 & 3;
  return (low | high << 4) - 32;
}

// Added and taken away, it leaves the nearest whole number, ties to even, for |x| < 2^22.
constexpr float kRound = 12582912.f;

// A group that holds what no code can express (NaN, infinity, a scale past float16) gets this for its scale: products with
// it are NaN, so that the fault shows in the logits instead of vanishing in rounding.
constexpr float kLargestHalf = 65504.f;
const float kBadScale = std::numeric_limits<float>::quiet_NaN();

bool all_finite(const float* x) {
  bool finite = true;
  for (int i = 0; i < 32; i++) finite &= std::fabs(x[i]) <= std::numeric_limits<float>::max();
  return finite;
}

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

void quantize_q8(const float* x, float& scale, uint8_t* code) {
  Floats v[8], lanes{};
  Ints finite = (Ints)lanes == 0;
  for (int i = 0; i < 8; i++) {
    memcpy(&v[i], x + 4 * i, 16);
    const Floats size = (Floats)((Ints)v[i] & 0x7fffffff);
    lanes = size > lanes ? size : lanes;
    finite &= size <= std::numeric_limits<float>::max();
  }
  const float largest = std::max(std::max(lanes[0], lanes[1]), std::max(lanes[2], lanes[3]));
  if (!(finite[0] & finite[1] & finite[2] & finite[3]) || largest > 127.f * kLargestHalf) {
    scale = kBadScale;
    std::fill(code, code + 32, uint8_t(128));
    return;
  }
  scale = half_to_float(float_to_half(largest / 127.f));
  const float inverse = scale > 0.f ? 1.f / scale : 0.f;
  int32_t whole[32];
  const Floats least = Floats{} - 128.f, most = Floats{} + 127.f;
  for (int i = 0; i < 8; i++) {
    Floats rounded = (v[i] * inverse + kRound) - kRound;
    rounded = rounded > least ? rounded : least;
    rounded = rounded < most ? rounded : most;
    const Ints four = __builtin_convertvector(rounded, Ints);
    memcpy(whole + 4 * i, &four, 16);
  }
  for (int i = 0; i < 32; i++) code[i] = uint8_t(whole[i] + 128);
}

// Sixteen values to six bits, for files of other formats: tests and measures ask for it.
void quantize_q6(const float* x, uint16_t& half_scale, uint8_t* code) {
  float largest = 0.f;
  bool is_fit = true;
  for (int i = 0; i < 16; i++) {
    is_fit &= std::fabs(x[i]) <= std::numeric_limits<float>::max();
    largest = std::max(largest, std::fabs(x[i]));
  }
  half_scale = float_to_half(is_fit && largest <= 31.f * kLargestHalf ? largest / 31.f : kBadScale);
  const float scale = half_to_float(half_scale);
  for (int i = 0; i < 16; i++) code[i] = uint8_t(32 + (scale > 0.f ? std::clamp(int(std::lrintf(x[i] / scale)), -32, 31) : 0));
}

// To the nearest of sixteen values, the largest at that of largest size and its sign: no file asks for it, tests and measures do.
void quantize_chosen(const int8_t* values, const float* x, float& scale, uint8_t* code) {
  float extreme = 0.f, most = 0.f;
  for (int i = 0; i < 32; i++) if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  for (int c = 0; c < 16; c++) if (std::fabs(float(values[c])) > std::fabs(most)) most = float(values[c]);
  scale = half_to_float(float_to_half(extreme / most));
  if (!all_finite(x) || !(std::fabs(scale) <= kLargestHalf)) scale = kBadScale;
  for (int i = 0; i < 32; i++) {
    int best = 0;
    if (scale == scale)
      for (int c = 1; c < 16; c++)
        if (std::fabs(x[i] - scale * float(values[c])) < std::fabs(x[i] - scale * float(values[best]))) best = c;
    code[i] = uint8_t(best);
  }
}

}  // namespace

bool known_format(int f) {
  switch (f) {
    case kF32: case kF16: case kBF16: case kQ4_0: case kQ4_1: case kQ5_0: case kQ5_1: case kQ8_0: case kQ2_K: case kQ3_K: case kQ4_K: case kQ5_K:
    case kQ6_K: case kIQ4_NL: case kIQ4_XS: case kMXFP4: return true;
    default: return false;
  }
}

int block_values(Format f) {
  switch (f) {
    case kF32: case kF16: case kBF16: return 1;
    case kQ2_K: case kQ3_K: case kQ4_K: case kQ5_K: case kQ6_K: case kIQ4_XS: return 256;
    default: return 32;
  }
}

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
    case kIQ4_NL: return n / 32 * 18;
    case kMXFP4: return n / 32 * 17;
    case kQ2_K: return n / 256 * 84;
    case kQ3_K: return n / 256 * 110;
    case kIQ4_XS: return n / 256 * 136;
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
      for (int g = 0; g < columns / 32; g++) {
        uint8_t code[32];
        float scales[2];
        q6_k_codes(row, g, code, scales);
        for (int half = 0; half < 2; half++)
          for (int i = 16 * half; i < 16 * half + 16; i++) out[g * 32 + i] = scales[half] * float(int(code[i]) - 32);
      }
      return;
    case kQ2_K:
      for (int part = 0; part < columns / 16; part++) {  // 16 values with one scale and one minimum
        const uint8_t* b = row + size_t(part / 16) * 84;
        const int p = part % 16, shift = p % 8 / 2 * 2;
        const uint8_t* q = b + 16 + p / 8 * 32 + p % 2 * 16;
        const float scale = half_at(b + 80) * float(b[p] & 15), minimum = half_at(b + 82) * float(b[p] >> 4);
        for (int i = 0; i < 16; i++) out[part * 16 + i] = scale * float((q[i] >> shift) & 3) - minimum;
      }
      return;
    case kQ3_K:
      for (int g = 0; g < columns / 32; g++) {
        int8_t code[32];
        int scales[2];
        q3_k_codes(row, g, code, scales);
        const float d = half_at(row + size_t(g / 8) * 110 + 108);
        for (int i = 0; i < 32; i++) out[g * 32 + i] = d * float(scales[i / 16]) * float(code[i]);
      }
      return;
    case kIQ4_NL: case kIQ4_XS: case kMXFP4:
      for (int g = 0; g < columns / 32; g++) {
        uint8_t code[32];
        const float scale = chosen_codes(format, row, g, code);
        const int8_t* values = code_values(chosen_kind(format));
        for (int i = 0; i < 32; i++) out[g * 32 + i] = scale * float(values[code[i]]);
      }
      return;
    default: {
      Group group;
      for (int g = 0; g < columns / 32; g++) {
        decode_group(format, row, g, group);
        // symmetric formats are exact integers times the scale: subtract before multiplying
        const int zero = zero_code(format);
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
  const int zero = zero_code(format);
  if (kind == Q8 && zero) {
    for (int i = 0; i < groups; i++) {
      const uint8_t* b = row + row_bytes(format, 32 * i);
      uint8_t code[32];
      block_codes(format, b, uint64_t(128 - zero) * kOnes, code);
      put_q8(panel, column, g + i, half_bits(b), code);
    }
    return;
  }
  if ((kind == Q4 && format == kQ4_0) || (kind == Q4M && format == kQ4_1)) {
    for (int i = 0; i < groups; i++) {
      const uint8_t* b = row + row_bytes(format, 32 * i);
      uint8_t code[32];
      block_codes(format, b, 0, code);
      put_q4(panel, column, g + i, kind == Q4M, half_bits(b), half_bits(b + 2), code);
    }
    return;
  }
  if (has_chosen_values(format) && (kind == Q8 || kind == chosen_kind(format))) {
    const int8_t* values = code_values(chosen_kind(format));
    for (int i = 0; i < groups; i++) {
      uint8_t code[32];
      const uint16_t scale = float_to_half(chosen_codes(format, row, i, code));
      if (kind != Q8) { put_q4(panel, column, g + i, false, scale, 0, code); continue; }
      for (uint8_t& c : code) c = uint8_t(values[c] + 128);
      put_q8(panel, column, g + i, scale, code);
    }
    return;
  }
  if (kind == Q8 && format == kQ3_K) {  // products of code and scale reach from -124 to 128: they fit with the other sign
    for (int i = 0; i < groups; i++) {
      int8_t code[32];
      int scales[2];
      q3_k_codes(row, i, code, scales);
      uint8_t out[32];
      for (int j = 0; j < 32; j++) out[j] = uint8_t(128 - scales[j / 16] * code[j]);
      put_q8(panel, column, g + i, uint16_t(half_bits(row + size_t(i / 8) * 110 + 108) ^ 0x8000), out);
    }
    return;
  }
  if (kind == Q4M && format == kQ4_K) {
    for (int i = 0; i < groups; i++) {
      Group group;
      decode_group(format, row, i, group);
      put_q4(panel, column, g + i, true, float_to_half(group.scale), float_to_half(group.minimum), group.code);
    }
    return;
  }
  if (kind == Q6 && format == kQ6_K) {
    for (int i = 0; i < groups; i++) {
      uint8_t code[32];
      float scales[2];
      q6_k_codes(row, i, code, scales);
      const uint16_t halves[2] = {float_to_half(scales[0]), float_to_half(scales[1])};
      put_q6(panel, column, g + i, halves, code);
    }
    return;
  }
  if (kind == BF16 && format == kBF16 && k == groups * 32) {  // in pairs, as they are
    for (int j = 0; j < k; j += 2) memcpy(panel + size_t(g * 16 + j / 2) * 128 + column * 4, row + 2 * j, 4);
    return;
  }
  if (kind == F16 && format == kF16 && k == groups * 32) {
    for (int j = 0; j < k; j++) memcpy(panel + size_t(g * 32 + j) * 64 + column * 2, row + 2 * j, 2);
    return;
  }
  float x[kUnit];
  decode_row(format, row, k, x);
  std::fill(x + k, x + groups * 32, 0.f);
  if (kind == Q4) {
    float scales[kUnit / 32];
    uint8_t codes[kUnit];
    quantize_q4(x, groups, scales, codes);
    for (int i = 0; i < groups; i++) put_q4(panel, column, g + i, false, float_to_half(scales[i]), 0, codes + i * 32);
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
        put_q8(panel, column, g + i, float_to_half(scale), code);
        break;
      case Q4M: {
        const float low = *std::min_element(v, v + 32), high = *std::max_element(v, v + 32);
        const float minimum = half_to_float(float_to_half(low));
        scale = half_to_float(float_to_half((high - low) / 15.f));
        if (!all_finite(v) || !(scale <= kLargestHalf) || std::fabs(minimum) > kLargestHalf) scale = kBadScale;
        else for (int j = 0; j < 32; j++)
          code[j] = uint8_t(scale > 0.f ? std::clamp(int(std::lrintf((v[j] - minimum) / scale)), 0, 15) : 0);
        put_q4(panel, column, g + i, true, float_to_half(scale), float_to_half(minimum), code);
        break;
      }
      case Q6: {
        uint16_t halves[2];
        for (int half = 0; half < 2; half++) quantize_q6(v + 16 * half, halves[half], code + 16 * half);
        put_q6(panel, column, g + i, halves, code);
        break;
      }
      case IQ4: case FP4:
        quantize_chosen(code_values(kind), v, scale, code);
        put_q4(panel, column, g + i, false, float_to_half(scale), 0, code);
        break;
      case BF16:
        for (int j = 0; j < 32; j++) {
          const uint16_t h = float_to_bf16(v[j]);
          memcpy(panel + size_t((first + j) / 2) * 128 + column * 4 + (j & 1) * 2, &h, 2);
        }
        break;
      case F16:
        for (int j = 0; j < 32; j++) put_half(panel + (size_t(first + j) * 32 + column) * 2, float_to_half(v[j]));
        break;
      default:
        for (int j = 0; j < 32; j++) memcpy(panel + (size_t(first + j) * 32 + column) * 4, v + j, 4);
    }
  }
}

}  // namespace

constexpr int kAhead = 4;  // columns, of which memory is asked for before they are packed

void pack_columns(Kind kind, Format format, const uint8_t* rows, size_t row_stride, int count, int k, int padded_k, char* panel,
                  int first_column, QuantizeFn quantize_q4) {
  // A piece of all columns before the next piece: a panel is larger than the first level cache, a piece of it is not.
  for (int begin = 0; begin < padded_k; begin += kUnit) {
    const int groups = std::min(kUnit, padded_k - begin) / 32, values = std::min(kUnit, k - begin);
    const size_t at = row_bytes(format, begin), bytes = row_bytes(format, values);
    for (int i = 0; i < count; i++) {
      // As many streams as columns are too many for what the processor fetches ahead by itself.
      const uint8_t* row = rows + size_t(i) * row_stride + at;
      if (i + kAhead < count) for (size_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + kAhead * row_stride + byte);
      pack_groups(kind, format, row, values, panel, first_column + i, begin / 32, groups, quantize_q4);
    }
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
      case IQ4: case FP4: {
        uint8_t c = uint8_t(*q4_code(p, column, i, 576, 64, high));
        out[i] = half_at((const uint8_t*)p + size_t(g) * 576 + column * 2) * float(code_values(kind)[high ? c >> 4 : c & 15]);
        break;
      }
      case Q4M: {
        uint8_t c = uint8_t(*q4_code(p, column, i, 640, 128, high));
        const uint8_t* s = (const uint8_t*)p + size_t(g) * 640 + column * 2;
        out[i] = half_at(s) * float(high ? c >> 4 : c & 15) + half_at(s + 64);
        break;
      }
      case Q6:
        out[i] = half_at((const uint8_t*)p + size_t(g) * 896 + i % 32 / 16 * 64 + column * 2) * float(q6_code(p, column, i));
        break;
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

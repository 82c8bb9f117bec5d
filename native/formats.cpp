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

// Integer codes of 32 values with value = scale * code + minimum, for the formats that have them per 32.
struct Group { uint8_t code[32]; float scale, minimum; };

bool decode_group(Format format, const uint8_t* row, int g, Group& out) {
  switch (format) {
    case kQ4_0: case kQ4_1: {
      const uint8_t* b = row + size_t(g) * (format == kQ4_0 ? 18 : 20);
      const uint8_t* q = b + (format == kQ4_0 ? 2 : 4);
      out.scale = half_at(b);
      out.minimum = format == kQ4_0 ? -8.f * out.scale : half_at(b + 2);
      for (int i = 0; i < 16; i++) { out.code[i] = q[i] & 15; out.code[i + 16] = q[i] >> 4; }
      return true;
    }
    case kQ5_0: case kQ5_1: {
      const uint8_t* b = row + size_t(g) * (format == kQ5_0 ? 22 : 24);
      const uint8_t* h = b + (format == kQ5_0 ? 2 : 4);
      uint32_t high;
      memcpy(&high, h, 4);
      out.scale = half_at(b);
      out.minimum = format == kQ5_0 ? -16.f * out.scale : half_at(b + 2);
      for (int i = 0; i < 16; i++) {
        out.code[i] = uint8_t((h[4 + i] & 15) | (((high >> i) & 1) << 4));
        out.code[i + 16] = uint8_t((h[4 + i] >> 4) | (((high >> (i + 16)) & 1) << 4));
      }
      return true;
    }
    case kQ8_0: {
      const uint8_t* b = row + size_t(g) * 34;
      out.scale = half_at(b);
      out.minimum = -128.f * out.scale;
      for (int i = 0; i < 32; i++) out.code[i] = uint8_t(b[2 + i] ^ 128);
      return true;
    }
    case kQ4_K: case kQ5_K: {
      const uint8_t* b = row + size_t(g / 8) * (format == kQ4_K ? 144 : 176);
      int j = g % 8, scale, minimum;
      k_scale_min(b + 4, j, scale, minimum);
      out.scale = half_at(b) * float(scale);
      out.minimum = -half_at(b + 2) * float(minimum);
      const uint8_t* q = b + (format == kQ4_K ? 16 : 48) + 32 * (j / 2);
      for (int i = 0; i < 32; i++) {
        int code = j % 2 ? q[i] >> 4 : q[i] & 15;
        if (format == kQ5_K) code |= ((b[16 + i] >> j) & 1) << 4;
        out.code[i] = uint8_t(code);
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
void put_q8(char* panel, int column, int g, float scale, const int* q) {
  put_half(panel + size_t(g) * 1088 + column * 2, scale);
  for (int j = 0; j < 32; j++) *q8_code(panel, column, g * 32 + j) = char(q[j] + 128);
}
void put_q4(char* panel, int column, int g, bool with_minimum, float scale, float minimum, const uint8_t* code) {
  size_t group = with_minimum ? 640 : 576;
  int scales = with_minimum ? 128 : 64;
  put_half(panel + g * group + column * 2, scale);
  if (with_minimum) put_half(panel + g * group + 64 + column * 2, minimum);
  for (int j = 0; j < 32; j++) {
    bool high;
    char* p = q4_code(panel, column, g * 32 + j, group, scales, high);
    *p = char(high ? (uint8_t(*p) & 15) | (code[j] << 4) : (uint8_t(*p) & 240) | code[j]);
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

// Symmetric 4 bits with the scale of least squared error among a few around the usual one.
void quantize_q4(const float* x, float& scale, uint8_t* code) {
  float extreme = 0.f;
  for (int i = 0; i < 32; i++) if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  scale = 0.f;
  std::fill(code, code + 32, uint8_t(8));
  if (!all_finite(x) || std::fabs(extreme) > 8.f * kLargestHalf) { scale = kBadScale; return; }
  if (extreme == 0.f) return;
  float best_error = INFINITY;
  for (int t = -2; t <= 2; t++) {
    float s = half_to_float(float_to_half(extreme / (-8.f + 0.4f * float(t))));
    if (s == 0.f) continue;
    const float inverse = 1.f / s;
    float q[32], xq[4] = {}, qq[4] = {}, ee[4] = {};
    for (int i = 0; i < 32; i++) q[i] = std::min(7.f, std::max(-8.f, round_even(x[i] * inverse)));
    for (int i = 0; i < 32; i += 4)
      for (int j = 0; j < 4; j++) { xq[j] += x[i + j] * q[i + j]; qq[j] += q[i + j] * q[i + j]; }
    const float squares = qq[0] + qq[1] + qq[2] + qq[3];
    if (squares == 0.f) continue;
    const float fitted = half_to_float(float_to_half((xq[0] + xq[1] + xq[2] + xq[3]) / squares));
    for (int i = 0; i < 32; i += 4)
      for (int j = 0; j < 4; j++) { float d = x[i + j] - fitted * q[i + j]; ee[j] += d * d; }
    const float error = ee[0] + ee[1] + ee[2] + ee[3];
    if (error < best_error) {
      best_error = error;
      scale = fitted;
      for (int i = 0; i < 32; i++) code[i] = uint8_t(int(q[i]) + 8);
    }
  }
}

void quantize_q8(const float* x, float& scale, int* q) {
  float largest = 0.f;
  for (int i = 0; i < 32; i++) largest = std::max(largest, std::fabs(x[i]));
  if (!all_finite(x) || largest > 127.f * kLargestHalf) {
    scale = kBadScale;
    std::fill(q, q + 32, 0);
    return;
  }
  scale = half_to_float(float_to_half(largest / 127.f));
  float inverse = scale > 0.f ? 1.f / scale : 0.f;
  for (int i = 0; i < 32; i++) q[i] = int(std::min(127.f, std::max(-128.f, round_even(x[i] * inverse))));
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
        for (int half = 0; half < 2; half++)
          for (int i = 0; i < 32; i++) {
            const uint8_t *low = b + half * 64, *high = b + 128 + half * 32;
            const int8_t* scale = (const int8_t*)b + 192 + half * 8 + i / 16;
            int h = high[i];
            float* y = out + s * 256 + half * 128 + i;
            y[0] = d * float(scale[0]) * float(((low[i] & 15) | ((h & 3) << 4)) - 32);
            y[32] = d * float(scale[2]) * float(((low[i + 32] & 15) | (((h >> 2) & 3) << 4)) - 32);
            y[64] = d * float(scale[4]) * float(((low[i] >> 4) | (((h >> 4) & 3) << 4)) - 32);
            y[96] = d * float(scale[6]) * float(((low[i + 32] >> 4) | ((h >> 6) << 4)) - 32);
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

void pack_column(Kind kind, Format format, const uint8_t* row, int k, int padded_k, char* panel, int column, float* x) {
  Group group;
  int q[32];
  if (kind == Q8 && (format == kQ8_0 || format == kQ5_0 || format == kQ4_0)) {
    const int zero = format == kQ8_0 ? 128 : format == kQ5_0 ? 16 : 8;
    for (int g = 0; g < padded_k / 32; g++) {
      decode_group(format, row, g, group);
      for (int j = 0; j < 32; j++) q[j] = int(group.code[j]) - zero;
      put_q8(panel, column, g, group.scale, q);
    }
    return;
  }
  if ((kind == Q4 && format == kQ4_0) || (kind == Q4M && (format == kQ4_1 || format == kQ4_K))) {
    for (int g = 0; g < padded_k / 32; g++) {
      decode_group(format, row, g, group);
      put_q4(panel, column, g, kind == Q4M, group.scale, group.minimum, group.code);
    }
    return;
  }
  decode_row(format, row, k, x);
  std::fill(x + k, x + padded_k, 0.f);
  switch (kind) {
    case Q8:
      for (int g = 0; g < padded_k / 32; g++) {
        float scale;
        quantize_q8(x + g * 32, scale, q);
        put_q8(panel, column, g, scale, q);
      }
      return;
    case Q4:
      for (int g = 0; g < padded_k / 32; g++) {
        float scale;
        uint8_t code[32];
        quantize_q4(x + g * 32, scale, code);
        put_q4(panel, column, g, false, scale, 0.f, code);
      }
      return;
    case Q4M:
      for (int g = 0; g < padded_k / 32; g++) {
        const float* v = x + g * 32;
        float low = *std::min_element(v, v + 32), high = *std::max_element(v, v + 32);
        float scale = half_to_float(float_to_half((high - low) / 15.f)), minimum = half_to_float(float_to_half(low));
        uint8_t code[32] = {};
        if (!all_finite(v) || !(scale <= kLargestHalf) || std::fabs(minimum) > kLargestHalf) scale = kBadScale;
        else for (int j = 0; j < 32; j++)
          code[j] = uint8_t(scale > 0.f ? std::clamp(int(std::lrintf((v[j] - minimum) / scale)), 0, 15) : 0);
        put_q4(panel, column, g, true, scale, minimum, code);
      }
      return;
    case BF16:
      for (int i = 0; i < padded_k; i++) {
        uint16_t h = float_to_bf16(x[i]);
        memcpy(panel + size_t(i / 2) * 128 + column * 4 + (i & 1) * 2, &h, 2);
      }
      return;
    case F16:
      for (int i = 0; i < padded_k; i++) put_half(panel + (size_t(i) * 32 + column) * 2, x[i]);
      return;
    default:
      for (int i = 0; i < padded_k; i++) memcpy(panel + (size_t(i) * 32 + column) * 4, x + i, 4);
  }
}

void unpack_column(Kind kind, const char* panel, int k, int column, float* out) {
  char* p = const_cast<char*>(panel);
  for (int i = 0; i < k; i++) {
    int g = i / 32;
    bool high;
    switch (kind) {
      case Q8:
        out[i] = half_at((const uint8_t*)p + size_t(g) * 1088 + column * 2) * float(int(uint8_t(*q8_code(p, column, i))) - 128);
        break;
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

// A few vector operations under one name for each instruction set. Everything is internal to the including file: no symbol
// may be shared between files compiled for different processors, or the linker could keep the wrong copy.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#define MOOLI_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int W = 16;
using vf = __m512;
using vi = __m512i;
MOOLI_INLINE vf ld(const float* p) { return _mm512_loadu_ps(p); }
MOOLI_INLINE void st(float* p, vf x) { _mm512_storeu_ps(p, x); }
MOOLI_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
MOOLI_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
MOOLI_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
MOOLI_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
MOOLI_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
MOOLI_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
MOOLI_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
MOOLI_INLINE vf abs(vf a) { return _mm512_abs_ps(a); }
MOOLI_INLINE vi set1i(int x) { return _mm512_set1_epi32(x); }
MOOLI_INLINE vf cvt(vi a) { return _mm512_cvtepi32_ps(a); }
MOOLI_INLINE vf as_floats(vi a) { return _mm512_castsi512_ps(a); }
MOOLI_INLINE vf ld_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
MOOLI_INLINE vf ld_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
MOOLI_INLINE void st_f16(uint16_t* p, vf x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
// 2^x for x <= 0; exactly 0 below -126 (and for -inf)
MOOLI_INLINE vf exp2n(vf x) {
  __mmask16 keep = _mm512_cmp_ps_mask(x, set1(-126.f), _CMP_GE_OQ);
  vf n = _mm512_roundscale_ps(x, 0), r = sub(x, n);
  vf p = set1(1.5403530e-4f);
  p = fma(p, r, set1(1.3333558e-3f)); p = fma(p, r, set1(9.6181291e-3f)); p = fma(p, r, set1(5.5504109e-2f));
  p = fma(p, r, set1(2.4022651e-1f)); p = fma(p, r, set1(6.9314718e-1f)); p = fma(p, r, set1(1.f));
  return _mm512_maskz_scalef_ps(keep, p, n);
}
// lanes whose index base + lane lies in [lo, hi] keep x, the others become -inf
MOOLI_INLINE vf keep_range(vf x, int base, int lo, int hi) {
  vi id = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), set1i(base));
  __mmask16 k = _mm512_cmple_epi32_mask(id, set1i(hi)) & _mm512_cmpge_epi32_mask(id, set1i(lo));
  return _mm512_mask_blend_ps(k, set1(-__builtin_inff()), x);
}
// lanes whose bit is set keep x, the others become -inf
MOOLI_INLINE vf keep_bits(vf x, uint32_t bits) { return _mm512_mask_blend_ps(__mmask16(bits), set1(-__builtin_inff()), x); }
MOOLI_INLINE vf where_negative(vf x, vf a, vf b) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), b, a); }
MOOLI_INLINE float hmax(vf a) { return _mm512_reduce_max_ps(a); }
MOOLI_INLINE bool any_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
// GCC does not fold a broadcast from memory into these instructions, and spills the broadcasts it shares: hence the asm
MOOLI_INLINE vi dot4(vi acc, vi w, const int* a) {
  __asm__("vpdpbusd %2%{1to16%},%1,%0" : "+v"(acc) : "v"(w), "m"(*a));
  return acc;
}
struct WeightLine { vi w; };
MOOLI_INLINE WeightLine ld_weights(const char* p) { return {_mm512_loadu_si512(p)}; }
MOOLI_INLINE WeightLine low_nibbles(const char* p) { return {_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15))}; }
MOOLI_INLINE WeightLine high_nibbles(const char* p) {
  return {_mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15))};
}
// Codes of six bits of k-step `step` of four: their low bits are nibbles of a line for two steps, their high ones have a line
// for all four.
MOOLI_INLINE WeightLine six_bits(const char* low, const char* high, int step) {
  const vi l = _mm512_loadu_si512(low), h = _mm512_loadu_si512(high);
  const vi nibbles = step % 2 ? _mm512_srli_epi16(l, 4) : l;
  const vi top = step == 0 ? _mm512_slli_epi16(h, 4) : step == 1 ? _mm512_slli_epi16(h, 2) : step == 2 ? h : _mm512_srli_epi16(h, 2);
  constexpr int kSelect = 0xe4;  // the first where the third has ones, elsewhere the second
  return {_mm512_and_si512(_mm512_ternarylogic_epi32(nibbles, top, _mm512_set1_epi8(15), kSelect), _mm512_set1_epi8(63))};
}
// The weights that codes choose in a table of sixteen.
MOOLI_INLINE WeightLine look_up(WeightLine codes, const uint8_t* table) {
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), codes.w)};
}
MOOLI_INLINE vi dot4(vi acc, WeightLine w, const int* a) { return dot4(acc, w.w, a); }
// One four-byte activation in all lanes, for several weight lines: a load each would keep the dot units waiting.
struct Activation { vi x; };
MOOLI_INLINE Activation ld_activation(const int* a) {
  Activation x;
  __asm__("vpbroadcastd %1,%0" : "=v"(x.x) : "m"(*a));
  return x;
}
MOOLI_INLINE vi dot4(vi acc, WeightLine w, Activation a) {
  __asm__("vpdpbusd %2,%1,%0" : "+v"(acc) : "v"(w.w), "v"(a.x));
  return acc;
}
// eight bits per value, ties to even; returns the sum of the 16 values
MOOLI_INLINE int quantize16(const float* x, vf inverse, int8_t* q) {
  __m512i v = _mm512_cvtps_epi32(mul(ld(x), inverse));
  _mm_storeu_si128((__m128i*)q, _mm512_cvtepi32_epi8(v));
  return _mm512_reduce_add_epi32(v);
}
MOOLI_INLINE void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }

#elif defined(__AVX2__)
constexpr int W = 8;
using vf = __m256;
using vi = __m256i;
MOOLI_INLINE vf ld(const float* p) { return _mm256_loadu_ps(p); }
MOOLI_INLINE void st(float* p, vf x) { _mm256_storeu_ps(p, x); }
MOOLI_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
MOOLI_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
MOOLI_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
MOOLI_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
MOOLI_INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
MOOLI_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
MOOLI_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
MOOLI_INLINE vf abs(vf a) { return _mm256_andnot_ps(set1(-0.f), a); }
MOOLI_INLINE vi set1i(int x) { return _mm256_set1_epi32(x); }
MOOLI_INLINE vf cvt(vi a) { return _mm256_cvtepi32_ps(a); }
MOOLI_INLINE vf as_floats(vi a) { return _mm256_castsi256_ps(a); }
MOOLI_INLINE vf ld_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
MOOLI_INLINE vf ld_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
MOOLI_INLINE void st_f16(uint16_t* p, vf x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
MOOLI_INLINE vf exp2n(vf x) {
  vf keep = _mm256_cmp_ps(x, set1(-126.f), _CMP_GE_OQ);
  x = max(x, set1(-126.f));
  vf n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = sub(x, n);
  vf p = set1(1.5403530e-4f);
  p = fma(p, r, set1(1.3333558e-3f)); p = fma(p, r, set1(9.6181291e-3f)); p = fma(p, r, set1(5.5504109e-2f));
  p = fma(p, r, set1(2.4022651e-1f)); p = fma(p, r, set1(6.9314718e-1f)); p = fma(p, r, set1(1.f));
  vi e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), set1i(127)), 23);
  return _mm256_and_ps(keep, mul(p, _mm256_castsi256_ps(e)));
}
MOOLI_INLINE vf keep_range(vf x, int base, int lo, int hi) {
  vi id = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), set1i(base));
  vi out = _mm256_or_si256(_mm256_cmpgt_epi32(id, set1i(hi)), _mm256_cmpgt_epi32(set1i(lo), id));
  return _mm256_blendv_ps(x, set1(-__builtin_inff()), _mm256_castsi256_ps(out));
}
MOOLI_INLINE vf keep_bits(vf x, uint32_t bits) {
  const vi each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const vi kept = _mm256_cmpeq_epi32(_mm256_and_si256(set1i(int(bits)), each), each);
  return _mm256_blendv_ps(set1(-__builtin_inff()), x, _mm256_castsi256_ps(kept));
}
MOOLI_INLINE vf where_negative(vf x, vf a, vf b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ)); }
MOOLI_INLINE float hmax(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
MOOLI_INLINE bool any_nan(vf a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
struct Activation { vi x; };
MOOLI_INLINE Activation ld_activation(const int* a) { return {_mm256_set1_epi32(*a)}; }
MOOLI_INLINE vi six_bit_codes(const char* low, const char* high, int step) {
  const vi l = _mm256_loadu_si256((const vi*)low), h = _mm256_loadu_si256((const vi*)high);
  const vi nibbles = step % 2 ? _mm256_srli_epi16(l, 4) : l;
  const vi top = step == 0 ? _mm256_slli_epi16(h, 4) : step == 1 ? _mm256_slli_epi16(h, 2) : step == 2 ? h : _mm256_srli_epi16(h, 2);
  return _mm256_or_si256(_mm256_and_si256(nibbles, _mm256_set1_epi8(15)), _mm256_and_si256(top, _mm256_set1_epi8(48)));
}
#if defined(__AVXVNNI__)
struct WeightLine { vi w; };
MOOLI_INLINE WeightLine ld_weights(const char* p) { return {_mm256_loadu_si256((const vi*)p)}; }
MOOLI_INLINE WeightLine low_nibbles(const char* p) { return {_mm256_and_si256(ld_weights(p).w, _mm256_set1_epi8(15))}; }
MOOLI_INLINE WeightLine high_nibbles(const char* p) {
  return {_mm256_and_si256(_mm256_srli_epi16(ld_weights(p).w, 4), _mm256_set1_epi8(15))};
}
MOOLI_INLINE WeightLine six_bits(const char* low, const char* high, int step) { return {six_bit_codes(low, high, step)}; }
MOOLI_INLINE WeightLine look_up(WeightLine codes, const uint8_t* table) {
  return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table)), codes.w)};
}
MOOLI_INLINE vi dot4(vi acc, WeightLine w, Activation a) {
  __asm__("%{vex%} vpdpbusd %2,%1,%0" : "+x"(acc) : "x"(w.w), "x"(a.x));
  return acc;
}
#else
// No VNNI. The product of unsigned by signed bytes adds up two in 16 bits, saturating: with magnitudes of weights, and their
// signs on the activations, two stay below 32768. In asm, as GCC would first compute all products of a sum and spill them.
#define MOOLI_SIGNED_WEIGHTS
constexpr int kQ8Zero = 0;
struct WeightLine { vi value, magnitude; };
MOOLI_INLINE WeightLine ld_weights(const char* p) {
  vi value = _mm256_xor_si256(_mm256_loadu_si256((const vi*)p), _mm256_set1_epi8(-128));
  return {value, _mm256_abs_epi8(value)};
}
MOOLI_INLINE vi dot4(vi acc, WeightLine w, Activation a) {
  vi t;
  __asm__("vpsignb %2,%4,%1\n\tvpmaddubsw %1,%3,%1\n\tvpmaddwd %5,%1,%1\n\tvpaddd %1,%0,%0"
          : "+x"(acc), "=&x"(t) : "x"(w.value), "x"(w.magnitude), "x"(a.x), "x"(_mm256_set1_epi16(1)));
  return acc;
}
// Products with codes of four bits fit in 16 bits for a whole group of 32: 8 times 2 x 15 x 127.
struct NibbleLine { vi w; };
MOOLI_INLINE NibbleLine low_nibbles(const char* p) {
  return {_mm256_and_si256(_mm256_loadu_si256((const vi*)p), _mm256_set1_epi8(15))};
}
MOOLI_INLINE NibbleLine high_nibbles(const char* p) {
  return {_mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256((const vi*)p), 4), _mm256_set1_epi8(15))};
}
MOOLI_INLINE WeightLine look_up(NibbleLine codes, const uint8_t* table) {
  const vi value = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table)), codes.w);
  return {value, _mm256_abs_epi8(value)};
}
MOOLI_INLINE vi dot4(vi acc, NibbleLine w, Activation a) {
  vi t;
  __asm__("vpmaddubsw %3,%2,%1\n\tvpaddw %1,%0,%0" : "+x"(acc), "=&x"(t) : "x"(w.w), "x"(a.x));
  return acc;
}
// Products with codes of six bits are added up in 32 bits: two of them come to 2 x 63 x 127.
struct SixBitLine { vi w; };
MOOLI_INLINE SixBitLine six_bits(const char* low, const char* high, int step) { return {six_bit_codes(low, high, step)}; }
MOOLI_INLINE vi dot4(vi acc, SixBitLine w, Activation a) {
  vi t;
  __asm__("vpmaddubsw %3,%2,%1\n\tvpmaddwd %4,%1,%1\n\tvpaddd %1,%0,%0"
          : "+x"(acc), "=&x"(t) : "x"(w.w), "x"(a.x), "x"(_mm256_set1_epi16(1)));
  return acc;
}
MOOLI_INLINE vi begin_nibbles(int) { return _mm256_setzero_si256(); }
MOOLI_INLINE vi end_nibbles(vi acc, int start) {
  return _mm256_add_epi32(_mm256_madd_epi16(acc, _mm256_set1_epi16(1)), set1i(start));
}
#define MOOLI_NIBBLES_IN_WORDS
#endif
MOOLI_INLINE vi dot4(vi acc, WeightLine w, const int* a) { return dot4(acc, w, ld_activation(a)); }
MOOLI_INLINE int quantize16(const float* x, vf inverse, int8_t* q) {
  vi words = _mm256_packs_epi32(_mm256_cvtps_epi32(mul(ld(x), inverse)), _mm256_cvtps_epi32(mul(ld(x + 8), inverse)));
  words = _mm256_permute4x64_epi64(words, 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128((__m128i*)q, bytes);
  __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(-128)), _mm_setzero_si128());
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
}
MOOLI_INLINE void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }

#elif defined(MOOLI_NEON)
#include "simd_neon.h"

#else
constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
MOOLI_INLINE vf ld(const float* p) { vf x; memcpy(&x, p, sizeof x); return x; }
MOOLI_INLINE void st(float* p, vf x) { memcpy(p, &x, sizeof x); }
MOOLI_INLINE vf set1(float x) { return vf{x, x, x, x}; }
MOOLI_INLINE vf add(vf a, vf b) { return a + b; }
MOOLI_INLINE vf sub(vf a, vf b) { return a - b; }
MOOLI_INLINE vf mul(vf a, vf b) { return a * b; }
MOOLI_INLINE vf div(vf a, vf b) { return a / b; }
MOOLI_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
MOOLI_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // no fused instruction assumed at this level
MOOLI_INLINE vf abs(vf a) { return a < 0 ? -a : a; }
MOOLI_INLINE vi set1i(int x) { return vi{x, x, x, x}; }
MOOLI_INLINE vf cvt(vi a) { return __builtin_convertvector(a, vf); }
MOOLI_INLINE vf as_floats(vi a) { vf x; memcpy(&x, &a, sizeof x); return x; }
MOOLI_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023, u;
  if (e == 31) u = sign | 0x7f800000 | (m << 13);
  else if (e) u = sign | ((e + 112) << 23) | (m << 13);
  else { float f = float(m) * 5.9604644775390625e-8f; memcpy(&u, &f, 4); u |= sign; }
  float f; memcpy(&f, &u, 4); return f;
}
MOOLI_INLINE uint16_t float_to_half(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (a < 0x38800000) {  // subnormal: let the float adder round
    float t; memcpy(&t, &a, 4); t += 0.5f; memcpy(&a, &t, 4);
    return uint16_t(sign | (a - 0x3f000000));
  }
  a += 0xfff + ((a >> 13) & 1);
  return uint16_t(sign | ((a - 0x38000000) >> 13));
}
MOOLI_INLINE vf ld_f16(const uint16_t* p) { return vf{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])}; }
MOOLI_INLINE vf ld_bf16(const uint16_t* p) {
  vi u = vi{p[0], p[1], p[2], p[3]} << 16;
  vf x; memcpy(&x, &u, sizeof x); return x;
}
MOOLI_INLINE void st_f16(uint16_t* p, vf x) { for (int i = 0; i < 4; i++) p[i] = float_to_half(x[i]); }
MOOLI_INLINE vf exp2n(vf x) {
  vi keep = x >= -126.f;
  x = max(x, set1(-126.f));
  vf n = (x + 12582912.f) - 12582912.f, r = x - n;
  vf p = set1(1.5403530e-4f);
  p = fma(p, r, set1(1.3333558e-3f)); p = fma(p, r, set1(9.6181291e-3f)); p = fma(p, r, set1(5.5504109e-2f));
  p = fma(p, r, set1(2.4022651e-1f)); p = fma(p, r, set1(6.9314718e-1f)); p = fma(p, r, set1(1.f));
  vi e = (__builtin_convertvector(n, vi) + 127) << 23;
  vf two; memcpy(&two, &e, sizeof two);
  vf y = p * two; vi bits; memcpy(&bits, &y, sizeof bits); bits &= keep; memcpy(&y, &bits, sizeof y);
  return y;
}
MOOLI_INLINE vf keep_range(vf x, int base, int lo, int hi) {
  vi id = vi{0, 1, 2, 3} + base;
  return ((id <= hi) & (id >= lo)) ? x : set1(-__builtin_inff());
}
MOOLI_INLINE vf keep_bits(vf x, uint32_t bits) { return ((vi{1, 2, 4, 8} & int(bits)) != 0) ? x : set1(-__builtin_inff()); }
MOOLI_INLINE vf where_negative(vf x, vf a, vf b) { return x < 0 ? a : b; }
MOOLI_INLINE float hmax(vf a) {
  float m = a[0];
  for (int i = 1; i < 4; i++) m = a[i] > m ? a[i] : m;
  return m;
}
MOOLI_INLINE bool any_nan(vf a) { vi n = a != a; return n[0] | n[1] | n[2] | n[3]; }
struct WeightLine { uint8_t b[16]; };
MOOLI_INLINE WeightLine ld_weights(const char* p) { WeightLine w; memcpy(w.b, p, 16); return w; }
MOOLI_INLINE WeightLine low_nibbles(const char* p) { WeightLine w = ld_weights(p); for (auto& x : w.b) x &= 15; return w; }
MOOLI_INLINE WeightLine high_nibbles(const char* p) { WeightLine w = ld_weights(p); for (auto& x : w.b) x >>= 4; return w; }
MOOLI_INLINE WeightLine six_bits(const char* low, const char* high, int step) {
  WeightLine l = ld_weights(low), h = ld_weights(high);
  for (int i = 0; i < 16; i++) l.b[i] = uint8_t((l.b[i] >> step % 2 * 4 & 15) | (h.b[i] >> 2 * step & 3) << 4);
  return l;
}
MOOLI_INLINE WeightLine look_up(WeightLine codes, const uint8_t* table) { for (auto& x : codes.b) x = table[x]; return codes; }
// not inlined: unrolled by the callers it would only bloat the slowest level
__attribute__((noinline, unused)) vi dot4(vi acc, const WeightLine& w, const int* a) {
  int8_t v[4]; memcpy(v, a, 4);
  for (int c = 0; c < 4; c++) {
    int s = 0;
    for (int k = 0; k < 4; k++) s += int(w.b[c * 4 + k]) * v[k];
    acc[c] += s;
  }
  return acc;
}
MOOLI_INLINE int quantize16(const float* x, vf inverse, int8_t* q) {
  int sum = 0;
  for (int i = 0; i < 16; i++) {
    float n = (x[i] * inverse[0] + 12582912.f) - 12582912.f;  // ties to even, as the vector instructions round
    q[i] = n == n ? (int8_t)(int)n : 0; sum += q[i];
  }
  return sum;
}
MOOLI_INLINE void prefetch(const char*) {}
#endif

constexpr int H = 16 / W;  // vectors in half a panel
#if defined(__AVX512F__)
constexpr int kHalvesAtOnce = 2;  // registers for both halves of a panel's columns
#else
constexpr int kHalvesAtOnce = 1;
#endif
#if !defined(__AVX2__)
using Activation = const int*;
MOOLI_INLINE Activation ld_activation(const int* a) { return a; }
#endif
#if !defined(MOOLI_SIGNED_WEIGHTS)
constexpr int kQ8Zero = 128;  // what the dot product sees of a Q8 weight is value + 128
#endif
#if !defined(MOOLI_NIBBLES_IN_WORDS)
using NibbleLine = WeightLine;
MOOLI_INLINE vi begin_nibbles(int start) { return set1i(start); }
MOOLI_INLINE vi end_nibbles(vi acc, int) { return acc; }
#endif
MOOLI_INLINE uint16_t float_to_bf16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 64);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

}  // namespace

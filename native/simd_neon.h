// The vector operations of simd.h for AArch64 with the dot product of ARMv8.2. A fragment of simd.h, inside its unnamed
// namespace. Formulas, roundings and the treatment of NaN are those of the AVX2 level, so that results are the same bits.
#pragma once
#if !defined(__ARM_FEATURE_DOTPROD)
#error "this file needs -march=armv8.2-a+dotprod or better"
#endif

constexpr int W = 4;
using vf = float32x4_t;
using vi = int32x4_t;
MOOLI_INLINE vf ld(const float* p) { return vld1q_f32(p); }
MOOLI_INLINE void st(float* p, vf x) { vst1q_f32(p, x); }
MOOLI_INLINE vf set1(float x) { return vdupq_n_f32(x); }
MOOLI_INLINE vf add(vf a, vf b) { return vaddq_f32(a, b); }
MOOLI_INLINE vf sub(vf a, vf b) { return vsubq_f32(a, b); }
MOOLI_INLINE vf mul(vf a, vf b) { return vmulq_f32(a, b); }
MOOLI_INLINE vf div(vf a, vf b) { return vdivq_f32(a, b); }
// a > b ? a : b, as on x86: vmaxq_f32 would return a NaN of the first operand, and callers count on the second
MOOLI_INLINE vf max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
MOOLI_INLINE vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
MOOLI_INLINE vf abs(vf a) { return vabsq_f32(a); }
MOOLI_INLINE vi set1i(int x) { return vdupq_n_s32(x); }
MOOLI_INLINE vf cvt(vi a) { return vcvtq_f32_s32(a); }
MOOLI_INLINE vf as_floats(vi a) { return vreinterpretq_f32_s32(a); }
MOOLI_INLINE vf ld_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
MOOLI_INLINE vf ld_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
MOOLI_INLINE void st_f16(uint16_t* p, vf x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
MOOLI_INLINE vf exp2n(vf x) {
  uint32x4_t keep = vcgeq_f32(x, set1(-126.f));
  x = max(x, set1(-126.f));
  vf n = vrndnq_f32(x), r = sub(x, n);
  vf p = set1(1.5403530e-4f);
  p = fma(p, r, set1(1.3333558e-3f)); p = fma(p, r, set1(9.6181291e-3f)); p = fma(p, r, set1(5.5504109e-2f));
  p = fma(p, r, set1(2.4022651e-1f)); p = fma(p, r, set1(6.9314718e-1f)); p = fma(p, r, set1(1.f));
  vi e = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), set1i(127)), 23);
  vf y = mul(p, vreinterpretq_f32_s32(e));
  return vreinterpretq_f32_u32(vandq_u32(keep, vreinterpretq_u32_f32(y)));
}
MOOLI_INLINE vf keep_range(vf x, int base, int lo, int hi) {
  const int32_t lanes[4] = {0, 1, 2, 3};
  vi id = vaddq_s32(vld1q_s32(lanes), set1i(base));
  return vbslq_f32(vandq_u32(vcleq_s32(id, set1i(hi)), vcgeq_s32(id, set1i(lo))), x, set1(-__builtin_inff()));
}
MOOLI_INLINE vf keep_bits(vf x, uint32_t bits) {
  const uint32_t each[4] = {1, 2, 4, 8};
  return vbslq_f32(vtstq_u32(vdupq_n_u32(bits), vld1q_u32(each)), x, set1(-__builtin_inff()));
}
MOOLI_INLINE vf where_negative(vf x, vf a, vf b) { return vbslq_f32(vcltzq_f32(x), a, b); }
MOOLI_INLINE float hmax(vf a) {
  float t[4]; st(t, a);
  float m = t[0];
  for (int i = 1; i < 4; i++) m = t[i] > m ? t[i] : m;
  return m;
}
MOOLI_INLINE bool any_nan(vf a) { return vminvq_u32(vceqq_f32(a, a)) == 0; }

// The dot product takes two signed operands. A Q8 weight is stored as value + 128: with its top bit flipped it is the value
// itself, and the sum needs no correction, so rows are prepared with a zero of 0 instead of 128. Codes of 4 and 6
// bits are positive in either reading and keep their zeros of 8 and 32. The int32 sum of a group is the same number at every level.
#define MOOLI_SIGNED_WEIGHTS
constexpr int kQ8Zero = 0;
struct WeightLine { int8x16_t w; };
MOOLI_INLINE WeightLine ld_weights(const char* p) {
  return {vreinterpretq_s8_u8(veorq_u8(vld1q_u8((const uint8_t*)p), vdupq_n_u8(128)))};
}
MOOLI_INLINE WeightLine low_nibbles(const char* p) {
  return {vreinterpretq_s8_u8(vandq_u8(vld1q_u8((const uint8_t*)p), vdupq_n_u8(15)))};
}
MOOLI_INLINE WeightLine high_nibbles(const char* p) { return {vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8((const uint8_t*)p), 4))}; }
MOOLI_INLINE WeightLine six_bits(const char* low, const char* high, int step) {
  const uint8x16_t l = vld1q_u8((const uint8_t*)low), h = vld1q_u8((const uint8_t*)high);
  const uint8x16_t nibbles = step % 2 ? vshrq_n_u8(l, 4) : vandq_u8(l, vdupq_n_u8(15));
  const uint8x16_t top = step == 0 ? vshlq_n_u8(h, 4) : step == 1 ? vshlq_n_u8(h, 2) : step == 2 ? h : vshrq_n_u8(h, 2);
  return {vreinterpretq_s8_u8(vorrq_u8(nibbles, vandq_u8(top, vdupq_n_u8(48))))};
}
MOOLI_INLINE WeightLine look_up(WeightLine codes, const uint8_t* table) {
  return {vqtbl1q_s8(vld1q_s8((const int8_t*)table), vreinterpretq_u8_s8(codes.w))};
}
MOOLI_INLINE vi dot4(vi acc, WeightLine w, const int* a) { return vdotq_s32(acc, w.w, vreinterpretq_s8_s32(vld1q_dup_s32(a))); }
MOOLI_INLINE int quantize16(const float* x, vf inverse, int8_t* q) {
  vi v[4];
  for (int i = 0; i < 4; i++) v[i] = vcvtnq_s32_f32(mul(ld(x + 4 * i), inverse));
  int16x8_t low = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1])), high = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
  vst1q_s8(q, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  return vaddvq_s32(vaddq_s32(vaddq_s32(v[0], v[1]), vaddq_s32(v[2], v[3])));
}
MOOLI_INLINE void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

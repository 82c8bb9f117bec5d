// The kernel table: one per instruction set, chosen at run time. Owns layouts; never owns memory or threads.
//
// Packed weights. A panel holds 32 output columns over all of K (padded to 32), contiguous; lanes are output columns, so
// one output element is one chain of operations in K order whatever the number of rows: results never depend on batching.
//   Q8   per 32 of K: [32 x f16 scale][2 halves][8 k-steps][16 columns][4 x u8, value + 128]            1088 bytes
//   Q4   per 32 of K: [32 x f16 scale][2 halves][4 lines][16 columns][4 bytes: low nibble k-step 2j,
//                     high nibble k-step 2j+1, value + 8]                                                576 bytes
//   Q4M  as Q4 with [32 x f16 scale][32 x f16 minimum], value = scale * code + minimum                   640 bytes
//   IQ4, FP4  as Q4, value = scale * one of sixteen, which the code chooses                            576 bytes
//   Q6   per 32 of K: [2 x 32 x f16 scale: of the first and the last 16 of K][2 halves][4 lines as of Q4, with the low
//                     four bits of value + 32; 2 lines [16 columns][4 bytes: the high two bits of k-steps
//                     4j, 4j+1, 4j+2, 4j+3, lowest first]]                                                       896 bytes
//   BF16 per 2 of K: [32 columns][2];  F16 / F32 per 1 of K: [32 columns]
// Activations of a block of R rows:
//   int  per 32 of K: [R x f32 scale][R x i32 -zero * sum; Q4M: R x f32 scale * sum][8 k-steps][R][4 x s8];
//        IQ4, FP4: as Q8; Q4: [R x f32 c][R x bits of c - 8 * sum] and the same codes, c as in kernels.inc;
//        Q6: [R x f32 scale][R x i32 -32 * sum of the first 16][R x i32 the same of the last 16] and the same codes
//   BF16 per 2 of K: [R][2], without a dot product for it as float;  float per 1 of K: [R] as f32
// With AMX, of many rows and beside BF16, they lie as its tiles do: kernels_amx.inc.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mooli {

enum Kind : int { Q8 = 0, Q4 = 1, Q4M = 2, IQ4 = 3, FP4 = 4, Q6 = 5, BF16 = 6, F16 = 7, F32 = 8, kNumKinds = 9 };
inline bool is_integer(Kind kind) { return kind < BF16; }

// What codes stand for: of IQ4 (ggml's formats of that name) and, doubled, of FP4 (E2M1 of OCP's Microscaling Formats 1.0).
constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kFp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr const int8_t* code_values(Kind kind) { return kind == IQ4 ? kIq4Values : kFp4Values; }

// What a gated linear makes of its two products: silu(gate) * up, gelu_tanh(gate) * up, or with g = min(gate, 7) and u = up
// between -7 and 7, g * sigmoid(1.702 g) * (u + 1).
enum Gate : int { SILU = 0, GELU_TANH = 1, CLAMPED_SWIGLU = 2, kNumGates = 3 };

constexpr int kPanel = 32;     // output columns of a panel
constexpr int kGroup = 32;     // values of K that share a scale
constexpr int kMaxRows = 32;   // largest row block of any kernel
constexpr int kChunk = 256;    // of K: with a block's activations its weights fill two thirds of a first level cache
constexpr int kTile = 32;      // tokens of a KV tile
constexpr int kBlockTiles = 4; // tiles of an attention block: 128 tokens at an absolute position
constexpr int kBlock = kTile * kBlockTiles;

inline size_t panel_bytes(Kind kind, int padded_k) {
  switch (kind) {
    case Q8: return size_t(padded_k / kGroup) * (64 + 1024);
    case Q4: case IQ4: case FP4: return size_t(padded_k / kGroup) * (64 + 512);
    case Q4M: return size_t(padded_k / kGroup) * (128 + 512);
    case Q6: return size_t(padded_k / kGroup) * (128 + 512 + 256);
    case BF16: case F16: return size_t(padded_k) * kPanel * 2;
    default: return size_t(padded_k) * kPanel * 4;
  }
}

// How keys and values lie in a tile of 32 tokens for one head; see attend_block.
enum KvType : int { KV_F32 = 0, KV_F16 = 1, KV_BF16 = 2, KV_BF16_DOT = 3, KV_INT8 = 4, kNumKvTypes = 5 };
constexpr int kMaxInt8HeadDim = 512;
inline size_t kv_element_bytes(KvType type) { return type == KV_F32 ? 4 : type == KV_INT8 ? 1 : 2; }
// Values, then for KV_INT8 a scale for each token, and beside keys a base with its scale; see attention_int8.inc.
inline size_t v_tile_bytes(KvType type, int head_dim) {
  return size_t(kTile) * head_dim * kv_element_bytes(type) + (type == KV_INT8 ? kTile * 4 : 0);
}
inline size_t k_tile_bytes(KvType type, int head_dim) {
  return v_tile_bytes(type, head_dim) + (type == KV_INT8 ? size_t(head_dim + 4 + 63) / 64 * 64 : 0);
}
// A query row as attend_block reads it; never more than as f32.
inline size_t query_bytes(KvType type, int head_dim) {
  switch (type) {
    case KV_BF16_DOT: return size_t(head_dim) * 2;
    case KV_INT8: return 16 + size_t(head_dim) * 2;
    default: return size_t(head_dim) * 4;
  }
}

// One block of up to 128 tokens at absolute position `first`, attended by `rows` query rows of one or more sequences.
struct AttendBlock {
  const void* q;             // rows, as prepare_queries made them
  const int* positions;      // rows: last position each row attends to
  const void* const* k;      // tiles
  const void* const* v;
  const char* const* next;   // next_tiles tiles (keys, then values) of the block that follows, fetched meanwhile
  int next_tiles, tile_lines;
  int rows, tiles, first, head_dim, window;
  int value_dim;             // of attend_latent: the first numbers of a latent are its value; else head_dim
  float scale_log2e;         // softmax scale times log2(e)
  float* out;                // rows x head_dim, running weighted sum
  float* lane_sums;          // rows x 16, running sum of weights
  float* maxima;             // rows, running maximum of scaled scores
  float* scores;             // scratch kMaxRows x 128 f32
  void* weights;             // scratch kMaxRows x 128 f32, bf16 or two digits
  // Where it is not 0, scores are bent before they are masked and scaled: x to outer * tanh(x * inner), so that what is scaled
  // stays below a cap.
  float inner = 0, outer = 0;
};

// Channels [first, end) of consecutive tokens of one sequence through a causal convolution. Each channel is one chain, from the
// oldest column to the newest, whatever the tokens are cut into.
constexpr int kMaxConvColumns = 16, kConvLanes = 16;  // channels are a multiple of the second
struct ConvPart {
  const float* x;        // the first token's row, `stride` floats apart
  size_t stride;
  int tokens, channels, first, end, columns;
  bool is_gated;         // rows are [b | c | u], b * u goes in, and the result is c times what comes out; else silu of that
  const float* weight;   // (columns, channels)
  const float* bias;     // (channels)
  float* last;           // (columns - 1, channels): the inputs before the first token, then those before the one after the last
  float* out;            // rows of `channels`
};

// Columns [0, 16) of the state of one head, (key_dim, 16), through consecutive tokens of one sequence.
constexpr int kDeltaColumns = 16;
struct DeltaPart {
  const float *q, *k;    // the first token's, `unit_stride` floats apart
  const float* v;        // value_stride apart
  const float* gates;    // [what is kept of the state, beta], gate_stride apart
  size_t unit_stride, value_stride, gate_stride, out_stride;
  int tokens, key_dim;
  float* state;
  float* out;
};

// The same columns of a state that forgets and adds, and corrects nothing.
struct ScanPart {
  const float *q, *k, *v;  // the first token's, `stride` floats apart
  const float* gates;      // [what is kept of the state, how much of v is added], gate_stride apart
  float skip;              // of v, what goes past the state
  size_t stride, gate_stride, out_stride;
  int tokens, key_dim;
  float* state;
  float* out;
};

using GemmFn = void (*)(const char* activations, const char* panel, int padded_k, float* tile, const char* prefetch, int lines);
// `rows` rows of k values, `stride` floats apart, as the activations of one block
using PrepareFn = void (*)(const float* x, size_t stride, int k, int padded_k, char* block, int rows);
using StoreKvFn = void (*)(const float* k, const float* v, int head_dim, char* k_tile, char* v_tile, int token);

// `groups` of 32 weights: a scale and 32 codes for each.
using QuantizeFn = void (*)(const float* x, int groups, float* scales, uint8_t* codes);

// Part of a panel of integers as many rows are multiplied with it.
using OpenFn = void (*)(const char* panel, int padded_k, char* opened);

// How a block of rows is prepared and multiplied. Which one of a kind's two is taken never changes a bit of a result.
struct RowKernels {
  int max_rows;     // of a block; 0 where there are none of this sort
  int group_bytes;  // of a row's activations, for 32 of K
  bool is_chunked;  // all blocks are multiplied with kChunk of K before those that follow, which gemm_more adds
  PrepareFn prepare;
  OpenFn open;      // null: gemm reads the panel itself
  GemmFn gemm[kMaxRows + 1], gemm_more[kMaxRows + 1];
  size_t row_bytes(int padded_k) const { return size_t(padded_k / kGroup) * group_bytes; }
};

struct Kernels {
  const char* name;
  RowKernels few[kNumKinds], many[kNumKinds];  // up to a block of few, and beyond
  const RowKernels& of(Kind kind, int rows) const { return many[kind].max_rows && rows > few[kind].max_rows ? many[kind] : few[kind]; }
  void (*finish)();  // each thread, when it has no more to compute; may be null
  bool has_bf16_dot;
  StoreKvFn store_kv[kNumKvTypes];
  void (*prepare_queries[kNumKvTypes])(const float* q, int heads, int head_dim, char* out);
  void (*attend_block[kNumKvTypes])(const AttendBlock&);
  // Latents, of the float types: tiles [32 tokens][head_dim], which are keys and, in their first value_dim numbers, values of
  // all heads. Queries are float32. Null for other types.
  void (*store_latent[kNumKvTypes])(const float* row, int width, char* tile, int token);
  void (*attend_latent[kNumKvTypes])(const AttendBlock&);
  void (*finish_attention)(const float* out, const float* lane_sums, int head_dim, float* result);
  void (*to_bf16)(const float* x, int n, uint16_t* out);
  QuantizeFn quantize_q4;
  // residual may be null; out may be x or residual
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, const float* residual, float* out);
  void (*rope)(float* head, const float* cosines, const float* sines, int half);
  // epilogues of one R x 32 tile: bias may be null; columns <= 32
  void (*store)(const float* tile, int rows, int columns, const float* bias, const float* residual, float* out, size_t stride);
  // the same without residual, for what is too large to stay in a cache
  void (*stream)(const float* tile, int rows, int columns, const float* bias, float* out, size_t stride);
  // Of each column of a panel of logits the largest so far, the lowest panel where equals are, for each row: kept holds
  // 32 values and 32 panels. `rest`, 32 zeros, is NaN where a value was not finite. is_beyond: no panel after it was seen.
  // allowed: null, or a word a row: a column whose bit is 0 is not looked at, but for being finite.
  void (*keep_largest)(const float* tile, int rows, int columns, const float* bias, const uint32_t* allowed, int panel, bool is_beyond,
                       float* kept, float* rest);
  // the bias of a gated panel has 32 entries, as its columns lie
  void (*store_gated[kNumGates])(const float* tile, int rows, int columns, const float* bias, float* out, size_t stride);
  void (*convolve)(const ConvPart&);
  void (*delta_rule)(const DeltaPart&);
  void (*scan)(const ScanPart&);
  // out = x / sqrt(sum of squares + 1e-6) * scale
  void (*unit)(const float* x, int n, float scale, float* out);
  // out = x * sigmoid(gate), and x * gate * sigmoid(gate); out may be x
  void (*sigmoid_mul)(const float* x, const float* gate, int n, float* out);
  void (*silu_mul)(const float* x, const float* gate, int n, float* out);
  // out = cap * tanh(x / cap); out may be x
  void (*soft_cap)(const float* x, int n, float cap, float* out);
  // out = exp((x - max) * inverse_temperature); returns the sum, in a fixed order. out may be null.
  double (*exp_sum)(const float* x, int n, float max, float inverse_temperature, float* out);
  // indices of values from `from` to just below `below` (of all from there on, where that is infinite), ascending; returns
  // how many
  int (*find_between)(const float* x, int n, float from, float below, int* indices);
  // largest value and its lowest index; returns -1 if any value is NaN or all are -inf
  int (*argmax)(const float* x, int n, float* largest);
  void (*prefetch)(const char*);
  double (*dot_gauge)(long iterations);  // multiply-adds done, to time the integer units
  long (*read_gauge)(const char* data, size_t bytes);
};

const Kernels& kernels_scalar();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
#if defined(MOOLI_AVX2_VNNI)
const Kernels& kernels_avx2_vnni();
#endif
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
#if defined(MOOLI_AMX)
const Kernels& kernels_amx();
#endif
#elif defined(__aarch64__)
const Kernels& kernels_neon();
#endif

}  // namespace mooli

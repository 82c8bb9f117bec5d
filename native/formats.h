// Storage formats of checkpoints (GGUF block types, float16, bfloat16, float32) and the packing of rows into panels.
// Owns decoding and quantising; never allocates and never reads past the bytes of the rows it is given.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace mooli {

// Numbered as in GGUF.
enum Format : int {
  kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ2_K = 10, kQ3_K = 11, kQ4_K = 12, kQ5_K = 13,
  kQ6_K = 14, kIQ4_NL = 20, kIQ4_XS = 23, kBF16 = 30, kMXFP4 = 39
};

bool known_format(int format);
int block_values(Format format);
size_t row_bytes(Format format, int columns);
void decode_row(Format format, const uint8_t* row, int columns, float* out);

// Write `count` weight rows (k values of `format` each, `row_stride` bytes apart) as columns of a panel of `kind`. These keep
// their integers: Q8_0, Q5_0, Q4_0, Q3_K, IQ4_NL, IQ4_XS and MXFP4 to Q8, Q4_0 to Q4, Q4_1 and Q4_K to Q4M, Q6_K to Q6, IQ4_NL and
// IQ4_XS to IQ4, MXFP4 to FP4. Everything else goes through float, and to Q4 through `quantize_q4`.
void pack_columns(Kind kind, Format format, const uint8_t* rows, size_t row_stride, int count, int k, int padded_k, char* panel,
                  int first_column, QuantizeFn quantize_q4);
// The inverse, for tests: the values the kernels compute with.
void unpack_column(Kind kind, const char* panel, int k, int column, float* out);

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);

}  // namespace mooli

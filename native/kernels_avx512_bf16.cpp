#define MOOLI_KERNELS_FUNCTION kernels_avx512_bf16
#define MOOLI_KERNELS_NAME "avx512_bf16"
#include "kernels.inc"

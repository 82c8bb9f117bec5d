#define MOOLI_KERNELS_FUNCTION kernels_avx512
#define MOOLI_KERNELS_NAME "avx512"
#include "kernels.inc"

#define MOOLI_KERNELS_FUNCTION kernels_avx2
#define MOOLI_KERNELS_NAME "avx2"
#include "kernels.inc"

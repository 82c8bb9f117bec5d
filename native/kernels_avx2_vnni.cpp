#define MOOLI_KERNELS_FUNCTION kernels_avx2_vnni
#define MOOLI_KERNELS_NAME "avx2_vnni"
#include "kernels.inc"

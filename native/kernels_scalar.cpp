#define MOOLI_KERNELS_FUNCTION kernels_scalar
#define MOOLI_KERNELS_NAME "scalar"
#include "kernels.inc"

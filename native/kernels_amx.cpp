#define MOOLI_KERNELS_FUNCTION kernels_amx
#define MOOLI_KERNELS_NAME "amx"
#define MOOLI_AMX_TILES
#include "kernels.inc"

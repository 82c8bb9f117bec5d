// A level is asked for by name and not by what the compiler may use: where the dot product is the compiler's default, as on
// a Mac, the scalar level must stay scalar.
#define MOOLI_NEON 1
#define MOOLI_KERNELS_FUNCTION kernels_neon
#define MOOLI_KERNELS_NAME "neon"
#include "kernels.inc"

#define MEMLM_ISA neon_i8mm
#include "../vec_neon_i8mm.h"

#include "../kernels-inl.h"

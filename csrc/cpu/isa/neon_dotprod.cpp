#define MEMLM_ISA neon_dotprod
#include "../vec_neon_dotprod.h"

#include "../kernels-inl.h"

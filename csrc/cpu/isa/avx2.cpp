#define MEMLM_ISA avx2
#include "../vec_avx2.h"

#include "../kernels-inl.h"

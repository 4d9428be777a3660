#include "../vec_avx2.h"

#define MEMLM_ISA avx2
#include "../kernels-inl.h"

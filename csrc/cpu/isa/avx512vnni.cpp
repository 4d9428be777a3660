#define MEMLM_ISA avx512vnni
#include "../vec_avx512vnni.h"

#include "../kernels-inl.h"

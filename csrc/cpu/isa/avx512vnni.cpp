#include "../vec_avx512vnni.h"

#define MEMLM_ISA avx512vnni
#include "../kernels-inl.h"

#include "../vec_scalar.h"

#define MEMLM_ISA scalar
#include "../kernels-inl.h"

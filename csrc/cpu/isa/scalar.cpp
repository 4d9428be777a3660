#define MEMLM_ISA scalar
#include "../vec_scalar.h"

#include "../kernels-inl.h"

#define MEMLM_ISA amx
#include "../vec_amx.h"

#include "../kernels-inl.h"

#define MEMLM_ISA avxvnni
#include "../vec_avxvnni.h"

#include "../kernels-inl.h"

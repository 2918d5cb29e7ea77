#include "launch.h"

template void mla::Launch<mla::PrefillExpandedKernel>(Flash_fwd_params&, cudaStream_t);

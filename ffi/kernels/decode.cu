#include "launch.h"

template void mla::Launch<mla::DecodeKernel>(Flash_fwd_params&, cudaStream_t);

#include "launch.h"

template void mla::Launch<mla::PrefillAbsorbedKernel>(Flash_fwd_params&, cudaStream_t);

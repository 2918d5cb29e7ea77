// The definition of `Launch`, for the .cu files that instantiate it: no other file includes FA3's templates.
#pragma once

#include "flash_fwd_launch_template.h"
#include "kernels.h"

namespace mla {

template <typename Kernel>
void Launch(Flash_fwd_params& params, cudaStream_t stream) {
  run_flash_fwd</*Arch=*/90, Kernel::kHeadDim, Kernel::kHeadDimV, /*ClusterM=*/1, /*Element=*/cutlass::bfloat16_t,
                /*ElementOut=*/cutlass::bfloat16_t, /*Is_causal=*/true, /*Is_local=*/false, /*Has_softcap=*/false,
                /*Varlen=*/true, Kernel::PagedKVNonTMA, /*AppendKV=*/false, Kernel::HasQv, Kernel::PackGQA,
                Kernel::Split, /*V_colmajor=*/false>(params, stream);
}

}  // namespace mla

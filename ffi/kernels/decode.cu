// As prefill_absorbed, with the keys of a row split over thread blocks. Pages come by cp.async of a whole warp group: a
// tile of few queries waits for memory, and one thread's TMA keeps less of it in flight (flash_api.cpp,
// get_pagedkv_tma).
#include "flash_fwd_launch_template.h"

template void run_flash_fwd<90, 64, 512, 1, cutlass::bfloat16_t, cutlass::bfloat16_t, /*Is_causal=*/true,
                            /*Is_local=*/false, /*Has_softcap=*/false, /*Varlen=*/true, /*PagedKVNonTMA=*/true,
                            /*AppendKV=*/false, /*HasQv=*/true, /*PackGQA=*/true, /*Split=*/true,
                            /*V_colmajor=*/false>(Flash_fwd_params&, cudaStream_t);

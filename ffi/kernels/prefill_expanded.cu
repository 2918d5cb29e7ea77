// Causal, variable lengths, keys 192 wide, values 128. The template's arguments are named in FA3's own file.
#include "flash_fwd_launch_template.h"

template void run_flash_fwd<90, 192, 128, 1, cutlass::bfloat16_t, cutlass::bfloat16_t, /*Is_causal=*/true,
                            /*Is_local=*/false, /*Has_softcap=*/false, /*Varlen=*/true, /*PagedKVNonTMA=*/false,
                            /*AppendKV=*/false, /*HasQv=*/false, /*PackGQA=*/false, /*Split=*/false,
                            /*V_colmajor=*/false>(Flash_fwd_params&, cudaStream_t);

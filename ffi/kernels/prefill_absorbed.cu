// Causal, variable lengths, over pages of latents: all heads of a token share one key, so they are packed into a tile.
#include "flash_fwd_launch_template.h"

template void run_flash_fwd<90, 64, 512, 1, cutlass::bfloat16_t, cutlass::bfloat16_t, /*Is_causal=*/true,
                            /*Is_local=*/false, /*Has_softcap=*/false, /*Varlen=*/true, /*PagedKVNonTMA=*/false,
                            /*AppendKV=*/false, /*HasQv=*/true, /*PackGQA=*/true, /*Split=*/false,
                            /*V_colmajor=*/false>(Flash_fwd_params&, cudaStream_t);

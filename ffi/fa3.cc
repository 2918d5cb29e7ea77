// The targets on a Hopper GPU: checked arguments -> FlashAttention-3's parameters -> launches on XLA's stream.
// Nothing here allocates, waits, or decides by what device memory holds, so that XLA may record a call into a command
// buffer. What FA3's fields mean, and which go together, is in its flash_api.cpp (mha_fwd).

#include <cuda_runtime_api.h>

#include <exception>
#include <string>

#include "arguments.h"
#include "finish.h"
#include "flash.h"
#include "schedule.h"

namespace cutlass {
struct bfloat16_t;
}

// As in FA3's flash_fwd_launch_template.h, whose instantiations are in kernels/.
template <int Arch, int kHeadDim, int kHeadDimV, int ClusterM, typename Element, typename ElementOut, bool Is_causal,
          bool Is_local, bool Has_softcap, bool Varlen, bool PagedKVNonTMA, bool AppendKV, bool HasQv, bool PackGQA,
          bool Split, bool V_colmajor>
void run_flash_fwd(Flash_fwd_params& params, cudaStream_t stream);

namespace mla {
namespace {

using Bf16 = cutlass::bfloat16_t;

// FA3's scheduler sorts up to this many rows in one block, which may overlap with the launch of the attention kernel.
constexpr int64_t kMaxPdlRows = 992;

ffi::Error Failed(const char* target, const std::string& what) {
  return ffi::Error::Internal(std::string(target) + ": " + what);
}

// What all calls share. `params` is zero: fields that are not set are off.
ffi::Error Begin(const char* target, const Common& call, const Rows& rows, float scale, Flash_fwd_params& params) {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  auto attribute = [&](int* value, cudaDeviceAttr which) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(value, which, device);
  };
  attribute(&params.num_sm, cudaDevAttrMultiProcessorCount);
  attribute(&major, cudaDevAttrComputeCapabilityMajor);
  attribute(&minor, cudaDevAttrComputeCapabilityMinor);
  if (status != cudaSuccess) return Failed(target, cudaGetErrorString(status));
  if (major != 9 || minor != 0) {
    return Failed(target, "the kernels are for compute capability 9.0 (Hopper), this GPU has " + std::to_string(major) +
                              "." + std::to_string(minor));
  }
  int b = static_cast<int>(rows.count), padded = static_cast<int>(RoundUp4(rows.count));
  params.arch = 90;
  params.is_bf16 = true;
  params.is_causal = true;
  params.scale_softmax = scale;
  params.p_dropout = 1.0f;
  params.rp_dropout = 1.0f;
  params.p_dropout_in_uint8_t = 255;
  params.b = params.b_k = b;
  params.h = static_cast<int>(call.heads);
  params.seqlen_q = static_cast<int>(call.tokens);  // a bound: rows have the lengths in cu_q
  params.total_q = static_cast<int>(call.tokens);
  params.cu_seqlens_q = rows.cu_q;
  params.seqused_k = rows.kv_len;
  params.softmax_lse_ptr = call.lse;
  params.num_splits = 1;
  params.v_dim_stride = 1;
  params.prepare_varlen_pdl = rows.count <= kMaxPdlRows;
  params.varlen_sort_batches = true;
  params.head_swizzle = true;
  params.num_splits_dynamic_ptr = call.scheduler;
  params.num_m_blocks_ptr = call.scheduler + padded;
  params.varlen_batch_idx_ptr = call.scheduler + 2 * padded;
  params.num_nheads_in_l2_ptr = call.scheduler + 3 * padded;
  params.tile_count_semaphore = call.scheduler + 4 * padded;
  params.tile_count_semaphore_offset = 4 * padded;
  return ffi::Error::Success();
}

void SetKeys(Flash_fwd_params& params, int64_t longest, int64_t total) {
  params.seqlen_k = static_cast<int>(longest);
  params.total_k = static_cast<int>(total);
  params.window_size_left = params.seqlen_k - 1;
  params.window_size_right = 0;
}

ffi::Error BeginAbsorbed(const char* target, const Absorbed& call, Flash_fwd_params& params) {
  const Common& c = call.common;
  if (ffi::Error error = Begin(target, c, call.rows, call.scale, params); error.failure()) return error;
  constexpr int64_t width = kLatent + kRope;
  params.h_k = 1;
  params.d = params.d_rounded = kRope;
  params.dv = params.dv_rounded = kLatent;
  params.q_ptr = call.q_rope;
  params.q_row_stride = c.heads * kRope;
  params.q_head_stride = kRope;
  params.qv_ptr = call.q_latent;
  params.qv_row_stride = kLatent;
  params.qv_head_stride = c.tokens * kLatent;
  params.o_ptr = call.out;
  params.o_row_stride = kLatent;
  params.o_head_stride = c.tokens * kLatent;
  // The key of a token is its roped part, the value its latent, side by side in one row of a page.
  params.k_ptr = call.pages + kLatent;
  params.v_ptr = call.pages;
  params.k_row_stride = params.v_row_stride = width;
  params.k_head_stride = params.v_head_stride = width;
  params.k_batch_stride = params.v_batch_stride = call.page_size * width;
  params.page_table = call.page_table;
  params.page_table_batch_stride = call.table_width;
  params.page_size = static_cast<int>(call.page_size);
  params.num_pages = static_cast<int>(call.num_pages);
  params.pack_gqa = true;
  SetKeys(params, call.table_width * call.page_size, call.rows.count * call.page_size);
  return ffi::Error::Success();
}

// Runs what launches kernels; FA3's launch code throws (fa3_errors.h).
template <typename Launch>
ffi::Error Launched(const char* target, const Launch& launch) {
  try {
    cudaError_t status = launch();
    return status == cudaSuccess ? ffi::Error::Success() : Failed(target, cudaGetErrorString(status));
  } catch (const std::exception& error) {
    return Failed(target, error.what());
  }
}

ffi::Error PrefillExpanded(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer kv, ffi::AnyBuffer cu_q,
                           ffi::AnyBuffer kv_start, ffi::AnyBuffer kv_len, Result out, Result lse, Result scheduler,
                           float scale) {
  constexpr const char* target = "mla_prefill_expanded";
  Checker check(target);
  Expanded call = Expanded::Check(check, q, kv, cu_q, kv_start, kv_len, out, lse, scheduler, scale);
  if (!check.ok()) return check.error();
  const Common& c = call.common;
  Flash_fwd_params params{};
  if (ffi::Error error = Begin(target, c, call.rows, scale, params); error.failure()) return error;
  constexpr int64_t width = kQuery + kValue;
  params.h_k = params.h;
  params.d = params.d_rounded = kQuery;
  params.dv = params.dv_rounded = kValue;
  params.q_ptr = call.q;
  params.q_row_stride = c.heads * kQuery;
  params.q_head_stride = kQuery;
  params.o_ptr = call.out;
  params.o_row_stride = c.heads * kValue;
  params.o_head_stride = kValue;
  params.k_ptr = call.kv;
  params.v_ptr = call.kv + kQuery;
  params.k_row_stride = params.v_row_stride = c.heads * width;
  params.k_head_stride = params.v_head_stride = width;
  params.cu_seqlens_k = call.kv_start;  // only the starts are read: the lengths are in seqused_k
  params.page_size = 1;                 // FA3 divides by it
  SetKeys(params, call.keys, call.keys);
  return Launched(target, [&] {
    run_flash_fwd<90, 192, 128, 1, Bf16, Bf16, true, false, false, true, false, false, false, false, false, false>(
        params, stream);
    return ClearOutside(call.rows.cu_q, call.rows.count, c.tokens, c.heads, kValue, call.out, c.heads * kValue, kValue,
                        c.lse, stream);
  });
}

ffi::Error PrefillAbsorbed(cudaStream_t stream, ffi::AnyBuffer q_latent, ffi::AnyBuffer q_rope, ffi::AnyBuffer pages,
                           ffi::AnyBuffer page_table, ffi::AnyBuffer cu_q, ffi::AnyBuffer kv_len, Result out,
                           Result lse, Result scheduler, float scale) {
  constexpr const char* target = "mla_prefill_absorbed";
  Checker check(target);
  Absorbed call = Absorbed::Check(check, q_latent, q_rope, pages, page_table, cu_q, kv_len, out, lse, scheduler, scale);
  if (!check.ok()) return check.error();
  const Common& c = call.common;
  Flash_fwd_params params{};
  if (ffi::Error error = BeginAbsorbed(target, call, params); error.failure()) return error;
  params.pagedkv_tma = true;
  return Launched(target, [&] {
    run_flash_fwd<90, 64, 512, 1, Bf16, Bf16, true, false, false, true, false, false, true, true, false, false>(params,
                                                                                                                stream);
    return ClearOutside(call.rows.cu_q, call.rows.count, c.tokens, c.heads, kLatent, call.out, kLatent,
                        c.tokens * kLatent, c.lse, stream);
  });
}

ffi::Error Decode(cudaStream_t stream, ffi::AnyBuffer q_latent, ffi::AnyBuffer q_rope, ffi::AnyBuffer pages,
                  ffi::AnyBuffer page_table, ffi::AnyBuffer cu_q, ffi::AnyBuffer kv_len, Result out, Result lse,
                  Result scheduler, Result out_partial, Result lse_partial, float scale) {
  constexpr const char* target = "mla_decode";
  Checker check(target);
  Absorbed call = Absorbed::Check(check, q_latent, q_rope, pages, page_table, cu_q, kv_len, out, lse, scheduler, scale);
  Splits splits = Splits::Check(check, call.common, out_partial, lse_partial);
  if (!check.ok()) return check.error();
  const Common& c = call.common;
  Flash_fwd_params params{};
  if (ffi::Error error = BeginAbsorbed(target, call, params); error.failure()) return error;
  params.num_splits = static_cast<int>(splits.count);  // a bound: each row has its own number
  params.oaccum_ptr = splits.out;
  params.oaccum_row_stride = kLatent;
  params.oaccum_head_stride = c.tokens * kLatent;
  params.oaccum_split_stride = c.heads * c.tokens * kLatent;
  params.softmax_lseaccum_ptr = splits.lse;
  params.lseaccum_head_stride = c.tokens;
  params.lseaccum_split_stride = c.heads * c.tokens;
  params.skip_scheduler_metadata_computation = call.rows.count <= kMaxScheduledRows;
  return Launched(target, [&] {
    if (params.skip_scheduler_metadata_computation) {
      Schedule schedule{params.num_splits_dynamic_ptr, params.num_m_blocks_ptr, params.varlen_batch_idx_ptr,
                        params.num_nheads_in_l2_ptr, params.tile_count_semaphore};
      cudaError_t status = ScheduleSplits(call.rows.cu_q, call.rows.kv_len, call.rows.count, c.heads, splits.count,
                                          params.num_sm, schedule, stream);
      if (status != cudaSuccess) return status;
    }
    run_flash_fwd<90, 64, 512, 1, Bf16, Bf16, true, false, false, true, true, false, true, true, true, false>(params,
                                                                                                              stream);
    return CombineSplits(call.rows.cu_q, params.num_splits_dynamic_ptr, params.varlen_batch_idx_ptr, call.rows.count,
                         c.tokens, c.heads, splits.out, splits.lse, call.out, c.lse, stream);
  });
}

auto OnStream() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }

}  // namespace
}  // namespace mla

XLA_FFI_DEFINE_HANDLER_SYMBOL(MlaPrefillExpandedCuda, mla::PrefillExpanded, mla::BindExpanded(mla::OnStream()),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(MlaPrefillAbsorbedCuda, mla::PrefillAbsorbed, mla::BindAbsorbed(mla::OnStream()),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(MlaDecodeCuda, mla::Decode, mla::BindDecode(mla::OnStream()),
                              {xla::ffi::Traits::kCmdBufferCompatible});

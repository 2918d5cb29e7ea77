// The targets on a Hopper GPU: check arguments, set FlashAttention-3's parameters, launch on XLA's stream.
// Nothing here allocates, synchronizes or reads device memory, so that XLA can record a call into a command buffer.
// FA3's fields and their valid combinations: mha_fwd in its flash_api.cpp.

#include <cuda_runtime_api.h>

#include <exception>
#include <string>

#include "arguments.h"
#include "combine.h"
#include "flash.h"
#include "hopper.h"
#include "kernels/kernels.h"
#include "split_scheduler.h"

namespace mla {
namespace {

// Rows that FA3's scheduler sorts in one block, which may overlap with the launch of the attention kernel.
constexpr int64_t kMaxPdlRows = 992;

void SetMetadata(Flash_fwd_params& params, const SchedulerMetadata& metadata) {
  params.num_splits_dynamic_ptr = metadata.num_splits_dynamic;
  params.num_m_blocks_ptr = metadata.num_m_blocks;
  params.varlen_batch_idx_ptr = metadata.varlen_batch_idx;
  params.num_nheads_in_l2_ptr = metadata.num_nheads_in_l2;
}

// Sets the parameters that all kernels share. `params` is zero: fields that are not set are off.
ffi::Error SetParams(const char* target, const Common& call, const Rows& rows, float scale, Flash_fwd_params& params) {
  if (ffi::Error error = CheckHopper(target, params.num_sm); error.failure()) return error;
  int b = static_cast<int>(rows.count);
  params.arch = 90;
  params.is_bf16 = true;
  params.is_causal = true;
  params.scale_softmax = scale;
  params.p_dropout = 1.0f;
  params.rp_dropout = 1.0f;
  params.p_dropout_in_uint8_t = 255;
  params.b = params.b_k = b;
  params.h = static_cast<int>(call.heads);
  params.seqlen_q = static_cast<int>(call.tokens);  // an upper bound: cu_q has the lengths
  params.total_q = static_cast<int>(call.tokens);
  params.cu_seqlens_q = rows.cu_q;
  params.seqused_k = rows.kv_len;
  params.softmax_lse_ptr = call.lse;
  params.num_splits = 1;
  params.v_dim_stride = 1;
  params.prepare_varlen_pdl = rows.count <= kMaxPdlRows;
  params.varlen_sort_batches = true;
  params.head_swizzle = true;
  SetMetadata(params, SchedulerMetadata::At(call.scheduler, rows.count));
  params.tile_count_semaphore = call.scheduler + SplitsSize(rows.count);
  params.tile_count_semaphore_offset = static_cast<int>(SplitsSize(rows.count));
  return ffi::Error::Success();
}

void SetKeys(Flash_fwd_params& params, int64_t longest, int64_t total) {
  params.seqlen_k = static_cast<int>(longest);
  params.total_k = static_cast<int>(total);
  params.window_size_left = params.seqlen_k - 1;
  params.window_size_right = 0;
}

ffi::Error SetAbsorbedParams(const char* target, const Absorbed& call, Flash_fwd_params& params) {
  const Common& c = call.common;
  if (ffi::Error error = SetParams(target, c, call.rows, call.scale, params); error.failure()) return error;
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
  // A row of a page holds a token's latent, its value, and then its roped part, its key.
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

// Calls `launch`, which returns a cudaError_t or throws, as FA3's launch code does (fa3_errors.h).
template <typename Callable>
ffi::Error TryLaunch(const char* target, const Callable& launch) {
  try {
    cudaError_t status = launch();
    return status == cudaSuccess ? ffi::Error::Success() : InternalError(target, cudaGetErrorString(status));
  } catch (const std::exception& error) {
    return InternalError(target, error.what());
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
  if (ffi::Error error = SetParams(target, c, call.rows, scale, params); error.failure()) return error;
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
  return TryLaunch(target, [&] {
    Launch<PrefillExpandedKernel>(params, stream);
    return ClearPadding(call.rows.cu_q, call.rows.count, c.tokens, c.heads, kValue, call.out, c.heads * kValue, kValue,
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
  if (ffi::Error error = SetAbsorbedParams(target, call, params); error.failure()) return error;
  params.pagedkv_tma = true;
  return TryLaunch(target, [&] {
    Launch<PrefillAbsorbedKernel>(params, stream);
    return ClearPadding(call.rows.cu_q, call.rows.count, c.tokens, c.heads, kLatent, call.out, kLatent,
                        c.tokens * kLatent, c.lse, stream);
  });
}

ffi::Error Schedule(cudaStream_t stream, ffi::AnyBuffer cu_q, ffi::AnyBuffer kv_len, Result splits, int64_t heads,
                    int64_t max_splits) {
  constexpr const char* target = "schedule_splits";
  Checker check(target);
  Rows rows = Rows::Check(check, cu_q, kv_len);
  check.Expect(rows.count <= kMaxScheduledRows, "kv_len",
               "expected at most " + std::to_string(kMaxScheduledRows) + " rows, got " + std::to_string(rows.count));
  check.Expect(max_splits >= 1 && max_splits <= kMaxSplits, "max_splits",
               "expected 1 to " + std::to_string(kMaxSplits) + ", got " + std::to_string(max_splits));
  check.Buffer("splits", *splits, ffi::S32, {SplitsSize(rows.count)});
  if (!check.ok()) return check.error();
  auto metadata = SchedulerMetadata::At(static_cast<int32_t*>(splits->untyped_data()), rows.count);
  return LaunchOnHopper(target, [&](int num_sm) {
    return ScheduleSplits(rows.cu_q, rows.kv_len, rows.count, heads, max_splits, num_sm, metadata, nullptr, stream);
  });
}

ffi::Error Decode(cudaStream_t stream, ffi::AnyBuffer q_latent, ffi::AnyBuffer q_rope, ffi::AnyBuffer pages,
                  ffi::AnyBuffer page_table, ffi::AnyBuffer cu_q, ffi::AnyBuffer kv_len, ffi::AnyBuffer splits,
                  Result out, Result lse, Result scheduler, Result out_partial, Result lse_partial, float scale) {
  constexpr const char* target = "mla_decode";
  Checker check(target);
  Absorbed call = Absorbed::Check(check, q_latent, q_rope, pages, page_table, cu_q, kv_len, out, lse, scheduler, scale);
  Partials partials = Partials::Check(check, call.common, out_partial, lse_partial);
  Splits scheduled = Splits::Check(check, call.rows.count, splits);
  if (!check.ok()) return check.error();
  const Common& c = call.common;
  Flash_fwd_params params{};
  if (ffi::Error error = SetAbsorbedParams(target, call, params); error.failure()) return error;
  params.num_splits = static_cast<int>(partials.num_splits);  // an upper bound: num_splits_dynamic has each row's
  params.oaccum_ptr = partials.out;
  params.oaccum_row_stride = kLatent;
  params.oaccum_head_stride = c.tokens * kLatent;
  params.oaccum_split_stride = c.heads * c.tokens * kLatent;
  params.softmax_lseaccum_ptr = partials.lse;
  params.lseaccum_head_stride = c.tokens;
  params.lseaccum_split_stride = c.heads * c.tokens;
  // More rows are scheduled by FA3 itself, within the launch.
  params.skip_scheduler_metadata_computation = call.rows.count <= kMaxScheduledRows;
  return TryLaunch(target, [&] {
    if (params.skip_scheduler_metadata_computation) {
      int32_t* made = scheduled.schedule ? const_cast<int32_t*>(scheduled.schedule) : c.scheduler;  // FA3 only reads it
      auto metadata = SchedulerMetadata::At(made, call.rows.count);
      cudaError_t status = scheduled.schedule ? ClearCounter(params.tile_count_semaphore, stream)
                                              : ScheduleSplits(call.rows.cu_q, call.rows.kv_len, call.rows.count,
                                                               c.heads, partials.num_splits, params.num_sm, metadata,
                                                               params.tile_count_semaphore, stream);
      if (status != cudaSuccess) return status;
      SetMetadata(params, metadata);
    }
    Launch<DecodeKernel>(params, stream);
    return CombineSplits(call.rows.cu_q, params.num_splits_dynamic_ptr, params.varlen_batch_idx_ptr, call.rows.count,
                         c.tokens, c.heads, partials.out, partials.lse, call.out, c.lse, stream);
  });
}

}  // namespace
}  // namespace mla

XLA_FFI_DEFINE_HANDLER_SYMBOL(MlaPrefillExpandedCuda, mla::PrefillExpanded, mla::BindExpanded(mla::OnStream()),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(MlaPrefillAbsorbedCuda, mla::PrefillAbsorbed, mla::BindAbsorbed(mla::OnStream()),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(MlaDecodeCuda, mla::Decode, mla::BindDecode(mla::OnStream()),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(ScheduleSplitsCuda, mla::Schedule, mla::BindScheduleSplits(mla::OnStream()),
                              {xla::ffi::Traits::kCmdBufferCompatible});

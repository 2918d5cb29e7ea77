// The target `w8a8` on a Hopper GPU (w8a8.h): checks arguments and launches on XLA's stream. Nothing here allocates,
// synchronizes or reads device memory, so that XLA can record a call into a command buffer.

#include "w8a8.h"

#include <cuda_runtime_api.h>

#include <string>

#include "checker.h"
#include "grouped/check.h"
#include "hopper.h"
#include "xla/ffi/api/ffi.h"

namespace mla {
namespace {

// Letters: M rows, K inputs, N outputs, G matrices.
W8A8 Check(Checker& check, const ffi::AnyBuffer& rows, const ffi::AnyBuffer& row_scales, const ffi::AnyBuffer& weights,
           const ffi::AnyBuffer& weight_scales, const ffi::AnyBuffer& group_sizes, const ffi::AnyBuffer& first,
           Result out) {
  check.Rank("rows", rows, 2);
  check.Rank("weights", weights, 3);
  if (!check.ok()) return {};
  int64_t m = rows.dimensions()[0], k = rows.dimensions()[1], g = weights.dimensions()[0], n = weights.dimensions()[1];
  check.Expect(m >= 1, "rows", "expected at least one row, got none");
  check.Expect(k >= 16 && k % 16 == 0, "rows", "expected a multiple of 16 inputs, got " + std::to_string(k));
  check.Expect(n >= 8 && n % 8 == 0, "weights", "expected a multiple of 8 outputs, got " + std::to_string(n));
  check.Buffer("rows", rows, ffi::U8, {m, k});
  check.Buffer("row_scales", row_scales, ffi::F32, {ScaleBlocks(k), m});
  check.Buffer("weights", weights, ffi::U8, {g, n, k});
  check.Buffer("weight_scales", weight_scales, ffi::F32, {g, ScaleBlocks(n), ScaleBlocks(k)});
  int64_t groups = CheckGroups(check, group_sizes, first);
  check.Buffer("out", *out, ffi::BF16, {m, n});
  return {m,
          k,
          n,
          g,
          groups,
          rows.untyped_data(),
          static_cast<const float*>(row_scales.untyped_data()),
          weights.untyped_data(),
          static_cast<const float*>(weight_scales.untyped_data()),
          static_cast<const int32_t*>(group_sizes.untyped_data()),
          static_cast<const int32_t*>(first.untyped_data()),
          out->untyped_data()};
}

ffi::Error Run(cudaStream_t stream, ffi::AnyBuffer rows, ffi::AnyBuffer row_scales, ffi::AnyBuffer weights,
               ffi::AnyBuffer weight_scales, ffi::AnyBuffer group_sizes, ffi::AnyBuffer first, Result out) {
  constexpr const char* target = "w8a8";
  Checker check(target);
  W8A8 call = Check(check, rows, row_scales, weights, weight_scales, group_sizes, first, out);
  if (!check.ok()) return check.error();
  return LaunchOnHopper(target, [&](int num_sm) { return MultiplyW8A8(call, num_sm, stream); });
}

auto Bind() {
  return OnStream()
      .Arg<ffi::AnyBuffer>()   // rows
      .Arg<ffi::AnyBuffer>()   // row_scales
      .Arg<ffi::AnyBuffer>()   // weights
      .Arg<ffi::AnyBuffer>()   // weight_scales
      .Arg<ffi::AnyBuffer>()   // group_sizes
      .Arg<ffi::AnyBuffer>()   // first
      .Ret<ffi::AnyBuffer>();  // out
}

}  // namespace
}  // namespace mla

XLA_FFI_DEFINE_HANDLER_SYMBOL(W8A8Cuda, mla::Run, mla::Bind(), {xla::ffi::Traits::kCmdBufferCompatible});

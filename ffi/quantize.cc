// The targets `quantize_rows` and `quantize_gated` on a Hopper GPU (quantize.h): check arguments and launch on XLA's
// stream. Nothing here allocates, synchronizes or reads device memory, so that XLA can record a call into a command
// buffer.

#include "quantize.h"

#include <cuda_runtime_api.h>

#include <string>

#include "checker.h"
#include "hopper.h"
#include "xla/ffi/api/ffi.h"

namespace mla {
namespace {

// Letters: M rows, K columns.
ffi::Error Run(const char* target, Checker& check, cudaStream_t stream, const ffi::AnyBuffer& x, int64_t halves,
               const float* row_weights, Result q, Result scales) {
  check.Rank("x", x, 2);
  if (!check.ok()) return check.error();
  int64_t m = x.dimensions()[0], k = x.dimensions()[1] / halves;
  check.Expect(m >= 1, "x", "expected at least one row, got none");
  check.Expect(k >= 8 && k % 8 == 0, "x", "expected a multiple of 8 columns, got " + std::to_string(k));
  check.Buffer("x", x, ffi::BF16, {m, k * halves});
  check.Buffer("q", *q, ffi::U8, {m, k});
  check.Buffer("scales", *scales, ffi::F32, {m, ScaleBlocks(k)});
  if (!check.ok()) return check.error();
  Quantize call{m, k, x.untyped_data(), row_weights, q->untyped_data(), static_cast<float*>(scales->untyped_data())};
  return LaunchOnHopper(target, [&](int num_sm) { return QuantizeRows(call, num_sm, stream); });
}

ffi::Error Plain(cudaStream_t stream, ffi::AnyBuffer x, Result q, Result scales) {
  constexpr const char* target = "quantize_rows";
  Checker check(target);
  return Run(target, check, stream, x, 1, nullptr, q, scales);
}

ffi::Error Gated(cudaStream_t stream, ffi::AnyBuffer gate_up, ffi::AnyBuffer row_weights, Result q, Result scales) {
  constexpr const char* target = "quantize_gated";
  Checker check(target);
  check.Rank("x", gate_up, 2);
  if (!check.ok()) return check.error();
  check.Buffer("row_weights", row_weights, ffi::F32, {gate_up.dimensions()[0]});
  return Run(target, check, stream, gate_up, 2, static_cast<const float*>(row_weights.untyped_data()), q, scales);
}

auto BindPlain() { return OnStream().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>(); }

auto BindGated() {
  return OnStream().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>();
}

}  // namespace
}  // namespace mla

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizeRowsCuda, mla::Plain, mla::BindPlain(), {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizeGatedCuda, mla::Gated, mla::BindGated(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

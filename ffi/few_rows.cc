// The targets `few_rows` and `few_rows_scaled` on a Hopper GPU (few_rows.h): check arguments and launch on XLA's
// stream. Nothing here allocates, synchronizes or reads device memory, so that XLA can record a call into a command
// buffer.

#include "few_rows.h"

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "checker.h"
#include "grouped/check.h"
#include "hopper.h"
#include "xla/ffi/api/ffi.h"

namespace mla {
namespace {

// The checks of both targets. Letters: M rows, K inputs, N outputs, G matrices, E groups.
FewRows CheckOperands(Checker& check, const ffi::AnyBuffer& rows, const ffi::AnyBuffer& weights, ffi::DataType dtype,
                      const ffi::AnyBuffer& group_sizes, const ffi::AnyBuffer& first, Result out, int64_t max_rows) {
  check.Rank("rows", rows, 2);
  check.Rank("weights", weights, 3);
  if (!check.ok()) return {};
  int64_t m = rows.dimensions()[0], k = rows.dimensions()[1], g = weights.dimensions()[0], n = weights.dimensions()[1];
  check.Expect(m >= 1, "rows", "expected at least one row, got none");
  check.Expect(k >= 64 && k % 64 == 0, "rows", "expected a multiple of 64 inputs, got " + std::to_string(k));
  check.Expect(n >= 8 && n % 8 == 0, "weights", "expected a multiple of 8 outputs, got " + std::to_string(n));
  check.Expect(max_rows >= 1, "max_rows", "expected at least 1, got " + std::to_string(max_rows));
  check.Buffer("rows", rows, ffi::BF16, {m, k});
  check.Buffer("weights", weights, dtype, {g, n, k});
  check.Buffer("out", *out, ffi::BF16, {m, n});
  FewRows call{};
  call.rows = m;
  call.inputs = k;
  call.outputs = n;
  call.matrices = g;
  call.groups = CheckGroups(check, group_sizes, first);
  call.max_rows = max_rows;
  call.x = rows.untyped_data();
  call.weights = weights.untyped_data();
  call.group_sizes = static_cast<const int32_t*>(group_sizes.untyped_data());
  call.first_matrix = static_cast<const int32_t*>(first.untyped_data());
  call.out = out->untyped_data();
  return call;
}

ffi::Error Run(const char* target, const FewRows& call, cudaStream_t stream) {
  return LaunchOnHopper(target, [&](int num_sm) { return MultiplyFewRows(call, num_sm, stream); });
}

ffi::Error Plain(cudaStream_t stream, ffi::AnyBuffer rows, ffi::AnyBuffer weights, ffi::AnyBuffer group_sizes,
                 ffi::AnyBuffer first, Result out, int64_t max_rows) {
  constexpr const char* target = "few_rows";
  Checker check(target);
  FewRows call = CheckOperands(check, rows, weights, ffi::BF16, group_sizes, first, out, max_rows);
  if (!check.ok()) return check.error();
  call.format = WeightFormat::kBf16;
  return Run(target, call, stream);
}

ffi::Error Scaled(cudaStream_t stream, ffi::AnyBuffer rows, ffi::AnyBuffer weights, ffi::AnyBuffer scales,
                  ffi::AnyBuffer group_sizes, ffi::AnyBuffer first, Result out, int64_t max_rows, int64_t block_outputs,
                  int64_t block_inputs) {
  constexpr const char* target = "few_rows_scaled";
  Checker check(target);
  FewRows call = CheckOperands(check, rows, weights, ffi::U8, group_sizes, first, out, max_rows);
  bool blocks = block_inputs == 128 && block_outputs >= 64 && block_outputs % 64 == 0;
  bool in_groups = block_inputs == 32 && block_outputs == 1 && call.inputs % 128 == 0;
  check.Expect(
      blocks || in_groups, "block",
      "expected a scale for 128 inputs of a multiple of 64 outputs, or (with a multiple of 128 inputs) for 32 of "
      "one output, got one for " +
          std::to_string(block_inputs) + " of " + std::to_string(block_outputs));
  if (!check.ok()) return check.error();
  auto parts = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
  check.Buffer("scales", scales, blocks ? ffi::F32 : ffi::BF16,
               {call.matrices, parts(call.outputs, block_outputs), parts(call.inputs, block_inputs)});
  if (!check.ok()) return check.error();
  call.format = blocks ? WeightFormat::kBlockFp8 : WeightFormat::kGroupFp8;
  call.scales = scales.untyped_data();
  call.block_outputs = block_outputs;
  return Run(target, call, stream);
}

auto BindMatrices() {
  return OnStream()
      .Arg<ffi::AnyBuffer>()   // rows
      .Arg<ffi::AnyBuffer>();  // weights
}

// Binds the operands that follow the matrices.
template <typename Binding>
auto BindGroups(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<ffi::AnyBuffer>()  // group_sizes
      .template Arg<ffi::AnyBuffer>()  // first
      .template Ret<ffi::AnyBuffer>()  // out
      .template Attr<int64_t>("max_rows");
}

auto BindScaled() {
  return BindGroups(BindMatrices().Arg<ffi::AnyBuffer>())  // scales
      .Attr<int64_t>("block_outputs")
      .Attr<int64_t>("block_inputs");
}

}  // namespace
}  // namespace mla

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsCuda, mla::Plain, mla::BindGroups(mla::BindMatrices()),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsScaledCuda, mla::Scaled, mla::BindScaled(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

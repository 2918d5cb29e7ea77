// The target `sort_pairs` on a Hopper GPU (sort_pairs.h): checks arguments and launches on XLA's stream. Nothing here
// allocates, synchronizes or reads device memory, so that XLA can record a call into a command buffer.

#include "sort_pairs.h"

#include <string>

#include "../checker.h"
#include "../hopper.h"

namespace mla {
namespace {

ffi::Error RunSortPairs(cudaStream_t stream, ffi::AnyBuffer expert, ffi::AnyBuffer weight, Result row, Result sizes,
                        Result token, Result row_weight) {
  constexpr const char* target = "sort_pairs";
  Checker check(target);
  check.Rank("expert", expert, 2);
  check.Rank("sizes", *sizes, 1);
  if (!check.ok()) return check.error();
  int64_t t = expert.dimensions()[0], k = expert.dimensions()[1], e = sizes->dimensions()[0];
  check.Expect(t * k >= 1 && t * k <= kMaxPairs, "expert",
               "expected 1 to " + std::to_string(kMaxPairs) + " pairs, got " + std::to_string(t * k));
  check.Expect(e >= 1 && e <= kMaxGroups, "sizes",
               "expected 1 to " + std::to_string(kMaxGroups) + " experts, got " + std::to_string(e));
  check.Buffer("expert", expert, ffi::S32, {t, k});
  check.Buffer("weight", weight, ffi::F32, {t, k});
  check.Buffer("row", *row, ffi::S32, {t, k});
  check.Buffer("sizes", *sizes, ffi::S32, {e});
  check.Buffer("token", *token, ffi::S32, {t * k});
  check.Buffer("row_weight", *row_weight, ffi::F32, {t * k});
  if (!check.ok()) return check.error();
  SortPairs call{t * k,
                 k,
                 e,
                 static_cast<const int32_t*>(expert.untyped_data()),
                 static_cast<const float*>(weight.untyped_data()),
                 static_cast<int32_t*>(row->untyped_data()),
                 static_cast<int32_t*>(sizes->untyped_data()),
                 static_cast<int32_t*>(token->untyped_data()),
                 static_cast<float*>(row_weight->untyped_data())};
  return LaunchOnHopper(target, [&](int) { return SortFewPairs(call, stream); });
}

auto BindSortPairs() {
  return OnStream()
      .Arg<ffi::AnyBuffer>()   // expert
      .Arg<ffi::AnyBuffer>()   // weight
      .Ret<ffi::AnyBuffer>()   // row
      .Ret<ffi::AnyBuffer>()   // sizes
      .Ret<ffi::AnyBuffer>()   // token
      .Ret<ffi::AnyBuffer>();  // row_weight
}

}  // namespace
}  // namespace mla

XLA_FFI_DEFINE_HANDLER_SYMBOL(SortPairsCuda, mla::RunSortPairs, mla::BindSortPairs(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

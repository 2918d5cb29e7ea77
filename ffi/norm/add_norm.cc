// The target `add_norm` on a Hopper GPU (add_norm.h): checks arguments and launches on XLA's stream. Nothing here
// allocates, synchronizes or reads device memory, so that XLA can record a call into a command buffer.

#include "add_norm.h"

#include <string>

#include "../checker.h"
#include "../hopper.h"

namespace mla {
namespace {

ffi::Error RunAddNorm(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer part, ffi::AnyBuffer weight,
                      ffi::AnyBuffer layer, Result sum, Result normed, float eps) {
  constexpr const char* target = "add_norm";
  Checker check(target);
  check.Rank("x", x, 2);
  if (!check.ok()) return check.error();
  int64_t t = x.dimensions()[0], d = x.dimensions()[1];
  check.Expect(
      d >= 8 && d % 8 == 0 && d <= kMaxNormed, "x",
      "expected a multiple of 8 columns, at most " + std::to_string(kMaxNormed) + ", got " + std::to_string(d));
  check.Buffer("x", x, ffi::BF16, {t, d});
  check.Buffer("part", part, ffi::BF16, {t, d});
  check.Buffer("weight", weight, ffi::BF16, {Checker::kAny, d});
  check.Buffer("layer", layer, ffi::S32, {1});
  check.Buffer("sum", *sum, ffi::BF16, {t, d});
  check.Buffer("normed", *normed, ffi::BF16, {t, d});
  if (!check.ok()) return check.error();
  if (t == 0) return ffi::Error::Success();
  AddNorm call{t,
               d,
               eps,
               x.untyped_data(),
               part.untyped_data(),
               weight.untyped_data(),
               static_cast<const int32_t*>(layer.untyped_data()),
               sum->untyped_data(),
               normed->untyped_data()};
  return LaunchOnHopper(target, [&](int) { return AddAndNorm(call, stream); });
}

auto BindAddNorm() {
  return OnStream()
      .Arg<ffi::AnyBuffer>()  // x
      .Arg<ffi::AnyBuffer>()  // part
      .Arg<ffi::AnyBuffer>()  // weight
      .Arg<ffi::AnyBuffer>()  // layer
      .Ret<ffi::AnyBuffer>()  // sum
      .Ret<ffi::AnyBuffer>()  // normed
      .Attr<float>("eps");
}

}  // namespace
}  // namespace mla

XLA_FFI_DEFINE_HANDLER_SYMBOL(AddNormCuda, mla::RunAddNorm, mla::BindAddNorm(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

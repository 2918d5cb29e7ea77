// `Checker`: the checks of a call's arguments that do not read device memory.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "shapes.h"
#include "xla/ffi/api/ffi.h"

namespace mla {

namespace ffi = xla::ffi;
using Result = ffi::Result<ffi::AnyBuffer>;

// Keeps the first error in a call's arguments.
class Checker {
 public:
  explicit Checker(const char* target) : target_(target) {}

  // `dims`: the expected sizes; kAny accepts any.
  static constexpr int64_t kAny = -1;
  void Buffer(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType dtype,
              std::initializer_list<int64_t> dims) {
    if (!message_.empty()) return;
    bool fits = buffer.element_type() == dtype && buffer.dimensions().size() == dims.size();
    if (fits) {
      size_t i = 0;
      for (int64_t dim : dims) {
        fits = fits && (dim == kAny || buffer.dimensions()[i] == dim);
        ++i;
      }
    }
    if (!fits) {
      Fail(name, "expected " + Shape(dtype, dims) + ", got " + Shape(buffer.element_type(), buffer.dimensions()));
    } else if (buffer.size_bytes() >= kAlignment && reinterpret_cast<uintptr_t>(buffer.untyped_data()) % kAlignment) {
      Fail(name, "expected a " + std::to_string(kAlignment) + "-byte aligned address, got one that is not");
    }
  }
  void Rank(const char* name, const ffi::AnyBuffer& buffer, size_t rank) {
    if (message_.empty() && buffer.dimensions().size() != rank) {
      Fail(name, "expected " + std::to_string(rank) + " dimensions, got " +
                     Shape(buffer.element_type(), buffer.dimensions()));
    }
  }
  void Expect(bool holds, const char* name, const std::string& problem) {
    if (message_.empty() && !holds) Fail(name, problem);
  }
  bool ok() const { return message_.empty(); }
  ffi::Error error() const {
    return ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument(std::string(target_) + ": " + message_);
  }

 private:
  void Fail(const char* name, const std::string& problem) { message_ = std::string(name) + ": " + problem; }
  template <typename Dims>
  static std::string Shape(ffi::DataType dtype, const Dims& dims) {
    std::string text = dtype == ffi::BF16   ? "bfloat16["
                       : dtype == ffi::F32  ? "float32["
                       : dtype == ffi::S32  ? "int32["
                       : dtype == ffi::U8   ? "uint8["
                       : dtype == ffi::PRED ? "bool["
                                            : "dtype " + std::to_string(static_cast<int>(dtype)) + " [";
    const char* comma = "";
    for (int64_t dim : dims) {
      text += comma + (dim == kAny ? std::string("any") : std::to_string(dim));
      comma = ", ";
    }
    return text + "]";
  }

  const char* target_;
  std::string message_;
};

}  // namespace mla

// The targets on the CPU: plain loops, for tests of everything around the kernels. Unlike the CUDA handlers they also
// check the values of the index arrays, and refuse what the kernels would read out of range.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "arguments.h"

namespace mla {
namespace {

float Widen(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t Narrow(float value) {  // to the nearest bfloat16, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

ffi::Error Refuse(const char* target, const std::string& what) {
  return ffi::Error::InvalidArgument(std::string(target) + ": " + what);
}

ffi::Error CheckRows(const char* target, const Rows& rows, const Common& common, int64_t max_keys) {
  auto refuse = [&](const std::string& what) { return Refuse(target, what); };
  if (rows.cu_q[0] < 0 || rows.cu_q[rows.count] > common.tokens) {
    return refuse("cu_q: rows must lie within the " + std::to_string(common.tokens) + " tokens, they reach from " +
                  std::to_string(rows.cu_q[0]) + " to " + std::to_string(rows.cu_q[rows.count]));
  }
  for (int64_t b = 0; b < rows.count; ++b) {
    int64_t queries = rows.cu_q[b + 1] - rows.cu_q[b], keys = rows.kv_len[b];
    if (queries < 0) return refuse("cu_q: row " + std::to_string(b) + " has " + std::to_string(queries) + " queries");
    if (queries > 0 && (keys < queries || keys > max_keys)) {
      return refuse("kv_len: row " + std::to_string(b) + " has " + std::to_string(queries) + " queries and " +
                    std::to_string(keys) + " keys; expected from that many to " + std::to_string(max_keys));
    }
  }
  return ffi::Error::Success();
}

// Attention of one query over `visible` keys. score(j) is key j's score, value(j) points at `width` bfloat16 elements.
// Writes the output to `sum` and returns the LSE. `scores` is scratch.
template <typename Score, typename Value>
float Attend(int64_t visible, int64_t width, const Score& score, const Value& value, std::vector<float>& scores,
             std::vector<float>& sum) {
  scores.resize(visible);
  float best = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < visible; ++j) best = std::max(best, scores[j] = score(j));
  float total = 0;
  sum.assign(width, 0.0f);
  for (int64_t j = 0; j < visible; ++j) {
    float p = std::exp(scores[j] - best);
    total += p;
    const uint16_t* v = value(j);
    for (int64_t d = 0; d < width; ++d) sum[d] += p * Widen(v[d]);
  }
  for (float& x : sum) x /= total;
  return best + std::log(total);
}

float Dot(const uint16_t* a, const uint16_t* b, int64_t size) {
  float sum = 0;
  for (int64_t d = 0; d < size; ++d) sum += Widen(a[d]) * Widen(b[d]);
  return sum;
}

void Clear(uint16_t* out, int64_t size, const Common& common) {
  std::fill_n(out, size, uint16_t{0});
  std::fill_n(common.lse, common.heads * common.tokens, -std::numeric_limits<float>::infinity());
}

ffi::Error RunExpanded(const char* target, const Expanded& call) {
  const Common& c = call.common;
  if (ffi::Error error = CheckRows(target, call.rows, c, call.keys); error.failure()) return error;
  Clear(call.out, c.tokens * c.heads * kValue, c);
  std::vector<float> scores, sum;
  for (int64_t b = 0; b < call.rows.count; ++b) {
    int64_t first = call.rows.cu_q[b], stop = call.rows.cu_q[b + 1];
    if (first < stop && (call.kv_start[b] < 0 || call.kv_start[b] + call.rows.kv_len[b] > call.keys)) {
      return Refuse(target, "kv_start: row " + std::to_string(b) + "'s keys must lie within the " +
                                std::to_string(call.keys) + " packed ones, they begin at " +
                                std::to_string(call.kv_start[b]));
    }
    for (int64_t t = first; t < stop; ++t) {
      for (int64_t i = 0; i < c.heads; ++i) {
        const uint16_t* q = call.q + (t * c.heads + i) * kQuery;
        auto key = [&](int64_t j) { return call.kv + ((call.kv_start[b] + j) * c.heads + i) * (kQuery + kValue); };
        c.lse[i * c.tokens + t] = Attend(
            call.rows.kv_len[b] - (stop - 1 - t), kValue,
            [&](int64_t j) { return call.scale * Dot(q, key(j), kQuery); }, [&](int64_t j) { return key(j) + kQuery; },
            scores, sum);
        std::transform(sum.begin(), sum.end(), call.out + (t * c.heads + i) * kValue, Narrow);
      }
    }
  }
  return ffi::Error::Success();
}

ffi::Error RunAbsorbed(const char* target, const Absorbed& call) {
  const Common& c = call.common;
  if (ffi::Error error = CheckRows(target, call.rows, c, call.table_width * call.page_size); error.failure())
    return error;
  Clear(call.out, c.heads * c.tokens * kLatent, c);
  std::vector<float> scores, sum;
  for (int64_t b = 0; b < call.rows.count; ++b) {
    int64_t first = call.rows.cu_q[b], stop = call.rows.cu_q[b + 1];
    if (first == stop) continue;
    const int32_t* table = call.page_table + b * call.table_width;
    for (int64_t w = 0; w * call.page_size < call.rows.kv_len[b]; ++w) {
      if (table[w] < 0 || table[w] >= call.num_pages) {
        return Refuse(target, "page_table: row " + std::to_string(b) + " uses page " + std::to_string(table[w]) +
                                  "; expected 0 to " + std::to_string(call.num_pages - 1));
      }
    }
    auto latent = [&](int64_t j) {
      return call.pages + (table[j / call.page_size] * call.page_size + j % call.page_size) * (kLatent + kRope);
    };
    for (int64_t t = first; t < stop; ++t) {
      for (int64_t i = 0; i < c.heads; ++i) {
        const uint16_t* q_latent = call.q_latent + (i * c.tokens + t) * kLatent;
        const uint16_t* q_rope = call.q_rope + (t * c.heads + i) * kRope;
        auto score = [&](int64_t j) {
          return call.scale * (Dot(q_latent, latent(j), kLatent) + Dot(q_rope, latent(j) + kLatent, kRope));
        };
        c.lse[i * c.tokens + t] = Attend(call.rows.kv_len[b] - (stop - 1 - t), kLatent, score, latent, scores, sum);
        std::transform(sum.begin(), sum.end(), call.out + (i * c.tokens + t) * kLatent, Narrow);
      }
    }
  }
  return ffi::Error::Success();
}

ffi::Error PrefillExpanded(ffi::AnyBuffer q, ffi::AnyBuffer kv, ffi::AnyBuffer cu_q, ffi::AnyBuffer kv_start,
                           ffi::AnyBuffer kv_len, Result out, Result lse, Result scheduler, float scale) {
  constexpr const char* target = "mla_prefill_expanded";
  Checker check(target);
  Expanded call = Expanded::Check(check, q, kv, cu_q, kv_start, kv_len, out, lse, scheduler, scale);
  return check.ok() ? RunExpanded(target, call) : check.error();
}

ffi::Error PrefillAbsorbed(ffi::AnyBuffer q_latent, ffi::AnyBuffer q_rope, ffi::AnyBuffer pages,
                           ffi::AnyBuffer page_table, ffi::AnyBuffer cu_q, ffi::AnyBuffer kv_len, Result out,
                           Result lse, Result scheduler, float scale) {
  constexpr const char* target = "mla_prefill_absorbed";
  Checker check(target);
  Absorbed call = Absorbed::Check(check, q_latent, q_rope, pages, page_table, cu_q, kv_len, out, lse, scheduler, scale);
  return check.ok() ? RunAbsorbed(target, call) : check.error();
}

ffi::Error Decode(ffi::AnyBuffer q_latent, ffi::AnyBuffer q_rope, ffi::AnyBuffer pages, ffi::AnyBuffer page_table,
                  ffi::AnyBuffer cu_q, ffi::AnyBuffer kv_len, ffi::AnyBuffer splits, Result out, Result lse,
                  Result scheduler, Result out_partial, Result lse_partial, float scale) {
  constexpr const char* target = "mla_decode";
  Checker check(target);
  Absorbed call = Absorbed::Check(check, q_latent, q_rope, pages, page_table, cu_q, kv_len, out, lse, scheduler, scale);
  Partials::Check(check, call.common, out_partial, lse_partial);
  Splits::Check(check, call.rows.count, splits);
  return check.ok() ? RunAbsorbed(target, call) : check.error();
}

// This platform's mla_decode splits nothing.
ffi::Error Schedule(ffi::AnyBuffer cu_q, ffi::AnyBuffer kv_len, Result splits, int64_t, int64_t) {
  Checker check("schedule_splits");
  Rows rows = Rows::Check(check, cu_q, kv_len);
  check.Buffer("splits", *splits, ffi::S32, {SplitsSize(rows.count)});
  if (!check.ok()) return check.error();
  std::fill_n(static_cast<int32_t*>(splits->untyped_data()), SplitsSize(rows.count), 0);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mla

XLA_FFI_DEFINE_HANDLER_SYMBOL(MlaPrefillExpandedCpu, mla::PrefillExpanded, mla::BindExpanded(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(MlaPrefillAbsorbedCpu, mla::PrefillAbsorbed, mla::BindAbsorbed(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(MlaDecodeCpu, mla::Decode, mla::BindDecode(xla::ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(ScheduleSplitsCpu, mla::Schedule, mla::BindScheduleSplits(xla::ffi::Ffi::Bind()));

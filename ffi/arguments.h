// The arguments of the three targets of attention, and every check of them that does not read device memory.
// The CPU and the CUDA handlers bind the same buffers and call the same `Check`.
//
// Letters: T tokens of the rank's buffer, n heads, B rows, K packed keys, W pages of the longest request, S splits.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "checker.h"
#include "shapes.h"
#include "xla/ffi/api/ffi.h"

namespace mla {

// Rows of queries. Row b has tokens cu_q[b] to cu_q[b + 1]: the last one sees kv_len[b] keys, each earlier one a key
// less.
struct Rows {
  int64_t count;
  int32_t* cu_q;    // [B + 1]
  int32_t* kv_len;  // [B]

  static Rows Check(Checker& check, const ffi::AnyBuffer& cu_q, const ffi::AnyBuffer& kv_len) {
    check.Rank("kv_len", kv_len, 1);
    if (!check.ok()) return {};
    int64_t count = kv_len.dimensions()[0];
    check.Expect(count >= 1, "kv_len", "expected at least one row, got none");
    check.Buffer("kv_len", kv_len, ffi::S32, {count});
    check.Buffer("cu_q", cu_q, ffi::S32, {count + 1});
    return {count, static_cast<int32_t*>(cu_q.untyped_data()), static_cast<int32_t*>(kv_len.untyped_data())};
  }
};

// The results of every target besides its output.
struct Common {
  int64_t tokens, heads;
  float* lse;          // [n, T]: log-sum-exp of a query's scores; -inf for padding tokens (of no row)
  int32_t* scheduler;  // [SchedulerSize(B)], scratch

  static Common Check(Checker& check, int64_t tokens, int64_t heads, int64_t rows, Result lse, Result scheduler) {
    check.Buffer("lse", *lse, ffi::F32, {heads, tokens});
    check.Buffer("scheduler", *scheduler, ffi::S32, {SchedulerSize(rows)});
    return {tokens, heads, static_cast<float*>(lse->untyped_data()), static_cast<int32_t*>(scheduler->untyped_data())};
  }
};

// Causal attention over per-head keys and values, both inside one array.
struct Expanded {
  Common common;
  Rows rows;
  int64_t keys;
  uint16_t* q;        // bfloat16 [T, n, h + r]
  uint16_t* kv;       // bfloat16 [K, n, h + r + v]: each head's key, then its value
  int32_t* kv_start;  // [B]: the first key of each row; rows may share keys
  uint16_t* out;      // bfloat16 [T, n, v]
  float scale;

  static Expanded Check(Checker& check, ffi::AnyBuffer q, ffi::AnyBuffer kv, ffi::AnyBuffer cu_q,
                        ffi::AnyBuffer kv_start, ffi::AnyBuffer kv_len, Result out, Result lse, Result scheduler,
                        float scale) {
    check.Rank("q", q, 3);
    check.Rank("kv", kv, 3);
    if (!check.ok()) return {};
    int64_t tokens = q.dimensions()[0], heads = q.dimensions()[1], keys = kv.dimensions()[0];
    check.Expect(tokens >= 1 && heads >= 1, "q", "expected at least one token and one head, got none");
    check.Expect(keys >= 1, "kv", "expected at least one key, got none");
    check.Buffer("q", q, ffi::BF16, {tokens, heads, kQuery});
    check.Buffer("kv", kv, ffi::BF16, {keys, heads, kQuery + kValue});
    Rows rows = Rows::Check(check, cu_q, kv_len);
    check.Buffer("kv_start", kv_start, ffi::S32, {rows.count});
    check.Buffer("out", *out, ffi::BF16, {tokens, heads, kValue});
    Common common = Common::Check(check, tokens, heads, rows.count, lse, scheduler);
    return {common,
            rows,
            keys,
            static_cast<uint16_t*>(q.untyped_data()),
            static_cast<uint16_t*>(kv.untyped_data()),
            static_cast<int32_t*>(kv_start.untyped_data()),
            static_cast<uint16_t*>(out->untyped_data()),
            scale};
  }
};

// Causal attention over the cached latents: the keys of all heads, and with their first R elements the values.
struct Absorbed {
  Common common;
  Rows rows;
  int64_t num_pages, page_size, table_width;
  uint16_t* q_latent;   // bfloat16 [n, T, R]: the layout of the batched product with W_UK
  uint16_t* q_rope;     // bfloat16 [T, n, r]
  uint16_t* pages;      // bfloat16 [pages, page_size, R + r]
  int32_t* page_table;  // [B, W]: each row's pages in order; entries past kv_len are not read
  uint16_t* out;        // bfloat16 [n, T, R]: the layout of the batched product with W_UV
  float scale;

  static Absorbed Check(Checker& check, ffi::AnyBuffer q_latent, ffi::AnyBuffer q_rope, ffi::AnyBuffer pages,
                        ffi::AnyBuffer page_table, ffi::AnyBuffer cu_q, ffi::AnyBuffer kv_len, Result out, Result lse,
                        Result scheduler, float scale) {
    check.Rank("q_latent", q_latent, 3);
    check.Rank("pages", pages, 3);
    check.Rank("page_table", page_table, 2);
    if (!check.ok()) return {};
    int64_t heads = q_latent.dimensions()[0], tokens = q_latent.dimensions()[1];
    int64_t num_pages = pages.dimensions()[0], page_size = pages.dimensions()[1], width = page_table.dimensions()[1];
    check.Expect(tokens >= 1 && heads >= 1, "q_latent", "expected at least one token and one head, got none");
    check.Expect(num_pages >= 1 && page_size >= 1 && page_size % kPageTile == 0, "pages",
                 "expected a page size that is a multiple of " + std::to_string(kPageTile) + ", got " +
                     std::to_string(page_size));
    check.Expect(width >= 1, "page_table", "expected room for at least one page, got none");
    check.Buffer("q_latent", q_latent, ffi::BF16, {heads, tokens, kLatent});
    check.Buffer("q_rope", q_rope, ffi::BF16, {tokens, heads, kRope});
    check.Buffer("pages", pages, ffi::BF16, {num_pages, page_size, kLatent + kRope});
    Rows rows = Rows::Check(check, cu_q, kv_len);
    check.Buffer("page_table", page_table, ffi::S32, {rows.count, width});
    check.Buffer("out", *out, ffi::BF16, {heads, tokens, kLatent});
    Common common = Common::Check(check, tokens, heads, rows.count, lse, scheduler);
    return {common,
            rows,
            num_pages,
            page_size,
            width,
            static_cast<uint16_t*>(q_latent.untyped_data()),
            static_cast<uint16_t*>(q_rope.untyped_data()),
            static_cast<uint16_t*>(pages.untyped_data()),
            static_cast<int32_t*>(page_table.untyped_data()),
            static_cast<uint16_t*>(out->untyped_data()),
            scale};
  }
};

// Scratch of decode: the partial output and LSE of each split.
struct Partials {
  int64_t num_splits;
  float* out;  // [S, n, T, R]
  float* lse;  // [S, n, T]

  static Partials Check(Checker& check, const Common& common, Result out, Result lse) {
    check.Rank("out_partial", *out, 4);
    if (!check.ok()) return {};
    int64_t count = out->dimensions()[0];
    check.Expect(count >= 1 && count <= kMaxSplits, "out_partial",
                 "expected 1 to " + std::to_string(kMaxSplits) + " splits, got " + std::to_string(count));
    check.Buffer("out_partial", *out, ffi::F32, {count, common.heads, common.tokens, kLatent});
    check.Buffer("lse_partial", *lse, ffi::F32, {count, common.heads, common.tokens});
    return {count, static_cast<float*>(out->untyped_data()), static_cast<float*>(lse->untyped_data())};
  }
};

// A division of the rows' keys into splits, made once for all calls with the same rows.
struct Splits {
  // [SplitsSize(B)]; null: the call makes its own.
  const int32_t* schedule;

  static Splits Check(Checker& check, int64_t rows, const ffi::AnyBuffer& splits) {
    check.Rank("splits", splits, 1);
    if (!check.ok() || splits.dimensions()[0] == 0) return {nullptr};
    check.Buffer("splits", splits, ffi::S32, {SplitsSize(rows)});
    return {static_cast<const int32_t*>(splits.untyped_data())};
  }
};

// Binds the target that makes them.
template <typename Binding>
auto BindScheduleSplits(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<ffi::AnyBuffer>()  // cu_q
      .template Arg<ffi::AnyBuffer>()  // kv_len
      .template Ret<ffi::AnyBuffer>()  // splits
      .template Attr<int64_t>("heads")
      .template Attr<int64_t>("max_splits");
}

// The handlers' arguments in order, bound after those that the platform adds.
template <typename Binding>
auto BindExpanded(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<ffi::AnyBuffer>()  // q
      .template Arg<ffi::AnyBuffer>()  // kv
      .template Arg<ffi::AnyBuffer>()  // cu_q
      .template Arg<ffi::AnyBuffer>()  // kv_start
      .template Arg<ffi::AnyBuffer>()  // kv_len
      .template Ret<ffi::AnyBuffer>()  // out
      .template Ret<ffi::AnyBuffer>()  // lse
      .template Ret<ffi::AnyBuffer>()  // scheduler
      .template Attr<float>("scale");
}

template <typename Binding>
auto BindAbsorbedOperands(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<ffi::AnyBuffer>()   // q_latent
      .template Arg<ffi::AnyBuffer>()   // q_rope
      .template Arg<ffi::AnyBuffer>()   // pages
      .template Arg<ffi::AnyBuffer>()   // page_table
      .template Arg<ffi::AnyBuffer>()   // cu_q
      .template Arg<ffi::AnyBuffer>();  // kv_len
}

template <typename Binding>
auto BindAbsorbedResults(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Ret<ffi::AnyBuffer>()   // out
      .template Ret<ffi::AnyBuffer>()   // lse
      .template Ret<ffi::AnyBuffer>();  // scheduler
}

template <typename Binding>
auto BindAbsorbed(Binding&& binding) {
  return BindAbsorbedResults(BindAbsorbedOperands(std::forward<Binding>(binding))).template Attr<float>("scale");
}

template <typename Binding>
auto BindDecode(Binding&& binding) {
  return BindAbsorbedResults(
             BindAbsorbedOperands(std::forward<Binding>(binding)).template Arg<ffi::AnyBuffer>())  // splits
      .template Ret<ffi::AnyBuffer>()                                                              // out_partial
      .template Ret<ffi::AnyBuffer>()                                                              // lse_partial
      .template Attr<float>("scale");
}

}  // namespace mla

// Products with many vectors, which arithmetic bounds and not memory: weights are widened to float32 once, into the cache, and multiplied there.
//
// Axes: B vectors, K columns of a row, N rows of weights.

#pragma once

#include "native_rows.h"

namespace inflash {

constexpr int kPanel = 2 * kLanes;        // numbers that lie side by side, one for each sum
constexpr int kTogether = 6;              // times as many sums stay in registers
constexpr int64_t kDepth = 320;           // of a panel: it and kTogether widened rows (28 KiB) stay in the nearest cache, and no power of two sets the rows apart
constexpr int64_t kTall = 2 * kTogether;  // rows that are widened at a time

inline int64_t panels(int64_t count) { return (count + kPanel - 1) / kPanel; }

// sums[n][j] += rows[n * stride + k] * panel[k][j] for N rows, over k < depth.
template <int N>
inline void multiply(const float* rows, int64_t stride, const float* panel, int64_t depth, float* sums, int64_t sums_stride) {
  Floats first[N], second[N];
  for (int n = 0; n < N; ++n)
    first[n] = load<Floats>(sums + n * sums_stride), second[n] = load<Floats>(sums + n * sums_stride + kLanes);
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    const Floats left = load<Floats>(panel), right = load<Floats>(panel + kLanes);
    for (int n = 0; n < N; ++n) {
      const float factor = rows[n * stride + k];
      first[n] += factor * left;
      second[n] += factor * right;
    }
  }
  for (int n = 0; n < N; ++n) {
    std::memcpy(sums + n * sums_stride, &first[n], sizeof first[n]);
    std::memcpy(sums + n * sums_stride + kLanes, &second[n], sizeof second[n]);
  }
}

// `multiply` for any number of rows.
inline void multiply_rows(int64_t count, const float* rows, int64_t stride, const float* panel, int64_t depth, float* sums, int64_t sums_stride) {
  int64_t n = 0;
  for (; n + kTogether <= count; n += kTogether) multiply<kTogether>(rows + n * stride, stride, panel, depth, sums + n * sums_stride, sums_stride);
  for (; n < count; ++n) multiply<1>(rows + n * stride, stride, panel, depth, sums + n * sums_stride, sums_stride);
}

// Puts x [batch, width] side by side: packed [panels, width, kPanel] of the format's precision; vectors beyond the batch are zeros.
template <class Format>
Phase side_by_side(const float* x, int64_t batch, int64_t width, float* packed) {
  constexpr int64_t kPiece = kLineBytes / sizeof(float);  // of each vector in turn, as vectors begin where caches keep little of each
  const int64_t pieces = (width + kPiece - 1) / kPiece, most = std::max<int64_t>(1, pieces / 4);
  const int64_t parts = (pieces + most - 1) / most;
  return {panels(batch) * parts, [=](int64_t chunk) {
    const int64_t p = chunk / parts, stop = std::min(width, (chunk % parts + 1) * most * kPiece);
    for (int64_t from = chunk % parts * most * kPiece; from < stop; from += kPiece)
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t b = p * kPanel + j, to = std::min(stop, from + kPiece);
        for (int64_t k = from; k < to; ++k) packed[(p * width + k) * kPanel + j] = b < batch ? Format::rounded(x[b * width + k]) : 0.0f;
      }
  }};
}

// Room for vectors side by side.
inline float* panels_for(int64_t batch, int64_t width) { return scratch<float, 6>(panels(batch) * width * kPanel); }

// Calls use(first, count, sums, stride) with the products of all vectors (`side_by_side`) and some rows: sums[(n - first) * stride + b].
template <class Format, class Row, class Use>
Phase dot_many(int64_t num_rows, int64_t width, const float* packed, int64_t batch, const Row& row, const Use& use) {
  const int64_t stride = panels(batch) * kPanel;
  return {(num_rows + kTall - 1) / kTall, [=](int64_t chunk) {
    const int64_t start = chunk * kTall, count = std::min(num_rows - start, kTall);
    float* sums = scratch<float, 7>(kTall * stride);
    float* wide = scratch<float, 8>(kTall * kDepth);
    std::fill(sums, sums + kTall * stride, 0.0f);
    for (int64_t from = 0; from < width; from += kDepth) {
      const int64_t depth = std::min(kDepth, width - from);
      for (int64_t n = 0; n < count; ++n) {
        const auto* values = row(start + n) + from;
        for (int64_t k = 0; k < depth; ++k) wide[n * kDepth + k] = widened_weight(values[k]);
      }
      for (int64_t p = 0; p < panels(batch); ++p)
        multiply_rows(count, wide, kDepth, packed + (p * width + from) * kPanel, depth, sums + p * kPanel, stride);
    }
    use(start, count, sums, stride);
  }};
}

// out [batch, width] = accumulator + hidden [batch, count] . rows, some panels of columns at a time: whole lines of the cache of each row.
template <class Format, class Row>
Phase mix_many(int64_t count, int64_t width, const float* hidden, int64_t batch, const Row& row, const float* accumulator, float* out) {
  constexpr int64_t kPanels = 4, kColumns = kPanels * kPanel;
  return {(width + kColumns - 1) / kColumns, [=](int64_t chunk) {
    const int64_t first = chunk * kColumns, columns = std::min(kColumns, width - first);
    float* packed = scratch<float, 8>(kDepth * kColumns);
    float* sums = scratch<float, 7>(batch * kColumns);
    std::fill(sums, sums + batch * kColumns, 0.0f);
    if (columns < kColumns) std::fill(packed, packed + kDepth * kColumns, 0.0f);
    for (int64_t from = 0; from < count; from += kDepth) {
      const int64_t depth = std::min(kDepth, count - from);
      for (int64_t k = 0; k < depth; ++k) {
        const auto* values = row(from + k) + first;
        prefetch<kLine<Format>>(row(std::min(from + k + kBurst, count - 1)) + first, 0, columns);
        for (int64_t at = 0; at < columns; at += kPanel)
          for (int64_t j = 0; j < std::min<int64_t>(kPanel, columns - at); ++j)
            packed[(at / kPanel * kDepth + k) * kPanel + j] = widened_weight(values[at + j]);
      }
      for (int64_t at = 0; at < columns; at += kPanel)
        multiply_rows(batch, hidden + from, count, packed + at * kDepth, depth, sums + at, kColumns);
    }
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t j = 0; j < columns; ++j) out[b * width + first + j] = accumulator[b * width + first + j] + sums[b * kColumns + j];
  }};
}

}  // namespace inflash

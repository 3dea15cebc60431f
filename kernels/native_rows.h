// What the native kernels are made of: formats of weights, work in phases, and walks over rows at the memory's own rate.
//
// Axes: B batch (1 to 8), K columns of a row, R rows walked together.
//
// Decoding is a race against DRAM: every weight is read once and multiplied with B numbers. So each loop below walks several rows at a
// time, keeps the sums of all rows and sequences in registers, and prefetches the rows that come next: what hardware prefetches by itself
// ends with each page, and random rows it cannot guess at all. Sums are float32. The order in which they are added depends on sizes, never
// on which thread was faster, so the same input gives the same bits.
//
// Nothing here needs a certain processor: vectors are GCC's and Clang's own vector types, as wide as the target's registers. AVX512_BF16
// alone, which multiplies pairs of bf16 without converting them, is spelt out.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace inflash {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kLineBytes = 64;  // of the cache
constexpr int64_t kAheadBytes = 1 << 10;  // how far before its use a stream of rows is asked for
constexpr int64_t kChunkBytes = 256 << 10, kFewestChunkBytes = 64 << 10;
constexpr int kStreams = 4;  // of rows that are walked side by side: the hardware follows each of them by itself, too
constexpr int kBurst = 8;  // lines of a row that are asked for at once
constexpr int kMixed = 8;  // rows that one walk down adds to the sums
static_assert(kBurst == kMixed);

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef float Quarter __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class Vector>
inline Vector load(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);  // from any address
  return value;
}

// sums[i] = the sum of the lanes of vectors[i].
template <int N>
inline void sum_lanes(const Floats* vectors, float* sums) {
#if defined(__AVX512F__)
  static_assert(N % 4 == 0);
  for (int i = 0; i < N; i += 4) {  // four at a time: as many instructions as for one
    const auto halves = [](Floats one, Floats other) { return _mm512_unpacklo_ps(one, other) + _mm512_unpackhi_ps(one, other); };
    const __m512d first = (__m512d)halves(vectors[i], vectors[i + 1]), second = (__m512d)halves(vectors[i + 2], vectors[i + 3]);
    const Floats four = (Floats)_mm512_unpacklo_pd(first, second) + (Floats)_mm512_unpackhi_pd(first, second);
    const auto quarter = [&](int from) { return load<Quarter>(reinterpret_cast<const float*>(&four) + 4 * from); };
    const Quarter total = (quarter(0) + quarter(1)) + (quarter(2) + quarter(3));
    std::memcpy(sums + i, &total, sizeof total);
  }
#else
  for (int i = 0; i < N; ++i) {
    float lanes[kLanes];
    std::memcpy(lanes, &vectors[i], sizeof lanes);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    sums[i] = lanes[0];
  }
#endif
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = load<uint32_t>(&value);
  if (value != value) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float from_bf16(uint32_t bits) { return load<float>(&(bits <<= 16)); }

inline float widened_weight(uint16_t bits) { return from_bf16(bits); }
inline float widened_weight(float value) { return value; }

// A format says what a row's `Element` is, what `Operand` x is turned into for `dot`, and `Factor` a neuron's activation for the way down;
// factors of kPair rows lie together. Without AVX512_BF16 all formats multiply in float32.
struct InFloat32 {
  using Operand = float;
  using Factor = float;
  static constexpr int kStep = kLanes, kPair = 1;
  static float widened(float value) { return value; }
  static float narrowed(float value) { return value; }
  static float rounded(float value) { return value; }
  static Floats vector(const float* row) { return load<Floats>(row); }
  static Floats vector(const uint16_t* row) { return (Floats)(__builtin_convertvector(load<Halves>(row), Words) << 16); }
  template <class Element>
  static Floats dot(Floats sum, const Element* row, const float* x) {
    return sum + vector(row) * load<Floats>(x);
  }
};

struct Float32 : InFloat32 {
  using Element = float;
};

struct BFloat16 : InFloat32 {
  using Element = uint16_t;
  static float widened(uint16_t value) { return from_bf16(value); }
  static float rounded(float value) { return from_bf16(to_bf16(value)); }
#if defined(__AVX512BF16__)
  using Operand = uint16_t;
  using Factor = uint16_t;
  static constexpr int kStep = 2 * kLanes, kPair = 2;
  static uint16_t narrowed(float value) { return to_bf16(value); }
  static Floats dot(Floats sum, const Element* row, const Operand* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)load<Words>(row), (__m512bh)load<Words>(x));
  }
#else
  static float widened(float value) { return value; }
  static float narrowed(float value) { return rounded(value); }
#endif
};

// Chunks of work that may be done at once, each by body(chunk).
struct Phase {
  int64_t num_chunks;
  std::function<void(int64_t)> body;
};

// Runs each phase when the one before is done, on this thread and on those of the pool that are free: starting threads takes as long as
// reading half a MiB, so it is done once a call. Whoever is ready takes the next chunk, so a core that another process holds up delays one
// chunk. This thread alone would finish them all: it waits only for chunks that a running thread has begun. A helper that starts later
// finds no chunk left and touches nothing but the progress, which it co-owns.
inline void run(ffi::ThreadPool& pool, const std::vector<Phase>& phases) {
  struct Progress {
    explicit Progress(int64_t num_chunks) : num_chunks(num_chunks) {}
    const int64_t num_chunks;
    std::atomic<int64_t> taken{0}, finished{0};
  };
  const auto all = std::make_shared<std::deque<Progress>>();
  int64_t most = 1;
  for (const Phase& phase : phases) {
    all->emplace_back(phase.num_chunks);
    most = std::max(most, phase.num_chunks);
  }
  const auto work = [all, &phases] {
    size_t number = 0;
    for (Progress& progress : *all) {
      for (int64_t chunk; (chunk = progress.taken.fetch_add(1)) < progress.num_chunks; progress.finished.fetch_add(1))
        phases[number].body(chunk);
      while (progress.finished.load() < progress.num_chunks) std::this_thread::yield();
      ++number;
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), most) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
}

// Two phases that may be done at once.
inline Phase together(Phase one, Phase other) {
  const int64_t first = one.num_chunks;
  return {first + other.num_chunks, [=](int64_t chunk) { chunk < first ? one.body(chunk) : other.body(chunk - first); }};
}

// Memory of this thread that is kept between calls, on a cache line: fresh pages for every call would cost more than filling them.
template <class Value, int kUse>
Value* scratch(int64_t count) {
  thread_local std::vector<char> memory;
  const size_t num_bytes = count * sizeof(Value) + kLineBytes;
  if (memory.size() < num_bytes) memory.resize(num_bytes);
  return reinterpret_cast<Value*>((reinterpret_cast<uintptr_t>(memory.data()) + kLineBytes - 1) / kLineBytes * kLineBytes);
}

// Elements of a cache line of weights. What belongs to several sequences lies as [lines, B, line]: rows of powers of two, one for each
// sequence, would push each other out of the cache.
template <class Format>
constexpr int kLine = kLineBytes / sizeof(typename Format::Element);

// Where x[b][k] lies among the operands of `dot_rows`.
template <class Format, int B>
int64_t operand_at(int64_t b, int64_t k) {
  constexpr int64_t line = kLine<Format>;
  return (k / line * B + b) * line + k % line;
}

template <class Format, int B>
int64_t num_operands(int64_t width) {
  return (width + kLine<Format> - 1) / kLine<Format> * B * kLine<Format>;
}

// x [batch, K] f32 in the precision of the weights, interleaved, with zeros for what is missing.
template <class Format, int B>
const typename Format::Operand* operands(const float* x, int64_t batch, int64_t width) {
  using Operand = typename Format::Operand;
  constexpr int64_t line = kLine<Format>;
  const int64_t size = num_operands<Format, B>(width);
  auto* packed = scratch<Operand, 0>(size);
  if (batch < B || width % line) std::fill(packed, packed + size, Operand(0));
  for (int64_t at = 0; at < width; at += line)
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t k = at; k < std::min(at + line, width); ++k) packed[operand_at<Format, B>(b, k)] = Format::narrowed(x[b * width + k]);
  return packed;
}

// Asks for elements of a row, a few lines at a time.
template <int line, class Element>
inline void prefetch(const Element* row, int64_t from, int64_t to) {
  for (int64_t at = from; at < to; at += line) __builtin_prefetch(row + at, 0, 2);
}

// What to ask for while rows are walked: what lies `rest` elements further on in each of `next`, and beyond its end in `after`.
template <class Element, int R>
struct Ahead {
  const Element *next[R], *after[R];
  int64_t rest;
};

// sums[r][b] = rows[r] . x[b], while asking for what comes `ahead`, line by line. A few lines of two rows, then as many of the next two: the
// sums of two rows for every sequence stay in registers.
template <class Format, int B, int R>
inline void dot_rows(const typename Format::Element* const* rows, const Ahead<typename Format::Element, R>& ahead, int64_t width,
                     const typename Format::Operand* x, float (*sums)[B]) {
  using Element = typename Format::Element;
  constexpr int line = kLine<Format>;
  Floats lanes[R][B] = {};
  const auto add = [&](int r, const Element* one, const Element* other, int64_t from, int64_t length) {
    const auto soon = [&](int i, int64_t at) { return (at < width ? ahead.next[i] : ahead.after[i] - width) + at; };
    Floats first[B], second[B];  // in registers
    for (int b = 0; b < B; ++b) first[b] = lanes[r][b], second[b] = lanes[r + 1][b];
    for (int64_t at = 0; at < length; at += line) {
      __builtin_prefetch(soon(r, from + at + ahead.rest));
      __builtin_prefetch(soon(r + 1, from + at + ahead.rest));
      for (int step = 0; step < line; step += Format::kStep)
        for (int b = 0; b < B; ++b) {
          const auto* operand = x + (from + at) * B + b * line + step;
          first[b] = Format::dot(first[b], one + at + step, operand);
          second[b] = Format::dot(second[b], other + at + step, operand);
        }
    }
    for (int b = 0; b < B; ++b) lanes[r][b] = first[b], lanes[r + 1][b] = second[b];
  };
  const int64_t whole = width / line * line;
  for (int64_t from = 0; from < whole; from += kBurst * line)
    for (int r = 0; r < R; r += 2) add(r, rows[r] + from, rows[r + 1] + from, from, std::min<int64_t>(kBurst * line, whole - from));
  for (int r = 0; r < R && whole < width; r += 2) {
    Element ends[2][line] = {};
    for (int i = 0; i < 2; ++i) std::copy(rows[r + i] + whole, rows[r + i] + width, ends[i]);
    add(r, ends[0], ends[1], whole, line);
  }
  sum_lanes<R * B>(lanes[0], sums[0]);
}

// Where the factor of a row and a sequence lies: [rows / kPair, B, kPair].
template <class Format, int B>
int64_t factor_at(int64_t row, int64_t b) {
  return (row / Format::kPair * B + b) * Format::kPair + row % Format::kPair;
}

// sums [lines, B, line] += factors . rows over kMixed rows, from column `from` to `to`, while asking for the rows in `next`.
template <class Format, int B>
void mix_rows(const typename Format::Element* const* rows, const typename Format::Element* const* next,
              const typename Format::Factor* factors, int64_t from, int64_t to, float* sums) {
  constexpr int line = kLine<Format>;
  const int64_t whole = from + (to - from) / line * line;
  for (int64_t at = from; at < whole; at += line, sums += B * line) {
    // Of each of the next rows in turn a few lines: after kMixed lines as many have been asked for as were used.
    const int64_t number = (at - from) / line, first = from + number / kMixed * kBurst * line;
    prefetch<line>(next[number % kMixed], first, std::min(first + kBurst * line, to));
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Format, BFloat16>) {
      // Two rows' elements side by side, and their two factors, are the pairs that vdpbf16ps multiplies.
      alignas(64) static constexpr uint16_t kOrder[2][32] = {
          {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
          {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
      const __m512i first = load<__m512i>(kOrder[0]), second = load<__m512i>(kOrder[1]);
      Floats total[B][2];
      std::memcpy(total, sums, sizeof total);
      for (int r = 0; r < kMixed; r += 2) {
        const __m512i even = load<__m512i>(rows[r] + at), odd = load<__m512i>(rows[r + 1] + at);
        const __m512bh low_pairs = (__m512bh)_mm512_permutex2var_epi16(even, first, odd);
        const __m512bh high_pairs = (__m512bh)_mm512_permutex2var_epi16(even, second, odd);
        for (int b = 0; b < B; ++b) {
          const __m512bh pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(factors + factor_at<Format, B>(r, b)));
          total[b][0] = _mm512_dpbf16_ps(total[b][0], low_pairs, pair);
          total[b][1] = _mm512_dpbf16_ps(total[b][1], high_pairs, pair);
        }
      }
      std::memcpy(sums, total, sizeof total);
      continue;
    }
#endif
    for (int step = 0; step < line; step += kLanes) {
      Floats total[B];
      for (int b = 0; b < B; ++b) total[b] = load<Floats>(sums + b * line + step);
      for (int r = 0; r < kMixed; ++r) {
        const Floats row = Format::vector(rows[r] + at + step);
        for (int b = 0; b < B; ++b) total[b] += row * Format::widened(factors[factor_at<Format, B>(r, b)]);
      }
      for (int b = 0; b < B; ++b) std::memcpy(sums + b * line + step, &total[b], sizeof total[b]);
    }
  }
  for (int64_t k = whole; k < to; ++k)
    for (int b = 0; b < B; ++b)
      for (int r = 0; r < kMixed; ++r)
        sums[b * line + k - whole] += Format::widened(factors[factor_at<Format, B>(r, b)]) * Format::widened(rows[r][k]);
}

// Calls use(i, sums [B]) with the products of x and row(i), for all rows. A chunk of them is small enough that all threads end at about the
// same time, and is walked as streams side by side, each over neighbouring rows: memory answers a few long walks faster than one, and faster
// than many short ones.
template <class Format, int B, class Row, class Use>
Phase dot_all(int64_t num_rows, int64_t width, const typename Format::Operand* x, const Row& row, const Use& use) {
  using Element = typename Format::Element;
  constexpr int R = kStreams;
  const int64_t row_bytes = std::max<int64_t>(1, width * sizeof(Element));
  const int64_t bytes = std::clamp(num_rows * row_bytes / 32, kFewestChunkBytes, kChunkBytes);
  const int64_t size = std::max<int64_t>(1, bytes / row_bytes / R) * R, skipped = kAheadBytes / row_bytes;
  return {(num_rows + size - 1) / size, [=](int64_t chunk) {
    const int64_t start = chunk * size, stop = std::min(num_rows, start + size), steps = (stop - start + R - 1) / R;
    for (int64_t step = 0; step < steps; ++step) {
      const Element* rows[R];
      Ahead<Element, R> ahead;
      ahead.rest = kAheadBytes % row_bytes / sizeof(Element);
      for (int r = 0; r < R; ++r) {
        const int64_t i = start + r * steps + step;
        rows[r] = row(std::min(i, stop - 1));
        ahead.next[r] = row(std::min(i + skipped, num_rows - 1));
        ahead.after[r] = row(std::min(i + skipped + 1, num_rows - 1));
      }
      float sums[R][B];
      dot_rows<Format, B, R>(rows, ahead, width, x, sums);
      for (int r = 0; r < R; ++r)
        if (const int64_t i = start + r * steps + step; i < stop) use(i, sums[r]);
    }
  }};
}

}  // namespace inflash

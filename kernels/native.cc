// Kernels that read bf16 (or f32) weights at the memory's own rate, called by XLA through jax.ffi. kernels/native.py describes the calls.
//
// Axes: B batch (1 to 8), K inputs of a linear layer, N its outputs, D d_model, F d_ff, S slots.
//
// Decoding is a race against DRAM: every weight is read once and multiplied with B numbers. So each loop below walks several rows at a
// time, keeps the sums of all rows and sequences in registers, and prefetches the rows that come next: what hardware prefetches by itself
// ends with each page, and random rows it cannot guess at all. Sums are float32. The order in which they are added depends on sizes, never
// on which thread was faster, so the same input gives the same bits.
//
// Nothing here needs a certain processor: vectors are GCC's and Clang's own vector types, as wide as the target's registers. AVX512_BF16
// alone, which multiplies pairs of bf16 without converting them, is spelt out.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kSums = 24;  // sums that fit in registers beside the operands
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kSums = 8;
#else
constexpr int kVectorBytes = 16, kSums = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kLineBytes = 64;  // of the cache
constexpr int64_t kAheadBytes = 16 << 10;  // how far before its use a row of a matrix is asked for
constexpr int64_t kChunkBytes = 256 << 10, kFewestChunkBytes = 32 << 10;
constexpr int kBurst = 8;          // lines of a row that are asked for at once
constexpr int kMixed = 8;          // rows that one walk down adds to the sums
constexpr int64_t kColumns = 256;  // of a walk down: its sums stay in the nearest cache

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class Vector>
inline Vector load(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);  // from any address
  return value;
}

inline float sum_of_lanes(Floats vector) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(vector);
#else
  float lanes[kLanes];
  std::memcpy(lanes, &vector, sizeof lanes);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = load<uint32_t>(&value);
  if (value != value) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float from_bf16(uint32_t bits) { return load<float>(&(bits <<= 16)); }

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

// Runs body(0) to body(num_chunks - 1), each once, on this thread and on those of the pool that are free. Whoever is ready takes the next
// chunk, so a core that another process holds up delays one chunk. This thread alone would finish them all: it waits only for chunks that
// a running thread has begun. A helper that starts later finds no chunk left and touches nothing but the counters, which it co-owns.
void share(ffi::ThreadPool& pool, int64_t num_chunks, const std::function<void(int64_t)>& body) {
  struct Counters { std::atomic<int64_t> taken{0}, finished{0}; };
  const auto counters = std::make_shared<Counters>();
  const auto work = [counters, num_chunks, &body] {
    for (int64_t chunk; (chunk = counters->taken.fetch_add(1)) < num_chunks; counters->finished.fetch_add(1, std::memory_order_release))
      body(chunk);
  };
  const int64_t helpers = std::min(pool.num_threads(), num_chunks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  while (counters->finished.load(std::memory_order_acquire) < num_chunks) std::this_thread::yield();
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

// x [batch, K] f32 in the precision of the weights, interleaved, with zeros for what is missing.
template <class Format, int B>
const typename Format::Operand* operands(const float* x, int64_t batch, int64_t width) {
  using Operand = typename Format::Operand;
  constexpr int64_t line = kLine<Format>;
  const int64_t size = (width + line - 1) / line * line * B;
  auto* packed = scratch<Operand, 0>(size);
  if (batch < B || width % line) std::fill(packed, packed + size, Operand(0));
  for (int64_t at = 0; at < width; at += line)
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t k = 0; k < std::min(line, width - at); ++k) packed[at * B + b * line + k] = Format::narrowed(x[b * width + at + k]);
  return packed;
}

// Rows walked together: their sums for every sequence stay in registers.
constexpr int rows_together(int batch) { return std::max(1, std::min(8, kSums / batch)); }

// Asks for some lines of each row at once: memory answers neighbours faster than rows in turn.
template <int R, int line, class Element>
inline void prefetch(const Element* const* rows, int64_t from) {
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < kBurst; ++i) __builtin_prefetch(rows[r] + from + i * line, 0, 2);
}

// sums[r][b] = rows[r] . x[b], while asking for the rows in `next`.
template <class Format, int B, int R>
void dot_rows(const typename Format::Element* const* rows, const typename Format::Element* const* next, int64_t width,
              const typename Format::Operand* x, float (*sums)[B]) {
  using Element = typename Format::Element;
  constexpr int line = kLine<Format>;
  Floats lanes[R][B] = {};
  const auto add_line = [&](const Element* const* from, int64_t at, const auto* operand) __attribute__((always_inline)) {
    for (int step = 0; step < line; step += Format::kStep)
      for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) lanes[r][b] = Format::dot(lanes[r][b], from[r] + at + step, operand + b * line + step);
  };
  const int64_t whole = width / line * line;
  for (int64_t at = 0; at < whole; at += line) {
    if (at % (kBurst * line) == 0) prefetch<R, line>(next, at);
    add_line(rows, at, x + at * B);
  }
  if (whole < width) {
    Element ends[R][line] = {};
    const Element* from[R];
    for (int r = 0; r < R; ++r) from[r] = std::copy(rows[r] + whole, rows[r] + width, ends[r]) - (width - whole);
    add_line(from, 0, x + whole * B);
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) sums[r][b] = sum_of_lanes(lanes[r][b]);
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
    if ((at - from) % (kBurst * line) == 0) prefetch<kMixed, line>(next, at);
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

// Calls use(i, sums [B]) with the products of x and row(i), for all rows. A chunk of them is a multiple of what is walked together, and
// small enough that all threads end at about the same time.
template <class Format, int B, class Row, class Use>
void dot_all(ffi::ThreadPool& pool, int64_t num_rows, int64_t width, const typename Format::Operand* x, const Row& row, const Use& use) {
  constexpr int R = rows_together(B);
  const int64_t walk_bytes = std::max<int64_t>(1, R * width * sizeof(typename Format::Element));
  const int64_t bytes = std::clamp(num_rows * walk_bytes / R / 32, kFewestChunkBytes, kChunkBytes);
  const int64_t size = std::max<int64_t>(1, bytes / walk_bytes) * R, ahead = std::max<int64_t>(1, kAheadBytes / walk_bytes) * R;
  share(pool, (num_rows + size - 1) / size, [&](int64_t chunk) {
    const int64_t stop = std::min(num_rows, (chunk + 1) * size);
    for (int64_t i = chunk * size; i < stop; i += R) {
      const typename Format::Element *rows[R], *next[R];
      for (int r = 0; r < R; ++r) {
        rows[r] = row(std::min(i + r, stop - 1));
        next[r] = row(std::min(i + r + ahead, num_rows - 1));
      }
      float sums[R][B];
      dot_rows<Format, B, R>(rows, next, width, x, sums);
      for (int r = 0; r < R && i + r < stop; ++r) use(i + r, sums[r]);
    }
  });
}

// out [batch, N] = x [batch, K] . weight [N, K] + bias.
template <class Format, int B>
void linear(ffi::ThreadPool& pool, const float* x, const typename Format::Element* weight, const float* bias, float* out, int64_t batch,
            int64_t num_rows, int64_t width) {
  const auto row = [=](int64_t n) { return weight + n * width; };
  dot_all<Format, B>(pool, num_rows, width, operands<Format, B>(x, batch, width), row, [=](int64_t n, const float* sums) {
    for (int64_t b = 0; b < batch; ++b) out[b * num_rows + n] = sums[b] + (bias ? bias[n] : 0.0f);
  });
}

template <class Element>
struct Neurons {
  const Element *up, *down;        // [S, D]
  const float* bias;               // [F]
  const bool* predicted;           // [batch, F]; null: all
  const int32_t *slots, *ids;      // [count]; null: neuron i lies in slot i
  int64_t count, num_neurons, width, batch;
};

// out = accumulator + relu(x . up + bias) * down over all neurons: [batch, D]. All go up before any goes down: then a thread can have some
// columns of all rows to itself on the way down, with no sums to put together, and silent neurons' rows are not read.
template <class Format, int B>
void add_neurons(ffi::ThreadPool& pool, const Neurons<typename Format::Element>& neurons, const float* accumulator, const float* x,
                 float* out) {
  using Element = typename Format::Element;
  const int64_t width = neurons.width, batch = neurons.batch, count = neurons.count;
  auto* hidden = scratch<float, 1>(count * B);
  const auto row = [&](const Element* matrix, int64_t i) { return matrix + (neurons.slots ? neurons.slots[i] : i) * width; };
  const auto up = [&](int64_t i) { return row(neurons.up, i); };
  dot_all<Format, B>(pool, count, width, operands<Format, B>(x, batch, width), up, [&](int64_t i, const float* sums) {
    const int64_t id = neurons.ids ? std::clamp<int64_t>(neurons.ids[i], 0, neurons.num_neurons - 1) : i;
    for (int64_t b = 0; b < B; ++b) {
      const float sum = sums[b] + neurons.bias[id];
      const bool silent = b >= batch || sum < 0 || (neurons.predicted && !neurons.predicted[b * neurons.num_neurons + id]);
      hidden[i * B + b] = silent ? 0.0f : Format::rounded(sum);
    }
  });
  // The rows that are wanted, and what each adds to whom, up to a multiple of kMixed with nothing.
  const int64_t most = (count + kMixed - 1) / kMixed * kMixed;
  auto* rows = scratch<const Element*, 2>(most);
  auto* factors = scratch<typename Format::Factor, 3>(most * B);
  int64_t num_rows = 0;
  const auto append = [&](const Element* place, const float* values) {
    for (int b = 0; b < B; ++b) factors[factor_at<Format, B>(num_rows, b)] = Format::narrowed(values[b]);
    rows[num_rows++] = place;
  };
  for (int64_t i = 0; i < count; ++i) {
    const float* values = hidden + i * B;
    if (std::any_of(values, values + B, [](float value) { return value != 0; })) append(row(neurons.down, i), values);
  }
  constexpr float kNothing[B] = {};
  while (num_rows % kMixed) append(rows[num_rows - 1], kNothing);
  share(pool, (width + kColumns - 1) / kColumns, [&](int64_t piece) {
    constexpr int64_t line = kLine<Format>;
    const int64_t from = piece * kColumns, to = std::min(width, from + kColumns);
    alignas(kLineBytes) float sums[B * kColumns] = {};
    for (int64_t i = 0; i < num_rows; i += kMixed)
      mix_rows<Format, B>(rows + i, rows + std::min(i + kMixed, num_rows - kMixed), factors + i * B, from, to, sums);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t k = from; k < to; ++k)
        out[b * width + k] = accumulator[b * width + k] + sums[((k - from) / line * B + b) * line + (k - from) % line];
  });
}

// Calls body with the format of the weights and, as a constant, the batch, so that loops are unrolled; three sequences cost what four do.
template <class Body>
ffi::Error dispatch(ffi::DataType dtype, int64_t batch, const Body& body) {
  const auto with = [&](auto format) {
    if (batch == 1) return body(format, std::integral_constant<int, 1>());
    if (batch == 2) return body(format, std::integral_constant<int, 2>());
    if (batch <= 4) return body(format, std::integral_constant<int, 4>());
    body(format, std::integral_constant<int, 8>());
  };
  if (batch < 1 || batch > 8 || (dtype != ffi::BF16 && dtype != ffi::F32))
    return ffi::Error::InvalidArgument("inflash: native kernels serve 1 to 8 sequences and weights in bfloat16 or float32");
  dtype == ffi::BF16 ? with(BFloat16()) : with(Float32());
  return ffi::Error::Success();
}

using Floats32 = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

ffi::Error linear_call(ffi::ThreadPool pool, Floats32 x, ffi::AnyBuffer weight, Floats32 bias, ffi::Result<Floats32> out) {
  const int64_t batch = x.dimensions()[0], num_rows = weight.dimensions()[0], width = weight.dimensions()[1];
  return dispatch(weight.element_type(), batch, [&](auto format, auto size) {
    using Format = decltype(format);
    linear<Format, size>(pool, x.typed_data(), static_cast<const typename Format::Element*>(weight.untyped_data()),
                         bias.element_count() ? bias.typed_data() : nullptr, out->typed_data(), batch, num_rows, width);
  });
}

ffi::Error ffn_call(ffi::ThreadPool pool, Floats32 accumulator, Floats32 x, ffi::AnyBuffer up, ffi::AnyBuffer down, Floats32 bias,
                    ffi::Buffer<ffi::PRED> predicted, Integers slots, Integers ids, Integers count, ffi::Result<Floats32> out) {
  const int64_t batch = x.dimensions()[0], num_slots = up.dimensions()[0], width = up.dimensions()[1];
  const bool gathered = slots.element_count() > 0;
  const int64_t real = std::clamp<int64_t>(count.typed_data()[0], 0, gathered ? slots.element_count() : num_slots);
  for (int64_t i = 0; gathered && i < real; ++i)
    if (slots.typed_data()[i] < 0 || slots.typed_data()[i] >= num_slots)
      return ffi::Error::InvalidArgument("inflash: a slot of gathered_ffn lies outside of the slots");
  return dispatch(up.element_type(), batch, [&](auto format, auto size) {
    using Format = decltype(format);
    using Element = typename Format::Element;
    const Neurons<Element> neurons{
        static_cast<const Element*>(up.untyped_data()), static_cast<const Element*>(down.untyped_data()), bias.typed_data(),
        predicted.element_count() ? predicted.typed_data() : nullptr, gathered ? slots.typed_data() : nullptr,
        gathered ? ids.typed_data() : nullptr, real, static_cast<int64_t>(bias.element_count()), width, batch};
    add_neurons<Format, size>(pool, neurons, accumulator.typed_data(), x.typed_data(), out->typed_data());
  });
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED XLA_FFI_Error *inflash_linear(XLA_FFI_CallFrame*), *inflash_ffn(XLA_FFI_CallFrame*);

// The arguments are those of the functions above, in the shapes that kernels/native.py gives them; an empty array stands for none.
XLA_FFI_DEFINE_HANDLER_SYMBOL(inflash_linear, linear_call,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats32>().Arg<ffi::AnyBuffer>()
                                  .Arg<Floats32>().Ret<Floats32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(inflash_ffn, ffn_call,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats32>().Arg<Floats32>().Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>().Arg<Floats32>().Arg<ffi::Buffer<ffi::PRED>>().Arg<Integers>().Arg<Integers>()
                                  .Arg<Integers>().Ret<Floats32>());

// Kernels that read bf16 (or f32) weights at the memory's own rate, called by XLA through jax.ffi. kernels/native.py describes the calls.
//
// Axes: B batch (1 to 8), K inputs of a linear layer, N its outputs, D d_model, F d_ff, S slots, n rows of a block, R predictor rank,
// H heads, N blocks of the KV cache, P positions of a block, M blocks of a sequence's table.

#include "native_many.h"
#include "native_rows.h"

#include <cmath>

namespace inflash {
namespace {

// out [batch, N] = x [batch, K] . weight [N, K] + bias.
template <class Format, int B>
void linear(ffi::ThreadPool& pool, const float* x, const typename Format::Element* weight, const float* bias, float* out, int64_t batch,
            int64_t num_rows, int64_t width) {
  const auto row = [=](int64_t n) { return weight + n * width; };
  const auto use = [=](int64_t n, const float* sums) {
    for (int64_t b = 0; b < batch; ++b) out[b * num_rows + n] = sums[b] + (bias ? bias[n] : 0.0f);
  };
  run(pool, {dot_all<Format, B>(num_rows, width, operands<Format, B>(x, batch, width), row, use)});
}

// A low-rank predictor, and where its answer goes.
template <class Element>
struct Predictor {
  const Element *first, *second;  // [R, D], [F, R]
  const float* bias;              // [F]
  float threshold;
  bool relu;
  int64_t rank, num_neurons;
  bool* named;                    // [batch, F]
};

// named = second . f(first . x) + bias > threshold, for all predictors: their first products side by side, then their second ones.
template <class Format, int B>
void predict(ffi::ThreadPool& pool, const float* x, int64_t batch, int64_t width,
             const std::vector<Predictor<typename Format::Element>>& predictors) {
  using Operand = typename Format::Operand;
  int64_t size = 0;
  for (const auto& predictor : predictors) size += num_operands<Format, B>(predictor.rank);
  auto* coordinates = scratch<Operand, 1>(size);
  std::fill(coordinates, coordinates + size, Operand(0));
  const Operand* packed = operands<Format, B>(x, batch, width);
  Phase down{0, nullptr}, up{0, nullptr};
  for (const auto& predictor : predictors) {
    const auto [first, second, bias, threshold, relu, rank, num_neurons, named] = predictor;
    const auto first_row = [=, first = first](int64_t r) { return first + r * width; };
    const auto second_row = [=, second = second, rank = rank](int64_t n) { return second + n * rank; };
    const auto keep = [=, relu = relu](int64_t r, const float* sums) {
      for (int64_t b = 0; b < batch; ++b)
        coordinates[operand_at<Format, B>(b, r)] = Format::narrowed(relu && sums[b] < 0 ? 0.0f : sums[b]);
    };
    const auto judge = [=, bias = bias, threshold = threshold, num_neurons = num_neurons, named = named](int64_t n, const float* sums) {
      for (int64_t b = 0; b < batch; ++b) named[b * num_neurons + n] = sums[b] + bias[n] > threshold;
    };
    down = together(std::move(down), dot_all<Format, B>(rank, width, packed, first_row, keep));
    up = together(std::move(up), dot_all<Format, B>(num_neurons, rank, coordinates, second_row, judge));
    coordinates += num_operands<Format, B>(rank);
  }
  run(pool, {down, up});
}

template <class Element>
struct Neurons {
  const Element *up, *down;        // the first neuron's rows [D]
  int64_t apart;                   // elements from a neuron's row to that of the next one
  const float* bias;               // [F]
  const bool* predicted;           // [batch, F]; null: all
  const int32_t *slots, *ids;      // [count]; null: neuron i lies in slot i
  int64_t count, num_neurons, width, batch;
};

// Of a piece of the way down: wide pieces cross fewer pages, but their sums should stay in the nearest cache, and no thread be idle.
constexpr int64_t kFewestColumns = 256;
template <int B>
constexpr int64_t kMostColumns = B <= 4 ? 1024 : 512;

// out = accumulator + relu(x . up + bias) * down over all neurons: [batch, D]. All go up before any goes down: then a thread can have some
// columns of all rows to itself on the way down, with no sums to put together, and silent neurons' rows are not read.
template <class Format, int B>
void add_neurons(ffi::ThreadPool& pool, const Neurons<typename Format::Element>& neurons, const float* accumulator, const float* x,
                 float* out) {
  using Element = typename Format::Element;
  const int64_t width = neurons.width, batch = neurons.batch, count = neurons.count;
  auto* hidden = scratch<float, 1>(count * B);
  const auto row = [&](const Element* first, int64_t i) { return first + (neurons.slots ? neurons.slots[i] : i) * neurons.apart; };
  const auto up = [&](int64_t i) { return row(neurons.up, i); };
  const auto activate = [&](int64_t i, const float* sums) {
    const int64_t id = neurons.ids ? std::clamp<int64_t>(neurons.ids[i], 0, neurons.num_neurons - 1) : i;
    for (int64_t b = 0; b < B; ++b) {
      const float sum = sums[b] + neurons.bias[id];
      const bool silent = b >= batch || sum < 0 || (neurons.predicted && !neurons.predicted[b * neurons.num_neurons + id]);
      hidden[i * B + b] = silent ? 0.0f : Format::rounded(sum);
    }
  };
  // The rows that are wanted, and what each adds to whom, up to a multiple of kMixed with nothing.
  const int64_t most = (count + kMixed - 1) / kMixed * kMixed;
  auto* rows = scratch<const Element*, 2>(most);
  auto* factors = scratch<typename Format::Factor, 3>(most * B);
  int64_t num_rows = 0;
  const auto append = [&](const Element* place, const float* values) {
    for (int b = 0; b < B; ++b) factors[factor_at<Format, B>(num_rows, b)] = Format::narrowed(values[b]);
    rows[num_rows++] = place;
  };
  const auto select = [&](int64_t) {
    for (int64_t i = 0; i < count; ++i) {
      const float* values = hidden + i * B;
      if (std::any_of(values, values + B, [](float value) { return value != 0; })) append(row(neurons.down, i), values);
    }
    constexpr float kNothing[B] = {};
    while (num_rows % kMixed) append(rows[num_rows - 1], kNothing);
  };
  const int64_t share = width / (2 * pool.num_threads());
  const int64_t columns = std::clamp(share / kFewestColumns * kFewestColumns, kFewestColumns, kMostColumns<B>);
  const auto mix = [&](int64_t piece) {
    constexpr int64_t line = kLine<Format>;
    const int64_t from = piece * columns, to = std::min(width, from + columns);
    alignas(kLineBytes) float sums[B * kMostColumns<B>] = {};
    for (int64_t i = 0; i < num_rows; i += kMixed)
      mix_rows<Format, B>(rows + i, rows + std::min(i + kMixed, num_rows - kMixed), factors + i * B, from, to, sums);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t k = from; k < to; ++k)
        out[b * width + k] = accumulator[b * width + k] + sums[((k - from) / line * B + b) * line + (k - from) % line];
  };
  run(pool, {dot_all<Format, B>(count, width, operands<Format, B>(x, batch, width), up, activate),
             {1, select},
             {(width + columns - 1) / columns, mix}});
}

// `linear` for any number of vectors.
template <class Format>
void linear_many(ffi::ThreadPool& pool, const float* x, const typename Format::Element* weight, const float* bias, float* out, int64_t batch,
                 int64_t num_rows, int64_t width) {
  const auto row = [=](int64_t n) { return weight + n * width; };
  const auto use = [=](int64_t first, int64_t count, const float* sums, int64_t stride) {  // some of each vector's results at a time
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t n = 0; n < count; ++n) out[b * num_rows + first + n] = sums[n * stride + b] + (bias ? bias[first + n] : 0.0f);
  };
  float* packed = panels_for(batch, width);
  run(pool, {side_by_side<Format>(x, batch, width, packed), dot_many<Format>(num_rows, width, packed, batch, row, use)});
}

// `add_neurons` for any number of sequences: every row for all of them.
template <class Format>
void add_neurons_many(ffi::ThreadPool& pool, const Neurons<typename Format::Element>& neurons, const float* accumulator, const float* x,
                      float* out) {
  const int64_t width = neurons.width, batch = neurons.batch, count = neurons.count;
  float* hidden = scratch<float, 1>(batch * count);
  const auto row = [&](const auto* first, int64_t i) { return first + (neurons.slots ? neurons.slots[i] : i) * neurons.apart; };
  const auto up = [&](int64_t i) { return row(neurons.up, i); };
  const auto down = [&](int64_t i) { return row(neurons.down, i); };
  const auto activate = [&](int64_t first, int64_t number, const float* sums, int64_t stride) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t n = 0; n < number; ++n) {
        const int64_t i = first + n, id = neurons.ids ? std::clamp<int64_t>(neurons.ids[i], 0, neurons.num_neurons - 1) : i;
        const float sum = sums[n * stride + b] + neurons.bias[id];
        const bool silent = sum < 0 || (neurons.predicted && !neurons.predicted[b * neurons.num_neurons + id]);
        hidden[b * count + i] = silent ? 0.0f : Format::rounded(sum);
      }
  };
  float* packed = panels_for(batch, width);
  run(pool, {side_by_side<Format>(x, batch, width, packed),
             dot_many<Format>(count, width, packed, batch, up, activate),
             mix_many<Format>(count, width, hidden, batch, down, accumulator, out)});
}

// Which of the neurons any of the sequences may use: their slots and ids.
template <class Element>
int64_t select(const Neurons<Element>& neurons, int32_t* slots, int32_t* ids) {
  int64_t found = 0;
  bool* wanted = scratch<bool, 9>(neurons.num_neurons);
  std::copy(neurons.predicted, neurons.predicted + neurons.num_neurons, wanted);
  for (int64_t b = 1; b < neurons.batch; ++b)
    for (int64_t id = 0; id < neurons.num_neurons; ++id) wanted[id] |= neurons.predicted[b * neurons.num_neurons + id];
  for (int64_t i = 0; i < neurons.count; ++i) {
    const int64_t id = neurons.ids ? std::clamp<int64_t>(neurons.ids[i], 0, neurons.num_neurons - 1) : i;
    if (!wanted[id]) continue;
    slots[found] = neurons.slots ? neurons.slots[i] : i;
    ids[found++] = id;
  }
  return found;
}

// One head's cached positions: `table` says which blocks [P, head_dim] of the head's own they lie in.
struct Head {
  const float *query, *keys, *values;
  const int32_t* table;
  int64_t length, block_size, head_dim;
  float* out;

  // Where a position's row begins, counted from the head's first block.
  int64_t row(int64_t position) const {
    return (table[position / block_size] * block_size + position % block_size) * head_dim;
  }
};

// out = softmax(query . keys / sqrt(head_dim)) . values over all positions; zeros where there are none.
inline void attend(const Head& head) {
  constexpr int R = kMixed;
  constexpr int64_t kAhead = 4 * R;  // positions
  const int64_t length = head.length, width = head.head_dim, most = (length + R - 1) / R * R;
  float* x = scratch<float, 4>(num_operands<Float32, 1>(width));
  std::fill(x, x + num_operands<Float32, 1>(width), 0.0f);
  for (int64_t k = 0; k < width; ++k) x[k] = head.query[k] / std::sqrt(static_cast<float>(width));
  float* shares = scratch<float, 5>(most);
  const auto find = [&](const float* matrix, int64_t from, const float** rows) {
    if (from + R <= length && head.block_size % R == 0) {  // all in one block
      const float* first = matrix + head.row(from);
      for (int r = 0; r < R; ++r) rows[r] = first + r * width;
    } else {
      for (int r = 0; r < R; ++r) rows[r] = matrix + head.row(std::min(from + r, length - 1));
    }
  };
  const auto walk = [&](const float* matrix, const auto& add) {
    for (int64_t i = 0; i < length; i += R) {
      const float* rows[R];
      Ahead<float, R> ahead{};
      find(matrix, i, rows);
      find(matrix, i + kAhead, ahead.next);
      std::copy(ahead.next, ahead.next + R, ahead.after);
      add(i, rows, ahead);
    }
  };
  walk(head.keys,
       [=](int64_t i, const auto& rows, const auto& ahead) { dot_rows<Float32, 1, R>(rows, ahead, width, x, (float(*)[1])(shares + i)); });
  const float largest = *std::max_element(shares, shares + std::max<int64_t>(1, length));
  float total = 0;
  for (int64_t i = 0; i < length; ++i) total += shares[i] = std::exp(shares[i] - largest);
  std::fill(shares + length, shares + most, 0.0f);
  float* out = head.out;
  std::fill(out, out + width, 0.0f);
  walk(head.values,
       [=](int64_t i, const auto& rows, const auto& ahead) { mix_rows<Float32, 1>(rows, ahead.next, shares + i, 0, width, out); });
  for (int64_t k = 0; k < width && length; ++k) out[k] /= total;
}

constexpr int64_t kFew = 8;  // sequences whose sums stay in registers while rows are walked

// Calls body with the format of the weights and, as a constant, the batch, so that loops are unrolled; three sequences cost what four do.
// More than eight are 0.
template <class Body>
ffi::Error dispatch(ffi::DataType dtype, int64_t batch, const Body& body) {
  const auto with = [&](auto format) {
    if (batch > kFew) return body(format, std::integral_constant<int, 0>());
    if (batch == 1) return body(format, std::integral_constant<int, 1>());
    if (batch == 2) return body(format, std::integral_constant<int, 2>());
    if (batch <= 4) return body(format, std::integral_constant<int, 4>());
    body(format, std::integral_constant<int, 8>());
  };
  if (batch < 1 || (dtype != ffi::BF16 && dtype != ffi::F32))
    return ffi::Error::InvalidArgument("inflash: native kernels serve weights in bfloat16 or float32");
  dtype == ffi::BF16 ? with(BFloat16()) : with(Float32());
  return ffi::Error::Success();
}

using Floats32 = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

ffi::Error linear_call(ffi::ThreadPool pool, Floats32 x, ffi::AnyBuffer weight, Floats32 bias, ffi::Result<Floats32> out) {
  const int64_t batch = x.dimensions()[0], num_rows = weight.dimensions()[0], width = weight.dimensions()[1];
  return dispatch(weight.element_type(), batch, [&](auto format, auto size) {
    using Format = decltype(format);
    const auto* rows = static_cast<const typename Format::Element*>(weight.untyped_data());
    const float* added = bias.element_count() ? bias.typed_data() : nullptr;
    if constexpr (size == 0)
      linear_many<Format>(pool, x.typed_data(), rows, added, out->typed_data(), batch, num_rows, width);
    else
      linear<Format, size>(pool, x.typed_data(), rows, added, out->typed_data(), batch, num_rows, width);
  });
}

ffi::Error predict_call(ffi::ThreadPool pool, Floats32 x, ffi::RemainingArgs weights, ffi::RemainingRets named,
                        ffi::Span<const int32_t> relu) {
  constexpr size_t kParts = 4;
  const int64_t batch = x.dimensions()[0], width = x.dimensions()[1];
  const auto matrix = [&](size_t i) { return *weights.get<ffi::AnyBuffer>(i); };
  const auto vector = [&](size_t i) { return weights.get<Floats32>(i)->typed_data(); };
  if (batch > kFew) return ffi::Error::InvalidArgument("inflash: the native predictor serves up to 8 sequences");
  return dispatch(matrix(0).element_type(), batch, [&](auto format, auto size) {
    using Format = decltype(format);
    using Element = typename Format::Element;
    std::vector<Predictor<Element>> predictors;
    for (size_t i = 0; i < relu.size(); ++i) {
      const auto first = matrix(kParts * i), second = matrix(kParts * i + 1);
      predictors.push_back({static_cast<const Element*>(first.untyped_data()), static_cast<const Element*>(second.untyped_data()),
                            vector(kParts * i + 2), *vector(kParts * i + 3), relu[i] != 0, second.dimensions()[1],
                            second.dimensions()[0], (*named.get<ffi::Buffer<ffi::PRED>>(i))->typed_data()});
    }
    if constexpr (size > 0) predict<Format, size>(pool, x.typed_data(), batch, width, predictors);
  });
}

ffi::Error attend_call(ffi::ThreadPool pool, Floats32 query, Floats32 keys, Floats32 values, Integers tables, Integers lengths,
                       ffi::Result<Floats32> out) {
  const int64_t heads = keys.dimensions()[0], num_blocks = keys.dimensions()[1], block_size = keys.dimensions()[2];
  const int64_t width = keys.dimensions()[3], batch = tables.dimensions()[0], table_length = tables.dimensions()[1];
  // A sequence's positions end where its table names no block.
  auto* real = scratch<int64_t, 6>(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* table = tables.typed_data() + b * table_length;
    const int64_t blocks = std::find_if(table, table + table_length, [=](int32_t n) { return n < 0 || n >= num_blocks; }) - table;
    real[b] = std::clamp<int64_t>(lengths.typed_data()[b], 0, blocks * block_size);
  }
  run(pool, {{batch * heads, [&](int64_t i) {
    const int64_t b = i / heads, from = i % heads * num_blocks * block_size * width;
    attend({query.typed_data() + i * width, keys.typed_data() + from, values.typed_data() + from,
            tables.typed_data() + b * table_length, real[b], block_size, width, out->typed_data() + i * width});
  }}});
  return ffi::Error::Success();
}

// All of the neurons for all sequences; or, where sequences name theirs, for a few sequences at a time only what those name. Many products of
// all are faster than so many of few, so that pays when a few name much less than all do together.
template <class Format, int B>
void add(ffi::ThreadPool& pool, const Neurons<typename Format::Element>& neurons, const float* accumulator, const float* x, float* out,
         std::integral_constant<int, B>) {
  constexpr double kPays = 0.5;
  if (!neurons.predicted) {
    if constexpr (B == 0)
      add_neurons_many<Format>(pool, neurons, accumulator, x, out);
    else
      add_neurons<Format, B>(pool, neurons, accumulator, x, out);
    return;
  }
  const int64_t groups = (neurons.batch + kFew - 1) / kFew;
  std::vector<int32_t> slots(groups * neurons.count), ids(groups * neurons.count);
  std::vector<Neurons<typename Format::Element>> parts;
  int64_t named = 0;
  for (int64_t group = 0; group < groups; ++group) {
    auto part = neurons;
    part.batch = std::min(kFew, neurons.batch - group * kFew);
    part.predicted += group * kFew * neurons.num_neurons;
    int32_t *own_slots = slots.data() + group * neurons.count, *own_ids = ids.data() + group * neurons.count;
    part.count = select(part, own_slots, own_ids);
    part.slots = own_slots, part.ids = own_ids;
    named += part.count;
    parts.push_back(part);
  }
  if (B == 0 && named > kPays * groups * neurons.count) return add_neurons_many<Format>(pool, neurons, accumulator, x, out);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t at = group * kFew * neurons.width;
    if constexpr (B == 0)
      add_neurons<Format, kFew>(pool, parts[group], accumulator + at, x + at, out + at);
    else
      add_neurons<Format, B>(pool, parts[group], accumulator + at, x + at, out + at);
  }
}

ffi::Error ffn_call(ffi::ThreadPool pool, Floats32 accumulator, Floats32 x, ffi::AnyBuffer up, ffi::AnyBuffer down, Floats32 bias,
                    ffi::Buffer<ffi::PRED> predicted, Integers slots, Integers ids, Integers count, ffi::Result<Floats32> out) {
  const bool bundled = up.dimensions().size() == 3;  // then each neuron's down row lies behind its up row
  const int64_t batch = x.dimensions()[0], num_slots = up.dimensions()[0], width = x.dimensions()[1];
  const bool gathered = slots.element_count() > 0;
  const int64_t real = std::clamp<int64_t>(count.typed_data()[0], 0, gathered ? slots.element_count() : num_slots);
  for (int64_t i = 0; gathered && i < real; ++i)
    if (slots.typed_data()[i] < 0 || slots.typed_data()[i] >= num_slots)
      return ffi::Error::InvalidArgument("inflash: a slot of gathered_ffn lies outside of the slots");
  return dispatch(up.element_type(), batch, [&](auto format, auto size) {
    using Format = decltype(format);
    using Element = typename Format::Element;
    const auto* first = static_cast<const Element*>(up.untyped_data());
    const Neurons<Element> neurons{
        first, bundled ? first + width : static_cast<const Element*>(down.untyped_data()),
        bundled ? up.dimensions()[1] * width : width, bias.typed_data(),
        predicted.element_count() ? predicted.typed_data() : nullptr, gathered ? slots.typed_data() : nullptr,
        gathered ? ids.typed_data() : nullptr, real, static_cast<int64_t>(bias.element_count()), width, batch};
    add<Format>(pool, neurons, accumulator.typed_data(), x.typed_data(), out->typed_data(), size);
  });
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED XLA_FFI_Error *inflash_linear(XLA_FFI_CallFrame*), *inflash_predict(XLA_FFI_CallFrame*), *inflash_attend(XLA_FFI_CallFrame*),
    *inflash_ffn(XLA_FFI_CallFrame*);

// The arguments are those of the functions above, in the shapes that kernels/native.py gives them; an empty array stands for none.
XLA_FFI_DEFINE_HANDLER_SYMBOL(inflash_linear, linear_call,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats32>().Arg<ffi::AnyBuffer>()
                                  .Arg<Floats32>().Ret<Floats32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(inflash_predict, predict_call,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats32>().RemainingArgs().RemainingRets()
                                  .Attr<ffi::Span<const int32_t>>("relu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(inflash_attend, attend_call,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats32>().Arg<Floats32>().Arg<Floats32>()
                                  .Arg<Integers>().Arg<Integers>().Ret<Floats32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(inflash_ffn, ffn_call,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats32>().Arg<Floats32>().Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>().Arg<Floats32>().Arg<ffi::Buffer<ffi::PRED>>().Arg<Integers>().Arg<Integers>()
                                  .Arg<Integers>().Ret<Floats32>());

}  // namespace inflash

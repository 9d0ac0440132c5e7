// A decoder layer, the output head and the embedding, for one kind of processor; included once for each.
//
// A layer has three ways to share its work, all with the same arithmetic:
//
//   many rows, one position each   every thread takes its rows through the whole layer and waits for nobody;
//   many rows, several positions   the same, but attention waits for all keys, and the rest for all of attention;
//   else                           the outputs of each product are shared. Of few rows every thread prepares the
//                                  activations for itself, which is faster than to wait for another's.

#if defined(KERNELS_LAYER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_LAYER_INL_H_
#undef KERNELS_LAYER_INL_H_
#else
#define KERNELS_LAYER_INL_H_
#endif

#include <algorithm>

#include "attention-inl.h"
#include "calls.h"
#include "hwy/highway.h"
#include "products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kernels {
namespace HWY_NAMESPACE {

// From so many rows for each thread on, rows are shared and not outputs.
constexpr size_t kRowsOfThread = 4;

// Pieces of `items` for so many threads, small enough that nobody is left alone with much of the work.
inline size_t Piece(size_t items, size_t threads) { return std::max<size_t>(1, items / (8 * threads)); }
// The results [count, 32] of a tile, as they are.
inline auto Into(float* out, size_t width) {
  return [=](size_t row, size_t count, size_t tile, const float* results) HWY_ATTR {
    const Floats df;
    for (size_t r = 0; r < count; ++r) {
      float* to = out + (row + r) * width + tile * kBlock;
      for (size_t v = 0; v < kVectors; ++v)
        hn::StoreU(hn::LoadU(df, results + r * kBlock + v * kLanes), df, to + v * kLanes);
    }
  };
}

// The same plus `base` [rows, width].
inline auto AddInto(float* out, const float* base, size_t width) {
  return [=](size_t row, size_t count, size_t tile, const float* results) HWY_ATTR {
    const Floats df;
    for (size_t r = 0; r < count; ++r) {
      const size_t at = (row + r) * width + tile * kBlock;
      for (size_t v = 0; v < kVectors; ++v) {
        const Vector sum =
            hn::Add(hn::LoadU(df, results + r * kBlock + v * kLanes), hn::LoadU(df, base + at + v * kLanes));
        hn::StoreU(sum, df, out + at + v * kLanes);
      }
    }
  };
}

// SwiGLU of a tile of 16 gates and their 16 ups.
inline auto GateInto(float* out, size_t width) {
  return [=](size_t row, size_t count, size_t tile, const float* results) HWY_ATTR {
    const Floats df;
    constexpr size_t kHalf = kBlock / 2;
    for (size_t r = 0; r < count; ++r) {
      const float* from = results + r * kBlock;
      float* to = out + (row + r) * width + tile * kHalf;
      for (size_t i = 0; i < kHalf; i += kLanes) {
        hn::StoreU(SiluTimes(hn::LoadU(df, from + i), hn::LoadU(df, from + kHalf + i)), df, to + i);
      }
    }
  };
}

template <class T>
class Layer {
 public:
  Layer(LayerCall& call, size_t thread)
      : call_(call),
        thread_(thread),
        workspace_(call.workspace + thread * call.workspace_size),
        qkv_width_(call.qkv.outputs),
        heads_width_(call.heads * call.cache.head_dim) {}

  void Run() {
    const size_t positions = call_.positions();
    if (positions > kFewRows && positions >= kRowsOfThread * call_.threads) {
      const size_t share = Share(positions, call_.threads);
      if (call_.width == 1) {
        call_.phases[0].Run(
            positions, share,
            [&](size_t first, size_t last) {
              Project(first, last);
              for (size_t row = first; row < last; ++row) AttendRow(row);
              FinishRows(first, last);
            },
            true);
        return;
      }
      call_.phases[0].Run(positions, share, [&](size_t first, size_t last) { Project(first, last); });
      AttendAll(call_.phases[1]);
      call_.phases[2].Run(positions, share, [&](size_t first, size_t last) { FinishRows(first, last); }, true);
      return;
    }
    ShareOutputs(positions);
  }

 private:
  // Where the activations of a thread's rows begin, of which `first` is the first.
  size_t Place(size_t first) const {
    const size_t share = Share(call_.positions(), call_.threads);
    return first / share * Grouped(share);
  }

  // Rows `first`..`last`, from the layer's input to their queries, keys and values.
  void Project(size_t first, size_t last) {
    const Activations normed = call_.normed.from(Place(first));
    for (size_t m = first; m < last; ++m) {
      NormRow(call_.input + m * call_.hidden, call_.attention_norm, call_.epsilon, normed, m - first);
    }
    Multiply(call_.qkv, 0, call_.qkv.count(), normed, last - first,
             Into(call_.projected + first * qkv_width_, qkv_width_));
    for (size_t m = first; m < last; ++m) Keep(m);
  }

  void Keep(size_t m) {
    const size_t row = m / call_.width, step = m % call_.width;
    if (step < call_.valid(row)) KeepPosition<T>(call_, row, step);
  }

  void AttendRow(size_t row) {
    if (call_.valid(row) == 0) return Blank(row, 0, 1);
    for (size_t head = 0; head < call_.cache.kv_heads; ++head) AttendSpan<T>(call_, row, head, 0, 1, workspace_);
  }

  // What positions without a token have in place of attention.
  void Blank(size_t row, size_t first, size_t last) {
    float* out = call_.attended + row * call_.width * heads_width_;
    std::fill(out + first * heads_width_, out + last * heads_width_, 0.0f);
  }

  void AttendAll(Phase& phase) {
    const size_t kv_heads = call_.cache.kv_heads, spans = (call_.width + kSpan - 1) / kSpan;
    // The last spans have most positions before them: they come first.
    phase.Run(spans * call_.rows * kv_heads, 1, [&](size_t item, size_t) {
      const size_t span = spans - 1 - item / (call_.rows * kv_heads), rest = item % (call_.rows * kv_heads);
      const size_t row = rest / kv_heads, head = rest % kv_heads, step = span * kSpan;
      const size_t end = std::min(call_.width, step + kSpan), valid = std::min(end, call_.valid(row));
      if (step < valid) AttendSpan<T>(call_, row, head, step, valid - step, workspace_);
      if (head == 0 && valid < end) Blank(row, std::max(step, valid), end);
    });
  }

  // Rows `first`..`last`, from attention to the layer's output.
  void FinishRows(size_t first, size_t last) {
    const size_t rows = last - first, hidden = call_.hidden, place = Place(first);
    const Activations normed = call_.normed.from(place), mixed = call_.mixed.from(place),
                      gated = call_.gated.from(place);
    for (size_t m = first; m < last; ++m) WriteRow(call_.attended + m * heads_width_, mixed, m - first);
    float* residual = call_.residual + first * hidden;
    Multiply(call_.attention_output, 0, call_.attention_output.count(), mixed, rows,
             AddInto(residual, call_.input + first * hidden, hidden));
    for (size_t m = first; m < last; ++m) {
      NormRow(call_.residual + m * hidden, call_.mlp_norm, call_.epsilon, normed, m - first);
    }
    Multiply(call_.gate_up, 0, call_.gate_up.count(), normed, rows,
             GateInto(call_.activated + first * call_.mlp, call_.mlp));
    for (size_t m = first; m < last; ++m) WriteRow(call_.activated + m * call_.mlp, gated, m - first);
    Multiply(call_.down, 0, call_.down.count(), gated, rows, AddInto(call_.output + first * hidden, residual, hidden));
  }

  void ShareOutputs(size_t positions) {
    const bool few = positions <= kFewRows;
    Phase* phase = call_.phases;
    const size_t own = few ? thread_ * Grouped(positions) : 0;
    const Activations normed = call_.normed.from(own), mixed = call_.mixed.from(own), gated = call_.gated.from(own);
    const auto prepare = [&](const auto& work) {
      if (few) {
        for (size_t m = 0; m < positions; ++m) work(m);
      } else {
        (phase++)->Run(positions, 1, [&](size_t m, size_t) { work(m); });
      }
    };
    const auto multiply = [&](const Tiles& matrix, const Activations& x, const auto& finish, bool last = false) {
      const size_t piece = few ? Share(matrix.count(), call_.threads) : Piece(matrix.count(), call_.threads);
      (phase++)->Run(
          matrix.count(), piece, [&](size_t from, size_t to) { Multiply(matrix, from, to, x, positions, finish); },
          last);
    };
    const size_t hidden = call_.hidden;
    prepare([&](size_t m) { NormRow(call_.input + m * hidden, call_.attention_norm, call_.epsilon, normed, m); });
    multiply(call_.qkv, normed, Into(call_.projected, qkv_width_));
    (phase++)->Run(positions, 1, [&](size_t m, size_t) { Keep(m); });
    if (few) {
      AttendChunks(*phase++);
    } else {
      AttendAll(*phase++);
    }
    prepare([&](size_t m) {
      if (few) {
        MergeChunks(m, mixed);
      } else {
        WriteRow(call_.attended + m * heads_width_, mixed, m);
      }
    });
    multiply(call_.attention_output, mixed, AddInto(call_.residual, call_.input, hidden));
    prepare([&](size_t m) { NormRow(call_.residual + m * hidden, call_.mlp_norm, call_.epsilon, normed, m); });
    multiply(call_.gate_up, normed, GateInto(call_.activated, call_.mlp));
    prepare([&](size_t m) { WriteRow(call_.activated + m * call_.mlp, gated, m); });
    multiply(call_.down, gated, AddInto(call_.output, call_.residual, hidden), true);
  }

  // The place of a chunk's states, for one position and KV head.
  float* Part(size_t m, size_t head, size_t chunk) const {
    const size_t size = call_.group() * StateSize(call_.cache.head_dim);
    return call_.parts + ((m * call_.cache.kv_heads + head) * call_.chunks + chunk) * size;
  }

  // Each position, KV head and chunk by itself.
  void AttendChunks(Phase& phase) {
    const size_t kv_heads = call_.cache.kv_heads;
    phase.Run(call_.positions() * kv_heads * call_.chunks, 1, [&](size_t item, size_t) {
      const size_t chunk = item % call_.chunks, head = item / call_.chunks % kv_heads;
      const size_t m = item / call_.chunks / kv_heads, row = m / call_.width, step = m % call_.width;
      if (step >= call_.valid(row) || chunk * kChunk > call_.past(row) + step) return;
      RotateQueries(call_, row, head, step, 1, workspace_);
      AttendPositions<T>(call_, row, head, call_.past(row) + step, 1, chunk, workspace_, Part(m, head, chunk));
    });
  }

  void MergeChunks(size_t m, const Activations& mixed) {
    const size_t row = m / call_.width, step = m % call_.width, head_dim = call_.cache.head_dim;
    const size_t group = call_.group(), size = StateSize(head_dim);
    // Each thread merges for itself, into memory of its own.
    float* state = workspace_;
    float* out = state + size;
    const bool idle = step >= call_.valid(row);
    const size_t chunks = idle ? 0 : (call_.past(row) + step) / kChunk + 1;
    for (size_t head = 0; head < call_.cache.kv_heads; ++head) {
      for (size_t g = 0; g < group; ++g) {
        float* to = out + (head * group + g) * head_dim;
        if (idle) {
          std::fill(to, to + head_dim, 0.0f);
          continue;
        }
        std::copy_n(Part(m, head, 0) + g * size, size, state);
        for (size_t chunk = 1; chunk < chunks; ++chunk) Merge(Part(m, head, chunk) + g * size, head_dim, state);
        Finish(state, head_dim, to);
      }
    }
    WriteRow(out, mixed, m);
  }

  LayerCall& call_;
  const size_t thread_;
  float* const workspace_;
  const size_t qkv_width_;
  const size_t heads_width_;
};

void RunLayer(LayerCall& call, size_t thread) {
  if (call.cache.half) {
    Layer<hwy::float16_t>(call, thread).Run();
  } else {
    Layer<float>(call, thread).Run();
  }
}

void RunHead(HeadCall& call, size_t thread) {
  (void)thread;
  call.phases[0].Run(call.rows, 1, [&](size_t m, size_t) {
    const float* from = call.input + static_cast<size_t>(call.positions[m]) * call.hidden;
    NormRow(from, call.norm, call.epsilon, call.normed, m);
  });
  call.phases[1].Run(
      call.table.count(), Piece(call.table.count(), call.threads),
      [&](size_t first, size_t last) {
        Multiply(call.table, first, last, call.normed, call.rows, Into(call.logits, call.table.outputs));
      },
      true);
}

void LookUp(const Tiles& table, size_t row, float* output) {
  const uint8_t* strip = table.strip(row / kBlock);
  for (size_t i = 0; i < table.inputs; ++i) {
    output[i] = Weight(strip + i / kBlock * TileBytes(table.type), table.type, row % kBlock, i % kBlock);
  }
}

size_t WorkspaceOf(const LayerCall& call) {
  const size_t head_dim = call.cache.head_dim;
  return std::max(Workspace(call), StateSize(head_dim) + call.heads * head_dim);
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace kernels
HWY_AFTER_NAMESPACE();

#endif

// The operators, as onnxruntime sees them: what they are called, what they take, and the checks of it.
#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "calls.h"
#include "onnxruntime.h"
#include "scratch.h"

namespace kernels {
namespace {

constexpr const char* kDomain = "completion.kernels";
constexpr const char* kThreadsEntry = "completion.kernels.threads";
constexpr const char* kFloatEntry = "completion.kernels.float";
constexpr size_t kMostThreads = 1024;

const Target* const target = ChooseTarget();

// What the operators of one onnxruntime session share. A session runs one call at a time.
struct Session {
  size_t threads = 1;
  bool in_float = false;
  std::mutex running;
  Scratch scratch;
};

Tiles TilesOf(const Node& node, size_t index, const char* name) {
  const OrtValue* value = node.constant(index, name);
  const Shape shape = ShapeOf(value);
  Require(shape.size() == 3 && shape[0] > 0 && shape[1] > 0,
          std::string(name) + " must be tiles [outputs / 32, inputs / 32, bytes], and is " + Text(shape));
  Tiles tiles;
  tiles.data = Data<const uint8_t>(value);
  tiles.outputs = static_cast<size_t>(shape[0]) * kBlock;
  tiles.inputs = static_cast<size_t>(shape[1]) * kBlock;
  for (const BlockType type : {BlockType::kQ4_0, BlockType::kQ4_1, BlockType::kQ8_0}) {
    if (static_cast<size_t>(shape[2]) == TileBytes(type)) {
      tiles.type = type;
      return tiles;
    }
  }
  throw Refusal(std::string(name) + " has tiles of " + std::to_string(shape[2]) +
                " bytes: Q4_0 has 576, Q4_1 640, Q8_0 1088");
}

void RequireSizes(const Tiles& tiles, const char* name, size_t outputs, size_t inputs) {
  Require(tiles.outputs == outputs && tiles.inputs == inputs,
          std::string(name) + " must have " + std::to_string(outputs) + " outputs of " + std::to_string(inputs) +
              " inputs, and has " + std::to_string(tiles.outputs) + " of " + std::to_string(tiles.inputs));
}

size_t NeedOf(size_t rows, size_t inputs, bool in_float) {
  return Scratch::Need<int8_t>(rows * inputs) + Scratch::Need<float>(rows * inputs / kBlock * 2) +
         (in_float ? Scratch::Need<float>(rows * inputs) : 0);
}

// Of whole groups of rows.
Activations TakeActivations(Scratch& scratch, size_t rows, size_t inputs, bool in_float) {
  Activations taken;
  taken.inputs = inputs;
  taken.in_float = in_float;
  taken.codes = scratch.Take<int8_t>(rows * inputs);
  taken.scales = scratch.Take<float>(rows * inputs / kBlock * 2);
  // Not read in integer arithmetic, but pointers are moved by rows.
  taken.plain = in_float ? scratch.Take<float>(rows * inputs) : taken.scales;
  return taken;
}

// The rows of a table at the indices of tokens.
class EmbeddingLookup {
 public:
  static constexpr const char* kName = "EmbeddingLookup";
  static constexpr std::array kInputs = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64};
  static constexpr std::array kOutputs = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT};

  EmbeddingLookup(const Node& node, Session&) : table_(TilesOf(node, 0, "table")) {}

  void Compute(const Context& context) {
    const OrtValue* ids = context.input(1);
    Shape shape = ShapeOf(ids);
    size_t count = 1;
    for (const int64_t size : shape) count *= static_cast<size_t>(size);
    shape.push_back(static_cast<int64_t>(table_.inputs));
    float* rows = Data<float>(context.output(0, shape));
    const int64_t* id = Data<const int64_t>(ids);
    for (size_t i = 0; i < count; ++i) {
      Require(id[i] >= 0 && static_cast<size_t>(id[i]) < table_.outputs,
              "token " + std::to_string(id[i]) + " is not within 0.." + std::to_string(table_.outputs - 1));
      target->look_up(table_, static_cast<size_t>(id[i]), rows + i * table_.inputs);
    }
  }

 private:
  Tiles table_;
};

// The logits of some positions: RMS norm, then the product with the table.
class Head {
 public:
  static constexpr const char* kName = "Head";
  static constexpr std::array kInputs = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64};
  static constexpr std::array kOutputs = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT};

  Head(const Node& node, Session& session)
      : session_(session),
        epsilon_(node.number("epsilon")),
        table_(TilesOf(node, 2, "table")),
        norm_(node.vector(1, "norm", table_.inputs)) {}

  void Compute(const Context& context) {
    const OrtValue* hidden = context.input(0);
    const OrtValue* wanted = context.input(3);
    const Shape shape = ShapeOf(hidden), rows = ShapeOf(wanted);
    Require(shape.size() == 3 && static_cast<size_t>(shape[2]) == table_.inputs && rows.size() == 1,
            "hidden must be [B, S, " + std::to_string(table_.inputs) + "], and is " + Text(shape));
    const std::lock_guard guard(session_.running);
    HeadCall call;
    call.rows = static_cast<size_t>(rows[0]);
    call.hidden = table_.inputs;
    call.epsilon = epsilon_;
    call.threads = session_.threads;
    call.input = Data<const float>(hidden);
    call.positions = Data<const int64_t>(wanted);
    call.norm = norm_;
    call.table = table_;
    call.logits = Data<float>(context.output(0, {rows[0], static_cast<int64_t>(table_.outputs)}));
    for (size_t row = 0; row < call.rows; ++row) {
      Require(call.positions[row] >= 0 && call.positions[row] < shape[0] * shape[1],
              "logits of position " + std::to_string(call.positions[row]) + " of " +
                  std::to_string(shape[0] * shape[1]) + " are wanted");
    }
    if (call.rows == 0) return;
    session_.scratch.Reserve(NeedOf(Grouped(call.rows), call.hidden, session_.in_float));
    call.normed = TakeActivations(session_.scratch, Grouped(call.rows), call.hidden, session_.in_float);
    const auto work = [&](size_t thread) { target->head(call, thread); };
    context.InThreads(session_.threads, work);
  }

 private:
  Session& session_;
  float epsilon_;
  Tiles table_;
  const float* norm_;
};

// A whole decoder layer; its inputs are named in `Input`.
template <bool kHalf>
class DecoderLayer {
 public:
  static constexpr ONNXTensorElementDataType kCacheType =
      kHalf ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  static constexpr const char* kName = kHalf ? "DecoderLayerHalf" : "DecoderLayer";
  enum Input {
    kHidden,
    kAttentionNorm,
    kQkv,
    kPastKey,
    kPastValue,
    kSeqlensK,
    kQuerySeqlens,
    kCos,
    kSin,
    kOutputWeights,
    kMlpNorm,
    kGateUp,
    kDown,
  };
  static constexpr std::array kInputs = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
                                         kCacheType,
                                         kCacheType,
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8};
  static constexpr std::array kOutputs = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kCacheType, kCacheType};

  DecoderLayer(const Node& node, Session& session)
      : session_(session),
        epsilon_(node.number("epsilon")),
        scale_(node.number("scale")),
        kv_heads_(node.size("kv_heads")),
        head_dim_(node.size("head_dim")),
        qkv_(TilesOf(node, kQkv, "qkv")),
        output_(TilesOf(node, kOutputWeights, "output")),
        gate_up_(TilesOf(node, kGateUp, "gate_up")),
        down_(TilesOf(node, kDown, "down")),
        hidden_(qkv_.inputs),
        attention_norm_(node.vector(kAttentionNorm, "attention_norm", hidden_)),
        mlp_norm_(node.vector(kMlpNorm, "mlp_norm", hidden_)) {
    Require(head_dim_ % 32 == 0 && head_dim_ <= kMostHeadDim,
            "head_dim must be a multiple of 32 up to 256, and is " + std::to_string(head_dim_));
    Require(qkv_.outputs % head_dim_ == 0 && qkv_.outputs / head_dim_ > 2 * kv_heads_,
            "qkv has " + std::to_string(qkv_.outputs) + " outputs, which are no heads of " + std::to_string(head_dim_) +
                " beside " + std::to_string(kv_heads_) + " of keys and of values");
    heads_ = qkv_.outputs / head_dim_ - 2 * kv_heads_;
    Require(heads_ % kv_heads_ == 0, std::to_string(heads_) + " heads are no multiple of " + std::to_string(kv_heads_));
    RequireSizes(output_, "output", hidden_, heads_ * head_dim_);
    RequireSizes(gate_up_, "gate_up", gate_up_.outputs, hidden_);
    RequireSizes(down_, "down", hidden_, gate_up_.outputs / 2);
    for (const auto& [index, name] : {std::pair(kCos, "cos"), std::pair(kSin, "sin")}) {
      const OrtValue* value = node.constant(index, name);
      const Shape shape = ShapeOf(value);
      Require(shape.size() == 2 && static_cast<size_t>(shape[1]) == head_dim_ / 2,
              std::string(name) + " must be [positions, " + std::to_string(head_dim_ / 2) + "], and is " + Text(shape));
      (index == kCos ? cos_ : sin_) = Data<const float>(value);
      positions_ = index == kCos ? static_cast<size_t>(shape[0]) : std::min(positions_, static_cast<size_t>(shape[0]));
    }
  }

  void Compute(const Context& context) {
    const std::lock_guard guard(session_.running);
    LayerCall call;
    const Shape shape = ShapeOf(context.input(kHidden));
    Require(shape.size() == 3 && static_cast<size_t>(shape[2]) == hidden_,
            "hidden must be [B, S, " + std::to_string(hidden_) + "], and is " + Text(shape));
    call.rows = static_cast<size_t>(shape[0]);
    call.width = static_cast<size_t>(shape[1]);
    call.hidden = hidden_;
    call.heads = heads_;
    call.mlp = down_.inputs;
    call.epsilon = epsilon_;
    call.scale = scale_;
    call.threads = session_.threads;
    call.input = Data<const float>(context.input(kHidden));
    call.output = Data<float>(context.output(0, shape));
    call.attention_norm = attention_norm_;
    call.mlp_norm = mlp_norm_;
    call.qkv = qkv_;
    call.attention_output = output_;
    call.gate_up = gate_up_;
    call.down = down_;
    call.cos = cos_;
    call.sin = sin_;
    TakeCache(context, call);
    TakeLengths(context, call);
    if (call.positions() == 0) return;
    TakeScratch(call);
    const auto work = [&](size_t thread) { target->layer(call, thread); };
    context.InThreads(session_.threads, work);
  }

 private:
  void TakeCache(const Context& context, LayerCall& call) const {
    const OrtValue* past[] = {context.input(kPastKey), context.input(kPastValue)};
    void* places[2];
    for (size_t i = 0; i < 2; ++i) {
      const Shape shape = ShapeOf(past[i]);
      Require(shape.size() == 4 && static_cast<size_t>(shape[0]) == call.rows &&
                  static_cast<size_t>(shape[1]) == kv_heads_ && shape[2] % static_cast<int64_t>(kTile) == 0 &&
                  static_cast<size_t>(shape[3]) == head_dim_,
              "the KV cache must be [" + std::to_string(call.rows) + ", " + std::to_string(kv_heads_) +
                  ", a multiple of 16, " + std::to_string(head_dim_) + "], and is " + Text(shape));
      places[i] = Data<void>(past[i]);
      Require(Data<void>(context.output(1 + i, shape)) == places[i],
              "past and present must be bound to the same memory");
      call.cache.max_length = static_cast<size_t>(shape[2]);
    }
    call.cache.keys = places[0];
    call.cache.values = places[1];
    call.cache.half = kHalf;
    call.cache.kv_heads = kv_heads_;
    call.cache.head_dim = head_dim_;
  }

  void TakeLengths(const Context& context, LayerCall& call) const {
    const OrtValue* seqlens_k = context.input(kSeqlensK);
    const OrtValue* query_seqlens = context.input(kQuerySeqlens);
    const Shape wanted = {static_cast<int64_t>(call.rows)};
    Require(ShapeOf(seqlens_k) == wanted && ShapeOf(query_seqlens) == wanted,
            "seqlens_k and query_seqlens must be " + Text(wanted));
    call.seqlens_k = Data<const int32_t>(seqlens_k);
    call.query_seqlens = Data<const int32_t>(query_seqlens);
    const size_t most = std::min(call.cache.max_length, positions_);
    for (size_t row = 0; row < call.rows; ++row) {
      const int64_t valid = call.query_seqlens[row], last = call.seqlens_k[row];
      if (valid == 0) continue;
      Require(valid > 0 && static_cast<size_t>(valid) <= call.width && last + 1 >= valid &&
                  static_cast<size_t>(last) < most,
              "row " + std::to_string(row) + " has " + std::to_string(valid) + " of " + std::to_string(call.width) +
                  " tokens up to position " + std::to_string(last) + ", and there are " + std::to_string(most));
      call.chunks = std::max(call.chunks, static_cast<size_t>(last) / kChunk + 1);
    }
  }

  void TakeScratch(LayerCall& call) const {
    const size_t positions = call.positions(), own = session_.threads, mixed = heads_ * head_dim_;
    const bool few = positions <= kFewRows, in_float = session_.in_float;
    call.workspace_size = target->workspace(call);
    const size_t parts = few ? positions * call.heads * call.chunks * (head_dim_ + kTile) : 0;
    const size_t sizes[] = {positions * qkv_.outputs, positions * hidden_,       positions * call.mlp,
                            positions * mixed,        own * call.workspace_size, parts};
    size_t need = 0;
    for (const size_t size : sizes) need += Scratch::Need<float>(size);
    // Of few rows each thread has all, else its share.
    const size_t rows = own * Grouped(few ? positions : Share(positions, own));
    for (const size_t inputs : {hidden_, mixed, call.mlp}) need += NeedOf(rows, inputs, in_float);
    Scratch& scratch = session_.scratch;
    scratch.Reserve(need);
    call.projected = scratch.Take<float>(sizes[0]);
    call.residual = scratch.Take<float>(sizes[1]);
    call.activated = scratch.Take<float>(sizes[2]);
    call.attended = scratch.Take<float>(sizes[3]);
    call.workspace = scratch.Take<float>(sizes[4]);
    call.parts = scratch.Take<float>(sizes[5]);
    for (const auto& [field, inputs] : {std::pair(&LayerCall::normed, hidden_), std::pair(&LayerCall::mixed, mixed),
                                        std::pair(&LayerCall::gated, call.mlp)}) {
      call.*field = TakeActivations(scratch, rows, inputs, in_float);
    }
  }

  Session& session_;
  float epsilon_, scale_;
  size_t kv_heads_, head_dim_, heads_ = 0;
  Tiles qkv_, output_, gate_up_, down_;
  size_t hidden_;
  const float* attention_norm_;
  const float* mlp_norm_;
  const float* cos_ = nullptr;
  const float* sin_ = nullptr;
  size_t positions_ = 0;
};

// An operator's description for onnxruntime, for one session.
template <class Kernel>
struct Operator : OrtCustomOp {
  Session& session;

  explicit Operator(Session& of) : OrtCustomOp{}, session(of) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::kInputs.size(); };
    GetInputType = [](const OrtCustomOp*, size_t index) { return Kernel::kInputs.at(index); };
    GetOutputTypeCount = [](const OrtCustomOp*) { return Kernel::kOutputs.size(); };
    GetOutputType = [](const OrtCustomOp*, size_t index) { return Kernel::kOutputs.at(index); };
    GetInputCharacteristic = GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info,
                        void** kernel) -> OrtStatusPtr {
      return Guarded([&] { *kernel = new Kernel(Node{info}, static_cast<const Operator*>(op)->session); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatusPtr {
      return Guarded([&] { static_cast<Kernel*>(kernel)->Compute(Context{context}); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }
};

// A session and the operators that it uses. It lives as long as the process, as onnxruntime says of no domain when it is
// done with it.
struct Registration {
  Session session;
  Operator<EmbeddingLookup> look_up{session};
  Operator<Head> head{session};
  Operator<DecoderLayer<false>> layer{session};
  Operator<DecoderLayer<true>> half_layer{session};
};

std::string ConfigEntry(const OrtSessionOptions* options, const char* key) {
  int present = 0;
  Check(api->HasSessionConfigEntry(options, key, &present));
  if (!present) return "";
  size_t size = 0;
  Check(api->GetSessionConfigEntry(options, key, nullptr, &size));
  std::string value(size, '\0');
  Check(api->GetSessionConfigEntry(options, key, value.data(), &size));
  value.resize(size - 1);  // without its end
  return value;
}

void Register(OrtSessionOptions* options) {
  static std::mutex registering;
  // Never destroyed: some compilers' programs would do that at their end, when this library is no longer in memory.
  static auto& registrations = *new std::vector<std::unique_ptr<Registration>>();
  Require(target != nullptr, "this processor has neither AVX2 with FMA and F16C nor AVX-512 with VNNI");
  auto made = std::make_unique<Registration>();
  const std::string threads = ConfigEntry(options, kThreadsEntry);
  if (!threads.empty()) {
    const unsigned long number = std::strtoul(threads.c_str(), nullptr, 10);
    Require(number >= 1 && number <= kMostThreads, std::string(kThreadsEntry) + " must be 1..1024, and is " + threads);
    made->session.threads = number;
  }
  made->session.in_float = ConfigEntry(options, kFloatEntry) == "1";
  OrtCustomOpDomain* domain = nullptr;
  Check(api->CreateCustomOpDomain(kDomain, &domain));
  for (const OrtCustomOp* op :
       std::initializer_list<const OrtCustomOp*>{&made->look_up, &made->head, &made->layer, &made->half_layer}) {
    Check(api->CustomOpDomain_Add(domain, op));
  }
  Check(api->AddCustomOpDomain(options, domain));
  const std::lock_guard guard(registering);
  registrations.push_back(std::move(made));
}

}  // namespace
}  // namespace kernels

extern "C" {

// onnxruntime's entry point of a library of operators.
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                    const OrtApiBase* base) {
  const OrtApi* found = base->GetApi(kernels::kApiVersion);
  if (found == nullptr) {
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "the kernels need the API of onnxruntime 1.20 or later");
  }
  kernels::api = found;
  return kernels::Guarded([&] { kernels::Register(options); });
}

// The name of the code that this processor runs; empty if there is none.
__attribute__((visibility("default"))) const char* completion_kernels_target() {
  return kernels::target == nullptr ? "" : kernels::target->name;
}

// Multiplies bytes `turns` times as fast as a thread of this processor can; gives the number of multiply-adds.
__attribute__((visibility("default"))) uint64_t completion_kernels_peak(uint64_t turns) {
  return kernels::target == nullptr ? 0 : kernels::target->peak(turns);
}
}

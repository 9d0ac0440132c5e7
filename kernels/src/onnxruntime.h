// What the operators need of onnxruntime's C API. Failures are exceptions, which `Guarded` turns into a status.
#pragma once

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_c_api.h"

namespace kernels {

// The oldest API with all functions that are used here: onnxruntime 1.20's.
constexpr uint32_t kApiVersion = 20;

// Set once, before the first operator is made.
inline const OrtApi* api = nullptr;

// A sentence for the caller.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void Check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw Refusal(message);
}

inline void Require(bool holds, const std::string& otherwise) {
  if (!holds) throw Refusal(otherwise);
}

template <class Work>
OrtStatus* Guarded(const Work& work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}

using Shape = std::vector<int64_t>;

inline std::string Text(const Shape& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline Shape ShapeOf(const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(api->GetTensorTypeAndShape(value, &info));
  size_t count = 0;
  OrtStatus* status = api->GetDimensionsCount(info, &count);
  Shape shape(count);
  if (status == nullptr) status = api->GetDimensions(info, shape.data(), count);
  api->ReleaseTensorTypeAndShapeInfo(info);
  Check(status);
  return shape;
}

template <class T>
T* Data(const OrtValue* value) {
  void* data = nullptr;
  Check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));  // the C API has no other
  return static_cast<T*>(data);
}

// A node while its operator is made: its attributes and weights.
struct Node {
  const OrtKernelInfo* info;

  float number(const char* name) const {
    float value = 0;
    Check(api->KernelInfoGetAttribute_float(info, name, &value));
    return value;
  }

  size_t size(const char* name) const {
    int64_t value = 0;
    Check(api->KernelInfoGetAttribute_int64(info, name, &value));
    Require(value > 0, std::string(name) + " must be positive, and is " + std::to_string(value));
    return static_cast<size_t>(value);
  }

  const OrtValue* constant(size_t index, const char* name) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    Check(api->KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
    Require(is_constant != 0 && value != nullptr, std::string(name) + " must be an initializer");
    return value;
  }

  // A vector of `size` numbers, or of any size.
  const float* vector(size_t index, const char* name, size_t size) const {
    const OrtValue* value = constant(index, name);
    const Shape shape = ShapeOf(value), wanted = {static_cast<int64_t>(size)};
    Require(shape == wanted, std::string(name) + " must be " + Text(wanted) + ", and is " + Text(shape));
    return Data<const float>(value);
  }
};

// A call of an operator.
struct Context {
  OrtKernelContext* context;

  const OrtValue* input(size_t index) const {
    const OrtValue* value = nullptr;
    Check(api->KernelContext_GetInput(context, index, &value));
    return value;
  }

  OrtValue* output(size_t index, const Shape& shape) const {
    OrtValue* value = nullptr;
    Check(api->KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
    return value;
  }

  // Runs `work(thread)` for each of `threads` numbers, in onnxruntime's own threads.
  template <class Work>
  void InThreads(size_t threads, const Work& work) const {
    const auto call = [](void* data, size_t thread) { (*static_cast<const Work*>(data))(thread); };
    Check(api->KernelContext_ParallelFor(context, call, threads, 0, const_cast<Work*>(&work)));
  }
};

}  // namespace kernels

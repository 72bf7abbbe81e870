// Replays a tape: allocates its buffers, launches its kernels, calls its operators.
#define PY_SSIZE_T_CLEAN  // the size for "#" is a Py_ssize_t
#include "chain/tape.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "chain/tape_tensors.h"
#include "checks.h"

namespace resnet_fast {
namespace {

// One replay.
class Replay {
 public:
  Replay(const Tape& tape, const std::vector<Tensor>& inputs)
      : tape_(tape), inputs_(inputs), on_gpu_(!tape.launcher && !tape.discards) {
    addresses_.resize(tape.buffers.size());
    owned_.resize(tape.buffers.size());
  }

  std::vector<Tensor> operator()() {
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (on_gpu_) {
      guard.emplace(static_cast<int32_t>(tape_.device));
      stream_ = stream_on_gpu(tape_.device);
    }
    allocate();
    for (size_t i = 0; i < tape_.steps.size(); ++i) {
      const Step& step = tape_.steps[i];
      if (step.launches) {
        launch(i, step.launch);
      } else {
        call(step.call);
      }
      for (const int64_t b : step.releases) owned_[static_cast<size_t>(b)].reset();
    }
    std::vector<Tensor> outputs;
    outputs.reserve(tape_.outputs.size());
    for (const int64_t v : tape_.outputs) outputs.push_back(view(static_cast<size_t>(v)));
    return outputs;
  }

 private:
  const Tape& tape_;
  const std::vector<Tensor>& inputs_;
  const bool on_gpu_;
  void* stream_ = nullptr;
  std::vector<char*> addresses_;
  std::vector<std::optional<Tensor>> owned_;  // by buffer: outputs, and results of calls
  std::optional<Tensor> scratch_;

  Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t dtype) const {
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(dtype),
        static_cast<int32_t>(tape_.device_type), static_cast<int32_t>(tape_.device), &made));
    return Tensor(made);
  }

  void allocate() {
    char* scratch = nullptr;
    if (tape_.scratch_bytes > 0) {
      scratch_ = empty({tape_.scratch_bytes}, {1}, aoti_torch_dtype_uint8());
      scratch = static_cast<char*>(scratch_->data_ptr());
    }
    for (size_t i = 0; i < addresses_.size(); ++i) {
      const Buffer& b = tape_.buffers[i];
      switch (b.kind) {
        case Buffer::kInput:
          addresses_[i] = static_cast<char*>(inputs_[static_cast<size_t>(b.location)].data_ptr());
          break;
        case Buffer::kScratch: addresses_[i] = scratch + b.location; break;
        case Buffer::kConstant: addresses_[i] = reinterpret_cast<char*>(b.location); break;
        case Buffer::kOutput: {
          const View& whole = tape_.views[static_cast<size_t>(b.location)];
          owned_[i] = empty(whole.sizes, whole.strides, whole.dtype);
          addresses_[i] = static_cast<char*>(owned_[i]->data_ptr());
          break;
        }
        case Buffer::kResult: break;
      }
    }
  }

  static bool same_layout(const Tensor& t, const View& v) {
    if (t.dim() != static_cast<int64_t>(v.sizes.size())) return false;
    for (int64_t d = 0; d < t.dim(); ++d) {
      const auto i = static_cast<size_t>(d);
      if (t.size(d) != v.sizes[i] || (v.sizes[i] > 1 && t.stride(d) != v.strides[i])) return false;
    }
    return true;
  }

  Tensor view(size_t number) const {
    const View& v = tape_.views[number];
    const auto b = static_cast<size_t>(v.buffer);
    const Buffer& buffer = tape_.buffers[b];
    const auto dims = static_cast<int64_t>(v.sizes.size());
    AtenTensorHandle made = nullptr;
    switch (buffer.kind) {
      case Buffer::kConstant: return *tape_.constants[number];
      case Buffer::kInput: {
        const Tensor& whole = inputs_[static_cast<size_t>(buffer.location)];
        if (v.offset == 0 && v.dtype == dtype_of(whole) && same_layout(whole, v)) return whole;
        return from_blob(addresses_[b], v, tape_.device_type, tape_.device);
      }
      case Buffer::kScratch:
        TORCH_ERROR_CODE_CHECK(
            aoti_torch__alloc_from_pool(scratch_->get(), buffer.location + v.offset * element_size(v.dtype),
                                        static_cast<int32_t>(v.dtype), dims, v.sizes.data(), v.strides.data(), &made));
        return Tensor(made);
      case Buffer::kOutput:
      case Buffer::kResult: break;
    }
    RESNET_FAST_CHECK(owned_[b].has_value(), "run_tape: a result is read before it is there");
    if (v.offset == 0 && same_layout(*owned_[b], v)) return *owned_[b];
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(owned_[b]->get(), dims, v.sizes.data(), v.strides.data(), v.offset, &made));
    return Tensor(made);
  }

  void launch(size_t step, const Launch& l) const {
    alignas(16) char bytes[kParameterBytes];
    void* parameters[kParameters];
    std::memcpy(bytes, l.bytes.data(), l.bytes.size());
    for (size_t i = 0; i < l.begins.size(); ++i) parameters[i] = bytes + l.begins[i];
    for (const Launch::Pointer& p : l.pointers) {
      const char* at = addresses_[static_cast<size_t>(p.buffer)] + p.offset;
      std::memcpy(parameters[p.parameter], &at, sizeof at);
    }
    if (on_gpu_) {
      launch_on_gpu(l, parameters, stream_);
    } else if (tape_.launcher != nullptr) {
      call_launcher(step, l, parameters);
    }
  }

  // launcher(step, [(bytes, extent or -1) per parameter]) returns true on success.
  void call_launcher(size_t step, const Launch& l, void** parameters) const {
    const PyGILState_STATE state = PyGILState_Ensure();
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(l.begins.size()));
    for (size_t i = 0; i < l.begins.size(); ++i) {
      const size_t end = i + 1 < l.begins.size() ? static_cast<size_t>(l.begins[i + 1]) : l.bytes.size();
      long long extent = -1;
      for (const Launch::Pointer& p : l.pointers)
        if (p.parameter == static_cast<int64_t>(i)) extent = p.extent;
      PyList_SetItem(list, static_cast<Py_ssize_t>(i),
                     Py_BuildValue("(y#L)", static_cast<const char*>(parameters[i]),
                                   static_cast<Py_ssize_t>(end - static_cast<size_t>(l.begins[i])), extent));
    }
    PyObject* answer = PyObject_CallFunction(tape_.launcher, "nN", static_cast<Py_ssize_t>(step), list);
    const bool went_well = answer != nullptr && PyObject_IsTrue(answer) == 1;
    if (answer == nullptr) PyErr_Clear();
    Py_XDECREF(answer);
    PyGILState_Release(state);
    RESNET_FAST_CHECK(went_well, "run_tape: the launcher stopped at step ", step);
  }

  template <typename T>
  static StableIValue value(const T& v, bool optional) {
    return optional ? torch::stable::detail::from(std::optional<T>(v)) : torch::stable::detail::from(v);
  }

  // A list of bool. Not from std::vector<bool>, which holds bits.
  static StableIValue booleans(const std::vector<int64_t>& values) {
    StableListHandle list = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(values.size(), &list));
    for (const int64_t v : values)
      TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, torch::stable::detail::from(v != 0)));
    return torch::stable::detail::from(list);
  }

  StableIValue argument(const Call::Argument& a) const {
    using torch::headeronly::MemoryFormat;
    switch (a.kind) {
      case Call::Argument::kNone: break;
      case Call::Argument::kTensor: return value(view(static_cast<size_t>(a.value)), a.optional);
      case Call::Argument::kInt: return value(a.value, a.optional);
      case Call::Argument::kDouble: {
        double number;
        std::memcpy(&number, &a.value, sizeof number);
        return value(number, a.optional);
      }
      case Call::Argument::kBool: return value(a.value != 0, a.optional);
      case Call::Argument::kInts: return value(a.values, a.optional);
      case Call::Argument::kBools: return booleans(a.values);
      case Call::Argument::kDtype: return value(static_cast<torch::headeronly::ScalarType>(a.value), a.optional);
      case Call::Argument::kMemoryFormat:
        return value(a.value == 0   ? MemoryFormat::Contiguous
                     : a.value == 1 ? MemoryFormat::ChannelsLast
                                    : MemoryFormat::Preserve,
                     a.optional);
    }
    return torch::stable::detail::from(std::nullopt);
  }

  void call(const Call& c) {
    std::vector<StableIValue> stack;
    stack.reserve(std::max(c.arguments.size(), c.results.size()));
    for (const Call::Argument& a : c.arguments) stack.push_back(argument(a));
    stack.resize(stack.capacity());
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(c.name.c_str(), c.overload.c_str(), stack.data(), TORCH_ABI_VERSION));
    std::vector<Tensor> results;  // takes all of them before any check: none leaks if one fails
    for (size_t i = 0; i < c.results.size(); ++i) results.push_back(torch::stable::detail::to<Tensor>(stack[i]));
    for (size_t i = 0; i < c.results.size(); ++i) {
      if (c.results[i] < 0) continue;
      const View& v = tape_.views[static_cast<size_t>(c.results[i])];
      RESNET_FAST_CHECK(same_layout(results[i], v), "run_tape: ", c.name,
                        " gives another layout than when it was recorded");
      const auto b = static_cast<size_t>(v.buffer);
      addresses_[b] = static_cast<char*>(results[i].data_ptr());
      owned_[b] = std::move(results[i]);
    }
  }
};

}  // namespace

bool fits(const Tape& tape, const std::vector<Tensor>& inputs) {
  if (inputs.size() != tape.inputs.size()) return false;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& t = inputs[i];
    const auto& [want, aligned] = tape.inputs[i];
    if (dtype_of(t) != want.dtype || t.get_device_index() != tape.device) return false;
    if (t.dim() != static_cast<int64_t>(want.sizes.size())) return false;
    for (int64_t d = 0; d < t.dim(); ++d)
      if (t.size(d) != want.sizes[static_cast<size_t>(d)] || t.stride(d) != want.strides[static_cast<size_t>(d)])
        return false;
    if (aligned && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0) return false;
  }
  for (const Alias& a : tape.aliases) {
    const auto* first = static_cast<const char*>(inputs[static_cast<size_t>(a.first)].data_ptr());
    if (first + a.distance != inputs[static_cast<size_t>(a.second)].data_ptr()) return false;
  }
  return true;
}

std::vector<Tensor> replay(const Tape& tape, const std::vector<Tensor>& inputs) { return Replay(tape, inputs)(); }

}  // namespace resnet_fast

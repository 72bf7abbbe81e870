// Tapes: read from Python once, kept by number, replayed by the operator run_tape.
#define PY_SSIZE_T_CLEAN  // sizes behind "#" are Py_ssize_t
#include "chain/tape.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "checks.h"

namespace resnet_fast {
namespace {

constexpr size_t kParameterBytes = 4096;  // of a launch, at most
constexpr size_t kParameters = 64;

// The words in the order in which resnet_fast/gpu/recorder.py writes them.
class Reader {
 public:
  Reader(const char* data, size_t bytes) : data_(data), words_(bytes / 8) {}

  int64_t word() {
    RESNET_FAST_CHECK(at_ < words_, "tape: it ends in the middle, after ", words_, " words");
    int64_t value;
    std::memcpy(&value, data_ + 8 * at_++, 8);
    return value;
  }
  // A count or a place: at least 0 and less than `end`.
  int64_t below(int64_t end, const char* what) {
    const int64_t value = word();
    RESNET_FAST_CHECK(value >= 0 && value < end, "tape: ", what, " is ", value, ", want 0 to ", end - 1);
    return value;
  }
  int64_t count() { return below(static_cast<int64_t>(words_) + 1, "a count"); }
  std::vector<int64_t> list() {
    std::vector<int64_t> values(static_cast<size_t>(count()));
    for (int64_t& value : values) value = word();
    return values;
  }
  // Bytes, in as many words as hold them.
  std::string bytes() {
    const auto size = static_cast<size_t>(below(static_cast<int64_t>(8 * words_) + 1, "a size"));
    RESNET_FAST_CHECK(size <= 8 * (words_ - at_), "tape: it ends in the middle, after ", words_, " words");
    std::string value(data_ + 8 * at_, size);
    at_ += (size + 7) / 8;
    return value;
  }
  bool done() const { return at_ == words_; }

 private:
  const char* data_;
  size_t words_, at_ = 0;
};

int64_t element_size(int64_t dtype) {
  if (dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_int32()) return 4;
  if (dtype == aoti_torch_dtype_float64() || dtype == aoti_torch_dtype_int64()) return 8;
  return dtype == aoti_torch_dtype_uint8() || dtype == aoti_torch_dtype_int8() ? 1 : 2;
}

int64_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// A tensor in memory that outlives it.
Tensor from_blob(char* memory, const View& v, int64_t device_type, int64_t device) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      memory + v.offset * element_size(v.dtype), static_cast<int64_t>(v.sizes.size()), v.sizes.data(), v.strides.data(),
      0, static_cast<int32_t>(v.dtype), static_cast<int32_t>(device_type), static_cast<int32_t>(device), &made));
  return Tensor(made);
}

View read_view(Reader& in, int64_t buffers) {
  View view;
  view.buffer = in.below(buffers, "a buffer");
  view.dtype = in.word();
  view.offset = in.word();
  view.sizes = in.list();
  view.strides = in.list();
  RESNET_FAST_CHECK(view.sizes.size() == view.strides.size(), "tape: a view has ", view.sizes.size(), " sizes and ",
                    view.strides.size(), " strides");
  return view;
}

Launch read_launch(Reader& in, const std::vector<Buffer>& buffers) {
  Launch launch;
  launch.function = static_cast<uintptr_t>(in.word());
  launch.driver = in.below(2, "a launch's kind") == 1;
  for (unsigned& size : launch.grid) size = static_cast<unsigned>(in.below(int64_t{1} << 31, "a grid"));
  launch.threads = static_cast<unsigned>(in.below(1025, "the threads"));
  launch.shared = static_cast<unsigned>(in.below(1 << 20, "the shared memory"));
  const int64_t parameters = in.below(kParameters, "the number of parameters");
  for (int64_t i = 0; i < parameters; ++i) {
    launch.begins.push_back(static_cast<int64_t>(launch.bytes.size()));
    if (in.below(2, "a parameter's kind") == 1) {
      const int64_t buffer = in.below(static_cast<int64_t>(buffers.size()), "a buffer");
      const Buffer& b = buffers[static_cast<size_t>(buffer)];
      const int64_t offset = in.below(b.bytes + 1, "an offset"), extent = in.below(b.bytes - offset + 1, "an extent");
      launch.pointers.push_back({i, buffer, offset, extent});
      launch.bytes.resize(launch.bytes.size() + 8);
    } else {
      const std::string value = in.bytes();
      launch.bytes.insert(launch.bytes.end(), value.begin(), value.end());
      launch.bytes.resize((launch.bytes.size() + 7) / 8 * 8);
    }
  }
  RESNET_FAST_CHECK(launch.bytes.size() <= kParameterBytes, "tape: a launch has ", launch.bytes.size(),
                    " bytes of parameters, want at most ", kParameterBytes);
  return launch;
}

Call read_call(Reader& in, int64_t views) {
  Call call;
  call.name = in.bytes();
  call.overload = in.bytes();
  for (int64_t i = in.count(); i > 0; --i) {
    Call::Argument a{};
    a.kind = static_cast<Call::Argument::Kind>(in.below(Call::Argument::kDtype + 1, "an argument's kind"));
    a.optional = in.below(2, "whether an argument is optional") == 1;
    if (a.kind == Call::Argument::kInts || a.kind == Call::Argument::kBools) {
      a.values = in.list();
    } else if (a.kind == Call::Argument::kTensor) {
      a.value = in.below(views, "a view");
    } else if (a.kind != Call::Argument::kNone) {
      a.value = in.word();
    }
    call.arguments.push_back(std::move(a));
  }
  call.results = in.list();
  for (const int64_t v : call.results)
    RESNET_FAST_CHECK(v >= -1 && v < views, "tape: a call's result is ", v, ", want -1 to ", views - 1);
  return call;
}

std::unique_ptr<Tape> read_tape(Reader in) {
  auto tape = std::make_unique<Tape>();
  const bool cuda = in.below(2, "the kind of device") == 1;
  tape->device_type = cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  tape->device = in.word();
  tape->scratch_bytes = in.below(int64_t{1} << 56, "the scratch memory") * 8;
  for (int64_t i = in.count(); i > 0; --i) {
    Buffer b{};
    b.kind = static_cast<Buffer::Kind>(in.below(Buffer::kResult + 1, "a buffer's kind"));
    b.place = in.word();
    b.bytes = in.word();
    RESNET_FAST_CHECK(
        b.bytes >= 0 && (b.kind != Buffer::kScratch || (b.place >= 0 && b.place + b.bytes <= tape->scratch_bytes)),
        "tape: a buffer lies outside of the scratch memory");
    tape->buffers.push_back(b);
  }
  const auto buffers = static_cast<int64_t>(tape->buffers.size());
  for (int64_t i = in.count(); i > 0; --i) {
    View view = read_view(in, buffers);
    tape->inputs.push_back({std::move(view), in.word() != 0});
  }
  const auto inputs = static_cast<int64_t>(tape->inputs.size());
  for (int64_t i = in.count(); i > 0; --i) {
    const int64_t first = in.below(inputs, "an input"), second = in.below(inputs, "an input");
    tape->aliases.push_back({first, second, in.word()});
  }
  for (int64_t i = in.count(); i > 0; --i) tape->views.push_back(read_view(in, buffers));
  const auto views = static_cast<int64_t>(tape->views.size());
  tape->outputs = in.list();
  for (const int64_t v : tape->outputs)
    RESNET_FAST_CHECK(v >= 0 && v < views, "tape: an output is ", v, ", want 0 to ", views - 1);
  for (const Buffer& b : tape->buffers) {
    const int64_t end = b.kind == Buffer::kInput ? inputs : b.kind == Buffer::kOutput ? views : b.place + 1;
    RESNET_FAST_CHECK(b.kind == Buffer::kConstant || (b.place >= 0 && b.place < end), "tape: a buffer's place is ",
                      b.place);
  }
  for (const View& v : tape->views) {
    const Buffer& b = tape->buffers[static_cast<size_t>(v.buffer)];
    const bool constant = b.kind == Buffer::kConstant;
    tape->constants.push_back(
        constant ? std::optional(from_blob(reinterpret_cast<char*>(b.place), v, tape->device_type, tape->device))
                 : std::nullopt);
  }
  for (int64_t i = in.count(); i > 0; --i) {
    Step step{};
    step.launches = in.below(2, "a step's kind") == 0;
    if (step.launches) {
      step.launch = read_launch(in, tape->buffers);
    } else {
      step.call = read_call(in, views);
    }
    step.ends = in.list();
    for (const int64_t b : step.ends)
      RESNET_FAST_CHECK(b >= 0 && b < buffers, "tape: a buffer is ", b, ", want 0 to ", buffers - 1);
    tape->steps.push_back(std::move(step));
  }
  RESNET_FAST_CHECK(in.done(), "tape: there are words behind its end");
  return tape;
}

// By number. A run holds its tape, so that it may be dropped meanwhile.
std::map<int64_t, std::shared_ptr<const Tape>> tapes;
std::mutex tapes_lock;
int64_t next_number = 1;

void destroy(const Tape* tape) {
  if (tape->launcher != nullptr) {
    const PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF(tape->launcher);
    PyGILState_Release(state);
  }
  delete tape;
}

std::shared_ptr<const Tape> tape_of(int64_t number) {
  const std::lock_guard<std::mutex> hold(tapes_lock);
  const auto found = tapes.find(number);
  RESNET_FAST_CHECK(found != tapes.end(), "run_tape: there is no tape ", number);
  return found->second;
}

// One call of run_tape.
class Run {
 public:
  Run(const Tape& tape, const std::vector<Tensor>& inputs)
      : tape_(tape), inputs_(inputs), on_gpu_(!tape.launcher && !tape.discards) {
    bases_.resize(tape.buffers.size());
    made_.resize(tape.buffers.size());
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
      for (const int64_t b : step.ends) made_[static_cast<size_t>(b)].reset();
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
  std::vector<char*> bases_;
  std::vector<std::optional<Tensor>> made_;  // by buffer: outputs, and results of calls
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
    for (size_t i = 0; i < bases_.size(); ++i) {
      const Buffer& b = tape_.buffers[i];
      switch (b.kind) {
        case Buffer::kInput: bases_[i] = static_cast<char*>(inputs_[static_cast<size_t>(b.place)].data_ptr()); break;
        case Buffer::kScratch: bases_[i] = scratch + b.place; break;
        case Buffer::kConstant: bases_[i] = reinterpret_cast<char*>(b.place); break;
        case Buffer::kOutput: {
          const View& whole = tape_.views[static_cast<size_t>(b.place)];
          made_[i] = empty(whole.sizes, whole.strides, whole.dtype);
          bases_[i] = static_cast<char*>(made_[i]->data_ptr());
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
        const Tensor& whole = inputs_[static_cast<size_t>(buffer.place)];
        if (v.offset == 0 && v.dtype == dtype_of(whole) && same_layout(whole, v)) return whole;
        return from_blob(bases_[b], v, tape_.device_type, tape_.device);
      }
      case Buffer::kScratch:
        TORCH_ERROR_CODE_CHECK(
            aoti_torch__alloc_from_pool(scratch_->get(), buffer.place + v.offset * element_size(v.dtype),
                                        static_cast<int32_t>(v.dtype), dims, v.sizes.data(), v.strides.data(), &made));
        return Tensor(made);
      case Buffer::kOutput:
      case Buffer::kResult: break;
    }
    RESNET_FAST_CHECK(made_[b].has_value(), "run_tape: a result is read before it is there");
    if (v.offset == 0 && same_layout(*made_[b], v)) return *made_[b];
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(made_[b]->get(), dims, v.sizes.data(), v.strides.data(), v.offset, &made));
    return Tensor(made);
  }

  void launch(size_t step, const Launch& l) const {
    alignas(16) char bytes[kParameterBytes];
    void* parameters[kParameters];
    std::memcpy(bytes, l.bytes.data(), l.bytes.size());
    for (size_t i = 0; i < l.begins.size(); ++i) parameters[i] = bytes + l.begins[i];
    for (const Launch::Pointer& p : l.pointers) {
      const char* at = bases_[static_cast<size_t>(p.buffer)] + p.offset;
      std::memcpy(parameters[p.parameter], &at, sizeof at);
    }
    if (on_gpu_) {
      launch_on_gpu(l, parameters, stream_);
    } else if (tape_.launcher != nullptr) {
      hand_over(step, l, parameters);
    }
  }

  // launcher(step, [(bytes, extent or -1) a parameter]): true where all went well.
  void hand_over(size_t step, const Launch& l, void** parameters) const {
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

  // Of no std::vector: the one of bool holds bits.
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
    std::vector<Tensor> results;  // all are taken, so that none is left behind should one be wrong
    for (size_t i = 0; i < c.results.size(); ++i) results.push_back(torch::stable::detail::to<Tensor>(stack[i]));
    for (size_t i = 0; i < c.results.size(); ++i) {
      if (c.results[i] < 0) continue;
      const View& v = tape_.views[static_cast<size_t>(c.results[i])];
      RESNET_FAST_CHECK(same_layout(results[i], v), "run_tape: ", c.name,
                        " gives another layout than when it was recorded");
      const auto b = static_cast<size_t>(v.buffer);
      bases_[b] = static_cast<char*>(results[i].data_ptr());
      made_[b] = std::move(results[i]);
    }
  }
};

// Whether the inputs are like those which the tape was recorded with.
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

std::vector<Tensor> run_tape(const std::vector<Tensor>& inputs, int64_t number) {
  const std::shared_ptr<const Tape> tape = tape_of(number);
  if (!fits(*tape, inputs)) return {};
  return Run(*tape, inputs)();
}

}  // namespace

PyObject* add_tape(PyObject*, PyObject* args) {
  PyObject *words, *launcher;
  if (!PyArg_ParseTuple(args, "OO", &words, &launcher)) return nullptr;
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(words, &data, &size) != 0) return nullptr;
  try {
    std::unique_ptr<Tape> read = read_tape({data, static_cast<size_t>(size)});
    read->discards = launcher == Py_False;
    if (launcher != Py_None && launcher != Py_False) {
      Py_INCREF(launcher);
      read->launcher = launcher;
    }
    const std::shared_ptr<const Tape> tape(read.release(), destroy);
    if (launcher == Py_None) prepare_on_gpu(*tape);
    const std::lock_guard<std::mutex> hold(tapes_lock);
    tapes[next_number] = tape;
    return PyLong_FromLongLong(next_number++);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* drop_tape(PyObject*, PyObject* number) {
  const long long key = PyLong_AsLongLong(number);
  if (key == -1 && PyErr_Occurred()) return nullptr;
  std::shared_ptr<const Tape> last;  // goes outside of the lock
  {
    const std::lock_guard<std::mutex> hold(tapes_lock);
    const auto found = tapes.find(key);
    if (found != tapes.end()) {
      last = found->second;
      tapes.erase(found);
    }
  }
  Py_RETURN_NONE;
}

PyObject* kernel(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (bytes == nullptr) return nullptr;
  const void* found = find_on_gpu(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyLong_FromVoidPtr(const_cast<void*>(found));
}

#ifndef RESNET_FAST_CUDA
const void* find_on_gpu(const char*) { return nullptr; }
void launch_on_gpu(const Launch&, void**, void*) { RESNET_FAST_CHECK(false, "run_tape: built without CUDA"); }
void prepare_on_gpu(const Tape&) { RESNET_FAST_CHECK(false, "tape: resnet_fast was built without CUDA"); }
void* stream_on_gpu(int64_t) { return nullptr; }
#endif

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) { m.impl("run_tape", TORCH_BOX(&run_tape)); }

}  // namespace resnet_fast

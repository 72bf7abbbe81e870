// A chain on a GPU, or a pass of its training, with all that depends on shapes resolved: what is launched and called,
// in order, and where each argument lies. resnet_fast/gpu/recorder.py records it once; replaying it costs the host a
// few microseconds a step.
#pragma once

#include <Python.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace resnet_fast {

// Memory that steps read and write.
struct Buffer {
  enum Kind : int64_t {
    kInput,  // the input number `place`
    kScratch,  // `place` bytes behind the beginning of the scratch memory
    kOutput,  // what is returned, allocated in the layout of the view `place`
    kConstant,  // at the address `place`
    kResult,  // what a call returns
  };
  Kind kind;
  int64_t place, bytes;
};

// A tensor in a buffer; `offset` in elements.
struct View {
  int64_t buffer, dtype, offset;
  std::vector<int64_t> sizes, strides;
};

// A launch. Its parameters lie in `bytes`, the i-th at begins[i]; those that point into buffers are filled in.
struct Launch {
  struct Pointer {
    int64_t parameter, buffer, offset, extent;  // bytes; extent: of the tensor
  };
  uintptr_t function;
  bool driver;  // a function of the driver, as Triton's are, rather than a kernel of this module
  unsigned grid[3], threads, shared;
  std::vector<char> bytes;
  std::vector<int64_t> begins;
  std::vector<Pointer> pointers;
};

// A call of an operator of PyTorch's that returns tensors.
struct Call {
  struct Argument {
    enum Kind : int64_t { kNone, kTensor, kInt, kDouble, kBool, kInts, kMemoryFormat, kBools, kDtype };
    Kind kind;
    bool optional;  // in the schema
    int64_t value;  // a view's number, an integer, or a double's bits
    std::vector<int64_t> values;
  };
  std::string name, overload;
  std::vector<Argument> arguments;
  std::vector<int64_t> results;  // views, whose layouts the call must give; -1 for one that is not there
};

// What an input must be like.
struct Input {
  View view;
  bool aligned;  // it begins at a multiple of 16 bytes
};

// Two inputs that share memory: the second begins `distance` bytes behind the first.
struct Alias {
  int64_t first, second, distance;
};

struct Step {
  bool launches;
  Launch launch;
  Call call;
  std::vector<int64_t> ends;  // results that no later step reads
};

struct Tape {
  int64_t device_type = 0, device = -1;
  std::vector<Input> inputs;
  std::vector<Alias> aliases;
  std::vector<int64_t> outputs;  // the views that are returned
  int64_t scratch_bytes = 0;
  std::vector<Buffer> buffers;
  std::vector<View> views;
  std::vector<std::optional<torch::stable::Tensor>> constants;  // by view, those in constant buffers
  std::vector<Step> steps;
  PyObject* launcher = nullptr;  // what takes the launches instead of a GPU, or null
  bool discards = false;  // launches nothing: what a call costs the host can be measured anywhere
};

// Launches `step` on a CUDA device, on its current stream; cuda/tape_launch.cu.
void launch_on_gpu(const Launch& launch, void** parameters, void* stream);
void prepare_on_gpu(const Tape& tape);
void* stream_on_gpu(int64_t device);
// A kernel of this module by the name that Python knows it by, or null.
const void* find_on_gpu(const char* name);

// tape(words: bytes, launcher: callable or None or False) -> int: the number of a tape that run_tape takes.
PyObject* add_tape(PyObject* self, PyObject* args);
// kernel(name: str) -> int: the address of a CUDA kernel of this module, 0 where there is none of the name.
PyObject* kernel(PyObject* self, PyObject* name);
// drop_tape(number: int) -> None
PyObject* drop_tape(PyObject* self, PyObject* number);

}  // namespace resnet_fast

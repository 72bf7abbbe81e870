// A tape: the launches and operator calls of a chain on a GPU, or of a pass of its training, in order, with all that
// depends on shapes resolved. resnet_fast/gpu/recorder.py records it once; a replay costs the host a few microseconds a
// step.
#pragma once

#include <Python.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace resnet_fast {

// Memory that steps read and write.
struct Buffer {
  enum Kind : int64_t {
    kInput,  // input number `location`
    kScratch,  // `location` bytes into the scratch memory
    kOutput,  // returned; allocated in the layout of view `location`
    kConstant,  // at address `location`
    kResult,  // returned by a call
  };
  Kind kind;
  int64_t location, bytes;
};

// A tensor in a buffer; `offset` in elements.
struct View {
  int64_t buffer, dtype, offset;
  std::vector<int64_t> sizes, strides;
};

// Limits of a launch.
constexpr size_t kParameterBytes = 4096, kParameters = 64;

// A kernel launch. Parameter i lies at bytes[begins[i]]; pointers into buffers are filled in by the replay.
struct Launch {
  struct Pointer {
    int64_t parameter, buffer, offset, extent;  // in bytes; extent: of the tensor
  };
  uintptr_t function;
  bool driver;  // a CUfunction, as Triton's kernels are; else a kernel of this module
  unsigned grid[3], threads, shared;
  std::vector<char> bytes;
  std::vector<int64_t> begins;
  std::vector<Pointer> pointers;
};

// A call of a PyTorch operator that returns tensors.
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
  std::vector<int64_t> results;  // views, whose layouts the call must return; -1: undefined
};

// What an input must look like.
struct Input {
  View view;
  bool aligned;  // to 16 bytes
};

// Two inputs that share memory: the second begins `distance` bytes behind the first.
struct Alias {
  int64_t first, second, distance;
};

struct Step {
  bool launches;
  Launch launch;
  Call call;
  std::vector<int64_t> releases;  // buffers that no later step reads
};

struct Tape {
  int64_t device_type = 0, device = -1;
  std::vector<Input> inputs;
  std::vector<Alias> aliases;
  std::vector<int64_t> outputs;  // views
  int64_t scratch_bytes = 0;
  std::vector<Buffer> buffers;
  std::vector<View> views;
  std::vector<std::optional<torch::stable::Tensor>> constants;  // by view, those in constant buffers
  std::vector<Step> steps;
  PyObject* launcher = nullptr;  // takes the launches instead of a GPU; may be null
  bool discards = false;  // drops the launches, to measure what a replay costs the host
};

// Reads and checks a tape; throws if it is malformed. In tape_read.cpp.
std::unique_ptr<Tape> read_tape(const char* data, size_t bytes);
// Whether the tape was recorded with inputs like these, and its replay for them. In tape_replay.cpp.
bool fits(const Tape& tape, const std::vector<torch::stable::Tensor>& inputs);
std::vector<torch::stable::Tensor> replay(const Tape& tape, const std::vector<torch::stable::Tensor>& inputs);

// Launches on a stream; what the launches of a tape need before the first replay; the current stream. In
// cuda/tape_launch.cu.
void launch_on_gpu(const Launch& launch, void** parameters, void* stream);
void prepare_on_gpu(const Tape& tape);
void* stream_on_gpu(int64_t device);
// The kernel of this module by its name in Python, or null.
const void* find_on_gpu(const char* name);

// tape(words: bytes, launcher: callable or None or False) -> int: adds a tape and returns its number, for run_tape.
PyObject* add_tape(PyObject* self, PyObject* args);
// kernel(name: str) -> int: the address of a CUDA kernel of this module, 0 if there is none of the name.
PyObject* kernel(PyObject* self, PyObject* name);
// drop_tape(number: int) -> None
PyObject* drop_tape(PyObject* self, PyObject* number);

}  // namespace resnet_fast

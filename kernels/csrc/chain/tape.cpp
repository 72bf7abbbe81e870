// Tapes by number: added and dropped by Python, replayed by the operator run_tape.
#include "chain/tape.h"

#include <torch/csrc/stable/library.h>

#include <map>
#include <memory>
#include <mutex>

#include "checks.h"

namespace resnet_fast {
namespace {

// A replay holds its tape, so a tape may be dropped during a replay.
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

std::vector<Tensor> run_tape(const std::vector<Tensor>& inputs, int64_t number) {
  const std::shared_ptr<const Tape> tape = tape_of(number);
  if (!fits(*tape, inputs)) return {};
  return replay(*tape, inputs);
}

}  // namespace

PyObject* add_tape(PyObject*, PyObject* args) {
  PyObject *words, *launcher;
  if (!PyArg_ParseTuple(args, "OO", &words, &launcher)) return nullptr;
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(words, &data, &size) != 0) return nullptr;
  try {
    std::unique_ptr<Tape> read = read_tape(data, static_cast<size_t>(size));
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
  std::shared_ptr<const Tape> last;  // destroyed after the lock is released
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

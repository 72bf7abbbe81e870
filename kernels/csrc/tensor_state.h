// The memory, the sizes and strides and the version counter of the tensor behind a Python object, in 21 ns for a
// filter: PyTorch's getters of memory and version alone take 110.
#pragma once

#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

// What a tensor was, in five words of a snapshot.
struct TensorState {
  // The field of the Python object that holds its at::Tensor, a single pointer: what a handle points to. It stays where
  // it is as long as the object lives.
  AtenTensorHandle handle;
  const void* impl;  // what the field held: torch.utils.swap_tensors exchanges it
  void* data;
  int64_t version;
  uint64_t geometry;  // a hash of sizes and strides: `t.data = t.data.t()` keeps memory and version

  bool is_current() const;
};

// _C.tensor_state(tensor, cdata: int, basicsize: int, data_ptr: int, version: int) -> bytes | None: the TensorState, if
// the object has a field that holds `cdata` and the tensor behind it that data pointer and version; else None.
PyObject* tensor_state(PyObject* self, PyObject* arguments);

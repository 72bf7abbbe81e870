// Asked before every fused call: whether all that was packed is unchanged.
#pragma once

#include <Python.h>

// _C.unchanged(snapshot: bytes) -> bool; resnet_fast/chain/guard.py writes the snapshot.
PyObject* is_valid(PyObject* self, PyObject* snapshot);

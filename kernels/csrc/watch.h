// Asked before every fused call: is everything still what was packed?
#pragma once

#include <Python.h>

// unchanged(snapshot: bytes) -> bool; resnet_fast/chain/guard.py writes the snapshot.
PyObject* unchanged(PyObject* self, PyObject* snapshot);

// fingerprint((address: int, bytes: int)) -> int: the hash of a sample of the memory there, as `unchanged` forms it.
PyObject* fingerprint(PyObject* self, PyObject* place);

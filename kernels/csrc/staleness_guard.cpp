// One call from Python for all checks, and one array of addresses, read front to back: the kernels evict the caches
// between two calls, and the memory read here is most of the cost.
#include "staleness_guard.h"

#include <cstdint>
#include <cstring>

#include "tensor_state.h"

namespace {

// Numbers and addresses of objects, in the order in which resnet_fast/chain/guard.py writes them. Its StalenessGuard
// holds the objects: no address is ever reused by a new one.
struct Reader {
  const uintptr_t* next;

  Py_ssize_t count() { return static_cast<Py_ssize_t>(*next++); }
  PyObject* object() { return reinterpret_cast<PyObject*>(*next++); }
};

constexpr size_t kLine = 64, kWords = kLine / sizeof(uintptr_t), kStateWords = sizeof(TensorState) / sizeof(uintptr_t);

// Objects lie anywhere: those that come so many places later are fetched ahead.
constexpr Py_ssize_t kAhead = 8;
void prefetch(uintptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address)); }

// The value of a key that was found at `position` before. PyDict_Next finds it there without hashing, in half the time;
// if the key has moved, it is looked up.
PyObject* value_at(PyObject* dict, PyObject* key, Py_ssize_t position) {
  PyObject *found, *value;
  if (PyDict_Next(dict, &position, &found, &value) && found == key) return value;
  return PyDict_GetItemWithError(dict, key);
}

// A module: its class, its own forward where `forward` is given, and the named attributes.
bool same_module(Reader& snapshot, PyObject* forward) {
  PyObject *module = snapshot.object(), *kind = snapshot.object(), *attributes = snapshot.object();
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind) return false;
  PyObject* own = snapshot.object();  // null where forward is that of the class
  if (forward != nullptr && PyDict_GetItemWithError(attributes, forward) != own) return false;
  for (Py_ssize_t i = snapshot.count(); i > 0; --i) {
    PyObject *name = snapshot.object(), *value = snapshot.object();
    const Py_ssize_t position = snapshot.count();
    PyObject* now = value == nullptr ? PyDict_GetItemWithError(attributes, name) : value_at(attributes, name, position);
    if (now != value) return false;
  }
  return true;
}

// All values of a dict, in their order.
bool same_values(Reader& snapshot) {
  PyObject *dict = snapshot.object(), *value;
  const Py_ssize_t count = snapshot.count();
  if (PyDict_Size(dict) != count) return false;
  if (!PyDict_CheckExact(dict)) {  // an OrderedDict has an order of its own
    PyObject* values = PyMapping_Values(dict);
    bool same = values != nullptr;
    for (Py_ssize_t i = 0; same && i < count; ++i) same = PyList_GetItem(values, i) == snapshot.object();
    Py_XDECREF(values);
    return same;
  }
  Py_ssize_t next = 0;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!PyDict_Next(dict, &next, nullptr, &value) || value != snapshot.object()) return false;
  return true;
}

bool equal(PyObject* now, PyObject* before) {
  if (now == nullptr) return false;
  const bool same = now == before || PyObject_RichCompareBool(now, before, Py_EQ) == 1;
  Py_DECREF(now);
  return same;
}

// The value of an attribute of each object, through the slot of its descriptor: its name would be looked up each time.
bool same_attributes(Reader& snapshot) {
  PyObject* descriptor = snapshot.object();
  const auto get = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(descriptor), Py_tp_descr_get));
  for (Py_ssize_t i = snapshot.count(); i > 0; --i) {
    PyObject *object = snapshot.object(), *value = snapshot.object();
    if (!equal(get(descriptor, object, reinterpret_cast<PyObject*>(Py_TYPE(object))), value)) return false;
  }
  return true;
}

// 64 bytes of memory against the copy of them that follows in the snapshot. In words, which the compiler inlines and
// vectorizes; memcmp is a call.
bool same_line(Reader& snapshot) {
  uintptr_t now[kWords], difference = 0;
  std::memcpy(now, snapshot.object(), kLine);
  for (size_t i = 0; i < kWords; ++i) difference |= now[i] ^ snapshot.next[i];
  snapshot.next += kWords;
  return difference == 0;
}

// Less than that, padded to 64 bytes.
bool same_rest(Reader& snapshot) {
  const PyObject* now = snapshot.object();
  const auto count = static_cast<size_t>(snapshot.count());
  const uintptr_t* before = snapshot.next;
  snapshot.next += kWords;
  return std::memcmp(now, before, count) == 0;
}

bool same(Reader snapshot) {
  static PyObject* const forward = PyUnicode_InternFromString("forward");
  // The first module is the one that is called, whichever forward it has.
  for (Py_ssize_t i = 0, count = snapshot.count(); i < count; ++i)
    if (!same_module(snapshot, i == 0 ? nullptr : forward)) return false;
  for (Py_ssize_t i = snapshot.count(); i > 0; --i) {
    if (i > kAhead) prefetch(snapshot.next[kAhead]);
    if (PyDict_Size(snapshot.object()) != 0) return false;
  }
  for (Py_ssize_t i = snapshot.count(); i > 0; --i)
    if (!same_values(snapshot)) return false;
  for (Py_ssize_t i = snapshot.count(); i > 0; --i) {
    if (i > kAhead) {
      const uintptr_t *later = snapshot.next + kAhead * kStateWords, handle = later[0], impl = later[1];
      prefetch(handle);
      for (uintptr_t at = 0; at < 3 * kLine; at += kLine) prefetch(impl + at);
    }
    TensorState before;
    std::memcpy(&before, snapshot.next, sizeof before);
    snapshot.next += kStateWords;
    if (!before.is_current()) return false;
  }
  // Methods first: they return the addresses. A tensor replaced by an inference tensor has no version to ask for, and
  // freed memory must not be read.
  for (Py_ssize_t i = snapshot.count(); i > 0; --i) {
    PyObject *method = snapshot.object(), *value = snapshot.object();
    if (!equal(PyObject_CallNoArgs(method), value)) return false;
  }
  for (Py_ssize_t i = snapshot.count(); i > 0; --i)
    if (!same_attributes(snapshot)) return false;
  for (Py_ssize_t i = snapshot.count(); i > 0; --i) {
    if (i > kAhead) prefetch(snapshot.next[kAhead * (1 + kWords)]);
    if (!same_line(snapshot)) return false;
  }
  for (Py_ssize_t i = snapshot.count(); i > 0; --i)
    if (!same_rest(snapshot)) return false;
  return true;
}

}  // namespace

PyObject* is_valid(PyObject*, PyObject* snapshot) {
  const char* bytes = PyBytes_AsString(snapshot);
  if (bytes == nullptr) return nullptr;
  const bool is = same({reinterpret_cast<const uintptr_t*>(bytes)});
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(is);
}

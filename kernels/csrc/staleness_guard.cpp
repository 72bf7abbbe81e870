// One call from Python for all checks, and one array of addresses, read front to back: the kernels evict the caches
// between two calls, and the memory read here is most of the cost.
#include "staleness_guard.h"

#include <cstdint>
#include <cstring>

namespace {

// Numbers and addresses of objects, in the order in which resnet_fast/chain/guard.py writes them. Its StalenessGuard
// holds the objects: no address is ever reused by a new one.
struct Reader {
  const uintptr_t* next;

  Py_ssize_t count() { return static_cast<Py_ssize_t>(*next++); }
  PyObject* object() { return reinterpret_cast<PyObject*>(*next++); }
  uint64_t hash() { return *next++; }
};

// A module: its class, its own forward where `forward` is given, and the named attributes.
bool same_module(Reader& snapshot, PyObject* forward) {
  PyObject *module = snapshot.object(), *kind = snapshot.object(), *attributes = snapshot.object();
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind) return false;
  PyObject* own = snapshot.object();  // null where forward is that of the class
  if (forward != nullptr && PyDict_GetItemWithError(attributes, forward) != own) return false;
  for (Py_ssize_t i = snapshot.count(); i > 0; --i) {
    PyObject *name = snapshot.object(), *value = snapshot.object();
    if (PyDict_GetItemWithError(attributes, name) != value) return false;
  }
  return true;
}

// All values of a dict, in their order.
bool same_values(Reader& snapshot) {
  PyObject *dict = snapshot.object(), *value;
  const Py_ssize_t count = snapshot.count();
  if (PyDict_Size(dict) != count) return false;
  if (count == 0) return true;
  if (!PyDict_CheckExact(dict)) {  // an OrderedDict has an order of its own
    PyObject* values = PyMapping_Values(dict);
    bool same = values != nullptr;
    for (Py_ssize_t i = 0; same && i < count; ++i) same = PyList_GetItem(values, i) == snapshot.object();
    Py_XDECREF(values);
    return same;
  }
  Py_ssize_t next = 0;
  while (PyDict_Next(dict, &next, nullptr, &value))
    if (value != snapshot.object()) return false;
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

// A hash of a sample of the bytes: all of a small tensor, eight cache lines of a large one, evenly spread from its
// first byte to its last. More lines would take longer than the kernels of a small network.
constexpr size_t kLine = 64, kLines = 8, kWords = kLine / sizeof(uint64_t);

// A chain of multiplications for each word of a line, so that latencies overlap. Each step is a bijection: tensors that
// differ in a single word never hash alike.
struct Fingerprint {
  uint64_t lanes[kWords] = {1, 2, 3, 4, 5, 6, 7, 8};

  void add(const unsigned char* bytes, size_t count) {
    uint64_t words[kWords] = {};
    std::memcpy(words, bytes, count);
    for (size_t i = 0; i < kWords; ++i) {
      const uint64_t mixed = (lanes[i] ^ words[i]) * 0x9E3779B97F4A7C15ull;
      // A multiplication carries upwards only: without the rotation the signs of two numbers would cancel in the top
      // bit.
      lanes[i] = mixed << 31 | mixed >> 33;
    }
  }

  uint64_t value() const {
    uint64_t all = 0;
    for (uint64_t lane : lanes) all = (all ^ lane ^ (lane >> 32)) * 0x9E3779B97F4A7C15ull;
    return all;
  }
};

uint64_t hash_of(const unsigned char* bytes, size_t count) {
  Fingerprint print;
  if (count <= kLines * kLine) {
    for (size_t at = 0; at < count; at += kLine) print.add(bytes + at, count - at < kLine ? count - at : kLine);
    return print.value();
  }
  for (size_t i = 0; i + 1 < kLines; ++i)  // whole cache lines: a tensor starts on one
    print.add(bytes + count / (kLines - 1) * i / kLine * kLine, kLine);
  print.add(bytes + count - kLine, kLine);
  return print.value();
}

bool same(Reader snapshot) {
  static PyObject* const forward = PyUnicode_InternFromString("forward");
  // The first module is the one that is called, whichever forward it has.
  for (Py_ssize_t i = 0, count = snapshot.count(); i < count; ++i)
    if (!same_module(snapshot, i == 0 ? nullptr : forward)) return false;
  for (Py_ssize_t i = snapshot.count(); i > 0; --i)
    if (!same_values(snapshot)) return false;
  // Methods first: they return the addresses. A tensor replaced by an inference tensor has no version to ask for, and
  // freed memory must not be read.
  for (Py_ssize_t i = snapshot.count(); i > 0; --i) {
    PyObject *method = snapshot.object(), *value = snapshot.object();
    if (!equal(PyObject_CallNoArgs(method), value)) return false;
  }
  for (Py_ssize_t i = snapshot.count(); i > 0; --i)
    if (!same_attributes(snapshot)) return false;
  for (Py_ssize_t i = snapshot.count(); i > 0; --i) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(snapshot.object());
    const Py_ssize_t count = snapshot.count();
    if (hash_of(bytes, static_cast<size_t>(count)) != snapshot.hash()) return false;
  }
  return true;
}

}  // namespace

PyObject* is_valid(PyObject*, PyObject* snapshot) {
  const char* bytes = PyBytes_AsString(snapshot);
  if (bytes == nullptr) return nullptr;
  const bool is = same({reinterpret_cast<const uintptr_t*>(bytes)});
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(is);
}

PyObject* fingerprint(PyObject*, PyObject* place) {
  if (!PyTuple_Check(place) || PyTuple_Size(place) != 2) {
    PyErr_SetString(PyExc_TypeError, "place is no pair, want (address, bytes)");
    return nullptr;
  }
  PyObject *address = PyTuple_GetItem(place, 0), *bytes = PyTuple_GetItem(place, 1);
  if (address == nullptr || bytes == nullptr) return nullptr;
  const auto* memory = static_cast<const unsigned char*>(PyLong_AsVoidPtr(address));
  const size_t count = PyLong_AsSize_t(bytes);
  if (PyErr_Occurred()) return nullptr;
  return PyLong_FromUnsignedLongLong(hash_of(memory, count));
}

// One call from Python for all that is asked, and one array of addresses from front to back: between two calls the
// kernels have emptied the caches, and what is read here is most of what the question costs.
#include "watch.h"

#include <cstdint>

namespace {

// Numbers and addresses of objects, in the order in which resnet_fast/watch.py writes them. Its Watch holds the
// objects, so no address is ever that of something new.
struct Reader {
  const uintptr_t* place;

  Py_ssize_t count() { return static_cast<Py_ssize_t>(*place++); }
  PyObject* object() { return reinterpret_cast<PyObject*>(*place++); }
};

// Modules: the class, that forward is the class's own where `forward` is given, and the named attributes.
bool same_module(Reader& was, PyObject* forward) {
  PyObject *module = was.object(), *kind = was.object(), *attributes = was.object();
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind) return false;
  if (forward != nullptr && PyDict_GetItemWithError(attributes, forward) != nullptr) return false;
  for (Py_ssize_t i = was.count(); i > 0; --i) {
    PyObject *name = was.object(), *value = was.object();
    if (PyDict_GetItemWithError(attributes, name) != value) return false;
  }
  return true;
}

// All values of a dict, in their order.
bool same_values(Reader& was) {
  PyObject *dict = was.object(), *value;
  const Py_ssize_t count = was.count();
  if (PyDict_Size(dict) != count) return false;
  if (!PyDict_CheckExact(dict)) {  // an OrderedDict has an order of its own
    PyObject* values = PyMapping_Values(dict);
    bool same = values != nullptr;
    for (Py_ssize_t i = 0; same && i < count; ++i) same = PyList_GetItem(values, i) == was.object();
    Py_XDECREF(values);
    return same;
  }
  Py_ssize_t next = 0;
  while (PyDict_Next(dict, &next, nullptr, &value))
    if (value != was.object()) return false;
  return true;
}

bool equal(PyObject* now, PyObject* before) {
  if (now == nullptr) return false;
  const bool same = now == before || PyObject_RichCompareBool(now, before, Py_EQ) == 1;
  Py_DECREF(now);
  return same;
}

// What an attribute's descriptor gives of each object. Its slot itself: an attribute's name would be looked up each
// time.
bool same_attributes(Reader& was) {
  PyObject* descriptor = was.object();
  const auto get = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(descriptor), Py_tp_descr_get));
  for (Py_ssize_t i = was.count(); i > 0; --i) {
    PyObject *object = was.object(), *value = was.object();
    if (!equal(get(descriptor, object, reinterpret_cast<PyObject*>(Py_TYPE(object))), value)) return false;
  }
  return true;
}

bool same(Reader was) {
  static PyObject* const forward = PyUnicode_InternFromString("forward");
  // The first module is the one that is called: by its forward, whosever that is.
  for (Py_ssize_t i = 0, count = was.count(); i < count; ++i)
    if (!same_module(was, i == 0 ? nullptr : forward)) return false;
  for (Py_ssize_t i = was.count(); i > 0; --i)
    if (!same_values(was)) return false;
  for (Py_ssize_t i = was.count(); i > 0; --i)
    if (PyDict_Size(was.object()) != 0) return false;
  for (Py_ssize_t i = was.count(); i > 0; --i)
    if (!same_attributes(was)) return false;
  for (Py_ssize_t i = was.count(); i > 0; --i) {
    PyObject *method = was.object(), *value = was.object();
    if (!equal(PyObject_CallNoArgs(method), value)) return false;
  }
  return true;
}

}  // namespace

PyObject* unchanged(PyObject*, PyObject* snapshot) {
  const char* bytes = PyBytes_AsString(snapshot);
  if (bytes == nullptr) return nullptr;
  const bool is = same({reinterpret_cast<const uintptr_t*>(bytes)});
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(is);
}

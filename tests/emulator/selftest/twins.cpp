// A Python module that calls kernels, without pybind11, which takes seven seconds to compile.
#include <Python.h>

int triple(int number);
int quintuple(int number);
int launch_in_pairs();

static PyObject* call(PyObject* argument, int (*function)(int)) {
  return PyLong_FromLong(function(static_cast<int>(PyLong_AsLong(argument))));
}
static PyMethodDef methods[] = {
    {"triple", [](PyObject*, PyObject* x) { return call(x, triple); }, METH_O, nullptr},
    {"quintuple", [](PyObject*, PyObject* x) { return call(x, quintuple); }, METH_O, nullptr},
    {"launch_in_pairs", [](PyObject*, PyObject*) { return PyLong_FromLong(launch_in_pairs()); },
     METH_NOARGS, nullptr},
    {},
};

PyMODINIT_FUNC PyInit_twins() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "twins", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

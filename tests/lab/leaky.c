/* An extension that leaks: what it takes by malloc, neither Python nor its allocation tracing sees.

   Built by tests/roles/test_leak_patterns.py; the tasks `native` and `native_mended` of boxoffice/leaks.py call it. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>

static void *
touched(Py_ssize_t size)
{
    char *block = size > 0 ? malloc((size_t)size) : NULL;
    if (block == NULL) {
        PyErr_SetString(PyExc_MemoryError, "no block of that size");
        return NULL;
    }
    /* Memory that nobody wrote to takes no RSS; and a memset that nobody reads after, the compiler leaves out. */
    for (Py_ssize_t at = 0; at < size; at += 1024)
        ((volatile char *)block)[at] = 1;
    return block;
}

static PyObject *
hold(PyObject *module, PyObject *argument)
{
    Py_ssize_t size = PyLong_AsSsize_t(argument);
    if (size == -1 && PyErr_Occurred())
        return NULL;
    if (touched(size) == NULL) /* the leak: the address is forgotten */
        return NULL;
    return PyLong_FromSsize_t(size);
}

static PyObject *
hold_and_free(PyObject *module, PyObject *argument)
{
    Py_ssize_t size = PyLong_AsSsize_t(argument);
    if (size == -1 && PyErr_Occurred())
        return NULL;
    void *block = touched(size);
    if (block == NULL)
        return NULL;
    free(block);
    return PyLong_FromSsize_t(size);
}

static PyMethodDef methods[] = {
    {"hold", hold, METH_O, "Take that many bytes and never give them back."},
    {"hold_and_free", hold_and_free, METH_O, "Take that many bytes and give them back."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "leaky",
    .m_doc = "Takes memory outside of Python.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC
PyInit_leaky(void)
{
    return PyModuleDef_Init(&definition);
}

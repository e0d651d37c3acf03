/* A model of the parts of CPython's API that _accelerator.c uses, for the proofs of CBMC.
 *
 * A function returns whatever CPython may return: each type of object, each size, and each failure. It asserts what CPython
 * requires of its caller:
 *
 * - An object is alive when it is used: the caller holds a reference to it or to what contains it.
 * - A reference is given up only by its holder. `finish` asserts that none but the result is left at the end.
 * - An index is within its container, and each function gets the type of object that it is for.
 *
 * It leaves out: that Python code, which a call may run, changes the objects of a request meanwhile. */

#ifndef MODEL_PYTHON_H
#define MODEL_PYTHON_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef ptrdiff_t Py_ssize_t;
#define PY_SSIZE_T_MAX PTRDIFF_MAX

/* The largest bytes object: more than fits into a frame, less than the largest object of CBMC. */
#define MODEL_LARGEST ((Py_ssize_t)1 << 40)

/* How many items of a container are remembered, so that they are the same each time. */
#define MODEL_ITEMS 8

typedef enum {
    OTHER, NONE, INT, INT_SUBCLASS, BYTES, BYTES_SUBCLASS, ODD_BYTES, STR, STR_SUBCLASS, TUPLE, LIST, DICT, FROZENSET, KINDS
} Kind;

typedef struct object PyObject;
typedef struct object PyTypeObject;
struct object {
    Kind kind;
    int is_of_caller;   /* alive during the whole call */
    Py_ssize_t held;    /* references that the code under proof holds */
    PyObject *parent;   /* a container that holds a reference */
    PyObject *type;
    Py_ssize_t size;    /* of bytes, or items */
    unsigned char *bytes;
    int is_uint64;      /* whether a number is within 64 bits without sign */
    uint64_t number;
    PyObject *items[MODEL_ITEMS];
};

typedef enum { NO_ERROR, MEMORY_ERROR, OTHER_ERROR } Error;

extern Error model_error;
extern Py_ssize_t model_held; /* the sum of `held` of all objects */
extern PyObject model_none, model_true, model_false, PyBytes_Type, model_error_object;

/* For harnesses. */
PyObject *model_argument(void);                         /* any object, which the caller holds */
PyObject *model_bytes(Py_ssize_t size);                 /* bytes, which the caller holds */
PyObject *model_new(Kind kind);                         /* a new object, or NULL with an exception */
PyObject *model_any(void);                              /* a new object of any type, or NULL with an exception */
void model_own(PyObject *object);                       /* the code under proof holds a reference from now on */
int model_is_alive(const PyObject *object);
void model_finish(PyObject *result);                    /* what each function has to have done when it returns */
void model_fail(void);                                  /* raise any exception */

/* References. */
void Py_INCREF(PyObject *object);
void Py_DECREF(PyObject *object);
void Py_XDECREF(PyObject *object);
void model_clear(PyObject **name);
#define Py_CLEAR(name) model_clear(&(name)) /* without CPython's loops around a statement, which would be numbered */
#define Py_None (&model_none)
#define Py_RETURN_TRUE return PyBool_FromLong(1)
#define Py_RETURN_FALSE return PyBool_FromLong(0)

/* Exceptions. */
PyObject *PyErr_Occurred(void);
void PyErr_Clear(void);
int PyErr_ExceptionMatches(PyObject *type);
#define PyExc_MemoryError (&model_error_object)

/* Types. */
#define Py_tp_richcompare 67
int model_is(const PyObject *object, Kind first, Kind last);
#define PyLong_CheckExact(o) model_is(o, INT, INT)
#define PyBytes_CheckExact(o) model_is(o, BYTES, BYTES)
#define PyBytes_Check(o) model_is(o, BYTES, ODD_BYTES)
#define PyUnicode_CheckExact(o) model_is(o, STR, STR)
#define PyTuple_CheckExact(o) model_is(o, TUPLE, TUPLE)
#define PyList_CheckExact(o) model_is(o, LIST, LIST)
#define PyDict_CheckExact(o) model_is(o, DICT, DICT)
#define PyFrozenSet_CheckExact(o) model_is(o, FROZENSET, FROZENSET)
PyTypeObject *Py_TYPE(PyObject *object);
void *PyType_GetSlot(PyTypeObject *type, int slot);

/* Objects. */
unsigned long long PyLong_AsUnsignedLongLong(PyObject *object);
PyObject *PyLong_FromUnsignedLong(unsigned long value);
PyObject *PyLong_FromUnsignedLongLong(unsigned long long value);
PyObject *PyLong_FromLongLong(long long value);
PyObject *PyLong_FromSize_t(size_t value);
PyObject *PyBool_FromLong(long value);
Py_ssize_t PyBytes_Size(PyObject *object);
char *PyBytes_AsString(PyObject *object);
PyObject *PyBytes_FromStringAndSize(const char *bytes, Py_ssize_t size);
int PyUnicode_CompareWithASCIIString(PyObject *object, const char *text);
PyObject *PyTuple_New(Py_ssize_t size);
Py_ssize_t PyTuple_Size(PyObject *object);
PyObject *PyTuple_GetItem(PyObject *object, Py_ssize_t index);
int PyTuple_SetItem(PyObject *object, Py_ssize_t index, PyObject *item);
PyObject *PyList_New(Py_ssize_t size);
Py_ssize_t PyList_Size(PyObject *object);
PyObject *PyList_GetItem(PyObject *object, Py_ssize_t index);
int PyList_Append(PyObject *object, PyObject *item);
PyObject *PyList_AsTuple(PyObject *object);
PyObject *PyDict_New(void);
Py_ssize_t PyDict_Size(PyObject *object);
int PyDict_Next(PyObject *object, Py_ssize_t *at, PyObject **key, PyObject **value);
PyObject *PyDict_GetItemWithError(PyObject *object, PyObject *key);
Py_ssize_t PySet_Size(PyObject *object);
int PySet_Contains(PyObject *object, PyObject *key);

/* Calls. */
PyObject *model_call(PyObject *function, PyObject *argument);
PyObject *model_pack(PyObject *first, PyObject *second, PyObject *third);
#define PyObject_CallFunctionObjArgs(function, argument, end) model_call(function, argument)
#define PyTuple_Pack(count, first, second, third) model_pack(first, second, third)
PyObject *PyObject_CallObject(PyObject *function, PyObject *arguments);
PyObject *PyImport_ImportModule(const char *name);
PyObject *PyObject_GetAttrString(PyObject *object, const char *name);
PyObject *PyMapping_GetItemString(PyObject *object, const char *name);

/* Modules: declared only. */
typedef PyObject *(*PyCFunction)(PyObject *, PyObject *);
typedef struct { const char *name; PyCFunction function; int flags; const char *doc; } PyMethodDef;
typedef struct { int slot; void *value; } PyModuleDef_Slot;
struct PyModuleDef {
    int base; const char *name; const char *doc; Py_ssize_t size; PyMethodDef *methods; PyModuleDef_Slot *m_slots;
    void *traverse, *clear, *free;
};
#define PyModuleDef_HEAD_INIT 0
#define METH_FASTCALL 0x80
#define PyMODINIT_FUNC PyObject *
#define Py_UNUSED(name) unused_##name
extern const unsigned long Py_Version;
PyObject *PyModuleDef_Init(struct PyModuleDef *definition);

#endif

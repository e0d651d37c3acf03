/* The functions of Python.h in this folder. */

#include "Python.h"

Error model_error;
Py_ssize_t model_held;
PyObject model_none = {.kind = NONE, .is_of_caller = 1};
PyObject model_true = {.kind = OTHER, .is_of_caller = 1};
PyObject model_false = {.kind = OTHER, .is_of_caller = 1};
PyObject PyBytes_Type = {.kind = OTHER, .is_of_caller = 1};
PyObject model_error_object = {.kind = OTHER, .is_of_caller = 1};

int nondet_int(void);
_Bool nondet_bool(void);
Py_ssize_t nondet_size(void);
uint64_t nondet_uint64(void);

static PyObject *
allocate(Kind kind)
{
    PyObject *object = malloc(sizeof(PyObject));
    object->kind = kind;
    object->is_of_caller = 0;
    object->held = 0;
    object->parent = NULL;
    object->type = NULL;
    object->bytes = NULL;
    object->size = 0;
    for (int i = 0; i < MODEL_ITEMS; i++)
        object->items[i] = NULL;
    return object;
}

/* An object of any type but None, which is one object. */
static PyObject *
allocate_any(void)
{
    Kind kind = (Kind)nondet_int();
    __CPROVER_assume(kind >= OTHER && kind < KINDS && kind != NONE);
    PyObject *object = allocate(kind);
    object->size = nondet_size();
    __CPROVER_assume(object->size >= 0 && object->size <= MODEL_LARGEST);
    object->is_uint64 = nondet_bool();
    object->number = nondet_uint64();
    return object;
}

PyObject *
model_argument(void)
{
    if (nondet_bool())
        return &model_none;
    PyObject *object = allocate_any();
    object->is_of_caller = 1;
    return object;
}

PyObject *
model_bytes(Py_ssize_t size)
{
    PyObject *object = allocate(BYTES);
    object->is_of_caller = 1;
    object->size = size;
    object->bytes = malloc((size_t)size);
    return object;
}

void
model_fail(void)
{
    model_error = nondet_bool() ? MEMORY_ERROR : OTHER_ERROR;
}

void
model_own(PyObject *object)
{
    object->held++;
    model_held++;
}

static PyObject *
owned(PyObject *object)
{
    if (nondet_bool()) {
        model_error = MEMORY_ERROR;
        return NULL;
    }
    model_own(object);
    return object;
}

PyObject *
model_new(Kind kind)
{
    return owned(allocate(kind));
}

PyObject *
model_any(void)
{
    if (nondet_bool()) {
        model_fail();
        return NULL;
    }
    PyObject *object = nondet_bool() ? &model_none : allocate_any();
    model_own(object);
    return object;
}

int
model_is_alive(const PyObject *object)
{
    for (int depth = 0; depth < 5; depth++) {
        if (object == NULL)
            return 0;
        if (object->is_of_caller || object->held > 0)
            return 1;
        object = object->parent;
    }
    return 0;
}

static void
use(const PyObject *object)
{
    __CPROVER_assert(model_is_alive(object), "an object that is used is alive");
}

void
model_finish(PyObject *result)
{
    __CPROVER_assert((result == NULL) == (model_error != NO_ERROR), "a result, or an exception");
    if (result != NULL)
        Py_DECREF(result);
    __CPROVER_assert(model_held == 0, "no reference leaks");
}

/* --- references ------------------------------------------------------------------------------------ */

void
Py_INCREF(PyObject *object)
{
    use(object);
    model_own(object);
}

static void
give_up(PyObject *object)
{
    __CPROVER_assert(object != NULL, "the reference is not NULL");
    __CPROVER_assert(object->held > 0, "a reference is given up by its holder");
    object->held--;
    model_held--;
}

void
Py_DECREF(PyObject *object)
{
    give_up(object);
}

void
Py_XDECREF(PyObject *object)
{
    if (object != NULL)
        give_up(object);
}

void
model_clear(PyObject **name)
{
    PyObject *object = *name;
    *name = NULL;
    Py_XDECREF(object);
}

/* --- exceptions -------------------------------------------------------------------------------------- */

PyObject *
PyErr_Occurred(void)
{
    return model_error == NO_ERROR ? NULL : &model_error_object;
}

void
PyErr_Clear(void)
{
    model_error = NO_ERROR;
}

int
PyErr_ExceptionMatches(PyObject *type)
{
    __CPROVER_assert(model_error != NO_ERROR && type == PyExc_MemoryError, "an exception that is compared is set");
    return model_error == MEMORY_ERROR;
}

/* --- types ----------------------------------------------------------------------------------------------- */

int
model_is(const PyObject *object, Kind first, Kind last)
{
    use(object);
    return object->kind >= first && object->kind <= last;
}

static void
expect(const PyObject *object, Kind first, Kind last)
{
    __CPROVER_assert(model_is(object, first, last), "a function gets the type that it is for");
}

PyTypeObject *
Py_TYPE(PyObject *object)
{
    use(object);
    if (object->kind == BYTES)
        return &PyBytes_Type;
    if (object->type == NULL) {
        object->type = allocate(OTHER);
        object->type->is_of_caller = 1;
        object->type->number = object->kind == ODD_BYTES;
    }
    return object->type;
}

void *
PyType_GetSlot(PyTypeObject *type, int slot)
{
    __CPROVER_assert(slot == Py_tp_richcompare, "the slot is modelled");
    return type == &PyBytes_Type || type->number == 0 ? (void *)&PyBytes_Type : (void *)type;
}

/* --- numbers and bytes ----------------------------------------------------------------------------------- */

unsigned long long
PyLong_AsUnsignedLongLong(PyObject *object)
{
    expect(object, INT, INT_SUBCLASS);
    if (object->is_uint64)
        return object->number;
    model_error = OTHER_ERROR;
    return UINT64_MAX;
}

PyObject *
PyLong_FromUnsignedLongLong(unsigned long long value)
{
    PyObject *object = model_new(INT);
    if (object != NULL) {
        object->is_uint64 = 1;
        object->number = value;
    }
    return object;
}

PyObject *
PyLong_FromUnsignedLong(unsigned long value)
{
    return PyLong_FromUnsignedLongLong(value);
}

PyObject *
PyLong_FromSize_t(size_t value)
{
    return PyLong_FromUnsignedLongLong(value);
}

PyObject *
PyLong_FromLongLong(long long value)
{
    PyObject *object = PyLong_FromUnsignedLongLong((unsigned long long)value);
    if (object != NULL)
        object->is_uint64 = value >= 0;
    return object;
}

PyObject *
PyBool_FromLong(long value)
{
    PyObject *result = value ? &model_true : &model_false;
    model_own(result);
    return result;
}

Py_ssize_t
PyBytes_Size(PyObject *object)
{
    expect(object, BYTES, ODD_BYTES);
    return object->size;
}

char *
PyBytes_AsString(PyObject *object)
{
    expect(object, BYTES, ODD_BYTES);
    if (object->bytes == NULL)
        object->bytes = malloc((size_t)object->size);
    return (char *)object->bytes;
}

PyObject *
PyBytes_FromStringAndSize(const char *bytes, Py_ssize_t size)
{
    __CPROVER_assert(size >= 0, "a size is not negative");
    __CPROVER_assert(bytes == NULL || __CPROVER_r_ok(bytes, (size_t)size), "bytes that are copied can be read");
    PyObject *object = model_new(BYTES);
    if (object != NULL)
        object->size = size;
    return object;
}

int
PyUnicode_CompareWithASCIIString(PyObject *object, const char *text)
{
    expect(object, STR, STR_SUBCLASS);
    __CPROVER_assert(text[0] != 0, "the text is not empty");
    return nondet_int();
}

/* --- containers ------------------------------------------------------------------------------------------ */

/* A borrowed reference to an item, which is the same each time. */
static PyObject *
item(PyObject *container, Py_ssize_t index)
{
    __CPROVER_assert(index >= 0 && index < MODEL_ITEMS, "the item is modelled");
    if (container->items[index] == NULL) {
        PyObject *made = nondet_bool() ? &model_none : allocate_any();
        if (made != &model_none)
            made->parent = container;
        container->items[index] = made;
    }
    return container->items[index];
}

PyObject *
PyTuple_New(Py_ssize_t size)
{
    __CPROVER_assert(size >= 0, "a size is not negative");
    PyObject *tuple = model_new(TUPLE);
    if (tuple != NULL)
        tuple->size = size;
    return tuple;
}

Py_ssize_t
PyTuple_Size(PyObject *object)
{
    expect(object, TUPLE, TUPLE);
    return object->size;
}

PyObject *
PyTuple_GetItem(PyObject *object, Py_ssize_t index)
{
    if (!model_is(object, TUPLE, TUPLE) || index < 0 || index >= object->size) {
        model_error = OTHER_ERROR;
        return NULL;
    }
    return item(object, index);
}

int
PyTuple_SetItem(PyObject *object, Py_ssize_t index, PyObject *added)
{
    expect(object, TUPLE, TUPLE);
    __CPROVER_assert(index >= 0 && index < object->size, "an index is within its tuple");
    give_up(added);
    if (!model_is_alive(added))
        added->parent = object;
    if (index < MODEL_ITEMS) {
        __CPROVER_assert(object->items[index] == NULL, "an item of a tuple is set once");
        object->items[index] = added;
    }
    return 0;
}

PyObject *
PyList_New(Py_ssize_t size)
{
    __CPROVER_assert(size == 0, "a new list is empty");
    return model_new(LIST);
}

Py_ssize_t
PyList_Size(PyObject *object)
{
    expect(object, LIST, LIST);
    return object->size;
}

PyObject *
PyList_GetItem(PyObject *object, Py_ssize_t index)
{
    expect(object, LIST, LIST);
    __CPROVER_assert(index >= 0 && index < object->size, "an index is within its list");
    return item(object, index);
}

int
PyList_Append(PyObject *object, PyObject *added)
{
    expect(object, LIST, LIST);
    use(added);
    if (nondet_bool()) {
        model_error = MEMORY_ERROR;
        return -1;
    }
    if (!model_is_alive(added))
        added->parent = object;
    object->size++;
    return 0;
}

PyObject *
PyList_AsTuple(PyObject *object)
{
    expect(object, LIST, LIST);
    PyObject *tuple = model_new(TUPLE);
    if (tuple != NULL)
        tuple->size = object->size;
    return tuple;
}

PyObject *
PyDict_New(void)
{
    return model_new(DICT);
}

Py_ssize_t
PyDict_Size(PyObject *object)
{
    expect(object, DICT, DICT);
    return object->size;
}

int
PyDict_Next(PyObject *object, Py_ssize_t *at, PyObject **key, PyObject **value)
{
    expect(object, DICT, DICT);
    if (*at >= object->size)
        return 0;
    *key = item(object, *at * 2);
    *value = item(object, *at * 2 + 1);
    *at += 1;
    return 1;
}

PyObject *
PyDict_GetItemWithError(PyObject *object, PyObject *key)
{
    expect(object, DICT, DICT);
    use(key);
    if (nondet_bool())
        return nondet_bool() ? &PyBytes_Type : &model_none; /* one that may be the type of a value, and another */
    if (nondet_bool())
        model_fail();
    return NULL;
}

Py_ssize_t
PySet_Size(PyObject *object)
{
    expect(object, FROZENSET, FROZENSET);
    return object->size;
}

int
PySet_Contains(PyObject *object, PyObject *key)
{
    use(object);
    use(key);
    if (object->kind == FROZENSET && nondet_bool())
        return nondet_bool();
    model_fail(); /* the key cannot be hashed, or the object is another */
    return -1;
}

/* --- calls ----------------------------------------------------------------------------------------------- */

PyObject *
model_call(PyObject *function, PyObject *argument)
{
    use(function);
    use(argument);
    return model_any();
}

PyObject *
model_pack(PyObject *first, PyObject *second, PyObject *third)
{
    use(first);
    use(second);
    use(third);
    PyObject *tuple = model_new(TUPLE);
    if (tuple != NULL)
        tuple->size = 3;
    return tuple;
}

PyObject *
PyObject_CallObject(PyObject *function, PyObject *arguments)
{
    expect(arguments, TUPLE, TUPLE);
    return model_call(function, arguments);
}

PyObject *
PyImport_ImportModule(const char *name)
{
    __CPROVER_assert(name[0] != 0, "the name is not empty");
    return model_any();
}

PyObject *
PyObject_GetAttrString(PyObject *object, const char *name)
{
    use(object);
    __CPROVER_assert(name[0] != 0, "the name is not empty");
    return model_any();
}

PyObject *
PyMapping_GetItemString(PyObject *object, const char *name)
{
    use(object);
    __CPROVER_assert(name != NULL, "there is a name");
    return model_any();
}

/* The functions of requests and logins in C.
 *
 * encode_frame, encode_frames, scan_body, fits and wall_ms have Python functions of the same names, to which they pass on calls with
 * other than the usual types and ranges, so that results and errors are the same by construction. read_requests and
 * cut_values read what is common, and leave the rest to the general path of a connection.
 *
 * Compiled for the stable ABI of Python 3.11 where there is one (setup.py). There is no state: several interpreters
 * and threads may use the module at once. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

/* Offsets of the fields of a frame (zcp1.md, section 5). */
enum { HEAD = 4, STREAM = 8, TIMESTAMP = 12, SALT = 20, COUNTER = 28, TOKEN = 36, BODY = 68 };
enum { LENGTH_SIZE = HEAD, MIN_LENGTH = BODY - LENGTH_SIZE, SALT_SIZE = COUNTER - SALT, TOKEN_SIZE = BODY - TOKEN };

typedef const unsigned char *Bytes;

static inline uint32_t
get32(Bytes p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static inline uint64_t
get64(Bytes p)
{
    return (uint64_t)get32(p) << 32 | get32(p + 4);
}

static inline void
put32(unsigned char *p, uint64_t value)
{
    p[0] = (unsigned char)(value >> 24);
    p[1] = (unsigned char)(value >> 16);
    p[2] = (unsigned char)(value >> 8);
    p[3] = (unsigned char)value;
}

static inline void
put64(unsigned char *p, uint64_t value)
{
    put32(p, value >> 32);
    put32(p + 4, value);
}

/* Return whether a value is an int from 0 to `most`, no subclass; store it. Never leaves an exception. */
static int
is_uint(PyObject *value, uint64_t most, uint64_t *out)
{
    if (!PyLong_CheckExact(value))
        return 0;
    *out = PyLong_AsUnsignedLongLong(value);
    if (*out == UINT64_MAX && PyErr_Occurred()) {
        PyErr_Clear();
        return 0;
    }
    return *out <= most;
}

typedef enum { PLAIN, COMPARED_AS_PLAIN, ANY_SUBCLASS } Allowed;

/* Return whether a value is bytes, or also such a subclass; store them. `size` is the only allowed one, or -1. */
static int
is_bytes(PyObject *value, Allowed allowed, Py_ssize_t size, Bytes *out)
{
    if (!PyBytes_CheckExact(value)) {
        if (allowed == PLAIN || !PyBytes_Check(value))
            return 0;
        if (allowed == COMPARED_AS_PLAIN && PyType_GetSlot(Py_TYPE(value), Py_tp_richcompare) !=
                                                PyType_GetSlot(&PyBytes_Type, Py_tp_richcompare))
            return 0;
    }
    if (size >= 0 && PyBytes_Size(value) != size)
        return 0;
    *out = (Bytes)PyBytes_AsString(value);
    return 1;
}

/* Return the result of the Python function of this name (zcproto/accelerator.py). */
static PyObject *
call_reference(const char *name, PyObject *const *args, Py_ssize_t nargs)
{
    PyObject *module = PyImport_ImportModule("zcproto.accelerator");
    PyObject *references = module == NULL ? NULL : PyObject_GetAttrString(module, "references");
    PyObject *function = references == NULL ? NULL : PyMapping_GetItemString(references, name);
    PyObject *all = function == NULL ? NULL : PyTuple_New(nargs), *result = NULL;
    for (Py_ssize_t i = 0; all != NULL && i < nargs; i++) {
        Py_INCREF(args[i]);
        PyTuple_SetItem(all, i, args[i]);
    }
    if (all != NULL)
        result = PyObject_CallObject(function, all);
    Py_XDECREF(all);
    Py_XDECREF(function);
    Py_XDECREF(references);
    Py_XDECREF(module);
    return result;
}

/* Return a tuple of these new references, or NULL if one of them is. */
static PyObject *
tuple_of(PyObject **parts, Py_ssize_t count)
{
    Py_ssize_t found = 0;
    while (found < count && parts[found] != NULL)
        found++;
    PyObject *result = found == count ? PyTuple_New(count) : NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (result != NULL)
            PyTuple_SetItem(result, i, parts[i]);
        else
            Py_XDECREF(parts[i]);
    }
    return result;
}

/* What a frame must have to be read here. */
typedef struct {
    uint64_t limit, head, counter, wall, tolerance;
    Bytes salt, token;
} Rules;

/* Read the first arguments of cut_values. Return 0 if they are of other types or ranges. */
static int
read_rules(PyObject *const *args, Py_ssize_t nargs, Bytes *data, Rules *rules)
{
    return nargs == 8 && is_bytes(args[0], PLAIN, -1, data) && is_uint(args[1], UINT64_MAX, &rules->limit) &&
           is_uint(args[2], UINT64_MAX, &rules->head) && is_bytes(args[3], PLAIN, SALT_SIZE, &rules->salt) &&
           is_uint(args[4], UINT64_MAX, &rules->counter) &&
           is_bytes(args[5], COMPARED_AS_PLAIN, TOKEN_SIZE, &rules->token) &&
           is_uint(args[6], UINT64_MAX, &rules->wall) && is_uint(args[7], UINT64_MAX, &rules->tolerance);
}

/* Return the size of the frame at the start of `left` bytes, or 0 if it does not meet the rules. */
static size_t
fitting_size(const Rules *rules, Bytes frame, size_t left)
{
    if (left < BODY)
        return 0;
    uint64_t length = get32(frame), timestamp = get64(frame + TIMESTAMP);
    uint64_t age = rules->wall > timestamp ? rules->wall - timestamp : timestamp - rules->wall;
    if (length < MIN_LENGTH || length > rules->limit || length > left - LENGTH_SIZE ||
        get32(frame + HEAD) != rules->head || get32(frame + STREAM) == 0 || age > rules->tolerance ||
        get64(frame + COUNTER) <= rules->counter || memcmp(frame + SALT, rules->salt, SALT_SIZE) != 0 ||
        memcmp(frame + TOKEN, rules->token, TOKEN_SIZE) != 0)
        return 0;
    return LENGTH_SIZE + (size_t)length;
}

/* Store borrowed references to the items of a tuple. Return whether it has so many. */
static int
unpack_tuple(PyObject *tuple, Py_ssize_t count, PyObject **items)
{
    if (!PyTuple_CheckExact(tuple) || PyTuple_Size(tuple) != count)
        return 0;
    for (Py_ssize_t i = 0; i < count; i++)
        items[i] = PyTuple_GetItem(tuple, i);
    return 1;
}

/* A frame to encode. */
typedef struct {
    uint64_t head, stream, timestamp, counter;
    Bytes salt, token, body;
    Py_ssize_t size;
} Frame;

/* Read a body. Return 0 if it is of another type or too large. */
static int
read_body(PyObject *value, Frame *frame)
{
    if (!is_bytes(value, PLAIN, -1, &frame->body))
        return 0;
    frame->size = PyBytes_Size(value);
    return frame->size <= PY_SSIZE_T_MAX - BODY && (uint64_t)frame->size <= UINT32_MAX - MIN_LENGTH;
}

/* Write a frame, and return its end. */
static unsigned char *
write_frame(unsigned char *p, const Frame *frame)
{
    put32(p, MIN_LENGTH + (uint64_t)frame->size);
    put32(p + HEAD, frame->head);
    put32(p + STREAM, frame->stream);
    put64(p + TIMESTAMP, frame->timestamp);
    memcpy(p + SALT, frame->salt, SALT_SIZE);
    put64(p + COUNTER, frame->counter);
    memcpy(p + TOKEN, frame->token, TOKEN_SIZE);
    memcpy(p + BODY, frame->body, (size_t)frame->size);
    return p + BODY + frame->size;
}

/* encode_frame(head, stream, timestamp, salt, counter, token, body) */
static PyObject *
encode_frame(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    Frame frame;
    if (nargs != 7 || !is_uint(args[0], UINT32_MAX, &frame.head) || !is_uint(args[1], UINT32_MAX, &frame.stream) ||
        !is_uint(args[2], UINT64_MAX, &frame.timestamp) ||
        !is_bytes(args[3], ANY_SUBCLASS, SALT_SIZE, &frame.salt) ||
        !is_uint(args[4], UINT64_MAX, &frame.counter) ||
        !is_bytes(args[5], ANY_SUBCLASS, TOKEN_SIZE, &frame.token) || !read_body(args[6], &frame))
        return call_reference("encode_frame", args, nargs);
    PyObject *result = PyBytes_FromStringAndSize(NULL, BODY + frame.size);
    if (result != NULL)
        write_frame((unsigned char *)PyBytes_AsString(result), &frame);
    return result;
}

/* Read a frame of encode_frames. Return 0 if it is of other types or ranges. */
static int
read_frame(PyObject *value, Frame *frame)
{
    PyObject *parts[5];
    return unpack_tuple(value, 5, parts) && is_uint(parts[0], UINT32_MAX, &frame->head) &&
           is_uint(parts[1], UINT32_MAX, &frame->stream) && is_uint(parts[2], UINT64_MAX, &frame->timestamp) &&
           is_bytes(parts[3], ANY_SUBCLASS, TOKEN_SIZE, &frame->token) && read_body(parts[4], frame);
}

/* encode_frames(frames, salt, counter) */
static PyObject *
encode_frames(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    Frame frame;
    if (nargs != 3 || !PyList_CheckExact(args[0]) || !is_bytes(args[1], ANY_SUBCLASS, SALT_SIZE, &frame.salt) ||
        !is_uint(args[2], (uint64_t)1 << 63, &frame.counter))
        return call_reference("encode_frames", args, nargs);
    PyObject *frames = PyList_AsTuple(args[0]); /* another thread may change the list */
    if (frames == NULL)
        return NULL;
    Py_ssize_t count = PyTuple_Size(frames), size = 0, i = 0;
    while (i < count && read_frame(PyTuple_GetItem(frames, i), &frame) && frame.size <= PY_SSIZE_T_MAX - BODY - size) {
        size += BODY + frame.size;
        i++;
    }
    PyObject *result = i < count ? call_reference("encode_frames", args, nargs) : PyBytes_FromStringAndSize(NULL, size);
    unsigned char *p = i < count || result == NULL ? NULL : (unsigned char *)PyBytes_AsString(result);
    for (i = 0; p != NULL && i < count; i++, frame.counter++) {
        if (read_frame(PyTuple_GetItem(frames, i), &frame))
            p = write_frame(p, &frame);
    }
    Py_DECREF(frames);
    return result;
}

enum { DEEPEST = 64, SIZED = 16, REFUSED = 32 };

/* What follows the first byte of a value, from 0xc0 on: so many bytes; or, above SIZED, a size of so many bytes. */
static const unsigned char FOLLOWS[32] = {
    0, REFUSED, 0, 0, SIZED + 1, SIZED + 2, SIZED + 4, REFUSED, REFUSED, REFUSED, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8,
    REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, SIZED + 1, SIZED + 2, SIZED + 4, SIZED + 2, SIZED + 4, SIZED + 2,
    SIZED + 4,
};

/* Return whether the bytes are one msgpack value without ext types, with str keys, nested at most `max_depth` deep.
 * Each value takes at least one byte, so the work is linear, whatever sizes are declared. */
static int
is_plain(Bytes p, Bytes end, uint64_t max_depth)
{
    uint64_t left[DEEPEST + 1]; /* values that each level still needs */
    unsigned char is_map[DEEPEST + 1];
    unsigned depth = 0;
    left[0] = 1;
    is_map[0] = 0;
    for (;;) {
        while (left[depth] == 0) {
            if (depth-- == 0)
                return p == end;
        }
        if (p == end)
            return 0;
        unsigned first = *p++;
        int is_str = (first >= 0xa0 && first <= 0xbf) || (first >= 0xd9 && first <= 0xdb);
        if (is_map[depth] && left[depth] % 2 == 0 && !is_str)
            return 0;
        left[depth]--;
        uint64_t size = 0;
        if (first >= 0xc0 && first <= 0xdf) {
            unsigned follows = FOLLOWS[first - 0xc0];
            if (follows == REFUSED)
                return 0;
            size = follows;
            if (follows > SIZED) {
                follows -= SIZED;
                if ((size_t)(end - p) < follows)
                    return 0;
                for (size = 0; follows > 0; follows--)
                    size = size << 8 | *p++;
            }
        } else if (first >= 0x80 && first <= 0xbf) {
            size = first & (is_str ? 31 : 15);
        }
        if ((first >= 0x80 && first <= 0x9f) || (first >= 0xdc && first <= 0xdf)) { /* map or array */
            if (++depth > max_depth || depth > DEEPEST)
                return 0;
            is_map[depth] = first <= 0x8f || first >= 0xde;
            left[depth] = is_map[depth] ? 2 * size : size;
        } else if ((uint64_t)(end - p) < size) {
            return 0;
        } else {
            p += size;
        }
    }
}

/* scan_body(body, max_depth) */
static PyObject *
scan_body(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    Bytes body;
    uint64_t max_depth;
    if (nargs == 2 && is_bytes(args[0], PLAIN, -1, &body) && is_uint(args[1], UINT64_MAX, &max_depth) &&
        is_plain(body, body + PyBytes_Size(args[0]), max_depth))
        Py_RETURN_TRUE;
    return call_reference("scan_body", args, nargs);
}

/* Return whether memory is exhausted. Clears any other exception. */
static int
is_out_of_memory(void)
{
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_MemoryError))
        return 1;
    PyErr_Clear();
    return 0;
}

/* Return the value of a body that is_plain accepts, by msgpack's `unpack`; otherwise NULL. */
static PyObject *
decode(PyObject *unpack, Bytes body, Bytes end, uint64_t max_depth)
{
    if (!is_plain(body, end, max_depth))
        return NULL;
    PyObject *copy = PyBytes_FromStringAndSize((const char *)body, end - body);
    PyObject *value = copy == NULL ? NULL : PyObject_CallFunctionObjArgs(unpack, copy, NULL);
    Py_XDECREF(copy);
    return value;
}

/* cut_values(data, limit, head, salt, counter, token, wall, tolerance, max_depth, unpack) */
static PyObject *
cut_values(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    Bytes data;
    Rules rules;
    uint64_t max_depth;
    if (nargs != 10 || !read_rules(args, 8, &data, &rules) || !is_uint(args[8], DEEPEST, &max_depth))
        return PyList_New(0);
    PyObject *frames = PyList_New(0);
    size_t at = 0, end = (size_t)PyBytes_Size(args[0]), size;
    while (frames != NULL && (size = fitting_size(&rules, data + at, end - at)) != 0) {
        Bytes start = data + at;
        PyObject *value = decode(args[9], start + BODY, start + size, max_depth);
        if (value == NULL && !is_out_of_memory())
            break;
        PyObject *parts[4] = {
            PyLong_FromUnsignedLong(get32(start + STREAM)),
            PyLong_FromUnsignedLongLong(get64(start + COUNTER)),
            value,
            PyLong_FromSize_t(at + size),
        };
        PyObject *frame = tuple_of(parts, 4);
        if (frame == NULL || PyList_Append(frames, frame) < 0)
            Py_CLEAR(frames);
        Py_XDECREF(frame);
        rules.counter = get64(start + COUNTER);
        at += size;
    }
    return frames;
}

/* fits(params, classes, named, required) */
static PyObject *
fits(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 4 || !PyDict_CheckExact(args[0]) || !PyDict_CheckExact(args[1]) ||
        (args[2] != Py_None && !PyFrozenSet_CheckExact(args[2])) || !PyFrozenSet_CheckExact(args[3]))
        return call_reference("fits", args, nargs);
    PyObject *name, *value;
    Py_ssize_t at = 0, found = 0;
    while (PyDict_Next(args[0], &at, &name, &value)) {
        if (!PyUnicode_CheckExact(name))
            return call_reference("fits", args, nargs);
        PyObject *expected = PyDict_GetItemWithError(args[1], name);
        if (expected == NULL && PyErr_Occurred())
            return NULL;
        int is_named = 0;
        if (expected != (PyObject *)Py_TYPE(value))
            is_named = args[2] == Py_None ? 1 : PySet_Contains(args[2], name);
        int is_required = is_named == 0 ? PySet_Contains(args[3], name) : 0;
        if (is_named < 0 || is_required < 0)
            return NULL;
        if (is_named)
            Py_RETURN_FALSE;
        found += is_required;
    }
    return PyBool_FromLong(found == PySet_Size(args[3]));
}

/* What read_requests goes by (zcproto/wire/request_fast_path.py). */
enum { LIMIT, KIND, ITS_SALT, ITS_TOKEN, TOLERANCE, MAX_DEPTH, SESSION, DECODING, RULES };
enum { UNPACK, KNOWN, NO_META, MAKE_META, DECODE_META, DECODERS };

/* Requests of one batch, and the bytes from which on none is added: the batch may have to wait. */
enum { MOST_REQUESTS = 16, MOST_BYTES = 4096 };

/* Return the RequestMeta of a map; NULL if it is invalid or its deadline has passed. */
static PyObject *
read_meta(PyObject *map, PyObject **by)
{
    PyObject *key, *deadline, *meta = NULL;
    Py_ssize_t at = 0;
    uint64_t ms;
    if (PyDict_CheckExact(map) && PyDict_Size(map) == 1 && PyDict_Next(map, &at, &key, &deadline) &&
        PyUnicode_CheckExact(key) && PyUnicode_CompareWithASCIIString(key, "deadline_ms") == 0) {
        PyObject *fields = PyTuple_Pack(3, deadline, Py_None, Py_None);
        if (fields != NULL)
            meta = PyObject_CallFunctionObjArgs(by[MAKE_META], fields, NULL);
        Py_XDECREF(fields);
    } else {
        meta = PyObject_CallFunctionObjArgs(by[DECODE_META], map, NULL);
        deadline = meta == NULL ? NULL : PyTuple_GetItem(meta, 0);
    }
    if (deadline == NULL || (deadline != Py_None && (!is_uint(deadline, UINT64_MAX, &ms) || ms == 0)))
        Py_CLEAR(meta);
    return meta;
}

/* Decode the body of a request. Return [method, params] or [method, params, meta] and the RequestMeta, or NULL. */
static PyObject *
request_message(Bytes body, Bytes end, PyObject **by, uint64_t max_depth, PyObject **meta)
{
    PyObject *value = decode(by[UNPACK], body, end, max_depth);
    Py_ssize_t size = value != NULL && PyList_CheckExact(value) ? PyList_Size(value) : 0;
    if ((size == 2 || size == 3) && PyUnicode_CheckExact(PyList_GetItem(value, 0)) &&
        PySet_Contains(by[KNOWN], PyList_GetItem(value, 0)) == 1 &&
        (PyList_GetItem(value, 1) == Py_None || PyDict_CheckExact(PyList_GetItem(value, 1)))) {
        *meta = size == 2 ? by[NO_META] : read_meta(PyList_GetItem(value, 2), by);
        if (size == 2)
            Py_INCREF(*meta);
        if (*meta != NULL)
            return value;
    }
    Py_XDECREF(value);
    return NULL;
}

/* Return the request in a frame: its event, its counter and where the next frame begins, 0 if nothing follows.
 * NULL without an exception: the body is not one that is read here. */
static PyObject *
request_in(Bytes frame, size_t size, size_t end, PyObject **its, PyObject **by, uint64_t max_depth)
{
    PyObject *meta = NULL, *value = request_message(frame + BODY, frame + size, by, max_depth, &meta);
    if (value == NULL) {
        is_out_of_memory();
        return NULL;
    }
    PyObject *params = PyList_GetItem(value, 1);
    PyObject *event[] = {PyLong_FromUnsignedLong(get32(frame + STREAM)), its[ITS_TOKEN], its[SESSION],
                         PyList_GetItem(value, 0), params == Py_None ? PyDict_New() : params, meta};
    for (Py_ssize_t i = 1; i < 5; i++) {
        if (i < 4 || params != Py_None)
            Py_INCREF(event[i]);
    }
    Py_DECREF(value);
    PyObject *parts[] = {tuple_of(event, 6), PyLong_FromUnsignedLongLong(get64(frame + COUNTER)),
                         PyLong_FromSize_t(end)};
    return tuple_of(parts, 3);
}

/* read_requests(data, at, rules, counter, wall) */
static PyObject *
read_requests(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    PyObject *its[RULES], *by[DECODERS];
    Bytes data;
    Rules rules;
    uint64_t at, max_depth;
    int is_valid = nargs == 5 && unpack_tuple(args[2], RULES, its) && unpack_tuple(its[DECODING], DECODERS, by);
    if (is_valid) {
        PyObject *const frame_rules[] = {args[0], its[LIMIT],     its[KIND], its[ITS_SALT],
                                         args[3], its[ITS_TOKEN], args[4],   its[TOLERANCE]};
        is_valid = read_rules(frame_rules, 8, &data, &rules) && is_uint(its[MAX_DEPTH], UINT64_MAX, &max_depth) &&
                   is_uint(args[1], (uint64_t)PyBytes_Size(args[0]), &at);
    }
    if (!is_valid)
        return PyList_New(0);
    size_t total = (size_t)PyBytes_Size(args[0]), start = (size_t)at, here = start, size;
    PyObject *requests = PyList_New(0);
    for (int count = 0; requests != NULL && count < MOST_REQUESTS && here - start < MOST_BYTES; count++) {
        if ((size = fitting_size(&rules, data + here, total - here)) == 0)
            break;
        size_t end = here + size;
        PyObject *request = request_in(data + here, size, end < total ? end : 0, its, by, max_depth);
        if (request == NULL && !PyErr_Occurred())
            break;
        if (request == NULL || PyList_Append(requests, request) < 0)
            Py_CLEAR(requests);
        Py_XDECREF(request);
        rules.counter = get64(data + here + COUNTER);
        here = end;
    }
    return requests;
}

/* wall_ms() */
static PyObject *
wall_ms(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    struct timespec now;
    if (nargs == 0 && timespec_get(&now, TIME_UTC) == TIME_UTC)
        return PyLong_FromLongLong((long long)now.tv_sec * 1000 + now.tv_nsec / 1000000);
    return call_reference("wall_ms", args, nargs);
}

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyMethodDef METHODS[] = {
    FUNCTION(read_requests),
    FUNCTION(encode_frame),
    FUNCTION(encode_frames),
    FUNCTION(scan_body),
    FUNCTION(cut_values),
    FUNCTION(fits),
    FUNCTION(wall_ms),
    {NULL, NULL, 0, NULL},
};

/* Slots that the headers of Python 3.11 do not have, by their numbers in the stable ABI. */
static PyModuleDef_Slot SLOTS[] = {
    {4, (void *)1}, /* 3.13: Py_mod_gil, Py_MOD_GIL_NOT_USED */
    {3, (void *)2}, /* 3.12: Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED */
    {0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "zcproto._accelerator", NULL, 0, METHODS, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__accelerator(void)
{
    /* An older Python refuses a slot that it does not have. */
    MODULE.m_slots = SLOTS + (Py_Version < 0x030d0000) + (Py_Version < 0x030c0000);
    return PyModuleDef_Init(&MODULE);
}

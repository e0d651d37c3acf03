/* Proofs of _accelerator.c: `proof_NAME` calls NAME with everything that may reach it, and asserts what it promises.
 *
 * A function whose callers are proved with its promise alone has three parts: what it needs (`needs_NAME`), what it promises
 * (`promises_NAME`), and `contract_NAME`, which the runner puts in its place (`proofs.py`). The proof of such a function assumes
 * the first and asserts the second; its contract asserts the first and assumes the second. */

#include SOURCE

int nondet_int(void);
_Bool nondet_bool(void);
size_t nondet_size_t(void);
uint64_t nondet_uint64(void);
unsigned char nondet_byte(void);

#define ASSUME(condition) __CPROVER_assume(condition)
#define ASSERT(condition, text) __CPROVER_assert(condition, text)
#define CAN_READ(p, size) __CPROVER_r_ok(p, size)

/* Any number of bytes up to MODEL_LARGEST. */
static Bytes
any_bytes(size_t size)
{
    ASSUME(size <= MODEL_LARGEST);
    Bytes bytes = malloc(size);
    ASSUME(bytes != NULL);
    return bytes;
}

static void
any_arguments(PyObject **args, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        args[i] = model_argument();
}

/* Any arguments up to `most`; there is nothing beyond them. Return their number. */
static Py_ssize_t
any_call(PyObject **args, Py_ssize_t most)
{
    Py_ssize_t nargs = nondet_int();
    ASSUME(nargs >= 0 && nargs <= most);
    for (Py_ssize_t i = 0; i < most; i++)
        args[i] = i < nargs ? model_argument() : NULL;
    return nargs;
}

/* --- numbers, bytes, tuples ------------------------------------------------------------------------ */

PyObject *
contract_call_reference(const char *name, PyObject *const *args, Py_ssize_t nargs)
{
    ASSERT(model_error == NO_ERROR, "Python code is called without an exception");
    ASSERT(nargs >= 0 && (nargs == 0 || CAN_READ(args, (size_t)nargs * sizeof *args)), "arguments can be read");
    return model_any();
}

void
proof_call_reference(void)
{
    PyObject *args[10];
    Py_ssize_t nargs = any_call(args, 10);
    model_finish(call_reference("encode_frame", args, nargs));
}

uint32_t
contract_get32(Bytes p)
{
    ASSERT(CAN_READ(p, 4), "4 bytes can be read");
    return (uint32_t)nondet_uint64();
}

uint64_t
contract_get64(Bytes p)
{
    ASSERT(CAN_READ(p, 8), "8 bytes can be read");
    return nondet_uint64();
}

void
proof_numbers(void)
{
    unsigned char bytes[8];
    uint64_t value = nondet_uint64();
    put64(bytes, value);
    ASSERT(get64(bytes) == value, "64 bits that are written are read");
    int i = nondet_int();
    ASSUME(i >= 0 && i < 8);
    ASSERT(bytes[i] == (unsigned char)(value >> (56 - 8 * i)), "the highest byte is the first");
    put32(bytes, value);
    ASSERT(get32(bytes) == (uint32_t)value, "32 bits that are written are read");
}

void
proof_is_uint(void)
{
    PyObject *object = model_argument();
    uint64_t most = nondet_uint64(), value;
    int found = is_uint(object, most, &value);
    ASSERT(found == (object->kind == INT && object->is_uint64 && object->number <= most), "ints in the range are read");
    ASSERT(!found || value == object->number, "the value is that of the int");
    ASSERT(model_error == NO_ERROR && model_held == 0, "no exception is left");
}

void
proof_is_bytes(void)
{
    PyObject *object = model_argument();
    Allowed allowed = (Allowed)nondet_int();
    ASSUME(allowed >= PLAIN && allowed <= ANY_SUBCLASS);
    Py_ssize_t size = nondet_int();
    ASSUME(size >= -1);
    Bytes bytes;
    int found = is_bytes(object, allowed, size, &bytes);
    int is_type = object->kind == BYTES || (allowed != PLAIN && object->kind == BYTES_SUBCLASS) ||
                  (allowed == ANY_SUBCLASS && object->kind == ODD_BYTES);
    ASSERT(found == (is_type && (size < 0 || object->size == size)), "bytes of the type and size are read");
    ASSERT(!found || CAN_READ(bytes, (size_t)object->size), "they can be read");
    ASSERT(model_error == NO_ERROR && model_held == 0, "no exception is left");
}

PyObject *
contract_tuple_of(PyObject **parts, Py_ssize_t count)
{
    int is_whole = 1;
    for (Py_ssize_t i = 0; i < count; i++) {
        is_whole &= parts[i] != NULL;
        Py_XDECREF(parts[i]);
    }
    ASSERT(is_whole || model_error != NO_ERROR, "a missing part left an exception");
    return is_whole ? model_new(TUPLE) : NULL;
}

void
proof_tuple_of(void)
{
    PyObject *parts[6];
    int count = nondet_int();
    ASSUME(count >= 0 && count <= 6);
    for (int i = 0; i < count; i++)
        parts[i] = model_any();
    PyObject *result = tuple_of(parts, count);
    ASSERT(result == NULL || result->size == count, "the tuple has all parts");
    if (result != NULL)
        model_error = NO_ERROR; /* that of an earlier part, which the caller would not have passed on */
    for (int i = 0; i < count; i++)
        ASSERT(result == NULL || (parts[i] != NULL && result->items[i] == parts[i]), "each part is in its place");
    model_finish(result);
}

/* --- reading frames ------------------------------------------------------------------------------------ */

static int
promises_read_rules(const Rules *rules, Bytes data, const PyObject *bytes)
{
    return CAN_READ(rules->salt, SALT_SIZE) && CAN_READ(rules->token, TOKEN_SIZE) && bytes->kind == BYTES &&
           data == bytes->bytes && CAN_READ(data, (size_t)bytes->size);
}

int
contract_read_rules(PyObject *const *args, Py_ssize_t nargs, Bytes *data, Rules *rules)
{
    ASSERT(CAN_READ(args, 8 * sizeof *args), "arguments can be read");
    if (nargs != 8 || args[0]->kind != BYTES || nondet_bool())
        return 0;
    *data = (Bytes)PyBytes_AsString(args[0]);
    Rules any;
    any.salt = malloc(SALT_SIZE);
    any.token = malloc(TOKEN_SIZE);
    *rules = any;
    ASSUME(promises_read_rules(rules, *data, args[0]));
    return 1;
}

void
proof_read_rules(void)
{
    PyObject *args[8];
    any_arguments(args, 8);
    Bytes data;
    Rules rules;
    if (read_rules(args, 8, &data, &rules))
        ASSERT(promises_read_rules(&rules, data, args[0]), "data, salt and token can be read");
    ASSERT(model_error == NO_ERROR && model_held == 0, "no exception is left");
}

static int
promises_fitting_size(size_t left, size_t size)
{
    return size == 0 || (size >= BODY && size <= left);
}

size_t
contract_fitting_size(const Rules *rules, Bytes frame, size_t left)
{
    ASSERT(CAN_READ(frame, left) && CAN_READ(rules->salt, SALT_SIZE) && CAN_READ(rules->token, TOKEN_SIZE),
           "frame and rules can be read");
    size_t size = nondet_size_t();
    ASSUME(promises_fitting_size(left, size));
    return size;
}

/* Return whether two byte strings are equal, and nothing beyond them is read. */
static int
are_equal(Bytes one, Bytes other, int size)
{
    int equal = 1;
    for (int i = 0; i < size; i++)
        equal &= one[i] == other[i];
    return equal;
}

void
proof_fitting_size(void)
{
    size_t left = nondet_size_t();
    Bytes frame = any_bytes(left);
    Rules rules;
    rules.salt = any_bytes(SALT_SIZE);
    rules.token = any_bytes(TOKEN_SIZE);
    size_t size = fitting_size(&rules, frame, left);
    ASSERT(promises_fitting_size(left, size), "the frame is within the data");

    /* zcp1.md, sections 5 and 6, in 128 bits. */
    int fits = left >= 68;
    if (fits) {
        unsigned __int128 length = (unsigned __int128)frame[0] << 24 | (uint32_t)frame[1] << 16 | frame[2] << 8 | frame[3];
        __int128 timestamp = 0, counter = 0;
        for (int i = 0; i < 8; i++) {
            timestamp = timestamp * 256 + frame[12 + i];
            counter = counter * 256 + frame[28 + i];
        }
        fits = length >= 64 && length <= rules.limit && length + 4 <= left &&
               (uint64_t)get32(frame + 4) == rules.head && (frame[8] || frame[9] || frame[10] || frame[11]) &&
               timestamp - (__int128)rules.wall <= (__int128)rules.tolerance &&
               (__int128)rules.wall - timestamp <= (__int128)rules.tolerance && counter > (__int128)rules.counter &&
               are_equal(frame + 20, rules.salt, 8) && are_equal(frame + 36, rules.token, 32);
        ASSERT(!fits || size == length + 4, "the size of a frame that fits is its length and 4 bytes");
    }
    ASSERT((size != 0) == fits, "exactly the frames fit that the specification accepts");
}

/* --- writing frames ------------------------------------------------------------------------------------ */

static int
promises_frame(const Frame *frame)
{
    return frame->head <= UINT32_MAX && frame->stream <= UINT32_MAX && CAN_READ(frame->token, TOKEN_SIZE) &&
           frame->size >= 0 && frame->size <= UINT32_MAX - 64 && CAN_READ(frame->body, (size_t)frame->size);
}

void
proof_read_body(void)
{
    PyObject *object = model_argument();
    Frame frame;
    int found = read_body(object, &frame);
    ASSERT(found == (object->kind == BYTES && object->size <= UINT32_MAX - 64), "bytes that fit into a frame are read");
    ASSERT(!found || (frame.size == object->size && CAN_READ(frame.body, (size_t)frame.size)), "they can be read");
}

int
contract_read_frame(PyObject *value, Frame *frame)
{
    ASSERT(model_is_alive(value), "the value is alive");
    /* A tuple of immutable objects gives the same each time: whether, and the size. */
    PyObject *first = value;
    if (first->kind != TUPLE || first->size != 5 || !first->is_uint64 || first->number > UINT32_MAX - 64)
        return 0;
    uint64_t counter = frame->counter;
    Bytes salt = frame->salt;
    Frame any;
    any.counter = counter;
    any.salt = salt;
    any.size = (Py_ssize_t)first->number;
    any.token = malloc(TOKEN_SIZE);
    any.body = malloc((size_t)any.size);
    *frame = any;
    ASSUME(promises_frame(frame));
    return 1;
}

void
proof_read_frame(void)
{
    PyObject *object = model_argument();
    Frame frame;
    Bytes salt = any_bytes(SALT_SIZE);
    frame.salt = salt;
    uint64_t counter = frame.counter;
    if (read_frame(object, &frame)) {
        ASSERT(promises_frame(&frame), "token and body can be read");
        Frame again;
        ASSERT(read_frame(object, &again) && again.size == frame.size, "a second reading gives the same size");
    }
    ASSERT(frame.salt == salt && frame.counter == counter, "salt and counter stay");
    ASSERT(model_error == NO_ERROR && model_held == 0, "no exception is left");
}

unsigned char *
contract_write_frame(unsigned char *p, const Frame *frame)
{
    ASSERT(promises_frame(frame) && CAN_READ(frame->salt, SALT_SIZE), "the frame can be read");
    ASSERT(__CPROVER_w_ok(p, (size_t)(BODY + frame->size)), "the frame can be written");
    return p + BODY + frame->size;
}

/* Return a byte of a number, counted from its highest. */
static unsigned char
byte_of(uint64_t value, size_t i, size_t size)
{
    return (unsigned char)(value >> (8 * (size - 1 - i)));
}

/* Return a byte of a frame (zcp1.md, section 5). */
static unsigned char
frame_byte(const Frame *frame, size_t i)
{
    return i < 4    ? byte_of(64 + (uint64_t)frame->size, i, 4)
           : i < 8  ? byte_of(frame->head, i - 4, 4)
           : i < 12 ? byte_of(frame->stream, i - 8, 4)
           : i < 20 ? byte_of(frame->timestamp, i - 12, 8)
           : i < 28 ? frame->salt[i - 20]
           : i < 36 ? byte_of(frame->counter, i - 28, 8)
           : i < 68 ? frame->token[i - 36]
                    : frame->body[i - 68];
}

void
proof_write_frame(void)
{
    Frame frame;
    ASSUME(frame.size >= 0 && frame.size <= UINT32_MAX - 64 && frame.head <= UINT32_MAX && frame.stream <= UINT32_MAX);
    frame.salt = any_bytes(SALT_SIZE);
    frame.token = any_bytes(TOKEN_SIZE);
    frame.body = any_bytes((size_t)frame.size);
    unsigned char *p = malloc((size_t)(68 + frame.size)), *end = write_frame(p, &frame);
    ASSERT(end == p + 68 + frame.size, "the end of the frame is returned");
    size_t i = nondet_size_t();
    ASSUME(i < (size_t)(68 + frame.size));
    ASSERT(p[i] == frame_byte(&frame, i), "each byte is as the specification says");
}

void
proof_encode_frame(void)
{
    PyObject *args[8];
    Py_ssize_t nargs = any_call(args, 8);
    model_finish(encode_frame(NULL, args, nargs));
}

/* Up to 3 frames of any size. */
void
proof_encode_frames(void)
{
    PyObject *args[4];
    Py_ssize_t nargs = any_call(args, 4);
    ASSUME(nargs == 0 || args[0]->size <= 3);
    model_finish(encode_frames(NULL, args, nargs));
}

/* --- bodies ---------------------------------------------------------------------------------------------- */

int
contract_is_plain(Bytes p, Bytes end, uint64_t max_depth)
{
    ASSERT(__CPROVER_same_object(p, end) && p <= end && CAN_READ(p, (size_t)(end - p)), "the body can be read");
    return nondet_bool();
}

void
proof_is_plain(void)
{
    size_t size = nondet_size_t();
    Bytes body = any_bytes(size);
    is_plain(body, body + size, nondet_uint64());
}

void
proof_scan_body(void)
{
    PyObject *args[3];
    Py_ssize_t nargs = any_call(args, 3);
    model_finish(scan_body(NULL, args, nargs));
}

PyObject *
contract_decode(PyObject *unpack, Bytes body, Bytes end, uint64_t max_depth)
{
    ASSERT(model_is_alive(unpack) && model_error == NO_ERROR, "msgpack can be called");
    contract_is_plain(body, end, max_depth);
    return nondet_bool() ? NULL : model_any();
}

void
proof_decode(void)
{
    size_t size = nondet_size_t();
    Bytes body = any_bytes(size);
    PyObject *value = decode(model_argument(), body, body + size, nondet_uint64());
    ASSERT(value == NULL || model_error == NO_ERROR, "a value, or an exception");
    Py_XDECREF(value);
    ASSERT(model_held == 0, "no reference leaks");
}

/* Up to 3 frames, and 16 bytes more. */
void
proof_cut_values(void)
{
    PyObject *args[11];
    Py_ssize_t nargs = any_call(args, 11);
    ASSUME(nargs == 0 || args[0]->size <= 3 * 68 + 16);
    model_finish(cut_values(NULL, args, nargs));
}

/* Up to 3 parameters. */
void
proof_fits(void)
{
    PyObject *args[5];
    Py_ssize_t nargs = any_call(args, 5);
    ASSUME(nargs == 0 || args[0]->size <= 3);
    model_finish(fits(NULL, args, nargs));
}

/* --- requests -------------------------------------------------------------------------------------------- */

static void
any_decoders(PyObject **by)
{
    any_arguments(by, DECODERS);
}

PyObject *
contract_read_meta(PyObject *map, PyObject **by)
{
    ASSERT(model_is_alive(map) && CAN_READ(by, DECODERS * sizeof *by), "the map is alive");
    PyObject *meta = model_any();
    if (nondet_bool())
        Py_CLEAR(meta);
    return meta;
}

void
proof_read_meta(void)
{
    PyObject *by[DECODERS];
    any_decoders(by);
    PyObject *meta = read_meta(model_argument(), by);
    ASSERT(meta == NULL || model_error == NO_ERROR, "a value, or an exception");
    Py_XDECREF(meta);
    ASSERT(model_held == 0, "no reference leaks");
}

static int
promises_request_message(PyObject *value, PyObject *meta)
{
    return model_error == NO_ERROR && meta != NULL && meta->held > 0 && value->held > 0 && value->kind == LIST &&
           value->size >= 2 && PyList_GetItem(value, 0)->kind == STR &&
           (PyList_GetItem(value, 1) == Py_None || PyList_GetItem(value, 1)->kind == DICT);
}

PyObject *
contract_request_message(Bytes body, Bytes end, PyObject **by, uint64_t max_depth, PyObject **meta)
{
    ASSERT(model_is_alive(by[UNPACK]) && model_error == NO_ERROR, "msgpack can be called");
    contract_is_plain(body, end, max_depth);
    PyObject *value = nondet_bool() ? NULL : model_any();
    if (value == NULL)
        return NULL;
    ASSUME(value->kind == LIST && value->size >= 2);
    *meta = &model_none;
    model_own(*meta);
    ASSUME(promises_request_message(value, *meta));
    return value;
}

void
proof_request_message(void)
{
    PyObject *by[DECODERS], *meta = NULL;
    any_decoders(by);
    size_t size = nondet_size_t();
    Bytes body = any_bytes(size);
    PyObject *value = request_message(body, body + size, by, nondet_uint64(), &meta);
    if (value != NULL) {
        ASSERT(promises_request_message(value, meta), "a list of a method and params, and metadata");
        Py_DECREF(meta);
    }
    Py_XDECREF(value);
    ASSERT(model_held == 0, "no reference leaks");
}

PyObject *
contract_request_in(Bytes frame, size_t size, size_t end, PyObject **its, PyObject **by, uint64_t max_depth)
{
    ASSERT(model_error == NO_ERROR, "Python code is called without an exception");
    ASSERT(size >= BODY && CAN_READ(frame, size), "the frame can be read");
    ASSERT(CAN_READ(its, RULES * sizeof *its) && CAN_READ(by, DECODERS * sizeof *by), "rules and decoders can be read");
    if (nondet_bool())
        return model_new(TUPLE);
    if (nondet_bool())
        model_fail();
    return NULL;
}

void
proof_request_in(void)
{
    PyObject *its[RULES], *by[DECODERS];
    any_arguments(its, RULES);
    any_decoders(by);
    size_t size = nondet_size_t();
    ASSUME(size >= BODY);
    Bytes frame = any_bytes(size);
    PyObject *request = request_in(frame, size, nondet_size_t(), its, by, nondet_uint64());
    ASSERT(model_error != OTHER_ERROR, "the errors of a body are cleared: the general path reports them");
    if (request == NULL && model_error == NO_ERROR)
        ASSERT(model_held == 0, "no reference leaks");
    else
        model_finish(request);
}

/* Up to 3 frames, and 16 bytes more. */
void
proof_read_requests(void)
{
    PyObject *args[6];
    Py_ssize_t nargs = any_call(args, 6);
    ASSUME(nargs == 0 || args[0]->size <= 3 * 68 + 16);
    model_finish(read_requests(NULL, args, nargs));
}

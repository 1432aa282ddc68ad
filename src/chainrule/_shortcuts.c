/* The commonest calls of the function modes (chainrule.dispatch.LightMode), in C.
 *
 * A function of chainrule.functions.TABLE that is called under one mode costs more in the interpreter of the mode's handler
 * than in torch. What the handlers do for plain arguments is done here: VmapMode.run_function for functions of one tensor or
 * of two that carry the batch alike, and Tape.run_function for plain tensors. Every other call, and everything where this
 * module could not be compiled, goes to the Python methods of the same meaning: they are the reference.
 *
 * Only the interpreter's own interface is used. Of torch's, the state of the dispatcher is asked for and set in its own
 * functions where chainrule.dispatch has found and tried them (`STATE`), and by their bindings for Python otherwise.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <structmember.h>

enum { NO_KIND = 0, VMAP = 1, TAPE = 2 };

/* Fields of chainrule.functions.Function, which is a tuple. */
enum { CALL, OP, NUMBER_OP, FEWEST, MOST, NUMBERS, POINTWISE, MAPPED, KEEPS, FIELDS };

typedef struct {
    PyObject_HEAD
    Py_ssize_t depth;
    PyObject *below;
    char graphs;
    char kind;
    char guarded;
    char respect_no_grad;
    PyObject *values;
    PyObject *active;
    PyObject *slots;
    PyObject *key;
    PyObject *records;
    PyObject *facts;
    PyObject *origin;
    PyObject *alias;
} Handler;

/* What `configure` is given, by name. */
#define CONFIGURED(X)                                                                                                  \
    X(table) X(count) X(level) X(exclude) X(python_key) X(constants) X(shared_constant) X(tensor) X(real) X(floating)   \
    X(make_wrapper) X(wrap_batched) X(autocast) X(grad_enabled) X(record) X(slot_objects)

#define DECLARE(name) static PyObject *c_##name = NULL;
CONFIGURED(DECLARE)
static PyObject *c_batch_tensor = NULL, *c_batched = NULL;

#define NAMES(X)                                                                                                       \
    X(take_function) X(level) X(inner) X(value) X(requires_grad) X(dtype) X(ndim) X(shape) X(is_cpu) X(is_contiguous)   \
    X(device) X(saw_blocked) X(_any_active) X(_slot_or_constant) X(_append_record)

#define DECLARE_NAME(name) static PyObject *s_##name = NULL;
NAMES(DECLARE_NAME)

static PyObject *empty = NULL;

/* Torch's own functions on the state of its dispatcher; all of them, or none. A key is an enumeration of 16 bits. */
static struct {
    void (*exclude)(uint16_t key, bool excluded);
    bool (*included)(uint16_t key);
    int64_t (*dispatch_modes)(void);
    int64_t (*function_modes)(void);
    bool (*functions_shown)(void);
    void (*set_functions)(int disabled); /* an enumeration: 0 shown to modes and classes, 1 to modes, 2 to none */
    int (*get_functions)(void);
    uint16_t python;
    uint16_t functorch;
} state;

/* Where the slots of BatchTensor, of Batched and of OpFacts are. */
static struct {
    Py_ssize_t inner, level, value, dtype, sample, common, op;
} offsets;

#define SLOT(object, name) (*(PyObject **)((char *)(object) + offsets.name))

/* 1, 0, or -1 with an error set. */
static int
attribute_is_true(PyObject *object, PyObject *name)
{
    PyObject *found = PyObject_GetAttr(object, name);
    if (found == NULL)
        return -1;
    int truth = found == Py_True ? 1 : found == Py_False ? 0 : PyObject_IsTrue(found);
    Py_DECREF(found);
    return truth;
}

static int
is_number(PyObject *item)
{
    return PyFloat_CheckExact(item) || PyLong_CheckExact(item);
}

/* A new reference to the constant for a number beside a tensor, or to the number itself. */
static PyObject *
constant_for(PyObject *number, PyObject *dtype)
{
    PyObject *known = PyDict_GetItemWithError(c_constants, dtype);
    if (known != NULL) {
        PyObject *found = PyDict_GetItemWithError(known, number);
        if (found != NULL)
            return Py_NewRef(found);
    }
    if (PyErr_Occurred())
        return NULL;
    PyObject *args[] = {number, dtype};
    return PyObject_Vectorcall(c_shared_constant, args, 2, NULL);
}

/* A new reference to a tensor's dtype if the tensor is plain (real, without a graph), None if it is not; NULL on error. */
static PyObject *
plain_dtype(PyObject *tensor)
{
    int graph = attribute_is_true(tensor, s_requires_grad);
    if (graph < 0)
        return NULL;
    if (graph)
        return Py_NewRef(Py_None);
    PyObject *dtype = PyObject_GetAttr(tensor, s_dtype);
    if (dtype == NULL)
        return NULL;
    int real = PySet_Contains(c_real, dtype);
    if (real > 0)
        return dtype;
    Py_DECREF(dtype);
    return real < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *
exclude_python(int excluded)
{
    if (state.exclude != NULL) {
        state.exclude(state.python, excluded);
        return Py_NewRef(Py_None);
    }
    PyObject *args[] = {c_python_key, excluded ? Py_True : Py_False};
    return PyObject_Vectorcall(c_exclude, args, 2, NULL);
}

/* Let torch's handlers be reached again; an error that is on its way stays. */
static int
include_python(void)
{
    if (state.exclude != NULL) {
        state.exclude(state.python, false);
        return 0;
    }
    PyObject *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace);
    PyObject *done = exclude_python(0);
    if (done == NULL) {
        Py_XDECREF(kind);
        Py_XDECREF(error);
        Py_XDECREF(trace);
        return -1;
    }
    Py_DECREF(done);
    PyErr_Restore(kind, error, trace);
    return 0;
}

/* The call of a function with torch's Python handlers off. */
static PyObject *
call_below(PyObject *call, PyObject *const *args, Py_ssize_t count)
{
    PyObject *done = exclude_python(1);
    if (done == NULL)
        return NULL;
    Py_DECREF(done);
    PyObject *out = PyObject_Vectorcall(call, args, count, NULL);
    if (include_python() < 0) {
        Py_XDECREF(out);
        return NULL;
    }
    return out;
}

static PyTypeObject handler_type;

/* ---------------------------------------------------------------------------------------------------------- vmap -- */

/* The `Batched` of a tensor of this level that carries the batch, borrowed; NULL, without an error, if it is none. */
static PyObject *
batch_of(Handler *self, PyObject *tensor)
{
    if ((PyObject *)Py_TYPE(tensor) != c_batch_tensor || SLOT(tensor, level) != (PyObject *)self)
        return NULL;
    PyObject *inner = SLOT(tensor, inner);
    return inner != NULL && (PyObject *)Py_TYPE(inner) == c_batched && SLOT(inner, value) != NULL ? inner : NULL;
}

/* The dtype of a stored tensor, if it is plain: 1 with a new reference; 0 if it is not; -1 with an error set. */
static int
stored_dtype(PyObject *batch, PyObject **dtype)
{
    PyObject *known = SLOT(batch, dtype);
    if (known != NULL) {
        *dtype = Py_NewRef(known);
        return 1;
    }
    *dtype = plain_dtype(SLOT(batch, value));
    if (*dtype == NULL)
        return -1;
    if (*dtype != Py_None)
        return 1;
    Py_CLEAR(*dtype);
    return 0;
}

static int
same_rank(PyObject *one, PyObject *other)
{
    PyObject *first = PyObject_GetAttr(one, s_ndim);
    PyObject *second = first == NULL ? NULL : PyObject_GetAttr(other, s_ndim);
    int same = second == NULL ? -1 : PyObject_RichCompareBool(first, second, Py_EQ);
    Py_XDECREF(first);
    Py_XDECREF(second);
    return same;
}

/* A result as a tensor of this level; takes the reference of `out`. `like` has its dtype, shape and layout, if it is given. */
static PyObject *
wrapped(Handler *self, PyObject *out, PyObject *like)
{
    PyObject *tensor = NULL, *shape = NULL, *dtype = NULL, *sample = NULL, *contiguous = NULL;
    PyObject *batch = ((PyTypeObject *)c_batched)->tp_alloc((PyTypeObject *)c_batched, 0);
    if (batch == NULL)
        goto done;
    SLOT(batch, value) = Py_NewRef(out);
    if (like != NULL) {
        dtype = Py_NewRef(SLOT(like, dtype));
        sample = Py_NewRef(SLOT(like, sample));
    } else {
        int plain = (PyObject *)Py_TYPE(out) == c_tensor;
        if (plain) {
            contiguous = PyObject_CallMethodNoArgs(out, s_is_contiguous);
            if (contiguous == NULL)
                goto done;
            plain = contiguous == Py_True ? attribute_is_true(out, s_is_cpu) : 0;
            if (plain < 0)
                goto done;
        }
        if (!plain) {
            PyObject *args[] = {batch, (PyObject *)self};
            tensor = PyObject_Vectorcall(c_wrap_batched, args, 2, NULL);
            goto done;
        }
        shape = PyObject_GetAttr(out, s_shape);
        dtype = shape == NULL ? NULL : PyObject_GetAttr(out, s_dtype);
        sample = dtype == NULL ? NULL : PyTuple_GetSlice(shape, 1, PyTuple_GET_SIZE(shape));
        if (sample == NULL)
            goto done;
    }
    PyObject *args[] = {c_batch_tensor, sample, Py_None, Py_None, Py_None, dtype};
    tensor = PyObject_Vectorcall(c_make_wrapper, args, 6, NULL);
    if (tensor == NULL)
        goto done;
    /* What is known of a tensor without a graph need not be asked of it when it is an argument. */
    int floating = like != NULL ? 1 : PySet_Contains(c_floating, dtype);
    if (floating > 0 && like == NULL)
        floating = !attribute_is_true(out, s_requires_grad);
    if (floating > 0) {
        SLOT(batch, dtype) = Py_NewRef(dtype);
        SLOT(batch, sample) = Py_NewRef(sample);
    }
    SLOT(tensor, inner) = Py_NewRef(batch);
    SLOT(tensor, level) = Py_NewRef(self);
done:
    Py_XDECREF(batch);
    Py_XDECREF(contiguous);
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    Py_XDECREF(sample);
    Py_DECREF(out);
    return tensor;
}

/* 1 if the rank of `one` is less than that of `other`, 0 if not, -1 with an error set. */
static int
lower_rank(PyObject *one, PyObject *other)
{
    PyObject *first = PyObject_GetAttr(one, s_ndim);
    PyObject *second = first == NULL ? NULL : PyObject_GetAttr(other, s_ndim);
    int lower = second == NULL ? -1 : PyObject_RichCompareBool(first, second, Py_LT);
    Py_XDECREF(first);
    Py_XDECREF(second);
    return lower;
}

static int
rank_is(PyObject *tensor, long wanted)
{
    PyObject *rank = PyObject_GetAttr(tensor, s_ndim);
    if (rank == NULL)
        return -1;
    long found = PyLong_AsLong(rank);
    Py_DECREF(rank);
    return found == wanted;
}

/* An argument after the first as it stands beside the first one's stored tensor: 1 with a new reference; 0 if it is left to
 * Python; -1 with an error set. `keeps` is cleared if the result may have another shape or layout. */
static int
stored_beside(Handler *self, PyObject *function, PyObject *first, PyObject *dtype, PyObject *item, Py_ssize_t place,
              PyObject **stored, int *keeps)
{
    PyObject *value = SLOT(first, value);
    int pointwise = PyTuple_GET_ITEM(function, POINTWISE) == Py_True;
    if (is_number(item)) {
        if (PyTuple_GET_ITEM(function, NUMBER_OP) == Py_None)
            return 0;
        *stored = PyTuple_GET_ITEM(function, NUMBERS) == Py_True ? constant_for(item, dtype) : Py_NewRef(item);
        return *stored == NULL ? -1 : 1;
    }
    PyObject *other = NULL;
    PyObject *batch = batch_of(self, item);
    int known, fits;
    if (batch != NULL) {
        if (!pointwise)
            return 0;
        Py_INCREF(batch);
        known = stored_dtype(batch, &other);
        *stored = Py_NewRef(SLOT(batch, value));
        fits = known <= 0 ? known : other == dtype;
        if (fits > 0 && (SLOT(first, sample) == NULL || SLOT(first, sample) != SLOT(batch, sample))) {
            fits = same_rank(value, *stored);
            *keeps = 0;
        }
        Py_DECREF(batch);
    } else {
        if ((PyObject *)Py_TYPE(item) != c_tensor)
            return 0;
        *keeps = 0;
        *stored = Py_NewRef(item);
        other = plain_dtype(item);
        fits = other == NULL ? -1 : other == dtype;
        /* Element by element it broadcasts against the last dimensions; of a product it is the matrix, or what is added. */
        if (fits > 0)
            fits = pointwise ? lower_rank(item, value) : place > 1 ? 1 : rank_is(item, 2);
    }
    Py_XDECREF(other);
    if (fits <= 0)
        Py_CLEAR(*stored);
    return fits;
}

/* How many arguments a call of a function has; an absent last one of a function of tensors is no argument. */
static Py_ssize_t
given(PyObject *function, PyObject *const *args, Py_ssize_t count)
{
    if (count > 2 && args[count - 1] == Py_None && PyTuple_GET_ITEM(function, NUMBER_OP) == Py_None)
        count--;
    return count >= PyLong_AsLong(PyTuple_GET_ITEM(function, FEWEST)) && count <= PyLong_AsLong(PyTuple_GET_ITEM(function, MOST)) &&
                   count <= 3
               ? count
               : 0;
}

/* NotImplemented leaves the call to the Python method, with nothing done. */
static PyObject *
run_under_vmap(Handler *self, PyObject *function, PyObject *const *args, Py_ssize_t count)
{
    count = given(function, args, count);
    if (self->guarded || self->graphs || count < 1 || PyTuple_GET_ITEM(function, MAPPED) != Py_True)
        return Py_NewRef(Py_NotImplemented);
    PyObject *first = batch_of(self, args[0]);
    if (first == NULL)
        return Py_NewRef(Py_NotImplemented);
    PyObject *stored[3] = {NULL, NULL, NULL}, *dtype = NULL, *out = NULL;
    Py_INCREF(first); /* the call may run anything, a write to the argument included */
    int fits = stored_dtype(first, &dtype);
    /* Whether the result has the dtype, the shape and the layout of the first argument. */
    int keeps = PyTuple_GET_ITEM(function, KEEPS) == Py_True && SLOT(first, sample) != NULL;
    stored[0] = Py_NewRef(SLOT(first, value));
    if (fits > 0 && PyTuple_GET_ITEM(function, POINTWISE) != Py_True) {
        fits = rank_is(stored[0], 1); /* a product of vectors has the batch before it nowhere */
        fits = fits < 0 ? fits : !fits;
    }
    for (Py_ssize_t place = 1; fits > 0 && place < count; place++)
        fits = stored_beside(self, function, first, dtype, args[place], place, &stored[place], &keeps);
    if (fits > 0) {
        out = call_below(PyTuple_GET_ITEM(function, CALL), stored, count);
        if (out != NULL)
            out = wrapped(self, out, keeps ? first : NULL);
    } else if (fits == 0)
        out = Py_NewRef(Py_NotImplemented);
    Py_DECREF(first);
    for (Py_ssize_t place = 0; place < 3; place++)
        Py_XDECREF(stored[place]);
    Py_XDECREF(dtype);
    return out;
}

/* ---------------------------------------------------------------------------------------------------------- tape -- */

/* Append an op that ran with one floating-point result; 0, or -1 with an error set. */
static int
append_record(Handler *self, PyObject *facts, PyObject *arguments, PyObject *out, PyObject *dtype)
{
    int outcome = -1;
    PyObject *slot = NULL, *identity = NULL, *shape = NULL, *key = NULL, *outputs = NULL, *record = NULL;
    PyObject *op = SLOT(facts, op);
    slot = PyLong_FromSsize_t(PyList_GET_SIZE(self->active));
    identity = slot == NULL ? NULL : PyLong_FromVoidPtr(out);
    shape = identity == NULL ? NULL : PyObject_GetAttr(out, s_shape);
    outputs = shape == NULL || op == NULL ? NULL : PyTuple_Pack(1, slot);
    key = outputs == NULL ? NULL : PyTuple_Pack(5, facts, arguments, empty, shape, dtype);
    record = key == NULL ? NULL : ((PyTypeObject *)c_record)->tp_alloc((PyTypeObject *)c_record, 6);
    if (record != NULL) {
        PyTuple_SET_ITEM(record, 0, Py_NewRef(op));
        PyTuple_SET_ITEM(record, 1, Py_NewRef(arguments));
        PyTuple_SET_ITEM(record, 2, Py_NewRef(empty));
        PyTuple_SET_ITEM(record, 3, Py_NewRef(outputs));
        PyTuple_SET_ITEM(record, 4, Py_NewRef(Py_False));
        PyTuple_SET_ITEM(record, 5, Py_NewRef(self->origin));
    }
    if (record != NULL && PyList_Append(self->values, out) == 0 && PyList_Append(self->active, Py_True) == 0 &&
        PyDict_SetItem(self->slots, identity, slot) == 0 && PyList_Append(self->key, key) == 0 &&
        PyList_Append(self->records, record) == 0)
        outcome = 0;
    Py_XDECREF(slot);
    Py_XDECREF(identity);
    Py_XDECREF(shape);
    Py_XDECREF(outputs);
    Py_XDECREF(key);
    Py_XDECREF(record);
    return outcome;
}

/* The slot of a tensor that the tape knows, -1 if it does not, -2 with an error set. */
static Py_ssize_t
known_slot(Handler *self, PyObject *item)
{
    PyObject *identity = PyLong_FromVoidPtr(item);
    if (identity == NULL)
        return -2;
    PyObject *slot = PyDict_GetItemWithError(self->slots, identity);
    Py_DECREF(identity);
    if (slot == NULL)
        return PyErr_Occurred() ? -2 : -1;
    return PyLong_AsSsize_t(slot);
}

static int
call_is_true(PyObject *callable)
{
    PyObject *found = PyObject_CallNoArgs(callable);
    if (found == NULL)
        return -1;
    int truth = PyObject_IsTrue(found);
    Py_DECREF(found);
    return truth;
}

/* Give a plain tensor that the tape has not seen a slot as a constant; -1 with an error set. */
static Py_ssize_t
append_constant(Handler *self, PyObject *tensor)
{
    Py_ssize_t number = PyList_GET_SIZE(self->values);
    PyObject *slot = NULL, *identity = NULL, *shape = NULL, *dtype = NULL, *device = NULL, *key = NULL;
    slot = PyLong_FromSsize_t(number);
    identity = slot == NULL ? NULL : PyLong_FromVoidPtr(tensor);
    shape = identity == NULL ? NULL : PyObject_GetAttr(tensor, s_shape);
    dtype = shape == NULL ? NULL : PyObject_GetAttr(tensor, s_dtype);
    device = dtype == NULL ? NULL : PyObject_GetAttr(tensor, s_device);
    key = device == NULL ? NULL : PyTuple_Pack(3, shape, dtype, device);
    if (key == NULL || PyList_Append(self->values, tensor) < 0 || PyList_Append(self->active, Py_False) < 0 ||
        PyDict_SetItem(self->slots, identity, slot) < 0 || PyList_Append(self->key, key) < 0)
        number = -1;
    Py_XDECREF(slot);
    Py_XDECREF(identity);
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    Py_XDECREF(device);
    Py_XDECREF(key);
    return number;
}

/* The slot of a plain tensor that was no argument before, which may become a constant; -1 with an error set. */
static Py_ssize_t
slot_or_constant(Handler *self, PyObject *tensor)
{
    if (self->alias == NULL || self->alias == Py_None) { /* no writes or views that it may come from */
        Py_ssize_t known = known_slot(self, tensor);     /* it may stand at two places of one call */
        return known == -1 ? append_constant(self, tensor) : known < 0 ? -1 : known;
    }
    PyObject *found = PyObject_CallMethodOneArg((PyObject *)self, s__slot_or_constant, tensor);
    if (found == NULL)
        return -1;
    Py_ssize_t slot = PyLong_AsSsize_t(found);
    Py_DECREF(found);
    return slot;
}

/* Record what ran, if an argument is active: 0, or -1 with an error set. `fresh` are places of tensors without a slot. */
static int
record_call(Handler *self, PyObject *facts, PyObject *args, PyObject *lowered, const Py_ssize_t *fresh, int fresh_count,
            int touched, PyObject *out)
{
    if (fresh_count && !touched) {
        PyObject *any = PyObject_CallMethodObjArgs((PyObject *)self, s__any_active, args, Py_None, NULL);
        if (any == NULL)
            return -1;
        touched = PyObject_IsTrue(any);
        Py_DECREF(any);
    }
    if (!touched)
        return 0;
    for (int number = 0; number < fresh_count; number++) {
        PyObject *tensor = PyTuple_GET_ITEM(args, fresh[number]);
        Py_ssize_t slot = slot_or_constant(self, tensor);
        if (slot < 0)
            return -1;
        PyObject *object = NULL;
        if (slot < PyList_GET_SIZE(c_slot_objects))
            object = Py_NewRef(PyList_GET_ITEM(c_slot_objects, slot));
        else
            object = PyObject_CallFunction((PyObject *)Py_TYPE(PyList_GET_ITEM(c_slot_objects, 0)), "n", slot);
        if (object == NULL)
            return -1;
        PyTuple_SET_ITEM(lowered, fresh[number], object);
    }
    PyObject *kind = (PyObject *)Py_TYPE(out);
    PyObject *dtype = kind == c_tensor || kind == c_batch_tensor ? PyObject_GetAttr(out, s_dtype) : Py_NewRef(Py_None);
    if (dtype == NULL)
        return -1;
    int outcome = PySet_Contains(c_floating, dtype);
    if (outcome > 0)
        outcome = append_record(self, facts, lowered, out, dtype);
    else if (outcome == 0) {
        PyObject *done = PyObject_CallMethodObjArgs((PyObject *)self, s__append_record, facts, lowered, empty, out, NULL);
        outcome = done == NULL ? -1 : 0;
        Py_XDECREF(done);
    }
    Py_DECREF(dtype);
    return outcome;
}

/* NotImplemented leaves the call to the Python method, with nothing done. */
static PyObject *
run_on_tape(Handler *self, PyObject *function, PyObject *args)
{
    Py_ssize_t count = given(function, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args));
    if (count < 1)
        return Py_NewRef(Py_NotImplemented);
    int autocast = call_is_true(c_autocast);
    if (autocast)
        return autocast < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *op = PyTuple_GET_ITEM(function, OP);
    PyObject *second = count > 1 ? PyTuple_GET_ITEM(args, 1) : NULL;
    int number = second != NULL && is_number(second);
    if (number && PyFloat_CheckExact(second) && PyFloat_AS_DOUBLE(second) == 0.0)
        return Py_NewRef(Py_NotImplemented); /* its sign is marked in the signature */
    if (PyTuple_GET_ITEM(function, NUMBER_OP) != Py_None) {
        if (number)
            op = PyTuple_GET_ITEM(function, NUMBER_OP);
    } else if (number)
        return Py_NewRef(Py_NotImplemented);
    PyObject *identity = PyLong_FromVoidPtr(op);
    if (identity == NULL)
        return NULL;
    PyObject *facts = PyDict_GetItemWithError(self->facts, identity);
    Py_DECREF(identity);
    if (facts == NULL)
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_NotImplemented);
    if (SLOT(facts, common) != Py_True)
        return Py_NewRef(Py_NotImplemented);

    PyObject *out = NULL, *first_dtype = NULL, *constant = NULL;
    PyObject *stored[3];
    Py_ssize_t fresh[3];
    int fresh_count = 0, touched = 0;
    PyObject *lowered = PyTuple_New(count);
    if (lowered == NULL)
        return NULL;
    for (Py_ssize_t place = 0; place < count; place++) {
        PyObject *item = stored[place] = PyTuple_GET_ITEM(args, place);
        if (place == 1 && number) {
            PyTuple_SET_ITEM(lowered, place, Py_NewRef(item));
            continue;
        }
        Py_ssize_t slot = known_slot(self, item);
        if (slot == -2)
            goto done;
        if (slot < 0 && (PyObject *)Py_TYPE(item) != c_tensor)
            goto refuse;
        PyObject *dtype = plain_dtype(item);
        if (dtype == NULL)
            goto done;
        int plain = dtype != Py_None;
        if (place == 0)
            first_dtype = dtype;
        else
            Py_DECREF(dtype);
        if (!plain || slot >= PyList_GET_SIZE(c_slot_objects))
            goto refuse;
        if (slot < 0) {
            fresh[fresh_count++] = place;
            continue;
        }
        if (PyList_GET_ITEM(self->active, slot) == Py_True)
            touched = 1;
        PyTuple_SET_ITEM(lowered, place, Py_NewRef(PyList_GET_ITEM(c_slot_objects, slot)));
    }
    if (number && PyTuple_GET_ITEM(function, NUMBERS) == Py_True && (PyObject *)Py_TYPE(stored[0]) == c_tensor) {
        constant = constant_for(second, first_dtype);
        if (constant == NULL)
            goto done;
        stored[1] = constant;
    }
    if (self->below == NULL || self->below == Py_None)
        out = call_below(PyTuple_GET_ITEM(function, CALL), stored, count);
    else
        out = run_under_vmap((Handler *)self->below, function, stored, count);
    if (out == NULL || out == Py_NotImplemented)
        goto done;
    if (self->respect_no_grad) {
        int enabled = call_is_true(c_grad_enabled);
        if (enabled == 0)
            enabled = PyObject_SetAttr((PyObject *)self, s_saw_blocked, Py_True) < 0 ? -1 : 0;
        if (enabled <= 0) {
            if (enabled < 0)
                Py_CLEAR(out);
            goto done;
        }
    }
    if (record_call(self, facts, args, lowered, fresh, fresh_count, touched, out) < 0)
        Py_CLEAR(out);
    goto done;
refuse:
    out = Py_NewRef(Py_NotImplemented);
done:
    Py_XDECREF(first_dtype);
    Py_XDECREF(constant);
    Py_DECREF(lowered);
    return out;
}

/* ------------------------------------------------------------------------------------------------------- handler -- */

/* Whether the innermost mode is this one, and torch.func is not at work: 1, 0, or -1 with an error set. */
static int
stands_innermost(Handler *self)
{
    if (state.exclude != NULL)
        return state.dispatch_modes() == self->depth && !state.included(state.functorch);
    PyObject *count = PyObject_CallNoArgs(c_count);
    if (count == NULL)
        return -1;
    Py_ssize_t depth = PyLong_AsSsize_t(count);
    Py_DECREF(count);
    if (depth != self->depth)
        return 0;
    PyObject *level = PyObject_CallNoArgs(c_level);
    if (level == NULL)
        return -1;
    Py_DECREF(level);
    return level == Py_None;
}

/* Whether the classes that torch names beside a call take no functions themselves. Methods without arguments name their own. */
static int
are_plain(PyObject *types)
{
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(types); place++) {
        PyObject *type = PyTuple_GET_ITEM(types, place);
        if (type != c_tensor && type != c_batch_tensor)
            return 0;
    }
    return 1;
}

/* Whether the next mode is torch itself, or for a tape the outermost vmap. */
static int
is_near_torch(Handler *self)
{
    if (self->below == NULL || self->below == Py_None)
        return self->kind != NO_KIND;
    if (self->kind != TAPE || !PyObject_TypeCheck(self->below, &handler_type))
        return 0;
    Handler *below = (Handler *)self->below;
    return below->kind == VMAP && (below->below == NULL || below->below == Py_None);
}

static PyObject *
torch_function(Handler *self, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    if (is_near_torch(self) && names == NULL && nargs >= 3 &&
        PyTuple_CheckExact(args[2]) && PyTuple_Check(args[1]) && are_plain(args[1]) &&
        (nargs == 3 || args[3] == Py_None || (PyDict_CheckExact(args[3]) && PyDict_GET_SIZE(args[3]) == 0))) {
        PyObject *function = PyDict_GetItemWithError(c_table, args[0]);
        if (function == NULL && PyErr_Occurred())
            return NULL;
        if (function != NULL && PyTuple_GET_SIZE(function) == FIELDS) {
            int innermost = stands_innermost(self);
            if (innermost < 0)
                return NULL;
            if (innermost) {
                PyObject *out = self->kind == TAPE ? run_on_tape(self, function, args[2])
                                                   : run_under_vmap(self, function, &PyTuple_GET_ITEM(args[2], 0),
                                                                    PyTuple_GET_SIZE(args[2]));
                if (out != Py_NotImplemented)
                    return out;
                Py_DECREF(out);
            }
        }
    }
    PyObject *method = PyObject_GetAttr((PyObject *)self, s_take_function);
    if (method == NULL)
        return NULL;
    PyObject *out = PyObject_Vectorcall(method, args, nargs, names);
    Py_DECREF(method);
    return out;
}

static int
handler_traverse(Handler *self, visitproc visit, void *arg)
{
    Py_VISIT(self->below);
    Py_VISIT(self->values);
    Py_VISIT(self->active);
    Py_VISIT(self->slots);
    Py_VISIT(self->key);
    Py_VISIT(self->records);
    Py_VISIT(self->facts);
    Py_VISIT(self->origin);
    Py_VISIT(self->alias);
    return 0;
}

static int
handler_clear(Handler *self)
{
    Py_CLEAR(self->below);
    Py_CLEAR(self->values);
    Py_CLEAR(self->active);
    Py_CLEAR(self->slots);
    Py_CLEAR(self->key);
    Py_CLEAR(self->records);
    Py_CLEAR(self->facts);
    Py_CLEAR(self->origin);
    Py_CLEAR(self->alias);
    return 0;
}

static void
handler_dealloc(Handler *self)
{
    PyObject_GC_UnTrack(self);
    handler_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *
handler_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Handler *self = (Handler *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->depth = -1;
        self->origin = Py_NewRef(Py_None);
    }
    return (PyObject *)self;
}

static PyMethodDef handler_methods[] = {
    {"__torch_function__", (PyCFunction)(void (*)(void))torch_function, METH_FASTCALL | METH_KEYWORDS,
     "Take a function of the table; whatever is not plain goes to take_function."},
    {NULL},
};

static PyMemberDef handler_members[] = {
    {"_depth", T_PYSSIZET, offsetof(Handler, depth), 0, NULL},
    {"below", T_OBJECT, offsetof(Handler, below), 0, NULL},
    {"graphs", T_BOOL, offsetof(Handler, graphs), 0, NULL},
    {"kind", T_BYTE, offsetof(Handler, kind), 0, NULL},
    {"_always_guard", T_BOOL, offsetof(Handler, guarded), 0, NULL},
    {"respect_no_grad", T_BOOL, offsetof(Handler, respect_no_grad), 0, NULL},
    {"values", T_OBJECT, offsetof(Handler, values), 0, NULL},
    {"active", T_OBJECT, offsetof(Handler, active), 0, NULL},
    {"slots", T_OBJECT, offsetof(Handler, slots), 0, NULL},
    {"key", T_OBJECT, offsetof(Handler, key), 0, NULL},
    {"records", T_OBJECT, offsetof(Handler, records), 0, NULL},
    {"_facts", T_OBJECT, offsetof(Handler, facts), 0, NULL},
    {"_origin", T_OBJECT, offsetof(Handler, origin), 0, NULL},
    {"_alias", T_OBJECT, offsetof(Handler, alias), 0, NULL},
    {NULL},
};

static PyTypeObject handler_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "chainrule._shortcuts.Handler",
    .tp_doc = "What a mode's function handler reads, and the handler itself for plain calls.",
    .tp_basicsize = sizeof(Handler),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = handler_new,
    .tp_dealloc = (destructor)handler_dealloc,
    .tp_traverse = (traverseproc)handler_traverse,
    .tp_clear = (inquiry)handler_clear,
    .tp_methods = handler_methods,
    .tp_members = handler_members,
};

/* -------------------------------------------------------------------------------------------------------- methods -- */

/* Method(function, otherwise): a function of the table as a method of BatchTensor, which needs no function mode under its own
 * level. Every other call goes to `otherwise`, torch's own method. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *function;
    PyObject *otherwise;
} Method;

static PyObject *
method_call(PyObject *callable, PyObject *const *args, size_t flagged, PyObject *names)
{
    Method *self = (Method *)callable;
    Py_ssize_t count = PyVectorcall_NARGS(flagged);
    if (names == NULL && count >= 1 && count <= 2 && (PyObject *)Py_TYPE(args[0]) == c_batch_tensor) {
        Handler *handler = (Handler *)SLOT(args[0], level);
        /* A mode that stands among the functions stands there alone, unless another was entered inside of it. */
        if (handler != NULL && PyObject_TypeCheck(handler, &handler_type) && handler->kind == VMAP &&
            (handler->below == NULL || handler->below == Py_None) && state.function_modes() == 1 &&
            state.functions_shown() && stands_innermost(handler)) {
            int disabled = state.get_functions();
            state.set_functions(2);
            PyObject *out = run_under_vmap(handler, self->function, args, count);
            state.set_functions(disabled);
            if (out != Py_NotImplemented)
                return out;
            Py_DECREF(out);
        }
    }
    return PyObject_Vectorcall(self->otherwise, args, flagged, names);
}

static PyObject *
method_bound(PyObject *self, PyObject *object, PyObject *type)
{
    return object == NULL || object == Py_None ? Py_NewRef(self) : PyMethod_New(self, object);
}

static PyObject *
method_attribute(PyObject *self, PyObject *name)
{
    PyObject *found = PyObject_GenericGetAttr(self, name);
    if (found != NULL || !PyErr_ExceptionMatches(PyExc_AttributeError))
        return found;
    PyErr_Clear();
    return PyObject_GetAttr(((Method *)self)->otherwise, name);
}

static PyObject *
method_doc(PyObject *self, void *unused)
{
    return PyObject_GetAttrString(((Method *)self)->otherwise, "__doc__");
}

static PyGetSetDef method_properties[] = {
    {"__doc__", method_doc, NULL, NULL, NULL},
    {NULL},
};

static PyObject *
method_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *function, *otherwise;
    if (!PyArg_ParseTuple(args, "O!O", &PyTuple_Type, &function, &otherwise))
        return NULL;
    if (PyTuple_GET_SIZE(function) != FIELDS)
        return PyErr_Format(PyExc_TypeError, "Method: a function of the table has %d fields", FIELDS);
    Method *self = (Method *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->vectorcall = method_call;
        self->function = Py_NewRef(function);
        self->otherwise = Py_NewRef(otherwise);
    }
    return (PyObject *)self;
}

static int
method_traverse(Method *self, visitproc visit, void *arg)
{
    Py_VISIT(self->function);
    Py_VISIT(self->otherwise);
    return 0;
}

static int
method_clear(Method *self)
{
    Py_CLEAR(self->function);
    Py_CLEAR(self->otherwise);
    return 0;
}

static void
method_dealloc(Method *self)
{
    PyObject_GC_UnTrack(self);
    method_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject method_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "chainrule._shortcuts.Method",
    .tp_basicsize = sizeof(Method),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR,
    .tp_vectorcall_offset = offsetof(Method, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_descr_get = method_bound,
    .tp_getattro = method_attribute,
    .tp_getset = method_properties,
    .tp_new = method_new,
    .tp_dealloc = (destructor)method_dealloc,
    .tp_traverse = (traverseproc)method_traverse,
    .tp_clear = (inquiry)method_clear,
};

/* -------------------------------------------------------------------------------------------------------- module -- */

static PyObject *
configure(PyObject *module, PyObject *args, PyObject *kwargs)
{
    PyObject *name, *value;
    Py_ssize_t place = 0;
    while (kwargs != NULL && PyDict_Next(kwargs, &place, &name, &value)) {
        PyObject **where = NULL;
#define PLACE(known)                                                                                                   \
    if (PyUnicode_CompareWithASCIIString(name, #known) == 0)                                                           \
        where = &c_##known;
        CONFIGURED(PLACE)
        if (where == NULL)
            return PyErr_Format(PyExc_TypeError, "configure: unknown name %R", name);
        Py_XSETREF(*where, Py_NewRef(value));
    }
    Py_RETURN_NONE;
}

/* The place of a slot in the instances of a class; -1 with an error set. */
static Py_ssize_t
slot_offset(PyObject *type, const char *name)
{
    PyObject *descriptor = PyObject_GetAttrString(type, name);
    if (descriptor == NULL)
        return -1;
    Py_ssize_t offset = -1;
    if (Py_TYPE(descriptor) == &PyMemberDescr_Type)
        offset = ((PyMemberDescrObject *)descriptor)->d_member->offset;
    else
        PyErr_Format(PyExc_TypeError, "%R has no slot %s", type, name);
    Py_DECREF(descriptor);
    return offset;
}

static PyObject *
use_classes(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2 || !PyType_Check(args[0]) || !PyType_Check(args[1]))
        return PyErr_Format(PyExc_TypeError, "use_classes: two classes are expected");
    if ((offsets.inner = slot_offset(args[0], "inner")) < 0 || (offsets.level = slot_offset(args[0], "level")) < 0 ||
        (offsets.value = slot_offset(args[1], "value")) < 0 || (offsets.dtype = slot_offset(args[1], "dtype")) < 0 ||
        (offsets.sample = slot_offset(args[1], "sample")) < 0)
        return NULL;
    Py_XSETREF(c_batch_tensor, Py_NewRef(args[0]));
    Py_XSETREF(c_batched, Py_NewRef(args[1]));
    Py_RETURN_NONE;
}

static PyObject *
use_facts(PyObject *module, PyObject *type)
{
    if ((offsets.common = slot_offset(type, "common")) < 0 || (offsets.op = slot_offset(type, "op")) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
use_state(PyObject *module, PyObject *args)
{
    unsigned long long exclude, included, dispatch_modes, function_modes, functions_shown, set_functions, get_functions;
    unsigned short python, functorch;
    if (!PyArg_ParseTuple(args, "KKKKKKKHH", &exclude, &included, &dispatch_modes, &function_modes, &functions_shown,
                          &set_functions, &get_functions, &python, &functorch))
        return NULL;
    state.exclude = (void (*)(uint16_t, bool))(uintptr_t)exclude;
    state.included = (bool (*)(uint16_t))(uintptr_t)included;
    state.dispatch_modes = (int64_t(*)(void))(uintptr_t)dispatch_modes;
    state.function_modes = (int64_t(*)(void))(uintptr_t)function_modes;
    state.functions_shown = (bool (*)(void))(uintptr_t)functions_shown;
    state.set_functions = (void (*)(int))(uintptr_t)set_functions;
    state.get_functions = (int (*)(void))(uintptr_t)get_functions;
    state.python = python;
    state.functorch = functorch;
    Py_RETURN_NONE;
}

static PyObject *
read_state(PyObject *module, PyObject *unused)
{
    if (state.exclude == NULL)
        Py_RETURN_NONE;
    return Py_BuildValue("(NLLN)", PyBool_FromLong(state.included(state.functorch)), (long long)state.dispatch_modes(),
                         (long long)state.function_modes(), PyBool_FromLong(state.functions_shown()));
}

static PyObject *
set_excluded(PyObject *module, PyObject *excluded)
{
    return exclude_python(excluded == Py_True);
}

static PyObject *
set_functions(PyObject *module, PyObject *disabled)
{
    long wanted = PyLong_AsLong(disabled);
    if (wanted == -1 && PyErr_Occurred())
        return NULL;
    if (wanted < 0 || wanted > 2 || state.set_functions == NULL)
        return PyErr_Format(PyExc_ValueError, "set_functions: 0, 1 or 2 where the state is known");
    long before = state.get_functions();
    state.set_functions((int)wanted);
    return PyLong_FromLong(before);
}

static PyMethodDef module_methods[] = {
    {"use_classes", (PyCFunction)(void (*)(void))use_classes, METH_FASTCALL, "Give BatchTensor and Batched."},
    {"use_facts", use_facts, METH_O, "Give OpFacts."},
    {"use_state", use_state, METH_VARARGS, "Give the addresses of torch's functions on the dispatcher's state, and two keys; zeros for none."},
    {"read_state", read_state, METH_NOARGS, "What those functions say: functorch's key, the numbers of modes, functions shown."},
    {"set_functions", set_functions, METH_O, "Hide functions from classes (1), from modes as well (2), or not (0); returns what it was."},
    {"set_excluded", set_excluded, METH_O, "Exclude the key of Python's handlers, or not."},
    {"configure", (PyCFunction)(void (*)(void))configure, METH_VARARGS | METH_KEYWORDS,
     "Give the handlers the objects that they use, by name."},
    {NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "chainrule._shortcuts",
    .m_doc = "The commonest calls of the function modes, in C.",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC
PyInit__shortcuts(void)
{
#define INTERN(name)                                                                                                   \
    s_##name = PyUnicode_InternFromString(#name);                                                                      \
    if (s_##name == NULL)                                                                                              \
        return NULL;
    NAMES(INTERN)
    empty = PyTuple_New(0);
    if (empty == NULL || PyType_Ready(&handler_type) < 0 || PyType_Ready(&method_type) < 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made != NULL && (PyModule_AddObjectRef(made, "Handler", (PyObject *)&handler_type) < 0 ||
                         PyModule_AddObjectRef(made, "Method", (PyObject *)&method_type) < 0))
        Py_CLEAR(made);
    return made;
}

/* The commonest calls of the function modes (chainrule.dispatch.LightMode), in C.
 *
 * A function of chainrule.functions.TABLE that is called under one mode costs more in the interpreter of the mode's handler
 * than in torch. What the handlers do for plain arguments is done here: VmapMode.run_function for functions of one tensor or
 * of two that carry the batch alike, and Tape.run_function for plain tensors. Every other call, and everything where this
 * module could not be compiled, goes to the Python methods of the same meaning: they are the reference.
 *
 * Only the interpreter's own interface is used, nothing of torch's.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

enum { NO_KIND = 0, VMAP = 1, TAPE = 2 };

/* Fields of chainrule.functions.Function, which is a tuple. */
enum { CALL, OP, NUMBER_OP, FEWEST, MOST, NUMBERS, POINTWISE, MAPPED, FIELDS };

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
} Handler;

/* What `configure` is given, by name. */
#define CONFIGURED(X)                                                                                                  \
    X(table) X(count) X(level) X(exclude) X(python_key) X(constants) X(shared_constant) X(tensor) X(real) X(floating)   \
    X(batch_tensor) X(batched) X(make_wrapper) X(wrap_batched) X(autocast) X(grad_enabled) X(record) X(slot_objects)

#define DECLARE(name) static PyObject *c_##name = NULL;
CONFIGURED(DECLARE)

#define NAMES(X)                                                                                                       \
    X(take_function) X(level) X(inner) X(value) X(requires_grad) X(dtype) X(ndim) X(shape) X(is_cpu) X(is_contiguous)   \
    X(common) X(op) X(saw_blocked) X(_any_active) X(_slot_or_constant) X(_append_record)

#define DECLARE_NAME(name) static PyObject *s_##name = NULL;
NAMES(DECLARE_NAME)

static PyObject *empty = NULL;

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
    PyObject *args[] = {c_python_key, excluded ? Py_True : Py_False};
    return PyObject_Vectorcall(c_exclude, args, 2, NULL);
}

/* Let torch's handlers be reached again; an error that is on its way stays. */
static int
include_python(void)
{
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

/* ---------------------------------------------------------------------------------------------------------- vmap -- */

/* The stored tensor of a tensor of this level that carries the batch: 1 with new references; 0 if it is none; -1. */
static int
stored_of(Handler *self, PyObject *tensor, PyObject **value, PyObject **dtype)
{
    if ((PyObject *)Py_TYPE(tensor) != c_batch_tensor)
        return 0;
    PyObject *level = PyObject_GetAttr(tensor, s_level);
    if (level == NULL)
        return -1;
    Py_DECREF(level);
    if (level != (PyObject *)self)
        return 0;
    PyObject *inner = PyObject_GetAttr(tensor, s_inner);
    if (inner == NULL)
        return -1;
    if ((PyObject *)Py_TYPE(inner) != c_batched) {
        Py_DECREF(inner);
        return 0;
    }
    *value = PyObject_GetAttr(inner, s_value);
    Py_DECREF(inner);
    if (*value == NULL)
        return -1;
    *dtype = plain_dtype(*value);
    if (*dtype == NULL || *dtype == Py_None) {
        int outcome = *dtype == NULL ? -1 : 0;
        Py_CLEAR(*dtype);
        Py_CLEAR(*value);
        return outcome;
    }
    return 1;
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

/* A result as a tensor of this level; takes the reference of `out`. */
static PyObject *
wrapped(Handler *self, PyObject *out)
{
    PyObject *tensor = NULL, *shape = NULL, *dtype = NULL, *sample = NULL, *contiguous = NULL;
    PyObject *batched = PyObject_CallOneArg(c_batched, out);
    if (batched == NULL)
        goto done;
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
        PyObject *args[] = {batched, (PyObject *)self};
        tensor = PyObject_Vectorcall(c_wrap_batched, args, 2, NULL);
        goto done;
    }
    shape = PyObject_GetAttr(out, s_shape);
    dtype = shape == NULL ? NULL : PyObject_GetAttr(out, s_dtype);
    sample = dtype == NULL ? NULL : PyTuple_GetSlice(shape, 1, PyTuple_GET_SIZE(shape));
    if (sample == NULL)
        goto done;
    PyObject *args[] = {c_batch_tensor, sample, Py_None, Py_None, Py_None, dtype};
    tensor = PyObject_Vectorcall(c_make_wrapper, args, 6, NULL);
    if (tensor != NULL &&
        (PyObject_SetAttr(tensor, s_inner, batched) < 0 || PyObject_SetAttr(tensor, s_level, (PyObject *)self) < 0))
        Py_CLEAR(tensor);
done:
    Py_XDECREF(batched);
    Py_XDECREF(contiguous);
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    Py_XDECREF(sample);
    Py_DECREF(out);
    return tensor;
}

/* NotImplemented leaves the call to the Python method, with nothing done. */
static PyObject *
run_under_vmap(Handler *self, PyObject *function, PyObject *args)
{
    Py_ssize_t count = PyTuple_GET_SIZE(args);
    if (self->guarded || self->graphs || count < 1 || count > 2 || PyTuple_GET_ITEM(function, MAPPED) != Py_True ||
        PyTuple_GET_ITEM(function, POINTWISE) != Py_True || PyLong_AsLong(PyTuple_GET_ITEM(function, FEWEST)) != count)
        return Py_NewRef(Py_NotImplemented);
    PyObject *stored[2] = {NULL, NULL}, *dtype = NULL, *other = NULL, *out = NULL;
    int known = stored_of(self, PyTuple_GET_ITEM(args, 0), &stored[0], &dtype);
    if (known <= 0)
        return known < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    if (count == 2) {
        PyObject *second = PyTuple_GET_ITEM(args, 1);
        if (is_number(second)) {
            if (PyTuple_GET_ITEM(function, NUMBERS) != Py_True)
                goto refuse;
            stored[1] = constant_for(second, dtype);
            if (stored[1] == NULL)
                goto done;
        } else {
            known = stored_of(self, second, &stored[1], &other);
            if (known < 0)
                goto done;
            if (!known)
                goto refuse;
            int fits = other == dtype ? same_rank(stored[0], stored[1]) : 0;
            if (fits < 0)
                goto done;
            if (!fits)
                goto refuse;
        }
    }
    out = call_below(PyTuple_GET_ITEM(function, CALL), stored, count);
    if (out != NULL)
        out = wrapped(self, out);
    goto done;
refuse:
    out = Py_NewRef(Py_NotImplemented);
done:
    Py_XDECREF(stored[0]);
    Py_XDECREF(stored[1]);
    Py_XDECREF(dtype);
    Py_XDECREF(other);
    return out;
}

/* ---------------------------------------------------------------------------------------------------------- tape -- */

/* Append an op that ran with one floating-point result; 0, or -1 with an error set. */
static int
append_record(Handler *self, PyObject *facts, PyObject *arguments, PyObject *out, PyObject *dtype)
{
    int outcome = -1;
    PyObject *slot = NULL, *identity = NULL, *shape = NULL, *key = NULL, *op = NULL, *outputs = NULL, *fields = NULL,
             *record = NULL, *packed = NULL;
    slot = PyLong_FromSsize_t(PyList_GET_SIZE(self->active));
    identity = slot == NULL ? NULL : PyLong_FromVoidPtr(out);
    shape = identity == NULL ? NULL : PyObject_GetAttr(out, s_shape);
    op = shape == NULL ? NULL : PyObject_GetAttr(facts, s_op);
    outputs = op == NULL ? NULL : PyTuple_Pack(1, slot);
    key = outputs == NULL ? NULL : PyTuple_Pack(5, facts, arguments, empty, shape, dtype);
    fields = key == NULL ? NULL : PyTuple_Pack(6, op, arguments, empty, outputs, Py_False, self->origin);
    packed = fields == NULL ? NULL : PyTuple_Pack(1, fields);
    record = packed == NULL ? NULL : PyTuple_Type.tp_new((PyTypeObject *)c_record, packed, NULL);
    if (record != NULL && PyList_Append(self->values, out) == 0 && PyList_Append(self->active, Py_True) == 0 &&
        PyDict_SetItem(self->slots, identity, slot) == 0 && PyList_Append(self->key, key) == 0 &&
        PyList_Append(self->records, record) == 0)
        outcome = 0;
    Py_XDECREF(slot);
    Py_XDECREF(identity);
    Py_XDECREF(shape);
    Py_XDECREF(op);
    Py_XDECREF(outputs);
    Py_XDECREF(key);
    Py_XDECREF(fields);
    Py_XDECREF(packed);
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
        PyObject *found = PyObject_CallMethodOneArg((PyObject *)self, s__slot_or_constant, tensor);
        if (found == NULL)
            return -1;
        Py_ssize_t slot = PyLong_AsSsize_t(found);
        Py_DECREF(found);
        PyObject *object = NULL;
        if (slot < PyList_GET_SIZE(c_slot_objects))
            object = Py_NewRef(PyList_GET_ITEM(c_slot_objects, slot));
        else
            object = PyObject_CallFunction((PyObject *)Py_TYPE(PyList_GET_ITEM(c_slot_objects, 0)), "n", slot);
        if (object == NULL)
            return -1;
        PyTuple_SET_ITEM(lowered, fresh[number], object);
    }
    PyObject *dtype = (PyObject *)Py_TYPE(out) == c_tensor ? PyObject_GetAttr(out, s_dtype) : Py_NewRef(Py_None);
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
    Py_ssize_t count = PyTuple_GET_SIZE(args);
    if (count < PyLong_AsLong(PyTuple_GET_ITEM(function, FEWEST)) || count > PyLong_AsLong(PyTuple_GET_ITEM(function, MOST)) ||
        count > 3)
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
    int common = attribute_is_true(facts, s_common);
    if (common <= 0)
        return common < 0 ? NULL : Py_NewRef(Py_NotImplemented);

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
    out = call_below(PyTuple_GET_ITEM(function, CALL), stored, count);
    if (out == NULL)
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

/* Whether no tensor's class has a way of its own to be called. */
static int
are_plain(PyObject *types)
{
    if (!PyTuple_Check(types))
        return 0;
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(types); place++)
        if (PyTuple_GET_ITEM(types, place) != c_tensor)
            return 0;
    return 1;
}

static PyObject *
torch_function(Handler *self, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    if (self->kind != NO_KIND && (self->below == NULL || self->below == Py_None) && names == NULL && nargs >= 3 &&
        PyTuple_CheckExact(args[2]) && are_plain(args[1]) &&
        (nargs == 3 || args[3] == Py_None || (PyDict_CheckExact(args[3]) && PyDict_GET_SIZE(args[3]) == 0))) {
        PyObject *function = PyDict_GetItemWithError(c_table, args[0]);
        if (function == NULL && PyErr_Occurred())
            return NULL;
        if (function != NULL && PyTuple_GET_SIZE(function) == FIELDS) {
            int innermost = stands_innermost(self);
            if (innermost < 0)
                return NULL;
            if (innermost) {
                PyObject *out = self->kind == VMAP ? run_under_vmap(self, function, args[2]) : run_on_tape(self, function, args[2]);
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

static PyMethodDef module_methods[] = {
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
    if (empty == NULL || PyType_Ready(&handler_type) < 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made != NULL && PyModule_AddObjectRef(made, "Handler", (PyObject *)&handler_type) < 0)
        Py_CLEAR(made);
    return made;
}

/* What the parts share: the fields of a handler, what `configure` gives, the state of torch's dispatcher. Part of shortcuts.c. */

enum { NO_KIND = 0, VMAP = 1, TAPE = 2 };

/* Fields of chainrule.functions.Function, which is a tuple. */
/* OpFacts.joining. */
enum { PARTS, WHOLE, LINEAR, MATMUL };

enum { CALL, OP, NUMBER_OP, FEWEST, MOST, NUMBERS, POINTWISE, MAPPED, KEEPS, WRITES, FIELDS };

typedef struct {
    PyObject_HEAD
    Py_ssize_t depth;
    PyObject *below;
    char graphs;
    char kind;
    char guarded;
    char makes_graphs;
    char respect_no_grad;
    PyObject *values;
    PyObject *active;
    PyObject *slots;
    PyObject *key;
    PyObject *records;
    PyObject *facts;
    PyObject *origin;
    PyObject *alias;
    PyObject *derived;
    PyObject *pending;
    PyObject *heard; /* what runs is noted in this list, where it is one */
    char sees_views;
    char meets_saved;
    PyObject *entered;
    char kernels;
    PyObject *policy;
    PyObject *inputs;
    PyObject *kept;
    PyObject *derived_slots;
    PyObject *prepared;
    PyObject *hooks;
    PyObject *sources;
    PyObject *outside;
    char nested;
    PyObject *calls;
    PyObject *size;
    PyObject *randomness;
    PyObject *fallbacks;
    PyObject *include;
    PyObject *exclude;
} Handler;

/* The fields of a handler that are objects. */
#define OBJECTS(X)                                                                                                     \
    X(below) X(values) X(active) X(slots) X(key) X(records) X(facts) X(origin) X(alias) X(derived) X(pending) X(heard) X(entered) \
    X(policy) X(inputs) X(kept) X(derived_slots) X(prepared) X(hooks) X(sources) X(outside) X(calls) X(size) X(randomness)  \
    X(fallbacks) X(include) X(exclude)

/* What `configure` is given, by name. */
#define CONFIGURED(X)                                                                                                  \
    X(count) X(level) X(exclude) X(python_key) X(constants) X(shared_constant) X(tensor) X(real) X(floating)   \
    X(strided) X(make_wrapper) X(wrap_batched) X(wrap_constant) X(make_subclass) X(choose) X(autocast) X(grad_enabled) X(record) X(slot_objects) X(parameter) \
    X(comparisons) X(plain) X(shaped) X(by_schema) X(required) X(getitem) X(named) X(select) X(slice) \
    X(unsqueeze) X(index) X(long) X(bool) X(calls) X(known) X(numbers) X(new_number) X(size) X(constants_of_calls) \
    X(mv) X(addmv) X(default_dtype) X(push) X(pop) X(at) X(push_function) X(pop_function) X(function_at) X(flags) \
    X(where) X(where_op) X(to_copy) X(to_op) X(conversions) X(constant_beside) X(entries) X(joined) \
    X(over) X(composites) X(composed) X(always_views) X(scatters) X(link) X(clone) X(expand_op) X(fill_op) X(copy_op) X(zero_op) X(copy_) X(fill_) X(zero_) X(put_op) X(put)  \
    X(setitem) X(included_keys) X(excluded_keys) X(autocast_keys) X(forward_mode) X(ledger) X(watch) X(lengths) X(numbered) X(spent)        \
    X(complex) X(set_grad) X(detach_op) X(converting) X(make_tensor) X(vmap_mode) X(unflatten) X(written) X(copies) X(places) X(makers) X(products) X(door) X(device)

#define DECLARE(name) static PyObject *c_##name = NULL;
CONFIGURED(DECLARE)
static PyObject *c_batch_tensor = NULL, *c_batched = NULL;

#define NAMES(X)                                                                                                       \
    X(take_function) X(__torch_function__) X(level) X(inner) X(value) X(requires_grad) X(dtype) X(ndim) X(shape) X(is_cpu) X(is_contiguous)   \
    X(device) X(layout) X(_note_derived) X(saw_blocked) X(_any_active) X(_joins_whole) X(_slot_or_constant) X(append_record) \
    X(facts) X(run_op) X(lower) X(_run_uncommon) X(grad_fn) X(stride) X(storage_offset) X(inplace) \
    X(alias) X(links) X(roots) X(families) X(_read_slots) X(_scanned) X(has_writes) X(kept) X(reads_values) X(_note_view)      \
    X(_save_old) X(_climb) X(kernels) X(is_active) X(_run_part_here) X(takes_functions) X(reads_data) X(_enter) X(dim) X(keepdim) \
    X(_listen) X(_run_step) X(detach) X(is_neg) X(is_conj) X(to_real) X(used) X(quick) X(plain) X(batched) X(extra) \
    X(_current_level) X(reverse) X(_note_blocked) \
    X(_is_view) X(_use_count) X(_version) X(untyped_storage) X(_cdata) X(parent) X(views) X(new_empty) X(_is_in_torch_dispatch_mode) X(_is_in_non_infra_torch_dispatch_mode)

#define DECLARE_NAME(name) static PyObject *s_##name = NULL;
NAMES(DECLARE_NAME)

static PyObject *empty = NULL;

/* How many keys autograd has that a tape is recorded without. */
enum { AUTOGRAD_KEYS = 4 };

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
    uint16_t snapshot; /* keeps the state for Python's handlers, by a boxed call for every op */
    uint16_t functorch;
    uint16_t autograd[AUTOGRAD_KEYS];
    uint16_t views; /* keeps track of which tensors are views of which */
    uint16_t conjugate; /* conjugates when values are read */
    bool (*excluded)(uint16_t key);
    bool (*grad_enabled)(void);
    uint16_t first_autocast, last_autocast; /* autocast is on for a device whose key is not excluded */
} state;

/* Where the slots of BatchTensor, of Batched and of OpFacts are. */
static struct {
    Py_ssize_t inner, level, shelf, value, dtype, sample, signature, common, plain, op, is_view, fast, unfollowed, joining, alone, direct, rewrites,
        functional, inactive, reads, numbers, random, shaped, whole, with_complex;
} offsets;

#define SLOT(object, name) (*(PyObject **)((char *)(object) + offsets.name))

/* The attributes of tensors that are read most, without the way through the attributes of an object: torch's own getters, as they
 * stand on its class; NULL where one is none. */
#define ATTRIBUTES(X) X(_version) X(dtype) X(shape) X(grad_fn) X(layout) X(ndim) X(device) X(is_cpu) X(requires_grad)
#define DECLARE_GETTER(name) PyGetSetDef *name;
static struct {
    ATTRIBUTES(DECLARE_GETTER)
} getters;

#define GET(tensor, name) attribute_of(tensor, getters.name, s_##name)

/* Methods without arguments that are called most, likewise. */
#define CALLED(X) X(storage_offset) X(_is_view) X(_use_count)
#define DECLARE_CALLED(name) PyCFunction name;
static struct {
    CALLED(DECLARE_CALLED)
} called;

#define ASK(tensor, name) called_on(tensor, called.name, s_##name)

/* What a method of torch's class of tensors returns, functions not shown to modes for other classes; a new reference. */
static PyObject *
called_on(PyObject *tensor, PyCFunction method, PyObject *name)
{
    if (method != NULL)
        return method(tensor, NULL);
    return PyObject_CallMethodNoArgs(tensor, name);
}

/* That method; NULL, without an error, if it takes arguments or is none. */
static PyCFunction
called_of(PyObject *name)
{
    PyObject *found = PyObject_GetAttr(c_tensor, name);
    PyCFunction method = NULL;
    if (found != NULL && Py_TYPE(found) == &PyMethodDescr_Type && ((PyMethodDescrObject *)found)->d_method->ml_flags == METH_NOARGS)
        method = ((PyMethodDescrObject *)found)->d_method->ml_meth;
    Py_XDECREF(found); /* the class keeps it */
    PyErr_Clear();
    return method;
}

/* An attribute of a tensor; a new reference. */
static PyObject *
attribute_of(PyObject *tensor, PyGetSetDef *getter, PyObject *name)
{
    PyObject *type = (PyObject *)Py_TYPE(tensor);
    if (getter != NULL && (type == c_tensor || type == c_parameter || type == c_batch_tensor))
        return getter->get(tensor, getter->closure);
    return PyObject_GetAttr(tensor, name);
}

/* The getter of an attribute of torch's class of tensors; NULL, without an error, if it has none that is plain. */
static PyGetSetDef *
getter_of(PyObject *name)
{
    PyObject *found = PyObject_GetAttr(c_tensor, name);
    PyGetSetDef *getter = found != NULL && Py_TYPE(found) == &PyGetSetDescr_Type ? ((PyGetSetDescrObject *)found)->d_getset : NULL;
    Py_XDECREF(found); /* the class keeps it */
    PyErr_Clear();
    return getter;
}

/* The truth of an object, the reference of which is taken: 1, 0, or -1 with an error set. NULL is an error that is set. */
static int
is_true_of(PyObject *found)
{
    if (found == NULL)
        return -1;
    int truth = found == Py_True ? 1 : found == Py_False ? 0 : PyObject_IsTrue(found);
    Py_DECREF(found);
    return truth;
}

/* The truth of an attribute, likewise. */
static int
attribute_is_true(PyObject *object, PyObject *name)
{
    return is_true_of(PyObject_GetAttr(object, name));
}

static int
is_number(PyObject *item)
{
    return PyFloat_CheckExact(item) || PyLong_CheckExact(item);
}

/* The same, with complex numbers. */
static int
is_any_number(PyObject *item)
{
    return is_number(item) || PyComplex_CheckExact(item);
}

/* Whether a part of a complex number is a zero below zero, which a dictionary does not tell from other zeros. */
static int
has_negative_zero(PyObject *number)
{
    Py_complex parts = PyComplex_AsCComplex(number);
    return (parts.real == 0.0 && signbit(parts.real)) || (parts.imag == 0.0 && signbit(parts.imag));
}

/* The signs of both parts of a complex number, as `chainrule.capture.slots.signs_of` writes them. */
static PyObject *
signs_of(PyObject *number)
{
    Py_complex parts = PyComplex_AsCComplex(number);
    return PyUnicode_FromFormat("%s%sj", signbit(parts.real) ? "-" : "+", signbit(parts.imag) ? "-" : "+");
}

/* Whether an object is a list or a tuple of numbers. */
static int
holds_numbers(PyObject *item)
{
    if (!PyList_CheckExact(item) && !PyTuple_CheckExact(item))
        return 0;
    for (Py_ssize_t place = 0; place < PySequence_Fast_GET_SIZE(item); place++) {
        PyObject *one = PySequence_Fast_GET_ITEM(item, place);
        if (!is_number(one) && !PyBool_Check(one))
            return 0;
    }
    return 1;
}

/* Append an object, the reference of which is taken: 0, or -1 with an error set. */
static int
append_new(PyObject *list, PyObject *item)
{
    int outcome = item == NULL ? -1 : PyList_Append(list, item);
    Py_XDECREF(item);
    return outcome;
}

/* Whether an object is a tensor of one of the two classes that are taken here. */
static int
is_tensor(PyObject *item)
{
    return (PyObject *)Py_TYPE(item) == c_tensor || (PyObject *)Py_TYPE(item) == c_batch_tensor;
}

/* Whether an object is a tensor that is taken here as an argument of an op. */
static int
is_argument(PyObject *item)
{
    return is_tensor(item) || (PyObject *)Py_TYPE(item) == c_parameter;
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

static int
call_is_true(PyObject *callable)
{
    return is_true_of(PyObject_CallNoArgs(callable));
}

/* Whether autocast is on for any device: 1, 0, or -1 with an error set. */
static int
autocast_is_on(void)
{
    if (state.excluded == NULL)
        return call_is_true(c_autocast);
    for (uint16_t key = state.first_autocast; key <= state.last_autocast; key++)
        if (!state.excluded(key))
            return 1;
    return 0;
}

/* Whether torch's gradients are on, likewise. */
static int
grad_is_enabled(void)
{
    return state.grad_enabled == NULL ? call_is_true(c_grad_enabled) : state.grad_enabled();
}

/* Whether a tensor from outside is of a class without ways of its own. */
static int
is_constant_class(PyObject *tensor)
{
    PyObject *type = (PyObject *)Py_TYPE(tensor);
    return type == c_tensor || type == c_parameter;
}

/* A new reference to a tensor's dtype if the tensor is real, None if it is not; NULL on error. Of one with a graph `joined` is
 * set, so that torch's autograd sees the call. */
static PyObject *
plain_dtype(PyObject *tensor, int *joined)
{
    int graph = is_true_of(GET(tensor, requires_grad));
    if (graph < 0)
        return NULL;
    if (graph)
        *joined = 1;
    PyObject *dtype = GET(tensor, dtype);
    if (dtype == NULL)
        return NULL;
    int real = PySet_Contains(c_real, dtype);
    if (real > 0)
        return dtype;
    Py_DECREF(dtype);
    return real < 0 ? NULL : Py_NewRef(Py_None);
}

/* Whether a tensor is complex: 1, 0, or -1 with an error set. */
static int
is_complex(PyObject *tensor)
{
    if (!is_constant_class(tensor) && (PyObject *)Py_TYPE(tensor) != c_batch_tensor)
        return 0;
    PyObject *dtype = GET(tensor, dtype);
    int found = dtype == NULL ? -1 : PySet_Contains(c_complex, dtype);
    Py_XDECREF(dtype);
    return found;
}

/* Whether the values of a tensor are conjugated or negated when they are read: 1, 0, or -1 with an error set. */
static int
is_lazy(PyObject *tensor)
{
    int lazy = is_true_of(PyObject_CallMethodNoArgs(tensor, s_is_conj));
    return lazy ? lazy : is_true_of(PyObject_CallMethodNoArgs(tensor, s_is_neg));
}

/* Whether calls on complex tensors may be made here: what is conjugated lazily is so when it is read. */
static int
reads_conjugates(void)
{
    return state.exclude != NULL && !state.excluded(state.conjugate);
}

/* As plain_dtype, also of a complex tensor that is not lazy, where calls on such ones may be made. */
static PyObject *
numeric_dtype(PyObject *tensor, int *joined)
{
    PyObject *dtype = plain_dtype(tensor, joined);
    if (dtype != Py_None || !reads_conjugates())
        return dtype;
    int complex = is_complex(tensor), lazy = complex > 0 ? is_lazy(tensor) : 0;
    if (complex < 0 || lazy < 0) {
        Py_DECREF(dtype);
        return NULL;
    }
    if (complex && !lazy)
        Py_SETREF(dtype, GET(tensor, dtype));
    return dtype;
}

/* What is known of a tensor that carries a batch without asking it, borrowed: its `Batched` with dtype and shape of a sample, which
 * says that it has no graph; NULL, without an error, of others. */
static PyObject *
known_batch(PyObject *tensor)
{
    if ((PyObject *)Py_TYPE(tensor) != c_batch_tensor)
        return NULL;
    PyObject *inner = SLOT(tensor, inner);
    return inner != NULL && (PyObject *)Py_TYPE(inner) == c_batched && SLOT(inner, dtype) != NULL && SLOT(inner, sample) != NULL
               ? inner
               : NULL;
}

static PyObject *
exclude_python(int excluded)
{
    if (state.exclude != NULL) {
        state.exclude(state.python, excluded);
        state.exclude(state.snapshot, excluded);
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
        state.exclude(state.snapshot, false);
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

static void
exclude_autograd(bool excluded)
{
    for (int number = 0; number < AUTOGRAD_KEYS; number++)
        state.exclude(state.autograd[number], excluded);
}

/* Whether a call on tensors with a graph may be made here: 1; 0 if it is left to Python; -1 with an error set. */
static int
may_join(void)
{
    return state.exclude == NULL ? 0 : grad_is_enabled();
}

/* The call of a function with torch's Python handlers off, and with its autograd switched on for it if `joined`. */
static PyObject *
call_below(PyObject *call, PyObject *const *args, Py_ssize_t count, int joined)
{
    PyObject *done = exclude_python(1);
    if (done == NULL)
        return NULL;
    Py_DECREF(done);
    if (joined)
        exclude_autograd(false);
    PyObject *out = PyObject_Vectorcall(call, args, count, NULL);
    if (joined)
        exclude_autograd(true);
    if (include_python() < 0) {
        Py_XDECREF(out);
        return NULL;
    }
    return out;
}

/* The same of a call as a handler is given it. */
static PyObject *
call_given_below(PyObject *func, PyObject *args, PyObject *kwargs)
{
    PyObject *off = exclude_python(1);
    if (off == NULL)
        return NULL;
    Py_DECREF(off);
    PyObject *out = PyObject_Call(func, args, kwargs);
    if (include_python() < 0)
        Py_CLEAR(out);
    return out;
}

static PyTypeObject handler_type;

/* Whether the next mode is torch itself; for a tape, whether there are only tapes before torch, or before the outermost vmap. */
static int
is_near_torch(Handler *self)
{
    while (self->below != NULL && self->below != Py_None) {
        if (self->kind != TAPE || !PyObject_TypeCheck(self->below, &handler_type))
            return 0;
        self = (Handler *)self->below;
    }
    return self->kind != NO_KIND;
}

/* Whether all modes from this one to torch are tapes and levels of vmap. */
static int
stands_among_handlers(Handler *self)
{
    while (self->kind != NO_KIND && self->below != NULL && self->below != Py_None) {
        if (!PyObject_TypeCheck(self->below, &handler_type))
            return 0;
        self = (Handler *)self->below;
    }
    return self->kind != NO_KIND;
}

/* Whether the next mode is the outermost vmap. */
static int
stands_on_vmap(Handler *self)
{
    if (!PyObject_TypeCheck(self->below, &handler_type))
        return 0;
    Handler *below = (Handler *)self->below;
    return below->kind == VMAP && (below->below == NULL || below->below == Py_None);
}

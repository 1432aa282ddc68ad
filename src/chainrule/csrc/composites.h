/* Calls that are many ops, replayed on a tape (chainrule.capture.composites). Part of shortcuts.c. */

/* Fields of a composite, of one of its steps, and of what is said of its results, which are tuples. */
enum { STEPS, RESULT, PLACES };
enum { STEP_FACTS, STEP_ARGS, STEP_SPOTS, STEP_PLACES, STEP_ORIGIN, STEP_RESULTS };
enum { RESULT_SORT, RESULT_CONTENT };
enum { RESULT_CONSTANT, RESULT_PLACE, RESULT_SEVERAL };

/* What a signature says of a tensor beside its shape and the like. */
enum { IS_ACTIVE = 1, HAS_GRAPH = 2, IS_PARAMETER = 4, IS_MAPPED = 8, IS_OWN = 16 };

static PyObject *
run_common(Handler *self, PyObject *facts, PyObject *args, PyObject *call, PyObject *call_args, PyObject *call_kwargs);

/* The vmap that a tape stands on, borrowed; NULL for none. */
static PyObject *
vmap_below(Handler *self)
{
    return self->below != NULL && self->below != Py_None && stands_on_vmap(self) ? self->below : NULL;
}

/* Whether a tensor depends on the inputs: 1, 0, or -1 with an error set. */
static int
depends_on_inputs(Handler *self, PyObject *tensor)
{
    Py_ssize_t slot = known_slot(self, tensor);
    if (slot != -1)
        return slot == -2 ? -1 : PyList_GET_ITEM(self->active, slot) == Py_True;
    int fresh = self->alias == NULL || self->alias == Py_None ? constant_is_new(self, tensor) : 0;
    return fresh ? (fresh < 0 ? -1 : 0) : is_true_of(PyObject_CallMethodOneArg((PyObject *)self, s_is_active, tensor));
}

/* Write down the signature of a tensor as a tape sees it, and the tensor among the values: 1; 0 if it is left to Python; -1 with an
 * error set. */
static int
read_taped(Handler *self, PyObject *item, PyObject *signature, PyObject *values, int *joined)
{
    for (Py_ssize_t place = 0; place < PyList_GET_SIZE(values); place++)
        if (PyList_GET_ITEM(values, place) == item)
            return append_new(signature, PyLong_FromSsize_t(-1 - place)) < 0 ? -1 : 1;
    PyObject *value = item, *batch = NULL, *number = NULL;
    int facts = (PyObject *)Py_TYPE(item) == c_parameter ? IS_PARAMETER : 0;
    if ((PyObject *)Py_TYPE(item) == c_batch_tensor) {
        if (SLOT(item, level) != vmap_below(self) || SLOT(item, inner) == NULL)
            return 0;
        value = SLOT(item, inner);
        if ((PyObject *)Py_TYPE(value) == c_batched) {
            batch = value;
            value = SLOT(batch, value);
            if (value == NULL)
                return 0;
        }
        facts |= batch != NULL ? IS_MAPPED : IS_OWN;
    }
    int graph = is_true_of(GET(value, requires_grad)), active = graph < 0 ? -1 : depends_on_inputs(self, item);
    if (active < 0)
        return -1;
    if (value != item && is_true_of(GET(item, requires_grad)))
        return PyErr_Occurred() ? -1 : 0;
    *joined |= graph;
    int taken = signature_number(value, batch, &number);
    if (taken <= 0)
        return taken;
    facts |= (active ? IS_ACTIVE : 0) | (graph ? HAS_GRAPH : 0);
    return append_new(signature, PyLong_FromLong(facts)) < 0 || append_new(signature, number) < 0 || PyList_Append(values, item) < 0
               ? -1
               : 1;
}

/* What a call depends on but for the values of its tensors, and these: 1 with a new reference; 0 if it is left to Python; -1 with
 * an error set. */
static int
composite_key(Handler *self, PyObject *callee, PyObject *args, PyObject *kwargs, PyObject *values, PyObject **key)
{
    PyObject *signature = PyList_New(0), *kernels = PyObject_GetAttr((PyObject *)self, s_kernels), *name, *item;
    PyObject *dtype = PyObject_CallNoArgs(c_default_dtype);
    Py_ssize_t place = 0;
    int joined = 0, taken = -1, enabled = grad_is_enabled();
    if (signature == NULL || kernels == NULL || dtype == NULL || enabled < 0)
        goto done;
    int modes = enabled + 2 * self->respect_no_grad + 4 * (kernels == Py_True) + 8 * (vmap_below(self) != NULL) + 16 * (int)self->depth;
    /* The facts are those of one policy. */
    if (PyList_Append(signature, callee) < 0 || append_new(signature, PyLong_FromVoidPtr(self->facts)) < 0 ||
        append_new(signature, PyLong_FromLong(modes)) < 0 || PyList_Append(signature, dtype) < 0)
        goto done;
    taken = read_items(self, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), signature, values, &joined, read_taped);
    while (taken > 0 && kwargs != NULL && PyDict_Next(kwargs, &place, &name, &item))
        taken = PyList_Append(signature, name) < 0 ? -1 : read_items(self, &item, 1, signature, values, &joined, read_taped);
    if (taken > 0 && (*key = PyList_AsTuple(signature)) == NULL)
        taken = -1;
done:
    Py_XDECREF(signature);
    Py_XDECREF(kernels);
    Py_XDECREF(dtype);
    return taken;
}

/* The tensors of a replay by their places. */
typedef struct {
    PyObject **tensors;
    Py_ssize_t count;
} Known;

static PyObject *
known_at(const Known *known, PyObject *place)
{
    if (place == Py_None)
        return Py_NewRef(Py_None);
    Py_ssize_t number = PyLong_AsSsize_t(place);
    if (number < 0 || number >= known->count)
        return PyErr_Format(PyExc_SystemError, "a composite reads a tensor that it has not made");
    return Py_NewRef(known->tensors[number]);
}

/* The arguments of a step; a new reference. */
static PyObject *
step_arguments(PyObject *step, const Known *known)
{
    PyObject *given = PyTuple_GET_ITEM(step, STEP_ARGS), *spots = PyTuple_GET_ITEM(step, STEP_SPOTS);
    PyObject *places = PyTuple_GET_ITEM(step, STEP_PLACES);
    Py_ssize_t count = PyTuple_GET_SIZE(given);
    PyObject *args = PyTuple_New(count);
    for (Py_ssize_t place = 0; args != NULL && place < count; place++)
        PyTuple_SET_ITEM(args, place, Py_NewRef(PyTuple_GET_ITEM(given, place)));
    for (Py_ssize_t number = 0; args != NULL && number < PyTuple_GET_SIZE(spots); number++) {
        Py_ssize_t spot = PyLong_AsSsize_t(PyTuple_GET_ITEM(spots, number));
        PyObject *where = PyTuple_GET_ITEM(places, number), *item;
        if (PyTuple_CheckExact(where)) {
            item = PyList_New(PyTuple_GET_SIZE(where));
            for (Py_ssize_t place = 0; item != NULL && place < PyTuple_GET_SIZE(where); place++) {
                PyObject *one = known_at(known, PyTuple_GET_ITEM(where, place));
                if (one == NULL)
                    Py_CLEAR(item);
                else
                    PyList_SET_ITEM(item, place, one);
            }
        } else
            item = known_at(known, where);
        if (item == NULL) {
            Py_CLEAR(args);
            break;
        }
        PyObject *before = PyTuple_GET_ITEM(args, spot);
        PyTuple_SET_ITEM(args, spot, item);
        Py_DECREF(before);
    }
    return args;
}

/* Run one step, and keep its results: 0, or -1 with an error set. Torch's handlers are off. */
static int
run_step(Handler *self, PyObject *step, Known *known)
{
    PyObject *facts = PyTuple_GET_ITEM(step, STEP_FACTS), *args = step_arguments(step, known), *out = NULL;
    if (args == NULL)
        return -1;
    Py_XSETREF(self->origin, Py_NewRef(PyTuple_GET_ITEM(step, STEP_ORIGIN)));
    if (SLOT(facts, plain) == Py_True)
        out = run_common(self, facts, args, SLOT(facts, fast), args, NULL);
    else
        out = Py_NewRef(Py_NotImplemented);
    if (out == Py_NotImplemented)
        Py_SETREF(out, PyObject_CallMethodObjArgs((PyObject *)self, s__run_step, facts, args, NULL));
    Py_DECREF(args);
    if (out == NULL)
        return -1;
    PyObject *several = PyTuple_GET_ITEM(step, STEP_RESULTS);
    if (several == Py_None) {
        known->tensors[known->count++] = out;
        return 0;
    }
    Py_ssize_t count = PyLong_AsSsize_t(several);
    int fits = (PyTuple_Check(out) || PyList_CheckExact(out)) && PySequence_Fast_GET_SIZE(out) == count;
    if (!fits)
        PyErr_SetString(PyExc_SystemError, "a step of a composite has other results than it had");
    for (Py_ssize_t place = 0; fits && place < count; place++)
        known->tensors[known->count++] = Py_NewRef(PySequence_Fast_GET_ITEM(out, place));
    Py_DECREF(out);
    return fits ? 0 : -1;
}

/* The result of a composite; a new reference. */
static PyObject *
composite_result(PyObject *result, const Known *known)
{
    PyObject *content = PyTuple_GET_ITEM(result, RESULT_CONTENT);
    switch (PyLong_AsLong(PyTuple_GET_ITEM(result, RESULT_SORT))) {
    case RESULT_CONSTANT:
        return Py_NewRef(content);
    case RESULT_PLACE:
        return known_at(known, content);
    }
    PyObject *kind = PyTuple_GET_ITEM(content, 0), *list = PyList_New(PyTuple_GET_SIZE(content) - 1);
    for (Py_ssize_t place = 1; list != NULL && place < PyTuple_GET_SIZE(content); place++) {
        PyObject *item = composite_result(PyTuple_GET_ITEM(content, place), known);
        if (item == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, place - 1, item);
    }
    if (list != NULL && kind != (PyObject *)&PyList_Type)
        Py_SETREF(list, PyObject_CallOneArg(kind, list));
    return list;
}

/* Run the steps of a composite on tensors of its signature. */
static PyObject *
replay_composite(Handler *self, PyObject *composite, PyObject *values)
{
    PyObject *steps = PyTuple_GET_ITEM(composite, STEPS), *out = NULL;
    Py_ssize_t given = PyList_GET_SIZE(values);
    Known known = {PyMem_New(PyObject *, PyLong_AsSsize_t(PyTuple_GET_ITEM(composite, PLACES)) + 1), 0};
    if (known.tensors == NULL)
        return PyErr_NoMemory();
    for (; known.count < given; known.count++)
        known.tensors[known.count] = Py_NewRef(PyList_GET_ITEM(values, known.count));
    PyObject *outer = self->origin == NULL ? Py_NewRef(Py_None) : Py_NewRef(self->origin);
    int done = 0;
    for (Py_ssize_t number = 0; done == 0 && number < PyTuple_GET_SIZE(steps); number++)
        done = run_step(self, PyTuple_GET_ITEM(steps, number), &known);
    Py_XSETREF(self->origin, outer);
    if (done == 0)
        out = composite_result(PyTuple_GET_ITEM(composite, RESULT), &known);
    while (known.count)
        Py_DECREF(known.tensors[--known.count]);
    PyMem_Free(known.tensors);
    return out;
}

/* Whether composites are looked up here. */
static int
takes_composites(Handler *self)
{
    return c_composites != NULL && state.exclude != NULL && self->kind == TAPE && (self->origin == NULL || self->origin == Py_None) &&
           (self->heard == NULL || self->heard == Py_None);
}

/* A function that torch has in Python, on the innermost mode, or the facts of an op that is recorded in parts (with torch's handlers
 * off): replayed, or run once more to hear what it does. NotImplemented, with nothing done, leaves it to Python. */
static PyObject *
run_composite(Handler *self, PyObject *callee, PyObject *types, PyObject *args, PyObject *kwargs)
{
    PyObject *key = NULL, *out = NULL, *values = PyList_New(0);
    int taken = values == NULL ? -1 : composite_key(self, callee, args, kwargs, values, &key);
    if (taken <= 0) {
        Py_XDECREF(values);
        return taken < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    }
    PyObject *composite = PyDict_GetItemWithError(c_composites, key);
    if (composite == NULL) {
        if (!PyErr_Occurred())
            out = PyObject_CallMethodObjArgs((PyObject *)self, s__listen, key, values, callee, types == NULL ? Py_None : types, args,
                                             kwargs == NULL ? Py_None : kwargs, NULL);
    } else if (composite == Py_None)
        out = Py_NewRef(Py_NotImplemented);
    else {
        Py_INCREF(composite);
        PyObject *off = types == NULL ? Py_NewRef(Py_None) : exclude_python(1);
        if (off != NULL)
            out = replay_composite(self, composite, values);
        Py_XDECREF(off);
        if (off != NULL && types != NULL && include_python() < 0)
            Py_CLEAR(out);
        Py_DECREF(composite);
    }
    Py_DECREF(key);
    Py_DECREF(values);
    return out;
}

/* Calls that are many ops, replayed on a tape (chainrule.capture.composites). Part of shortcuts.c. */

/* Fields of a composite, of one of its steps, and of what is said of its results, which are tuples. */
enum { STEPS, RESULT, PLACES, COMPOSITE_NUMBER };
enum { STEP_FACTS, STEP_ARGS, STEP_SPOTS, STEP_PLACES, STEP_ORIGIN, STEP_RESULTS, STEP_HOW, STEP_CALL, STEP_LOWERED,
       STEP_NAMED };
enum { RESULT_SORT, RESULT_CONTENT };
enum { RESULT_CONSTANT, RESULT_PLACE, RESULT_SEVERAL };

/* What a signature says of a tensor beside its shape and the like. */
enum { IS_ACTIVE = 1, HAS_GRAPH = 2, IS_PARAMETER = 4, IS_MAPPED = 8, IS_OWN = 16 };

static PyObject *
run_common(Handler *self, PyObject *facts, PyObject *args, PyObject *named, PyObject *call, PyObject *call_args,
           PyObject *call_kwargs);

static PyObject *
run_uncommon(Handler *self, PyObject *facts, PyObject *args, PyObject *call, PyObject *call_args,
             PyObject *call_kwargs); /* in ops.h */

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
    PyObject *value, *batch, *number = NULL;
    int facts = (PyObject *)Py_TYPE(item) == c_parameter ? IS_PARAMETER : 0;
    if (!find_stored_tensor(item, vmap_below(self), &value, &batch))
        return 0;
    if (value != item)
        facts |= batch != NULL ? IS_MAPPED : IS_OWN;
    int graph = is_true_of(GET(value, requires_grad)), active = graph < 0 ? -1 : depends_on_inputs(self, item);
    if (active < 0)
        return -1;
    if (value != item && is_true_of(GET(item, requires_grad)))
        return PyErr_Occurred() ? -1 : 0;
    *joined |= graph;
    int taken = signature_number(value, batch, &number, value == item || reads_conjugates());
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
    int modes = enabled + 2 * self->respect_no_grad + 4 * (kernels == Py_True) + 8 * (vmap_below(self) != NULL) + 16 * self->meets_saved + 32 * (int)self->depth;
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

/* The tensors of a replay by their places, and their slots. */
typedef struct {
    PyObject **tensors;
    Py_ssize_t *slots;
    Py_ssize_t count;
} Known;

/* The number of a tensor; -1 with an error set. */
static Py_ssize_t
known_place(const Known *known, PyObject *place)
{
    Py_ssize_t number = PyLong_AsSsize_t(place);
    if (number >= 0 && number < known->count)
        return number;
    PyErr_SetString(PyExc_SystemError, "a composite reads a tensor that it has not made");
    return -1;
}

/* The tensors that stand at one place of a step; a new reference. */
static PyObject *
known_at(const Known *known, PyObject *where)
{
    if (where == Py_None)
        return Py_NewRef(Py_None);
    if (!PyTuple_CheckExact(where)) {
        Py_ssize_t number = known_place(known, where);
        return number < 0 ? NULL : Py_NewRef(known->tensors[number]);
    }
    PyObject *list = PyList_New(PyTuple_GET_SIZE(where));
    for (Py_ssize_t place = 0; list != NULL && place < PyTuple_GET_SIZE(where); place++) {
        PyObject *one = known_at(known, PyTuple_GET_ITEM(where, place));
        if (one == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, place, one);
    }
    return list;
}

/* What stands in a record for them; a new reference. */
static PyObject *
lowered_at(Handler *self, Known *known, PyObject *where)
{
    if (where == Py_None)
        return Py_NewRef(Py_None);
    if (!PyTuple_CheckExact(where)) {
        Py_ssize_t number = known_place(known, where);
        if (number < 0)
            return NULL;
        if (known->slots[number] == -1)
            known->slots[number] = slot_or_constant(self, known->tensors[number]);
        return known->slots[number] < 0 ? NULL : Py_NewRef(PyList_GET_ITEM(c_slot_objects, known->slots[number]));
    }
    PyObject *slots = PyTuple_New(PyTuple_GET_SIZE(where));
    for (Py_ssize_t place = 0; slots != NULL && place < PyTuple_GET_SIZE(where); place++) {
        PyObject *one = lowered_at(self, known, PyTuple_GET_ITEM(where, place));
        if (one == NULL)
            Py_CLEAR(slots);
        else
            PyTuple_SET_ITEM(slots, place, one);
    }
    return slots;
}

/* A tuple with what stands at some spots in the place of what it has there: the tensors, or their slots; a new reference. */
static PyObject *
filled(Handler *self, PyObject *step, int field, Known *known)
{
    PyObject *given = PyTuple_GET_ITEM(step, field), *spots = PyTuple_GET_ITEM(step, STEP_SPOTS);
    Py_ssize_t count = PyTuple_GET_SIZE(given);
    PyObject *args = PyTuple_New(count);
    for (Py_ssize_t place = 0; args != NULL && place < count; place++)
        PyTuple_SET_ITEM(args, place, Py_NewRef(PyTuple_GET_ITEM(given, place)));
    for (Py_ssize_t number = 0; args != NULL && number < PyTuple_GET_SIZE(spots); number++) {
        Py_ssize_t spot = PyLong_AsSsize_t(PyTuple_GET_ITEM(spots, number));
        PyObject *where = PyTuple_GET_ITEM(PyTuple_GET_ITEM(step, STEP_PLACES), number);
        PyObject *item = field == STEP_LOWERED ? lowered_at(self, known, where) : known_at(known, where);
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

/* Keep a result of a step, the reference of which is taken; 0, or -1 with an error set. */
static int
keep_known(Handler *self, Known *known, PyObject *out, Py_ssize_t slot)
{
    known->tensors[known->count] = out;
    known->slots[known->count++] = slot;
    return 0;
}

/* Give a result that was recorded its slot: what append_record does but for the record. */
static int
append_value(Handler *self, Known *known, PyObject *out, PyObject *slot)
{
    PyObject *identity = PyLong_FromVoidPtr(out);
    int kept = identity != NULL && PyList_Append(self->values, out) == 0 && PyList_Append(self->active, Py_True) == 0 &&
               PyDict_SetItem(self->slots, identity, slot) == 0;
    Py_XDECREF(identity);
    return kept ? keep_known(self, known, Py_NewRef(out), PyLong_AsSsize_t(slot)) : -1;
}

/* Record a step that ran: 0, or -1 with an error set. */
static int
record_step(Handler *self, PyObject *step, PyObject *lowered, PyObject *out, Known *known)
{
    PyObject *several = PyTuple_GET_ITEM(step, STEP_RESULTS), *record = NULL;
    Py_ssize_t count = several == Py_None ? 1 : PyLong_AsSsize_t(several), first = PyList_GET_SIZE(self->active);
    PyObject *outputs = PyTuple_New(count);
    int outcome = outputs == NULL ? -1 : 0;
    for (Py_ssize_t place = 0; outcome == 0 && place < count; place++) {
        PyObject *slot = PyLong_FromSsize_t(first + place);
        if (slot == NULL)
            outcome = -1;
        else {
            PyTuple_SET_ITEM(outputs, place, slot);
            outcome = append_value(self, known, several == Py_None ? out : PySequence_Fast_GET_ITEM(out, place), slot);
        }
    }
    if (outcome == 0 && (record = ((PyTypeObject *)c_record)->tp_alloc((PyTypeObject *)c_record, 6)) != NULL) {
        PyTuple_SET_ITEM(record, 0, Py_NewRef(SLOT(PyTuple_GET_ITEM(step, STEP_FACTS), op)));
        PyTuple_SET_ITEM(record, 1, Py_NewRef(lowered));
        PyTuple_SET_ITEM(record, 2, Py_NewRef(empty));
        PyTuple_SET_ITEM(record, 3, Py_NewRef(outputs));
        PyTuple_SET_ITEM(record, 4, Py_NewRef(several == Py_None ? Py_False : Py_True));
        PyTuple_SET_ITEM(record, 5, Py_NewRef(PyTuple_GET_ITEM(step, STEP_ORIGIN)));
        outcome = PyList_Append(self->records, record);
    } else
        outcome = -1;
    Py_XDECREF(record);
    Py_XDECREF(outputs);
    return outcome;
}

static int
has_results(PyObject *out, PyObject *several)
{
    return several == Py_None ? (PyObject *)Py_TYPE(out) == c_tensor
                              : (PyTuple_Check(out) || PyList_CheckExact(out)) &&
                                    PySequence_Fast_GET_SIZE(out) == PyLong_AsSsize_t(several);
}

/* Run a step of which it is known how it runs, and that it is recorded: 0, or -1 with an error set. */
static int
run_known_step(Handler *self, PyObject *step, Known *known)
{
    PyObject *facts = PyTuple_GET_ITEM(step, STEP_FACTS), *out = NULL, *lowered = NULL, *args = filled(self, step, STEP_CALL, known);
    int joined = PyTuple_GET_ITEM(step, STEP_HOW) == Py_True, is_view = SLOT(facts, is_view) == Py_True, outcome = -1;
    if (args == NULL)
        return -1;
    /* Autograd must see views, so that writes through them are counted as writes. */
    if (is_view)
        state.exclude(state.views, false);
    if (joined)
        exclude_autograd(false);
    PyObject *call = !joined ? SLOT(facts, unfollowed) : SLOT(facts, alone) != Py_None ? SLOT(facts, alone) : SLOT(facts, fast);
    out = PyObject_Vectorcall(call, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), NULL);
    if (joined)
        exclude_autograd(true);
    if (is_view)
        state.exclude(state.views, true);
    if (out == NULL)
        goto done;
    if (!has_results(out, PyTuple_GET_ITEM(step, STEP_RESULTS))) {
        PyErr_SetString(PyExc_SystemError, "a step of a composite has other results than it had");
        goto done;
    }
    if (is_view) {
        PyObject *pending = PyTuple_Pack(4, SLOT(facts, op), args, Py_None, out);
        int kept = pending == NULL ? -1 : PyList_Append(self->pending, pending);
        Py_XDECREF(pending);
        if (kept < 0)
            goto done;
    }
    if ((lowered = filled(self, step, STEP_LOWERED, known)) != NULL)
        outcome = record_step(self, step, lowered, out, known);
done:
    Py_DECREF(args);
    Py_XDECREF(out);
    Py_XDECREF(lowered);
    return outcome;
}

/* Run a step of which it is known that it is a constant, whatever the tensors of the call are, with the same outcome. */
static int
run_constant_step(Handler *self, PyObject *step, Known *known)
{
    PyObject *args = filled(self, step, STEP_CALL, known), *several = PyTuple_GET_ITEM(step, STEP_RESULTS);
    if (args == NULL)
        return -1;
    PyObject *call = SLOT(PyTuple_GET_ITEM(step, STEP_FACTS), fast);
    PyObject *out = PyObject_Vectorcall(call, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), NULL);
    Py_DECREF(args);
    if (out == NULL)
        return -1;
    if (several == Py_None && has_results(out, several))
        return keep_known(self, known, out, -1);
    Py_DECREF(out);
    PyErr_SetString(PyExc_SystemError, "a step of a composite has other results than it had");
    return -1;
}

/* Run any other step, and keep its results, with the same outcome. Torch's handlers are off. */
static int
run_step(Handler *self, PyObject *step, Known *known)
{
    PyObject *facts = PyTuple_GET_ITEM(step, STEP_FACTS), *args = filled(self, step, STEP_ARGS, known), *out = NULL;
    if (args == NULL)
        return -1;
    Py_XSETREF(self->origin, Py_NewRef(PyTuple_GET_ITEM(step, STEP_ORIGIN)));
    PyObject *named = PyTuple_GET_ITEM(step, STEP_NAMED);
    if (SLOT(facts, plain) == Py_True && named == Py_None)
        out = run_common(self, facts, args, empty, SLOT(facts, fast), args, NULL);
    else if (SLOT(facts, plain) == Py_True && (self->below == NULL || self->below == Py_None)) {
        PyObject *items = PyDict_Items(named), *pairs = items == NULL ? NULL : PyList_AsTuple(items);
        out = pairs == NULL ? NULL : run_common(self, facts, args, pairs, SLOT(facts, fast), args, named);
        Py_XDECREF(items);
        Py_XDECREF(pairs);
    } else if (named == Py_None)
        out = run_uncommon(self, facts, args, SLOT(facts, fast), args, NULL);
    else
        out = Py_NewRef(Py_NotImplemented);
    if (out == Py_NotImplemented)
        Py_SETREF(out, PyObject_CallMethodObjArgs((PyObject *)self, s__run_step, facts, args, named, NULL));
    Py_DECREF(args);
    if (out == NULL)
        return -1;
    PyObject *several = PyTuple_GET_ITEM(step, STEP_RESULTS);
    Py_ssize_t count = several == Py_None ? 1 : PyLong_AsSsize_t(several);
    int fits = several == Py_None || has_results(out, several);
    if (!fits)
        PyErr_SetString(PyExc_SystemError, "a step of a composite has other results than it had");
    for (Py_ssize_t place = 0; fits && place < count; place++) {
        PyObject *one = several == Py_None ? out : PySequence_Fast_GET_ITEM(out, place);
        Py_ssize_t slot = known_slot(self, one);
        fits = slot != -2 && keep_known(self, known, Py_NewRef(one), slot) == 0;
    }
    Py_DECREF(out);
    return fits ? 0 : -1;
}

/* Run a check: a step that returns nothing, which is no matter of the tape; 0, or -1 with an error set. */
static int
run_check(Handler *self, PyObject *step, Known *known)
{
    PyObject *args = filled(self, step, STEP_ARGS, known);
    if (args == NULL)
        return -1;
    PyObject *out = PyObject_Call(SLOT(PyTuple_GET_ITEM(step, STEP_FACTS), fast), args, PyTuple_GET_ITEM(step, STEP_NAMED));
    Py_DECREF(args);
    Py_XDECREF(out);
    return out == NULL ? -1 : 0;
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

/* What the signature of a tape says of a composite, in the place of what its steps would say: which it is, and where its slots begin
 * and those of its inputs are. 0, or -1 with an error set. */
static int
note_composite(Handler *self, PyObject *composite, PyObject *values, Py_ssize_t first, Py_ssize_t said)
{
    Py_ssize_t given = PyList_GET_SIZE(values);
    PyObject *key = PyTuple_New(given + 2);
    if (key == NULL)
        return -1;
    PyTuple_SET_ITEM(key, 0, Py_NewRef(PyTuple_GET_ITEM(composite, COMPOSITE_NUMBER)));
    PyTuple_SET_ITEM(key, 1, PyLong_FromSsize_t(first));
    for (Py_ssize_t place = 0; place < given; place++)
        PyTuple_SET_ITEM(key, place + 2, PyLong_FromSsize_t(known_slot(self, PyList_GET_ITEM(values, place))));
    int outcome = PyErr_Occurred() ? -1 : PyList_SetSlice(self->key, said, PyList_GET_SIZE(self->key), NULL);
    if (outcome == 0)
        outcome = PyList_Append(self->key, key);
    Py_DECREF(key);
    return outcome;
}

/* Run the steps of a composite on tensors of its signature. */
static PyObject *
replay_composite(Handler *self, PyObject *composite, PyObject *values)
{
    PyObject *steps = PyTuple_GET_ITEM(composite, STEPS), *out = NULL;
    Py_ssize_t given = PyList_GET_SIZE(values), most = PyLong_AsSsize_t(PyTuple_GET_ITEM(composite, PLACES)) + 1;
    Py_ssize_t first = PyList_GET_SIZE(self->values), said = PyList_GET_SIZE(self->key);
    Known known = {PyMem_New(PyObject *, most), PyMem_New(Py_ssize_t, most), 0};
    int alone = (self->below == NULL || self->below == Py_None) && (self->alias == NULL || self->alias == Py_None) &&
                self->sees_views && first + most < PyList_GET_SIZE(c_slot_objects);
    PyObject *outer = self->origin == NULL ? Py_NewRef(Py_None) : Py_NewRef(self->origin);
    int done = known.tensors == NULL || known.slots == NULL ? -1 : 0;
    if (done < 0)
        PyErr_NoMemory();
    for (Py_ssize_t place = 0; done == 0 && place < given; place++) {
        Py_ssize_t slot = known_slot(self, PyList_GET_ITEM(values, place));
        done = slot == -2 ? -1 : keep_known(self, &known, Py_NewRef(PyList_GET_ITEM(values, place)), slot);
    }
    for (Py_ssize_t number = 0; done == 0 && number < PyTuple_GET_SIZE(steps); number++) {
        PyObject *step = PyTuple_GET_ITEM(steps, number);
        int is_known = alone && PyTuple_GET_ITEM(step, STEP_HOW) != Py_None;
        if (PyTuple_GET_ITEM(step, STEP_NAMED) != Py_None && PyTuple_GET_ITEM(step, STEP_RESULTS) != Py_None)
            done = run_check(self, step, &known);
        else if (is_known && PyTuple_GET_ITEM(step, STEP_HOW) == Py_Ellipsis)
            done = run_constant_step(self, step, &known);
        else
            done = is_known ? run_known_step(self, step, &known) : run_step(self, step, &known);
    }
    Py_XSETREF(self->origin, outer);
    if (done == 0 && note_composite(self, composite, values, first, said) == 0)
        out = composite_result(PyTuple_GET_ITEM(composite, RESULT), &known);
    while (known.count)
        Py_DECREF(known.tensors[--known.count]);
    PyMem_Free(known.tensors);
    PyMem_Free(known.slots);
    return out;
}

/* Whether composites are looked up here. */
static int
takes_composites(Handler *self)
{
    return c_composites != NULL && state.exclude != NULL && self->kind == TAPE && (self->origin == NULL || self->origin == Py_None) &&
           !is_listened(self);
}

/* Whether a function outside of the tables may be many ops: one that torch has in Python, or of those that it composes itself. 1, 0,
 * or -1 with an error set. */
static int
may_be_composite(PyObject *function)
{
    if (PyFunction_Check(function))
        return 1;
    int built = PyCFunction_Check(function) || Py_TYPE(function) == &PyMethodDescr_Type || Py_TYPE(function) == &_PyMethodWrapper_Type;
    return built ? is_true_of(PyObject_GetItem(c_composed, function)) : 0;
}

/* A function that torch composes of ops, on the innermost mode, or the facts of an op that is recorded in parts (with torch's handlers
 * off): replayed, or run once more to hear what it does. NotImplemented, with nothing done, leaves it to Python. */
static PyObject *
run_composite(Handler *self, PyObject *callee, PyObject *types, PyObject *args, PyObject *kwargs)
{
    int own = PyFunction_Check(callee) ? calls_torch(callee) : 1;
    if (own <= 0)
        return own < 0 ? NULL : Py_NewRef(Py_NotImplemented);
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

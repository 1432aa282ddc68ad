/* Any op on a tape: what stands for its arguments in the record, the run, and the record. Part of shortcuts.c. */

/* How many arguments of an op are looked at here. */
#define MOST_ARGUMENTS 24

/* The slot of a tensor, -1 for a plain one that the tape has not seen; -3 if it is left to Python, -2 with an error set. */
static Py_ssize_t
plain_slot(Handler *self, PyObject *tensor, Found *seen)
{
    Py_ssize_t slot = known_slot(self, tensor);
    if (slot == -2)
        return -2;
    if (slot < 0 && !may_be_constant(self, tensor))
        return -3;
    int graph = 0;
    PyObject *dtype = plain_dtype(tensor, &graph);
    if (dtype == NULL)
        return -2;
    int plain = dtype != Py_None && !(graph && (PyObject *)Py_TYPE(tensor) == c_batch_tensor);
    int complex = dtype == Py_None ? is_complex(tensor) : 0;
    Py_DECREF(dtype);
    if (complex < 0)
        return -2;
    plain |= complex;
    seen->complex |= complex;
    seen->joined |= graph;
    if (!plain || slot >= PyList_GET_SIZE(c_slot_objects))
        return -3;
    if (slot >= 0 && PyList_GET_ITEM(self->active, slot) == Py_True)
        seen->touched = 1;
    return slot;
}

/* What stands in the record for a list of tensors: 1 with a new reference; 0 if it is left to Python; -1 with an error set. With
 * a tensor among them that the tape has not seen it is NULL for now. */
static int
lowered_tensors(Handler *self, PyObject *list, Found *seen, PyObject **found)
{
    Py_ssize_t count = PyList_GET_SIZE(list);
    PyObject *lowered = PyTuple_New(count);
    int known = 1;
    if (lowered == NULL)
        return -1;
    for (Py_ssize_t place = 0; place < count; place++) {
        PyObject *item = PyList_GET_ITEM(list, place);
        if (item == Py_None) {
            PyTuple_SET_ITEM(lowered, place, Py_NewRef(Py_None));
            continue;
        }
        Py_ssize_t slot = is_argument(item) ? plain_slot(self, item, seen) : -3;
        if (slot < -1) {
            Py_DECREF(lowered);
            return slot == -2 ? -1 : 0;
        }
        if (slot < 0)
            known = 0;
        else
            PyTuple_SET_ITEM(lowered, place, Py_NewRef(PyList_GET_ITEM(c_slot_objects, slot)));
    }
    if (known)
        *found = lowered;
    else
        Py_DECREF(lowered);
    return 1;
}

/* What stands in the record for an argument, with the same results. */
static int
lowered_argument(Handler *self, PyObject *item, Found *seen, PyObject **found)
{
    *found = NULL;
    if (is_argument(item)) {
        Py_ssize_t slot = plain_slot(self, item, seen);
        if (slot < -1)
            return slot == -2 ? -1 : 0;
        if (slot >= 0)
            *found = Py_NewRef(PyList_GET_ITEM(c_slot_objects, slot));
        return 1;
    }
    if (PyList_CheckExact(item) || PyTuple_CheckExact(item)) {
        Py_ssize_t count = PySequence_Fast_GET_SIZE(item);
        PyObject *first = count ? PySequence_Fast_GET_ITEM(item, 0) : NULL;
        if (first == NULL || PyLong_CheckExact(first)) {
            *found = PySequence_Tuple(item);
            return *found == NULL ? -1 : 1;
        }
        return PyList_CheckExact(item) ? lowered_tensors(self, item, seen, found) : 0;
    }
    /* The sign of a zero is marked in the signature. */
    if (PyFloat_CheckExact(item) && PyFloat_AS_DOUBLE(item) == 0.0 && signbit(PyFloat_AS_DOUBLE(item)))
        return 0;
    int plain = PyComplex_CheckExact(item) ? 1 : PySet_Contains(c_plain, (PyObject *)Py_TYPE(item));
    if (plain > 0)
        *found = Py_NewRef(item);
    return plain;
}

/* Whether an argument is a mapped tensor that stands for one with a graph, or for another mapped one: 1, 0, -1 with an error set. */
static int
may_have_stored_graph(PyObject *args)
{
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(args); place++) {
        PyObject *item = PyTuple_GET_ITEM(args, place);
        if ((PyObject *)Py_TYPE(item) != c_batch_tensor || SLOT(item, inner) == NULL)
            continue;
        PyObject *value = SLOT(item, inner);
        if ((PyObject *)Py_TYPE(value) == c_batched)
            value = SLOT(value, value);
        int graph = value == NULL || (PyObject *)Py_TYPE(value) == c_batch_tensor ? 1 : is_true_of(GET(value, requires_grad));
        if (graph)
            return graph;
    }
    return 0;
}

/* Whether torch's autograd may see a call of an op here, some argument of which has a graph: 1, 0, or -1 with an error set. */
static int
op_joins_whole(Handler *self, PyObject *facts, PyObject *args)
{
    if (SLOT(facts, common) != Py_True && SLOT(facts, alone) == Py_None) /* recorded in parts there */
        return 0;
    int may = may_join();
    if (may > 0)
        may = joins_whole(self, facts, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args));
    if (self->below != NULL && self->below != Py_None) /* the vmap below shows it to autograd */
        return may;
    if (may > 0 && PyLong_AsLong(SLOT(facts, joining)) == LINEAR)
        may = !rank_is(PyTuple_GET_ITEM(args, 0), 1); /* see call_joined */
    return may;
}

static PyObject *
call_seen(PyObject *call, PyObject *args, PyObject *kwargs);

/* A part of a tensor that carries the batch, by one of the ops that an index is made of; NotImplemented for others. */
static PyObject *
view_on_level(Handler *level, PyObject *facts, PyObject *args)
{
    PyObject *op = SLOT(facts, op), *tensor = PyTuple_GET_ITEM(args, 0), *out = NULL;
    Py_ssize_t count = PyTuple_GET_SIZE(args);
    PyObject *batch = batch_of(level, tensor);
    if (batch == NULL || level->guarded || level->graphs || count < 2 ||
        (op != c_select && op != c_slice && op != c_unsqueeze) || !PyLong_CheckExact(PyTuple_GET_ITEM(args, 1)))
        return Py_NewRef(Py_NotImplemented);
    PyObject *value = SLOT(batch, value);
    int joined = 0, copy = is_constant_class(value) ? may_be_copy(value) : 1;
    if (copy)
        return copy < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *ndim = GET(value, ndim), *dtype = ndim == NULL ? NULL : numeric_dtype(value, &joined);
    long rank = dtype == NULL ? -1 : PyLong_AsLong(ndim) - 1 + (op == c_unsqueeze), dim = PyLong_AsLong(PyTuple_GET_ITEM(args, 1));
    Py_XDECREF(ndim);
    if (PyErr_Occurred()) {
        Py_XDECREF(dtype);
        return NULL;
    }
    PyObject *moved = NULL, *given = NULL;
    if (joined || dtype == Py_None || dim >= rank || dim < -rank)
        out = Py_NewRef(Py_NotImplemented);
    else if ((moved = PyLong_FromLong(dim < 0 ? dim : dim + 1)) != NULL && (given = PyTuple_New(count)) != NULL) {
        PyTuple_SET_ITEM(given, 0, Py_NewRef(value));
        PyTuple_SET_ITEM(given, 1, Py_NewRef(moved));
        for (Py_ssize_t place = 2; place < count; place++)
            PyTuple_SET_ITEM(given, place, Py_NewRef(PyTuple_GET_ITEM(args, place)));
        PyObject *view = call_seen(SLOT(facts, fast), given, NULL);
        if (view != NULL)
            out = wrapped_view((PyObject *)level, view, 1, dtype);
        else if (PyErr_ExceptionMatches(PyExc_Exception)) {
            PyErr_Clear(); /* what torch says of the whole is not what it says of a sample */
            out = Py_NewRef(Py_NotImplemented);
        }
        Py_XDECREF(view);
    }
    Py_XDECREF(moved);
    Py_XDECREF(given);
    Py_DECREF(dtype);
    return out;
}

/* Run an op that is only run and recorded, with torch's handlers off. `call` with its own arguments computes it where no other mode
 * has to know. `named` are pairs of names and plain values, where the tape stands alone. Nothing is done where NotImplemented is
 * returned. */
static PyObject *
run_common(Handler *self, PyObject *facts, PyObject *args, PyObject *named, PyObject *call, PyObject *call_args,
           PyObject *call_kwargs)
{
    Py_ssize_t count = PyTuple_GET_SIZE(args), fresh[MOST_ARGUMENTS];
    int is_view = SLOT(facts, is_view) == Py_True, alone = self->below == NULL || self->below == Py_None;
    if (count > MOST_ARGUMENTS || (is_view && alone && (!self->sees_views || state.exclude == NULL)))
        return Py_NewRef(Py_NotImplemented);
    if (SLOT(facts, common) != Py_True && !alone) {
        int graph = may_have_stored_graph(args); /* such an op is recorded in parts then */
        if (graph)
            return graph < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    }
    int fresh_count = 0;
    Found seen = {0, 0, 0};
    PyObject *out = NULL, *lowered = PyTuple_New(count);
    if (lowered == NULL)
        return NULL;
    for (Py_ssize_t place = 0; place < count; place++) {
        PyObject *found;
        int taken = lowered_argument(self, PyTuple_GET_ITEM(args, place), &seen, &found);
        if (taken <= 0) {
            out = taken < 0 ? NULL : Py_NewRef(Py_NotImplemented);
            goto done;
        }
        if (found == NULL)
            fresh[fresh_count++] = place;
        else
            PyTuple_SET_ITEM(lowered, place, found);
    }
    /* Torch conjugates lazily only where autograd sees the call. */
    int takes_complex = seen.complex && self->sees_views && state.exclude != NULL && SLOT(facts, with_complex) == Py_True;
    int shown = takes_complex && alone;
    if (seen.complex && !shown && !(takes_complex && !seen.joined && vmap_below(self) != NULL && reads_conjugates())) {
        out = Py_NewRef(Py_NotImplemented);
        goto done;
    }
    if (seen.joined) {
        int may = named == empty && (alone || stands_on_vmap(self)) ? op_joins_whole(self, facts, args) : 0;
        if (may <= 0) {
            out = may < 0 ? NULL : Py_NewRef(Py_NotImplemented);
            goto done;
        }
    }
    /* A view of a tensor from outside of the level is none of the level's. */
    int outside = is_view && !alone && !seen.joined && self->sees_views && state.exclude != NULL && vmap_below(self) != NULL &&
                  count && (PyObject *)Py_TYPE(PyTuple_GET_ITEM(args, 0)) == c_tensor;
    if (!alone && !outside && is_view && !seen.joined && self->sees_views && state.exclude != NULL && vmap_below(self) != NULL) {
        out = view_on_level((Handler *)self->below, facts, args);
        if (out == NULL)
            goto done;
    }
    if (!alone && !outside && (out == NULL || out == Py_NotImplemented)) {
        Py_CLEAR(out);
        out = stands_on_vmap(self) ? run_known_op((Handler *)self->below, SLOT(facts, op), args, is_view)
                                   : Py_NewRef(Py_NotImplemented);
        if (out == Py_NotImplemented)
            Py_SETREF(out, PyObject_CallMethodObjArgs(self->below, s_run_op, SLOT(facts, op), args, NULL));
        if (out != NULL && PyList_CheckExact(out))
            Py_SETREF(out, PyList_AsTuple(out));
    } else if (out == NULL) {
        /* Autograd must see views, so that writes through them are counted as writes. */
        if (is_view || shown)
            state.exclude(state.views, false);
        if (seen.joined || shown)
            exclude_autograd(false);
        if (seen.joined && SLOT(facts, alone) != Py_None)
            out = PyObject_Call(SLOT(facts, alone), args, NULL);
        else
            out = PyObject_Call(call, call_args, call_kwargs);
        if (seen.joined || shown)
            exclude_autograd(true);
        if (is_view || shown)
            state.exclude(state.views, true);
    }
    if (out == NULL || out == Py_NotImplemented)
        goto done;
    if (is_view) {
        PyObject *pending = PyTuple_Pack(4, SLOT(facts, op), args, Py_None, out);
        int kept = pending == NULL ? -1 : PyList_Append(self->pending, pending);
        Py_XDECREF(pending);
        if (kept < 0) {
            Py_CLEAR(out);
            goto done;
        }
    }
    PyObject *how = shown ? Py_None : seen.joined ? Py_True : Py_False;
    int blocked = note_step(self, facts, args, count, how, out) < 0 ? -1 : is_blocked(self, args, seen.touched);
    if (blocked < 0 || (!blocked && record_call(self, facts, args, lowered, named, fresh, fresh_count, &seen, out) < 0))
        Py_CLEAR(out);
done:
    Py_DECREF(lowered);
    return out;
}

/* The facts of an op, borrowed; NULL with an error set. */
static PyObject *
facts_of(Handler *self, PyObject *op)
{
    PyObject *identity = PyLong_FromVoidPtr(op);
    if (identity == NULL)
        return NULL;
    PyObject *facts = PyDict_GetItemWithError(self->facts, identity);
    if (facts == NULL && !PyErr_Occurred()) {
        Py_XDECREF(PyObject_CallMethodOneArg((PyObject *)self, s_facts, op)); /* which keeps them */
        if (!PyErr_Occurred())
            facts = PyDict_GetItemWithError(self->facts, identity);
    }
    Py_DECREF(identity);
    return facts;
}

/* Whether an argument is a list of numbers, or of such lists, as a tensor is made of. */
static int
holds_nested_numbers(PyObject *item)
{
    if (!PyList_CheckExact(item))
        return holds_numbers(item);
    for (Py_ssize_t place = 0; place < PyList_GET_SIZE(item); place++) {
        PyObject *part = PyList_GET_ITEM(item, place);
        if (!is_number(part) && !PyBool_Check(part) && !holds_nested_numbers(part))
            return 0;
    }
    return 1;
}

/* Whether a function makes something without a derivative: a comparison, or anything of constants. 1, 0, or -1 with an error. */
static int
is_ignored(Handler *self, PyObject *func, PyObject *args, PyObject *kwargs)
{
    int touched = 0;
    Py_ssize_t next = 0;
    PyObject *name, *value;
    while (kwargs != NULL && PyDict_Next(kwargs, &next, &name, &value)) {
        int plain = PySet_Contains(c_plain, (PyObject *)Py_TYPE(value));
        if (plain <= 0 || PyUnicode_CompareWithASCIIString(name, "requires_grad") == 0)
            return plain < 0 ? -1 : 0;
    }
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(args); place++) {
        PyObject *item = PyTuple_GET_ITEM(args, place);
        if ((PyObject *)Py_TYPE(item) == c_tensor) {
            int graph = is_true_of(GET(item, requires_grad));
            if (graph)
                return graph < 0 ? -1 : 0;
            Py_ssize_t slot = known_slot(self, item);
            if (slot == -2)
                return -1;
            if (slot >= 0 && PyList_GET_ITEM(self->active, slot) == Py_True)
                touched = 1;
            else if (slot < 0) {
                int known = may_be_known(self, item); /* a view of something that was written */
                if (known)
                    return known < 0 ? -1 : 0;
            }
        } else if (!PyLong_CheckExact(item) && !PyFloat_CheckExact(item) && !holds_nested_numbers(item)) {
            int plain = PySet_Contains(c_plain, (PyObject *)Py_TYPE(item));
            if (plain <= 0)
                return plain;
        }
    }
    if (!touched)
        return 1;
    int compares = PySet_Contains(c_comparisons, func);
    return compares ? compares : PySet_Contains(c_shaped, func);
}

/* Run a function whose result has no derivative; NotImplemented leaves it to Python. */
static PyObject *
run_ignored(Handler *self, PyObject *func, PyObject *args, PyObject *kwargs)
{
    int ignored = is_ignored(self, func, args, kwargs);
    if (ignored <= 0)
        return ignored < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *out = call_given_below(func, args, kwargs);
    int shaped = out == NULL ? 1 : PySet_Contains(c_shaped, func);
    if (shaped < 0 || (!shaped && note_derived(self, args, out) < 0))
        Py_CLEAR(out);
    return out;
}

static PyObject *
run_write(Handler *self, PyObject *facts, PyObject *args, PyObject *call, PyObject *call_args,
          PyObject *call_kwargs); /* in writes.h */

static PyObject *
run_named_write(Handler *self, PyObject *facts, PyObject *args, PyObject *named, PyObject *call, PyObject *call_args,
                PyObject *call_kwargs); /* likewise */

/* A call that torch sees as one on tensors without a graph, with torch's own handlers off already. */
static PyObject *
call_seen(PyObject *call, PyObject *args, PyObject *kwargs)
{
    state.exclude(state.views, false);
    PyObject *out = PyObject_Call(call, args, kwargs);
    state.exclude(state.views, true);
    return out;
}

/* An op that is a constant for differentiation, on a tape that stands alone; NotImplemented, with nothing done, leaves it to
 * Python. */
static PyObject *
run_inactive(Handler *self, PyObject *facts, PyObject *args, PyObject *call, PyObject *call_args, PyObject *call_kwargs)
{
    int is_view = SLOT(facts, is_view) == Py_True;
    if (is_view && (!self->sees_views || state.exclude == NULL))
        return Py_NewRef(Py_NotImplemented);
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(args); place++) {
        PyObject *item = PyTuple_GET_ITEM(args, place);
        int plain;
        if ((PyObject *)Py_TYPE(item) == c_tensor) {
            int graph = 0;
            PyObject *dtype = plain_dtype(item, &graph);
            plain = dtype == NULL ? -1 : dtype != Py_None && !graph;
            Py_XDECREF(dtype);
        } else
            plain = holds_numbers(item) ? 1 : PySet_Contains(c_plain, (PyObject *)Py_TYPE(item));
        if (plain <= 0)
            return plain < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    }
    PyObject *out = is_view ? call_seen(call, call_args, call_kwargs) : PyObject_Call(call, call_args, call_kwargs);
    if (out != NULL && is_view && append_new(self->pending, PyTuple_Pack(4, SLOT(facts, op), args, Py_None, out)) < 0)
        Py_CLEAR(out);
    if (out != NULL && SLOT(facts, shaped) != Py_True && note_derived(self, args, out) < 0)
        Py_CLEAR(out);
    return out;
}

static PyObject *
run_known(Handler *self, PyObject *func, PyObject *const *args, Py_ssize_t count, PyObject *kwargs); /* in calls.h */

/* Whether an argument of what is run on a level has no graph and is no list of tensors: 1, 0, or -1 with an error set. */
static int
is_plain_on_level(PyObject *item)
{
    if ((PyObject *)Py_TYPE(item) == c_batch_tensor)
        return 1; /* see may_have_stored_graph */
    if ((PyObject *)Py_TYPE(item) != c_tensor)
        return holds_numbers(item) ? 1 : PySet_Contains(c_plain, (PyObject *)Py_TYPE(item));
    int graph = 0;
    PyObject *dtype = numeric_dtype(item, &graph);
    int plain = dtype == NULL ? -1 : dtype != Py_None && !graph;
    Py_XDECREF(dtype);
    return plain;
}

/* Whether all arguments are such, and may be read: 1, 0, or -1 with an error set. */
static int
are_plain_on_level(Handler *level, PyObject *args)
{
    int plain = !level->guarded && !level->graphs && c_known != NULL;
    for (Py_ssize_t place = 0; plain > 0 && place < PyTuple_GET_SIZE(args); place++)
        plain = is_plain_on_level(PyTuple_GET_ITEM(args, place));
    if (plain > 0) {
        int graph = may_have_stored_graph(args);
        plain = graph < 0 ? -1 : !graph;
    }
    return plain;
}

/* A mapped tensor as a constant that shares its memory; NotImplemented for other tensors. */
static PyObject *
detached_on_level(Handler *level, PyObject *facts, PyObject *tensor)
{
    PyObject *batch = batch_of(level, tensor), *value = batch == NULL ? NULL : SLOT(batch, value), *out = NULL;
    int copy = value == NULL || !is_constant_class(value) ? 1 : may_be_copy(value);
    if (copy)
        return copy < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    int graph = 0;
    PyObject *dtype = numeric_dtype(value, &graph), *given = dtype == NULL ? NULL : PyTuple_Pack(1, value);
    if (given != NULL && (dtype == Py_None || graph))
        out = Py_NewRef(Py_NotImplemented);
    else if (given != NULL) {
        PyObject *view = call_seen(SLOT(facts, fast), given, NULL);
        out = view == NULL ? NULL : wrapped_view((PyObject *)level, view, 1, dtype);
        Py_XDECREF(view);
    }
    Py_XDECREF(dtype);
    Py_XDECREF(given);
    return out;
}

/* An op that is a constant for differentiation, on a tape that stands on a vmap which nothing is around; NotImplemented, with
 * nothing done, leaves it to Python. */
static PyObject *
run_inactive_below(Handler *self, PyObject *facts, PyObject *args)
{
    Handler *level = (Handler *)vmap_below(self);
    int is_view = SLOT(facts, is_view) == Py_True, plain = level == NULL ? 0 : are_plain_on_level(level, args);
    if (is_view && (!self->sees_views || state.exclude == NULL || SLOT(facts, op) != c_detach_op || PyTuple_GET_SIZE(args) != 1))
        plain = plain < 0 ? -1 : 0;
    if (plain <= 0)
        return plain < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *out = is_view ? detached_on_level(level, facts, PyTuple_GET_ITEM(args, 0)) : run_known_op(level, SLOT(facts, op), args, 0);
    if (out == NULL || out == Py_NotImplemented)
        return out;
    if (is_view && append_new(self->pending, PyTuple_Pack(4, SLOT(facts, op), args, Py_None, out)) < 0)
        Py_CLEAR(out);
    if (out != NULL && SLOT(facts, shaped) != Py_True && note_derived(self, args, out) < 0)
        Py_CLEAR(out);
    return out;
}

/* A function whose result has no derivative on such a tape, a comparison (`function`, which the vmap makes element by element) or
 * the conversion of what has none; the same. */
static PyObject *
run_ignored_below(Handler *self, PyObject *func, PyObject *function, PyObject *args)
{
    Handler *level = (Handler *)vmap_below(self);
    int autocast = level == NULL ? 1 : autocast_is_on(), plain = autocast ? (autocast < 0 ? -1 : 0) : are_plain_on_level(level, args);
    for (Py_ssize_t place = 0; plain > 0 && place < PyTuple_GET_SIZE(args); place++) {
        PyObject *item = PyTuple_GET_ITEM(args, place);
        if (!is_argument(item))
            continue;
        Py_ssize_t slot = known_slot(self, item);
        int known = slot == -2 ? -1 : slot >= 0 ? 0 : may_be_known(self, item); /* a view of something that was written */
        plain = known < 0 ? -1 : !known && (function != NULL || slot < 0 || PyList_GET_ITEM(self->active, slot) != Py_True);
    }
    if (plain <= 0)
        return plain < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *out = function != NULL ? run_under_vmap(level, function, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), 1)
                                     : run_known(level, func, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), NULL);
    if (out == Py_NotImplemented && function != NULL && PyTuple_GET_SIZE(args) == 2)
        Py_SETREF(out, run_constant_call(level, function, &PyTuple_GET_ITEM(args, 0), 2));
    if (out != NULL && out != Py_NotImplemented && note_derived(self, args, out) < 0)
        Py_CLEAR(out);
    return out;
}

/* Whether a call of an op that has a composite form is recorded whole: 1, 0, or -1 with an error set. */
static int
is_whole(Handler *self, PyObject *facts, PyObject *args)
{
    PyObject *kernels = PyObject_GetAttr((PyObject *)self, s_kernels);
    PyObject *asks = kernels == NULL ? NULL : PyObject_GetAttr((PyObject *)self, s_is_active);
    int outcome = asks == NULL ? -1 : is_true_of(PyObject_CallFunctionObjArgs(SLOT(facts, whole), args, kernels, asks, NULL));
    Py_XDECREF(kernels);
    Py_XDECREF(asks);
    return outcome;
}

/* An op that is a write, a constant or, on a tape that stands alone, recorded whole; NotImplemented leaves it to Python. */
static PyObject *
run_uncommon(Handler *self, PyObject *facts, PyObject *args, PyObject *call, PyObject *call_args, PyObject *call_kwargs)
{
    if (is_listened(self))
        return Py_NewRef(Py_NotImplemented);
    if (SLOT(facts, rewrites) == Py_True)
        return run_write(self, facts, args, call, call_args, call_kwargs);
    int alone = self->below == NULL || self->below == Py_None;
    if (!alone && SLOT(facts, inactive) == Py_True)
        return run_inactive_below(self, facts, args);
    if (SLOT(facts, inactive) == Py_True)
        return run_inactive(self, facts, args, call, call_args, call_kwargs);
    int whole = SLOT(facts, whole) == Py_None || SLOT(facts, is_view) == Py_True ? 0 : is_whole(self, facts, args);
    if (whole <= 0)
        return whole < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    return run_common(self, facts, args, empty, call, call_args, call_kwargs);
}

/* An op with arguments that are given by name only, on a tape that stands alone; NotImplemented leaves it to Python. */
static PyObject *
run_named(Handler *self, PyObject *read)
{
    PyObject *facts = facts_of(self, PyTuple_GET_ITEM(read, 0)), *pairs = PyTuple_GET_ITEM(read, 2), *out = NULL;
    int writes = facts != NULL && SLOT(facts, rewrites) == Py_True;
    int plain = facts == NULL ? -1 : writes || (SLOT(facts, is_view) != Py_True && SLOT(facts, plain) == Py_True);
    if (plain == 0 && SLOT(facts, is_view) != Py_True && SLOT(facts, whole) != Py_None)
        plain = is_whole(self, facts, PyTuple_GET_ITEM(read, 1));
    if (plain <= 0)
        return plain < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(pairs); place++) {
        PyObject *value = PyTuple_GET_ITEM(PyTuple_GET_ITEM(pairs, place), 1);
        if (PyFloat_CheckExact(value) && PyFloat_AS_DOUBLE(value) == 0.0)
            return Py_NewRef(Py_NotImplemented); /* its sign is marked in the signature */
    }
    PyObject *kwargs = PyDict_New(), *off = NULL;
    if (kwargs != NULL && PyDict_MergeFromSeq2(kwargs, pairs, 1) == 0 && (off = exclude_python(1)) != NULL) {
        Py_DECREF(off);
        PyObject *args = PyTuple_GET_ITEM(read, 1);
        out = writes ? run_named_write(self, facts, args, pairs, SLOT(facts, fast), args, kwargs)
                     : run_common(self, facts, args, pairs, SLOT(facts, fast), args, kwargs);
        if (include_python() < 0)
            Py_CLEAR(out);
    }
    Py_XDECREF(kwargs);
    return out;
}

/* A function that one reading of its arguments makes an op; NotImplemented leaves it to Python. */
static PyObject *
run_read(Handler *self, PyObject *func, PyObject *reading, PyObject *args, PyObject *kwargs)
{
    int autocast = autocast_is_on();
    if (autocast)
        return autocast < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *out = NULL, *read = read_call(reading, args, kwargs);
    if (read == NULL)
        return NULL;
    int alone = (self->below == NULL || self->below == Py_None) && !is_listened(self);
    if (read != Py_None && PyTuple_GET_SIZE(read) > 2) {
        out = alone ? run_named(self, read) : Py_NewRef(Py_NotImplemented);
        Py_DECREF(read);
        return out;
    }
    int named = read == Py_None || alone ? 0 : PySet_Contains(c_named, PyTuple_GET_ITEM(read, 0));
    if (named < 0) {
        Py_DECREF(read);
        return NULL;
    }
    if (read == Py_None || named) { /* names of results are lost where a mapped op is run */
        Py_DECREF(read);
        return Py_NewRef(Py_NotImplemented);
    }
    PyObject *facts = facts_of(self, PyTuple_GET_ITEM(read, 0));
    PyObject *off = facts == NULL ? NULL : exclude_python(1);
    if (off != NULL) {
        PyObject *op_args = PyTuple_GET_ITEM(read, 1);
        if (SLOT(facts, plain) == Py_True)
            out = run_common(self, facts, op_args, empty, func, args, kwargs);
        else {
            out = run_uncommon(self, facts, op_args, func, args, kwargs);
            int parts = SLOT(facts, inactive) != Py_True && SLOT(facts, rewrites) != Py_True && SLOT(facts, is_view) != Py_True;
            if (out == Py_NotImplemented && (parts || SLOT(facts, direct) != Py_None) && takes_composites(self))
                Py_SETREF(out, run_composite(self, facts, NULL, op_args, NULL));
            if (out == Py_NotImplemented)
                Py_SETREF(out, PyObject_CallMethodObjArgs((PyObject *)self, s__run_uncommon, facts, op_args, NULL));
        }
        Py_DECREF(off);
        if (include_python() < 0)
            Py_CLEAR(out);
    }
    Py_DECREF(read);
    return out;
}

/* _run_common(facts, args): what Python's handlers call, with torch's own off. */
static PyObject *
handler_run_common(Handler *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2 || !PyTuple_CheckExact(args[1]) || self->kind != TAPE)
        return PyErr_Format(PyExc_TypeError, "_run_common: facts and a tuple are expected, on a tape");
    return run_common(self, args[0], args[1], empty, SLOT(args[0], fast), args[1], NULL);
}

/* A part of an op without named arguments, with torch's handlers off; NotImplemented leaves it to Python. */
static PyObject *
run_part_plainly(Handler *self, PyObject *op, PyObject *const *given, Py_ssize_t count)
{
    int autocast = autocast_is_on();
    if (autocast)
        return autocast < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *facts = facts_of(self, op), *args = facts == NULL ? NULL : PyTuple_New(count);
    if (args == NULL)
        return NULL;
    for (Py_ssize_t place = 0; place < count; place++)
        PyTuple_SET_ITEM(args, place, Py_NewRef(given[place]));
    PyObject *fast = SLOT(facts, fast), *out;
    if (SLOT(facts, plain) == Py_True)
        out = run_common(self, facts, args, empty, fast, args, NULL);
    else
        out = run_uncommon(self, facts, args, fast, args, NULL);
    Py_DECREF(args);
    return out;
}

/* _run_part_at_once(op, *args, **kwargs): what Tape._run_part_here does, which has all that is not plain. */
static PyObject *
handler_run_part(Handler *self, PyObject *const *given, Py_ssize_t count, PyObject *names)
{
    if (count < 1 || self->kind != TAPE)
        return PyErr_Format(PyExc_TypeError, "_run_part_at_once: an op and its arguments are expected, on a tape");
    PyObject *out = names == NULL ? run_part_plainly(self, given[0], given + 1, count - 1) : Py_NewRef(Py_NotImplemented);
    if (out != Py_NotImplemented)
        return out;
    Py_DECREF(out);
    PyObject *method = PyObject_GetAttr((PyObject *)self, s__run_part_here);
    out = method == NULL ? NULL : PyObject_Vectorcall(method, given, count, names);
    Py_XDECREF(method);
    return out;
}

/* _run_seen(call, args): a call on tensors without a graph, of which torch keeps track of views and writes. */
static PyObject *
handler_run_seen(Handler *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2 || !PyTuple_CheckExact(args[1]))
        return PyErr_Format(PyExc_TypeError, "_run_seen: a function and a tuple are expected");
    if (state.exclude == NULL || !state.excluded(state.views) || !state.excluded(state.python))
        return Py_NewRef(Py_NotImplemented);
    state.exclude(state.views, false);
    PyObject *out = PyObject_Call(args[0], args[1], NULL);
    state.exclude(state.views, true);
    return out;
}

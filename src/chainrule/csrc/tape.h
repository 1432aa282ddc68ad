/* Handlers of the tape: functions of plain tensors, run and recorded. Part of shortcuts.c. */

/* Append an op that ran with one floating-point result, and its named arguments; 0, or -1 with an error set. */
static int
append_record(Handler *self, PyObject *facts, PyObject *arguments, PyObject *named, PyObject *out, PyObject *dtype)
{
    int outcome = -1;
    PyObject *slot = NULL, *identity = NULL, *shape = NULL, *key = NULL, *outputs = NULL, *record = NULL;
    PyObject *op = SLOT(facts, op);
    slot = PyLong_FromSsize_t(PyList_GET_SIZE(self->active));
    identity = slot == NULL ? NULL : PyLong_FromVoidPtr(out);
    PyObject *batch = known_batch(out);
    shape = identity == NULL ? NULL : batch != NULL ? Py_NewRef(SLOT(batch, sample)) : GET(out, shape);
    outputs = shape == NULL || op == NULL ? NULL : PyTuple_Pack(1, slot);
    key = outputs == NULL ? NULL : PyTuple_Pack(5, facts, arguments, named, shape, dtype);
    record = key == NULL ? NULL : ((PyTypeObject *)c_record)->tp_alloc((PyTypeObject *)c_record, 6);
    if (record != NULL) {
        PyTuple_SET_ITEM(record, 0, Py_NewRef(op));
        PyTuple_SET_ITEM(record, 1, Py_NewRef(arguments));
        PyTuple_SET_ITEM(record, 2, Py_NewRef(named));
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

/* What the signature says of a tensor without a batch; a new reference. */
static PyObject *
tensor_key(PyObject *tensor)
{
    PyObject *key = NULL, *shape = GET(tensor, shape);
    PyObject *dtype = shape == NULL ? NULL : GET(tensor, dtype);
    PyObject *device = dtype == NULL ? NULL : GET(tensor, device);
    if (device != NULL)
        key = PyTuple_Pack(3, shape, dtype, device);
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    Py_XDECREF(device);
    return key;
}

/* Append an op that ran with several results, plain real tensors all of them and the first one floating-point: 1; 0 for others; -1
 * with an error. */
static int
append_several(Handler *self, PyObject *facts, PyObject *arguments, PyObject *results)
{
    Py_ssize_t count = PySequence_Fast_GET_SIZE(results);
    if (count < 2)
        return 0;
    for (Py_ssize_t place = 0; place < count; place++) {
        PyObject *result = PySequence_Fast_GET_ITEM(results, place);
        if ((PyObject *)Py_TYPE(result) != c_tensor)
            return 0;
        PyObject *dtype = GET(result, dtype);
        int real = dtype == NULL ? -1 : PySet_Contains(place == 0 ? c_floating : c_real, dtype);
        Py_XDECREF(dtype);
        if (real <= 0)
            return real;
    }
    int outcome = -1;
    PyObject *op = SLOT(facts, op), *record = NULL, *entry = NULL, *outputs = PyTuple_New(count), *keys = PyTuple_New(count);
    for (Py_ssize_t place = 0; outputs != NULL && keys != NULL && place < count; place++) {
        PyObject *result = PySequence_Fast_GET_ITEM(results, place);
        PyObject *slot = PyLong_FromSsize_t(PyList_GET_SIZE(self->active) + place), *key = tensor_key(result);
        PyTuple_SET_ITEM(outputs, place, slot);
        PyTuple_SET_ITEM(keys, place, key);
        if (slot == NULL || key == NULL)
            goto done;
    }
    entry = outputs == NULL || keys == NULL ? NULL : PyTuple_Pack(4, facts, arguments, empty, keys);
    record = entry == NULL ? NULL : ((PyTypeObject *)c_record)->tp_alloc((PyTypeObject *)c_record, 6);
    if (record == NULL)
        goto done;
    PyTuple_SET_ITEM(record, 0, Py_NewRef(op));
    PyTuple_SET_ITEM(record, 1, Py_NewRef(arguments));
    PyTuple_SET_ITEM(record, 2, Py_NewRef(empty));
    PyTuple_SET_ITEM(record, 3, Py_NewRef(outputs));
    PyTuple_SET_ITEM(record, 4, Py_NewRef(Py_True));
    PyTuple_SET_ITEM(record, 5, Py_NewRef(self->origin));
    for (Py_ssize_t place = 0; place < count; place++) {
        PyObject *result = PySequence_Fast_GET_ITEM(results, place);
        PyObject *identity = PyLong_FromVoidPtr(result);
        int floating = PySet_Contains(c_floating, PyTuple_GET_ITEM(PyTuple_GET_ITEM(keys, place), 1));
        int kept = identity != NULL && floating >= 0 && PyList_Append(self->values, result) == 0 &&
                   PyList_Append(self->active, floating ? Py_True : Py_False) == 0 && PyDict_SetItem(self->slots, identity, PyTuple_GET_ITEM(outputs, place)) == 0;
        Py_XDECREF(identity);
        if (!kept)
            goto done;
    }
    outcome = PyList_Append(self->key, entry) == 0 && PyList_Append(self->records, record) == 0 ? 1 : -1;
done:
    Py_XDECREF(outputs);
    Py_XDECREF(keys);
    Py_XDECREF(entry);
    Py_XDECREF(record);
    return outcome;
}

/* Whether somebody listens to what runs: what is done here in other ways than op by op is then left to Python. */
static int
is_listened(Handler *self)
{
    return self->heard != NULL && self->heard != Py_None;
}

/* Note an op that ran, where somebody listens; 0, or -1 with an error set. `how` says whether autograd saw it; None where it was not
 * the call that the facts name. */
static int
note_step(Handler *self, PyObject *facts, PyObject *args, Py_ssize_t count, PyObject *how, PyObject *out)
{
    if (!is_listened(self))
        return 0;
    PyObject *given = PyTuple_GetSlice(args, 0, count), *origin = self->origin == NULL ? Py_None : self->origin;
    PyObject *step = given == NULL ? NULL : PyTuple_Pack(5, facts, given, out, origin, how);
    int outcome = step == NULL ? -1 : PyList_Append(self->heard, step);
    Py_XDECREF(given);
    Py_XDECREF(step);
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

/* Give a plain tensor that the tape has not seen a slot as a constant; -1 with an error set. */
static Py_ssize_t
append_constant(Handler *self, PyObject *tensor)
{
    Py_ssize_t number = PyList_GET_SIZE(self->values);
    PyObject *slot = PyLong_FromSsize_t(number);
    PyObject *identity = slot == NULL ? NULL : PyLong_FromVoidPtr(tensor);
    PyObject *key = identity == NULL ? NULL : tensor_key(tensor);
    if (key == NULL || PyList_Append(self->values, tensor) < 0 || PyList_Append(self->active, Py_False) < 0 ||
        PyDict_SetItem(self->slots, identity, slot) < 0 || PyList_Append(self->key, key) < 0)
        number = -1;
    Py_XDECREF(slot);
    Py_XDECREF(identity);
    Py_XDECREF(key);
    return number;
}

/* The same of a tensor of the level below, of which the key says also whether it carries the batch. */
static Py_ssize_t
append_constant_of_level(Handler *self, PyObject *tensor)
{
    PyObject *inner = SLOT(tensor, inner);
    int batched = inner != NULL && (PyObject *)Py_TYPE(inner) == c_batched;
    Py_ssize_t slot = append_constant(self, tensor), last = PyList_GET_SIZE(self->key) - 1;
    if (slot < 0)
        return -1;
    PyObject *key = PyList_GET_ITEM(self->key, last);
    key = PyTuple_Pack(4, PyTuple_GET_ITEM(key, 0), PyTuple_GET_ITEM(key, 1), PyTuple_GET_ITEM(key, 2), batched ? Py_True : Py_False);
    return key == NULL || PyList_SetItem(self->key, last, key) < 0 ? -1 : slot;
}

/* Whether there are constants that depend on the inputs, as masks do: what is made from them is noted, too. */
static int
notes_derived(Handler *self)
{
    return self->derived != NULL && PyDict_Check(self->derived) && PyDict_GET_SIZE(self->derived) > 0;
}

/* Whether a tensor is such a constant: 1, 0, or -1 with an error set. */
static int
is_derived(Handler *self, PyObject *tensor)
{
    if (!notes_derived(self))
        return 0;
    PyObject *identity = PyLong_FromVoidPtr(tensor);
    int found = identity == NULL ? -1 : PyDict_Contains(self->derived, identity);
    Py_XDECREF(identity);
    return found;
}

static int
may_be_known(Handler *self, PyObject *tensor); /* in memory.h */

/* Note a result without a derivative, if it depends on the inputs all the same; 0, or -1 with an error set. */
static int
note_derived(Handler *self, PyObject *args, PyObject *out)
{
    int noted = 0, simple = is_argument(out);
    for (Py_ssize_t place = 0; simple && !noted && place < PyTuple_GET_SIZE(args); place++) {
        PyObject *item = PyTuple_GET_ITEM(args, place);
        if (is_argument(item)) {
            Py_ssize_t slot = known_slot(self, item);
            if (slot == -2 || (noted = is_derived(self, item)) < 0)
                return -1;
            if (slot >= 0 && PyList_GET_ITEM(self->active, slot) == Py_True)
                noted = 1;
            /* It may be a view of something that was written. */
            int known = slot >= 0 || noted ? 0 : may_be_known(self, item);
            if (known < 0)
                return -1;
            simple = !known;
        } else
            simple = holds_numbers(item) || PySet_Contains(c_plain, (PyObject *)Py_TYPE(item)) > 0;
    }
    if (!simple) {
        PyObject *done = PyObject_CallMethodObjArgs((PyObject *)self, s__note_derived, args, Py_None, out, NULL);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    if (!noted)
        return 0;
    PyObject *identity = PyLong_FromVoidPtr(out);
    int outcome = identity == NULL ? -1 : PyDict_SetItem(self->derived, identity, out);
    Py_XDECREF(identity);
    return outcome;
}

/* Whether a tensor that the tape has not seen may be a constant here: a plain one, or one of the vmap below. */
static int
may_be_constant(Handler *self, PyObject *tensor)
{
    if (is_constant_class(tensor))
        return 1;
    return (PyObject *)Py_TYPE(tensor) == c_batch_tensor && self->below != NULL && self->below != Py_None &&
           SLOT(tensor, level) == self->below && PyObject_TypeCheck(self->below, &handler_type) &&
           ((Handler *)self->below)->kind == VMAP;
}

/* Whether a tensor without a slot is one that the tape cannot know by its graph: 1, 0, or -1 with an error set. */
static int
constant_is_new(Handler *self, PyObject *tensor)
{
    if (!self->meets_saved)
        return 1;
    PyObject *node = GET(tensor, grad_fn);
    Py_XDECREF(node);
    return node == NULL ? -1 : node == Py_None;
}

/* The slot of a plain tensor that was no argument before, which may become a constant; -1 with an error set. */
static Py_ssize_t
slot_or_constant(Handler *self, PyObject *tensor)
{
    PyObject *layout = GET(tensor, layout);
    if (layout == NULL)
        return -1;
    Py_DECREF(layout);
    int fresh = constant_is_new(self, tensor);
    if (fresh < 0)
        return -1;
    /* No writes that it may be touched by, no graph by which it may be known, and nothing else to note of it. */
    int derived = is_derived(self, tensor);
    if (derived < 0)
        return -1;
    int unknown = may_be_known(self, tensor);
    if (unknown < 0)
        return -1;
    int of_level = !is_constant_class(tensor) && may_be_constant(self, tensor);
    if ((is_constant_class(tensor) || of_level) && layout == c_strided && fresh && !unknown && !derived) {
        Py_ssize_t known = known_slot(self, tensor); /* it may stand at two places of one call */
        if (known == -1)
            return of_level ? append_constant_of_level(self, tensor) : append_constant(self, tensor);
        return known < 0 ? -1 : known;
    }
    PyObject *found = PyObject_CallMethodOneArg((PyObject *)self, s__slot_or_constant, tensor);
    if (found == NULL)
        return -1;
    Py_ssize_t slot = PyLong_AsSsize_t(found);
    Py_DECREF(found);
    return slot;
}

/* The slot of a number, as it stands in a record; a new reference. */
static PyObject *
slot_object(Py_ssize_t slot)
{
    if (slot < PyList_GET_SIZE(c_slot_objects))
        return Py_NewRef(PyList_GET_ITEM(c_slot_objects, slot));
    return PyObject_CallFunction((PyObject *)Py_TYPE(PyList_GET_ITEM(c_slot_objects, 0)), "n", slot);
}

/* What stands in a record for a tensor, or a list of tensors, that may become constants; a new reference. */
static PyObject *
lowered_fresh(Handler *self, PyObject *item)
{
    if (PyList_CheckExact(item))
        return PyObject_CallMethodOneArg((PyObject *)self, s_lower, item);
    Py_ssize_t slot = slot_or_constant(self, item);
    return slot < 0 ? NULL : slot_object(slot);
}

/* Whether torch's gradients are off, so that what runs is a constant: 1, 0, or -1 with an error set. That is noted where an
 * argument is active: `touched` says so of those with a slot. */
static int
is_blocked(Handler *self, PyObject *args, int touched)
{
    if (!self->respect_no_grad)
        return 0;
    int enabled = grad_is_enabled();
    if (enabled)
        return enabled < 0 ? -1 : 0;
    if (touched)
        return PyObject_SetAttr((PyObject *)self, s_saw_blocked, Py_True) < 0 ? -1 : 1;
    PyObject *done = PyObject_CallMethodObjArgs((PyObject *)self, s__note_blocked, args, Py_None, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 1;
}

/* What is found out of the arguments of a call: whether one depends on the inputs, whether one has a graph, and whether one is
 * complex. */
typedef struct {
    int touched;
    int joined;
    int complex;
} Found;

/* Zeros of either sign are equal, and the key of another plan where a complex number has them (Slots.lower). */
static int
mark_sign(Handler *self, PyObject *item)
{
    return PyComplex_CheckExact(item) && has_negative_zero(item) ? append_new(self->key, signs_of(item)) : 0;
}

/* Record what ran, if an argument is active: 0, or -1 with an error set. `fresh` are places of tensors without a slot (or of
 * lists with such tensors), which become constants. */
static int
record_call(Handler *self, PyObject *facts, PyObject *args, PyObject *lowered, PyObject *named, const Py_ssize_t *fresh,
            int fresh_count, const Found *seen, PyObject *out)
{
    int touched = seen->touched;
    /* Those that have no graph depend on nothing, where nothing was written. */
    int looks = fresh_count && !touched && seen->joined;
    for (int number = 0; !looks && !touched && number < fresh_count; number++) {
        PyObject *item = PyTuple_GET_ITEM(args, fresh[number]);
        looks = PyList_CheckExact(item) ? self->alias != NULL && self->alias != Py_None : may_be_known(self, item);
    }
    if (looks < 0)
        return -1;
    if (looks) {
        PyObject *any = PyObject_CallMethodObjArgs((PyObject *)self, s__any_active, args, Py_None, NULL);
        if (any == NULL)
            return -1;
        touched = PyObject_IsTrue(any);
        Py_DECREF(any);
    }
    if (!touched)
        return notes_derived(self) ? note_derived(self, args, out) : 0;
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(args); place++)
        if (mark_sign(self, PyTuple_GET_ITEM(args, place)) < 0)
            return -1;
    for (int number = 0; number < fresh_count; number++) {
        PyObject *found = lowered_fresh(self, PyTuple_GET_ITEM(args, fresh[number]));
        if (found == NULL)
            return -1;
        PyTuple_SET_ITEM(lowered, fresh[number], found);
    }
    if (named == empty && (PyTuple_Check(out) || PyList_CheckExact(out))) {
        int appended = append_several(self, facts, lowered, out);
        if (appended)
            return appended < 0 ? -1 : 0;
    }
    PyObject *kind = (PyObject *)Py_TYPE(out);
    PyObject *batch = known_batch(out);
    PyObject *dtype = batch != NULL                                ? Py_NewRef(SLOT(batch, dtype))
                      : kind == c_tensor || kind == c_batch_tensor ? GET(out, dtype)
                                                                   : Py_NewRef(Py_None);
    if (dtype == NULL)
        return -1;
    int outcome = PySet_Contains(c_floating, dtype);
    if (outcome == 0)
        outcome = PySet_Contains(c_complex, dtype);
    if (outcome > 0)
        outcome = append_record(self, facts, lowered, named, out, dtype);
    else if (outcome == 0) {
        PyObject *done = PyObject_CallMethodObjArgs((PyObject *)self, s_append_record, facts, lowered, named, out, NULL);
        outcome = done == NULL ? -1 : 0;
        Py_XDECREF(done);
    }
    Py_DECREF(dtype);
    return outcome;
}

/* Whether autograd keeps no values of a call but its arguments and the result, or views of them (Tape._joins_whole): 1, 0, -1
 * with an error. */
static int
joins_whole(Handler *self, PyObject *facts, PyObject *const *args, Py_ssize_t count)
{
    long joining = PyLong_AsLong(SLOT(facts, joining));
    if (SLOT(facts, alone) == Py_None && (joining == PARTS || joining == WHOLE))
        return joining == WHOLE;
    if (SLOT(facts, alone) == Py_None && self->below != NULL && self->below != Py_None)
        return 1; /* what is kept belongs to the stored tensors */
    if (joining == LINEAR && count > 1) { /* the commonest case */
        int fits = rank_is(args[0], 2);
        if (fits > 0 && (fits = rank_is(args[1], 2)) > 0)
            return 1;
        if (fits < 0)
            return -1;
    }
    PyObject *given = PyTuple_New(count);
    if (given == NULL)
        return -1;
    for (Py_ssize_t place = 0; place < count; place++)
        PyTuple_SET_ITEM(given, place, Py_NewRef(args[place]));
    PyObject *answer = PyObject_CallMethodObjArgs((PyObject *)self, s__joins_whole, facts, given, NULL);
    Py_DECREF(given);
    int may = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return may;
}

/* The call of a function that autograd sees; a linear layer on a vector as linear_of_vector in capture/schema.py does it. */
static PyObject *
call_joined(PyObject *function, PyObject *facts, PyObject *const *args, Py_ssize_t count)
{
    if (SLOT(facts, alone) != Py_None)
        return call_below(SLOT(facts, alone), args, count, 1);
    if (PyLong_AsLong(SLOT(facts, joining)) == LINEAR) {
        int vector = rank_is(args[0], 1);
        if (vector < 0)
            return NULL;
        if (vector) {
            PyObject *moved[] = {count > 2 ? args[2] : args[1], count > 2 ? args[1] : args[0], args[0]};
            return call_below(count > 2 ? c_addmv : c_mv, moved, count, 1);
        }
    }
    return call_below(PyTuple_GET_ITEM(function, CALL), args, count, 1);
}

static PyObject *
run_on_tape(Handler *self, PyObject *function, PyObject *args);

static PyObject *
run_common(Handler *self, PyObject *facts, PyObject *args, PyObject *named, PyObject *call, PyObject *call_args,
           PyObject *call_kwargs); /* in ops.h */

static PyObject *
facts_of(Handler *self, PyObject *op); /* in ops.h */

static PyObject *
vmap_below(Handler *self); /* in composites.h */

/* What is known of the op that torch makes of a product of matrices and vectors, by their ranks (borrowed); NULL, maybe with an error
 * set, for others. */
static PyObject *
facts_of_product(Handler *self, PyObject *facts, PyObject *args, Py_ssize_t count)
{
    PyObject *ranks = PyDict_GetItemWithError(c_products, SLOT(facts, op)), *op = NULL;
    if (ranks == NULL || count != 2 || !is_argument(PyTuple_GET_ITEM(args, 1)))
        return NULL;
    PyObject *first = GET(PyTuple_GET_ITEM(args, 0), ndim), *second = first == NULL ? NULL : GET(PyTuple_GET_ITEM(args, 1), ndim);
    PyObject *key = second == NULL ? NULL : PyTuple_Pack(2, first, second);
    if (key != NULL)
        op = PyDict_GetItemWithError(ranks, key);
    Py_XDECREF(first);
    Py_XDECREF(second);
    Py_XDECREF(key);
    return op == NULL ? NULL : facts_of(self, op);
}

/* A function of complex tensors as its op, on a tape that stands alone, or a product on a level; NotImplemented, with nothing done, for
 * others. */
static PyObject *
run_complex(Handler *self, PyObject *facts, PyObject *function, PyObject *args, Py_ssize_t count)
{
    int alone = self->below == NULL || self->below == Py_None, product = 0;
    if (SLOT(facts, with_complex) != Py_True) {
        if ((facts = facts_of_product(self, facts, args, count)) == NULL)
            return PyErr_Occurred() ? NULL : Py_NewRef(Py_NotImplemented);
        product = 1;
    }
    if (!alone && !(product && vmap_below(self) != NULL && reads_conjugates()))
        return Py_NewRef(Py_NotImplemented);
    PyObject *out = NULL, *given = PyTuple_GetSlice(args, 0, count), *off = given == NULL ? NULL : exclude_python(1);
    if (off != NULL) {
        Py_DECREF(off);
        out = run_common(self, facts, given, empty, product ? SLOT(facts, fast) : PyTuple_GET_ITEM(function, CALL), given, NULL);
        if (include_python() < 0)
            Py_CLEAR(out);
    }
    Py_XDECREF(given);
    return out;
}

/* A function as the next mode runs it: on stored tensors of a vmap, or as it was called on the next tape. */
static PyObject *
run_beneath(Handler *below, PyObject *function, PyObject *args, PyObject *const *stored, Py_ssize_t count)
{
    return below->kind == TAPE ? run_on_tape(below, function, args) : run_under_vmap(below, function, stored, count, 1);
}

static PyObject *
run_known_call(Handler *level, PyObject *op, PyObject *args, Py_ssize_t count); /* in calls.h */

/* A function of tensors that are the same for all samples of a level and have no graph; NotImplemented for others. */
static PyObject *
run_constant_call(Handler *level, PyObject *function, PyObject *const *args, Py_ssize_t count)
{
    PyObject *stored[3];
    if (level->guarded || level->graphs)
        return Py_NewRef(Py_NotImplemented);
    for (Py_ssize_t place = 0; place < count; place++) {
        PyObject *item = stored[place] = args[place];
        if ((PyObject *)Py_TYPE(item) == c_batch_tensor && SLOT(item, level) == (PyObject *)level) {
            item = stored[place] = SLOT(item, inner);
            int graph = item == NULL || (PyObject *)Py_TYPE(item) != c_tensor ? 1 : is_true_of(GET(item, requires_grad));
            if (graph)
                return graph < 0 ? NULL : Py_NewRef(Py_NotImplemented);
        }
        if (item == NULL || !((PyObject *)Py_TYPE(item) == c_tensor || is_any_number(item)))
            return Py_NewRef(Py_NotImplemented);
    }
    PyObject *out = call_below(PyTuple_GET_ITEM(function, CALL), stored, count, 0);
    if (out != NULL)
        Py_SETREF(out, wrapped_constant((PyObject *)level, out));
    return out;
}

/* NotImplemented leaves the call to the Python method, with nothing done. */
static PyObject *
run_on_tape(Handler *self, PyObject *function, PyObject *args)
{
    Py_ssize_t count = given(function, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args));
    if (count < 1)
        return Py_NewRef(Py_NotImplemented);
    int autocast = autocast_is_on();
    if (autocast)
        return autocast < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *op = PyTuple_GET_ITEM(function, OP);
    PyObject *second = count > 1 ? PyTuple_GET_ITEM(args, 1) : NULL;
    int number = second != NULL && is_any_number(second);
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
    if (SLOT(facts, plain) != Py_True)
        return Py_NewRef(Py_NotImplemented);

    PyObject *out = NULL, *first_dtype = NULL, *constant = NULL;
    PyObject *stored[3];
    Py_ssize_t fresh[3];
    int fresh_count = 0;
    Found seen = {0, 0, 0};
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
        if (slot < 0 && !(is_argument(item) && may_be_constant(self, item)))
            goto refuse;
        int graph = 0;
        PyObject *batch = self->graphs ? NULL : known_batch(item);
        PyObject *dtype = batch != NULL ? Py_NewRef(SLOT(batch, dtype)) : plain_dtype(item, &graph);
        if (dtype == NULL)
            goto done;
        int plain = dtype != Py_None;
        if (place == 0)
            first_dtype = dtype;
        else
            Py_DECREF(dtype);
        if (!plain && (seen.complex = is_complex(item))) {
            plain = seen.complex > 0 && SLOT(facts, with_complex) == Py_True && vmap_below(self) != NULL && reads_conjugates();
            if (!plain) {
                out = seen.complex < 0 ? NULL : run_complex(self, facts, function, args, count);
                goto done;
            }
        }
        if (!plain || slot >= PyList_GET_SIZE(c_slot_objects) || (graph && (PyObject *)Py_TYPE(item) == c_batch_tensor))
            goto refuse;
        seen.joined |= graph;
        if (slot < 0) {
            fresh[fresh_count++] = place;
            continue;
        }
        if (PyList_GET_ITEM(self->active, slot) == Py_True)
            seen.touched = 1;
        PyTuple_SET_ITEM(lowered, place, Py_NewRef(PyList_GET_ITEM(c_slot_objects, slot)));
    }
    if (seen.complex && seen.joined)
        goto refuse;
    if (number && is_number(second) && PyTuple_GET_ITEM(function, NUMBERS) == Py_True && (PyObject *)Py_TYPE(stored[0]) == c_tensor) {
        constant = constant_for(second, first_dtype);
        if (constant == NULL)
            goto done;
        stored[1] = constant;
    }
    if (seen.joined) {
        int may = may_join();
        if (may > 0)
            may = joins_whole(self, facts, stored, count);
        if (may < 0)
            goto done;
        if (!may)
            goto refuse;
    }
    if (self->below == NULL || self->below == Py_None)
        out = seen.joined ? call_joined(function, facts, stored, count) : call_below(PyTuple_GET_ITEM(function, CALL), stored, count, 0);
    else
        out = run_beneath((Handler *)self->below, function, args, stored, count);
    if (out == Py_NotImplemented && !seen.joined && vmap_below(self) != NULL)
        Py_SETREF(out, run_constant_call((Handler *)self->below, function, stored, count));
    if (out == Py_NotImplemented && SLOT(facts, common) == Py_True && vmap_below(self) != NULL)
        Py_SETREF(out, run_known_call((Handler *)self->below, op, args, count));
    if (out == NULL || out == Py_NotImplemented)
        goto done;
    int vector = seen.joined && PyLong_AsLong(SLOT(facts, joining)) == LINEAR ? rank_is(stored[0], 1) : 0; /* see call_joined */
    PyObject *how = vector ? Py_None : seen.joined ? Py_True : Py_False;
    int blocked = vector < 0 || note_step(self, facts, args, count, how, out) < 0 ? -1 : is_blocked(self, args, seen.touched);
    if (blocked) {
        if (blocked < 0)
            Py_CLEAR(out);
        goto done;
    }
    if (record_call(self, facts, args, lowered, empty, fresh, fresh_count, &seen, out) < 0)
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

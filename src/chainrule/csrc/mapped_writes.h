/* Writes on a tape that stands on a vmap, to tensors of that level, as chainrule.capture.aliasing does them. Part of shortcuts.c. */

static PyObject *
assign_mapped(Handler *self, PyObject *const *args, Py_ssize_t count); /* in methods.h */

static int
may_be_copy(PyObject *tensor); /* in methods.h */

static PyObject *
put_mapped(Handler *self, PyObject *target, PyObject *indices, PyObject *value); /* in methods.h */

/* The ops that choose a part of a tensor of this shape, one on the result of the other (chainrule.capture.assignments.parts_of): how
 * many they are; 0 for those that are left to Python; -1 with an error set. */
static int
assigned_parts(PyObject *shape, PyObject *index, Part *parts)
{
    PyObject *single[] = {index};
    PyObject **items = PyTuple_CheckExact(index) ? &PyTuple_GET_ITEM(index, 0) : single;
    Py_ssize_t given = PyTuple_CheckExact(index) ? PyTuple_GET_SIZE(index) : 1, rank = PyTuple_GET_SIZE(shape), named = 0, dim = 0, source = 0;
    int count = 0, dots = 0, outcome = 1;
    if (given > MOST_PARTS)
        return 0;
    for (Py_ssize_t place = 0; place < given; place++) {
        if (items[place] == Py_None) /* goes back by another op than a scatter */
            return 0;
        named += items[place] != Py_Ellipsis;
        dots += items[place] == Py_Ellipsis;
    }
    if (named > rank || dots > 1)
        return 0;
    for (Py_ssize_t place = 0; outcome > 0 && place < given; place++) {
        PyObject *item = items[place];
        if (item == Py_Ellipsis) {
            dim += rank - named;
            source += rank - named;
            continue;
        }
        Py_ssize_t size = PyLong_AsSsize_t(PyTuple_GET_ITEM(shape, source++));
        Part *part = &parts[count];
        part->index = NULL;
        if (PyLong_CheckExact(item)) {
            Py_ssize_t number = PyLong_AsSsize_t(item);
            if (is_too_large(number) || number < -size || number >= size) {
                outcome = 0;
                break;
            }
            part->op = c_select;
            part->args = Py_BuildValue("(nn)", dim, number);
        } else {
            PySliceObject *slice = (PySliceObject *)item;
            Py_ssize_t start, stop, step;
            if (!slice_number(slice->start, 0, &start) || !slice_number(slice->stop, PY_SSIZE_T_MAX, &stop) ||
                !slice_number(slice->step, 1, &step) || step < 1) {
                outcome = 0;
                break;
            }
            PySlice_AdjustIndices(size, &start, &stop, step);
            dim++;
            if (start == 0 && stop == size && step == 1)
                continue;
            part->op = c_slice;
            part->args = Py_BuildValue("(nnnn)", dim - 1, start, stop > start ? stop : start, step);
        }
        if (part->args == NULL)
            outcome = -1;
        else
            count++;
    }
    if (outcome > 0)
        return count;
    free_parts(parts, count);
    return outcome;
}

/* Whether a tensor is of a level and without a graph, and its dtype, a new reference: 1, 0, or -1 with an error set. */
static int
level_dtype(PyObject *level, PyObject *tensor, PyObject **dtype)
{
    PyObject *value, *batch;
    int joined = 0;
    *dtype = NULL;
    if (!find_stored_tensor(tensor, level, &value, &batch) || !is_constant_class(value))
        return 0;
    if ((*dtype = plain_dtype(value, &joined)) == NULL)
        return -1;
    int fits = *dtype != Py_None && !joined;
    if (fits && value != tensor && (fits = is_true_of(GET(tensor, requires_grad))) >= 0)
        fits = !fits;
    if (fits <= 0)
        Py_CLEAR(*dtype);
    return fits;
}

/* Whether a tensor depends on the inputs, where the views that were made are settled: 1, 0, or -1 with an error set. */
static int
is_active_now(Handler *self, Memory *memory, PyObject *tensor)
{
    Py_ssize_t slot = known_slot(self, tensor);
    if (slot != -1)
        return slot == -2 ? -1 : PyList_GET_ITEM(self->active, slot) == Py_True;
    PyObject *link = found_for(memory->links, tensor);
    int known = 0;
    while (link != NULL && !known) {
        PyObject *parent = PyTuple_GET_ITEM(link, LINK_PARENT);
        known = found_for(self->slots, parent) != NULL;
        link = found_for(memory->links, parent);
    }
    if (PyErr_Occurred())
        return -1;
    return known ? is_true_of(PyObject_CallMethodOneArg((PyObject *)self, s_is_active, tensor)) : 0;
}

/* The arguments of a record: some slots, and what comes after the tensor in the call of a view; a new reference. */
static PyObject *
lowered_with(Py_ssize_t first, Py_ssize_t second, PyObject *rest)
{
    Py_ssize_t slots = second < 0 ? 1 : 2, count = PyTuple_GET_SIZE(rest);
    PyObject *lowered = PyTuple_New(count + slots);
    for (Py_ssize_t place = 0; lowered != NULL && place < slots; place++) {
        PyObject *slot = slot_object(place ? second : first);
        if (slot == NULL) {
            Py_CLEAR(lowered);
            return NULL;
        }
        PyTuple_SET_ITEM(lowered, place, slot);
    }
    for (Py_ssize_t place = 0; lowered != NULL && place < count; place++)
        PyTuple_SET_ITEM(lowered, place + slots, Py_NewRef(PyTuple_GET_ITEM(rest, place)));
    return lowered;
}

/* Record an op on known slots that was not executed, one of which is active; its slot, or -1 with an error set. */
static Py_ssize_t
record_known(Handler *self, PyObject *op, Py_ssize_t first, Py_ssize_t second, PyObject *rest, PyObject *out, PyObject *dtype)
{
    PyObject *facts = facts_of(self, op), *lowered = facts == NULL ? NULL : lowered_with(first, second, rest);
    int outcome = lowered == NULL ? -1 : append_record(self, facts, lowered, empty, out, dtype);
    Py_XDECREF(lowered);
    return outcome < 0 ? -1 : PyList_GET_SIZE(self->values) - 1;
}

/* What an assignment to a part of a tensor of the level below works on: the stored tensors and their views, each a view of the one
 * before, and the tensors of the level that stand for all but the first and the last of them. */
typedef struct {
    Part parts[MOST_PARTS];
    PyObject *stored[MOST_PARTS + 1], *views[MOST_PARTS + 1];
    int count, batched;
} Chosen;

static void
free_chosen(Chosen *chosen)
{
    for (int number = 0; number <= chosen->count; number++) {
        Py_XDECREF(chosen->stored[number]);
        Py_XDECREF(chosen->views[number]);
    }
    free_parts(chosen->parts, chosen->count);
}

/* Find them: 1; 0 if they are left to Python, with nothing written; -1 with an error set. */
static int
choose_part(Handler *self, PyObject *tensor, PyObject *value, PyObject *dtype, Chosen *chosen)
{
    PyObject *level = self->below, *whole, *batch, *source, *mapped;
    if (!find_stored_tensor(value, level, &source, &mapped) || !find_stored_tensor(tensor, level, &whole, &batch))
        return 0;
    if (mapped != NULL && batch == NULL) { /* the target carries the batch from here on */
        if (carry_batch(level, tensor) < 0)
            return -1;
        if (!find_stored_tensor(tensor, level, &whole, &batch) || batch == NULL)
            return 0;
    }
    int copy = may_be_copy(whole);
    if (copy)
        return copy < 0 ? -1 : 0;
    chosen->batched = batch != NULL;
    chosen->stored[0] = Py_NewRef(whole);
    chosen->views[0] = Py_NewRef(tensor);
    for (int number = 0; number < chosen->count; number++) {
        PyObject *given = chosen->parts[number].args, *facts = facts_of(self, chosen->parts[number].op), *dim;
        PyObject *args = facts == NULL ? NULL : PyTuple_New(PyTuple_GET_SIZE(given) + 1);
        if (args == NULL)
            return -1;
        PyTuple_SET_ITEM(args, 0, Py_NewRef(chosen->stored[number]));
        for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(given); place++) {
            dim = place ? Py_NewRef(PyTuple_GET_ITEM(given, place)) : PyLong_FromLong(PyLong_AsLong(PyTuple_GET_ITEM(given, 0)) + chosen->batched);
            PyTuple_SET_ITEM(args, place + 1, dim);
        }
        chosen->stored[number + 1] = PyErr_Occurred() ? NULL : PyObject_Call(SLOT(facts, fast), args, NULL);
        Py_DECREF(args);
        if (chosen->stored[number + 1] == NULL)
            return -1;
        if (number + 1 < chosen->count &&
            (chosen->views[number + 1] = wrapped_view(level, chosen->stored[number + 1], chosen->batched, dtype)) == NULL)
            return -1;
    }
    PyObject *part = GET(chosen->stored[chosen->count], shape), *own = part == NULL ? NULL : GET(source, shape);
    PyObject *one = own == NULL ? NULL : PyTuple_GetSlice(part, chosen->batched, PyTuple_GET_SIZE(part));
    PyObject *other = one == NULL ? NULL : PyTuple_GetSlice(own, mapped != NULL, PyTuple_GET_SIZE(own));
    int same = other == NULL ? -1 : PyObject_RichCompareBool(one, other, Py_EQ);
    Py_XDECREF(part);
    Py_XDECREF(own);
    Py_XDECREF(one);
    Py_XDECREF(other);
    return same;
}

/* Write to the part, and record what that makes of the tensor: 0, or -1 with an error set. */
static int
write_part(Handler *self, Memory *memory, PyObject *tensor, PyObject *value, PyObject *dtype, Chosen *chosen)
{
    PyObject *source, *mapped, *facts = facts_of(self, c_copy_op);
    Py_ssize_t olds[MOST_PARTS + 1], slot = known_slot(self, value);
    if (slot == -1)
        slot = slot_or_constant(self, value);
    olds[0] = slot < 0 ? -1 : known_slot(self, tensor);
    if (olds[0] == -1 && slot >= 0)
        olds[0] = slot_or_constant(self, tensor);
    if (facts == NULL || slot < 0 || olds[0] < 0 || !find_stored_tensor(value, self->below, &source, &mapped))
        return -1;
    for (int number = 1; number < chosen->count; number++) {
        Part *part = &chosen->parts[number - 1];
        int active = PyList_GET_ITEM(self->active, olds[number - 1]) == Py_True;
        olds[number] = active ? record_known(self, part->op, olds[number - 1], -1, part->args, chosen->views[number], dtype)
                              : append_constant_of_level(self, chosen->views[number]);
        if (olds[number] < 0)
            return -1;
    }
    if (save_old(self, memory, tensor) < 0)
        return -1;
    PyObject *args[] = {chosen->stored[chosen->count], source};
    PyObject *done = PyObject_Vectorcall(SLOT(facts, fast), args, 2, NULL);
    Py_XDECREF(done);
    if (done == NULL || PyObject_SetAttr(memory->alias, s_has_writes, Py_True) < 0)
        return -1;
    for (int number = chosen->count - 1; number >= 0; number--) {
        Part *part = &chosen->parts[number];
        PyObject *scatter = found_for(c_scatters, part->op);
        slot = scatter == NULL ? -1 : record_known(self, scatter, olds[number], slot, part->args, chosen->views[number], dtype);
        if (slot < 0)
            return -1;
    }
    return climb(self, memory, tensor, dtype);
}

/* An assignment to a tensor of the level below, as AliasTracker.assign does it, with torch's handlers off and views tracked. */
static PyObject *
assign_below(Handler *self, PyObject *const *args)
{
    PyObject *tensor = args[0], *value, *dtype, *own = NULL, *shape = NULL, *out = NULL;
    Memory memory = {NULL};
    Chosen chosen = {.count = 0};
    int fits = level_dtype(self->below, tensor, &dtype), changes = 0, unknown = 0;
    if (fits <= 0)
        return fits < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *beside[] = {args[2], tensor};
    value = is_number(args[2]) ? PyObject_Vectorcall(c_constant_beside, beside, 2, NULL) : Py_NewRef(args[2]);
    if (value == NULL || (fits = PySet_Contains(c_floating, dtype)) < 0)
        goto done;
    fits = fits && is_argument(value) ? level_dtype(self->below, value, &own) : 0;
    if (fits < 0 || memory_of(self, &memory) < 0 || settle_views(self, &memory) < 0)
        goto done;
    fits = fits && own == dtype && found_for(memory.links, tensor) == NULL;
    if (PyErr_Occurred() || (fits && (changes = is_active_now(self, &memory, value)) < 0))
        goto done;
    if (fits && !changes) {
        if ((unknown = is_unknown(self, &memory, tensor)) < 0)
            goto done;
        Py_ssize_t slot = unknown ? -1 : known_slot(self, tensor);
        fits = unknown || (slot >= 0 && PyList_GET_ITEM(self->active, slot) == Py_True);
    }
    if (fits && unknown) {
        out = assign_mapped((Handler *)self->below, args, 3);
        goto done;
    }
    if (fits) {
        if ((shape = GET(tensor, shape)) == NULL || (chosen.count = assigned_parts(shape, args[1], chosen.parts)) < 0) {
            chosen.count = 0;
            goto done;
        }
        fits = chosen.count ? choose_part(self, tensor, value, dtype, &chosen) : 0;
    }
    if (fits == 0)
        out = Py_NewRef(Py_NotImplemented);
    else if (fits > 0 && write_part(self, &memory, tensor, value, dtype, &chosen) == 0)
        out = Py_NewRef(Py_None);
done:
    free_chosen(&chosen);
    let_go(&memory);
    Py_DECREF(dtype);
    Py_XDECREF(value);
    Py_XDECREF(own);
    Py_XDECREF(shape);
    return out;
}

/* An op that writes to a tensor of a level, on the stored tensors, with torch's handlers off; NotImplemented, with nothing written,
 * for others. */
static PyObject *
run_level_write(Handler *level, PyObject *facts, PyObject *args, PyObject *call)
{
    PyObject *op = SLOT(facts, op), *out = NULL, *entry, *zero, *given[] = {PyTuple_GET_ITEM(args, 0), Py_Ellipsis, NULL};
    Py_ssize_t count = PyTuple_GET_SIZE(args);
    state.exclude(state.views, false);
    if ((op == c_copy_op || op == c_fill_op) && count == 2) {
        given[2] = PyTuple_GET_ITEM(args, 1);
        out = assign_mapped(level, given, 3);
    } else if (op == c_zero_op && count == 1 && (zero = PyLong_FromLong(0)) != NULL) {
        given[2] = zero;
        out = assign_mapped(level, given, 3);
        Py_DECREF(zero);
    } else if (op == c_put_op && count == 3)
        out = put_mapped(level, given[0], PyTuple_GET_ITEM(args, 1), PyTuple_GET_ITEM(args, 2));
    else if ((entry = PyDict_GetItemWithError(c_entries, call)) != NULL && PyTuple_GET_ITEM(entry, WRITER) != Py_None)
        out = run_under_vmap(level, PyTuple_GET_ITEM(entry, WRITER), &PyTuple_GET_ITEM(args, 0), count, 1);
    else if (!PyErr_Occurred())
        out = Py_NewRef(Py_NotImplemented);
    state.exclude(state.views, true);
    PyObject *off = exclude_python(1); /* the handlers are on after a call of torch */
    if (off == NULL)
        Py_CLEAR(out);
    Py_XDECREF(off);
    return out;
}

/* Writes on a tape that stands alone, and assignments to what an index chooses: what chainrule.capture.aliasing and
 * chainrule.capture.assignments do for plain tensors. Part of shortcuts.c. */

static PyObject *
assign_mapped(Handler *self, PyObject *const *args, Py_ssize_t count); /* in methods.h */

static int
may_be_copy(PyObject *tensor); /* in methods.h */

/* Add the slots that stand in the arguments of a record to a set: 0, or -1 with an error set. */
static int
collect_slots(PyObject *tree, PyObject *into)
{
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(tree); place++) {
        PyObject *item = PyTuple_GET_ITEM(tree, place);
        int outcome = 0;
        if (Py_TYPE(item) == Py_TYPE(PyList_GET_ITEM(c_slot_objects, 0)))
            outcome = PySet_Add(into, PyTuple_GET_ITEM(item, 0));
        else if (PyTuple_CheckExact(item))
            outcome = collect_slots(item, into);
        if (outcome < 0)
            return -1;
    }
    return 0;
}

/* Whether the derivative of an op reads values: 1, 0, or -1 with an error set. */
static int
reads_values(Handler *self, PyObject *facts)
{
    PyObject *reads = SLOT(facts, reads);
    if (reads == Py_True || reads == Py_False)
        return reads == Py_True;
    return is_true_of(PyObject_CallMethodOneArg((PyObject *)self, s_reads_values, SLOT(facts, op)));
}

/* Fields of a record. */
enum { RECORD_OP, RECORD_ARGS, RECORD_KWARGS, RECORD_OUTPUTS };

/* Add what the records since then read (AliasTracker._scan_reads): 1; 0 if that is left to Python; -1 with an error set. */
static int
scan_reads(Handler *self, Memory *memory)
{
    PyObject *number = PyObject_GetAttr(memory->alias, s__scanned);
    Py_ssize_t place = number == NULL ? -1 : PyLong_AsSsize_t(number), count = PyList_GET_SIZE(self->records);
    Py_XDECREF(number);
    if (place < 0)
        return -1;
    int begun = place < count;
    for (; place < count; place++) {
        PyObject *record = PyList_GET_ITEM(self->records, place), *facts = found_for(self->facts, PyTuple_GET_ITEM(record, RECORD_OP));
        if (facts == NULL || PyTuple_GET_SIZE(PyTuple_GET_ITEM(record, RECORD_KWARGS)))
            return PyErr_Occurred() ? -1 : 0; /* what was added is added once more */
        int reads = reads_values(self, facts);
        if (reads < 0)
            return -1;
        PyObject *outputs = PyTuple_GET_ITEM(record, RECORD_OUTPUTS);
        for (Py_ssize_t output = 0; reads && output < PyTuple_GET_SIZE(outputs); output++)
            if (PySet_Add(memory->reads, PyTuple_GET_ITEM(outputs, output)) < 0)
                return -1;
        if (reads && collect_slots(PyTuple_GET_ITEM(record, RECORD_ARGS), memory->reads) < 0)
            return -1;
    }
    if (begun) {
        number = PyLong_FromSsize_t(count);
        int set = number == NULL ? -1 : PyObject_SetAttr(memory->alias, s__scanned, number);
        Py_XDECREF(number);
        if (set < 0)
            return -1;
    }
    return 1;
}

/* Let a copy hold the value of a tensor that is about to be written, if some derivative reads it: 1; 0 if that is left to Python; -1
 * with an error set. */
static int
save_one(Handler *self, Memory *memory, PyObject *member)
{
    PyObject *slot = found_for(self->slots, member);
    if (slot == NULL)
        return PyErr_Occurred() ? -1 : 1;
    int read = PySet_Contains(memory->reads, slot);
    Py_ssize_t number = PyLong_AsSsize_t(slot);
    if (read <= 0 || PyList_GET_ITEM(self->values, number) != member)
        return read < 0 ? -1 : 1;
    if ((PyObject *)Py_TYPE(member) != c_tensor)
        return 0;
    int graph = is_true_of(GET(member, requires_grad));
    if (graph)
        return graph < 0 ? -1 : 0;
    PyObject *kept = PyObject_GetAttr((PyObject *)self, s_kept), *args = kept == NULL ? NULL : PyTuple_Pack(1, member);
    PyObject *clone = args == NULL ? NULL : call_seen(c_clone, args, NULL);
    Py_INCREF(slot);
    /* The list of kept tensors holds the member from here on, whose place the copy takes. */
    int outcome = clone != NULL && PyList_Append(kept, member) == 0 && put_for(self->slots, clone, slot) == 0 ? 1 : -1;
    if (outcome > 0 && PyList_SetItem(self->values, number, Py_NewRef(clone)) < 0)
        outcome = -1;
    Py_DECREF(slot);
    Py_XDECREF(kept);
    Py_XDECREF(args);
    Py_XDECREF(clone);
    return outcome;
}

/* The tensor that owns the memory of a tensor and the views of that memory, both borrowed; `members` may be NULL. 0, or -1. */
static int
family_of(Memory *memory, PyObject *tensor, PyObject **root, PyObject **members)
{
    *root = found_for(memory->roots, tensor);
    if (*root == NULL && !PyErr_Occurred())
        *root = tensor;
    *members = *root == NULL ? NULL : found_for(memory->families, *root);
    return PyErr_Occurred() ? -1 : 0;
}

/* AliasTracker._save_old: 0, or -1 with an error set. */
static int
save_old(Handler *self, Memory *memory, PyObject *target)
{
    PyObject *root, *members;
    int outcome = scan_reads(self, memory);
    if (outcome > 0 && family_of(memory, target, &root, &members) < 0)
        outcome = -1;
    if (outcome > 0)
        outcome = save_one(self, memory, root);
    for (Py_ssize_t place = 0; outcome > 0 && members != NULL && place < PyList_GET_SIZE(members); place++)
        outcome = save_one(self, memory, PyList_GET_ITEM(members, place));
    if (outcome)
        return outcome < 0 ? -1 : 0;
    PyObject *done = PyObject_CallMethodOneArg(memory->alias, s__save_old, target);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* The op that writes a view's new value back into its parent, borrowed, if that can be recorded here; NULL if it cannot, or with an
 * error set. */
static PyObject *
scatter_of(Handler *self, PyObject *link)
{
    PyObject *parent = PyTuple_GET_ITEM(link, LINK_PARENT), *args = PyTuple_GET_ITEM(link, LINK_ARGS);
    PyObject *scatter = found_for(c_scatters, PyTuple_GET_ITEM(link, LINK_OP));
    if (scatter == NULL || PyDict_GET_SIZE(PyTuple_GET_ITEM(link, LINK_KWARGS)) || is_own_strided(parent) <= 0)
        return NULL;
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(args); place++)
        if (!PyLong_CheckExact(PyTuple_GET_ITEM(args, place)))
            return NULL;
    if (found_for(self->slots, parent) != NULL)
        return scatter;
    return PyErr_Occurred() || may_be_known(self, parent) ? NULL : scatter;
}

/* Record the new value of what a view is a view of, given the view's: 0, or -1 with an error set. */
static int
write_back(Handler *self, PyObject *link, PyObject *scatter, PyObject *dtype)
{
    PyObject *parent = PyTuple_GET_ITEM(link, LINK_PARENT), *args = PyTuple_GET_ITEM(link, LINK_ARGS);
    Py_ssize_t count = PyTuple_GET_SIZE(args), latest = PyList_GET_SIZE(self->values) - 1, old = known_slot(self, parent);
    if (old == -1)
        old = slot_or_constant(self, parent);
    PyObject *facts = facts_of(self, scatter), *lowered = facts == NULL ? NULL : PyTuple_New(count + 2);
    PyObject *slot = lowered == NULL ? NULL : slot_object(latest), *before = slot == NULL || old < 0 ? NULL : slot_object(old);
    int outcome = -1;
    if (before != NULL) {
        PyTuple_SET_ITEM(lowered, 0, before);
        PyTuple_SET_ITEM(lowered, 1, slot);
        for (Py_ssize_t place = 0; place < count; place++)
            PyTuple_SET_ITEM(lowered, place + 2, Py_NewRef(PyTuple_GET_ITEM(args, place)));
        outcome = append_record(self, facts, lowered, empty, parent, dtype);
    } else
        Py_XDECREF(slot);
    Py_XDECREF(lowered);
    return outcome;
}

/* Make all views of a memory stale but those on the way up from the one that was written: 0, or -1 with an error set. */
static int
make_stale(Handler *self, Memory *memory, PyObject *target, PyObject *root, PyObject *members)
{
    PyObject *fresh = PyList_New(0), *kept = fresh == NULL ? NULL : PyObject_GetAttr((PyObject *)self, s_kept);
    int outcome = kept == NULL ? -1 : 0;
    for (Py_ssize_t place = 0; outcome == 0 && place < PyList_GET_SIZE(members); place++) {
        PyObject *member = PyList_GET_ITEM(members, place), *above = target, *link;
        while (above != member && (link = found_for(memory->links, above)) != NULL)
            above = PyTuple_GET_ITEM(link, LINK_PARENT);
        if (PyErr_Occurred())
            outcome = -1;
        else if (above == member)
            outcome = PyList_Append(fresh, member);
        else {
            PyObject *identity = PyLong_FromVoidPtr(member);
            outcome = identity == NULL || PyList_Append(kept, member) < 0 ? -1 : PyDict_Contains(self->slots, identity);
            if (outcome > 0)
                outcome = PyDict_DelItem(self->slots, identity);
            Py_XDECREF(identity);
        }
    }
    if (outcome == 0)
        outcome = put_for(memory->families, root, fresh);
    Py_XDECREF(fresh);
    Py_XDECREF(kept);
    return outcome;
}

/* AliasTracker._climb, from the value that was recorded last: 0, or -1 with an error set. */
static int
climb(Handler *self, Memory *memory, PyObject *target, PyObject *dtype)
{
    PyObject *root, *members, *scatters[MOST_ARGUMENTS], *above = target, *link;
    int steps = 0, known = 1;
    while (known && (link = found_for(memory->links, above)) != NULL) {
        known = steps < MOST_ARGUMENTS && (scatters[steps++] = scatter_of(self, link)) != NULL;
        above = PyTuple_GET_ITEM(link, LINK_PARENT);
    }
    if (PyErr_Occurred())
        return -1;
    if (!known) {
        PyObject *slot = PyLong_FromSsize_t(PyList_GET_SIZE(self->values) - 1);
        PyObject *done = slot == NULL ? NULL : PyObject_CallMethodObjArgs(memory->alias, s__climb, target, slot, NULL);
        Py_XDECREF(slot);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    above = target;
    for (int step = 0; step < steps; step++) {
        link = found_for(memory->links, above);
        if (link == NULL || write_back(self, link, scatters[step], dtype) < 0)
            return -1;
        above = PyTuple_GET_ITEM(link, LINK_PARENT);
    }
    if (family_of(memory, target, &root, &members) < 0)
        return -1;
    return members == NULL || PyList_GET_SIZE(members) == 0 ? 0 : make_stale(self, memory, target, root, members);
}

/* What stands for the arguments of a write in its record, but for those that are no values of the tape yet: 1, 0 if they are left
 * to Python, or -1 with an error set. */
static int
lowered_of_write(Handler *self, PyObject *args, PyObject *lowered, Py_ssize_t *fresh, int *fresh_count, Found *seen)
{
    int known = 0;
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(args); place++) {
        PyObject *found, *item = PyTuple_GET_ITEM(args, place);
        int taken = lowered_argument(self, item, seen, &found);
        if (taken <= 0)
            return taken;
        if (found != NULL) {
            PyTuple_SET_ITEM(lowered, place, found);
            continue;
        }
        fresh[(*fresh_count)++] = place;
        if (!PyList_CheckExact(item))
            known = may_be_known(self, item);
        for (Py_ssize_t number = 0; known == 0 && PyList_CheckExact(item) && number < PyList_GET_SIZE(item); number++)
            if (PyList_GET_ITEM(item, number) != Py_None)
                known = may_be_known(self, PyList_GET_ITEM(item, number));
        if (known)
            return known < 0 ? -1 : 0;
    }
    return !seen->joined;
}

/* Whether the tape has no values in the memory of a tensor, so that a write of constants is nothing to it: 1, 0, or -1 with an error
 * set. */
static int
is_unknown(Handler *self, Memory *memory, PyObject *tensor)
{
    PyObject *root, *members, *above = tensor, *link;
    if (family_of(memory, tensor, &root, &members) < 0)
        return -1;
    int known = found_for(self->slots, root) != NULL || found_for(self->slots, tensor) != NULL;
    for (Py_ssize_t place = 0; !known && members != NULL && place < PyList_GET_SIZE(members); place++)
        known = found_for(self->slots, PyList_GET_ITEM(members, place)) != NULL;
    while (!known && (link = found_for(memory->links, above)) != NULL) {
        above = PyTuple_GET_ITEM(link, LINK_PARENT);
        known = found_for(self->slots, above) != NULL;
    }
    return PyErr_Occurred() ? -1 : !known;
}

/* A number beside the target of a write as a constant, where that is the same: a new reference to the arguments. */
static PyObject *
with_constant(PyObject *facts, PyObject *args, PyObject *dtype)
{
    PyObject *number = PyTuple_GET_SIZE(args) == 2 ? PyTuple_GET_ITEM(args, 1) : NULL;
    if (number == NULL || !is_number(number) || SLOT(facts, numbers) != Py_True)
        return Py_NewRef(args);
    PyObject *constant = constant_for(number, dtype), *changed = constant == NULL ? NULL : PyTuple_Pack(2, PyTuple_GET_ITEM(args, 0), constant);
    Py_XDECREF(constant);
    return changed;
}

/* A write: what is known of the op, its arguments, and what computes it with arguments of its own. */
typedef struct {
    PyObject *facts, *args, *call, *call_args, *call_kwargs;
} Write;

/* The write itself, once its arguments are looked at; the written tensor. */
static PyObject *
written(Handler *self, Memory *memory, const Write *write, PyObject *twin, PyObject *lowered, const Py_ssize_t *fresh,
        int fresh_count, PyObject *dtype)
{
    PyObject *args = write->args, *target = PyTuple_GET_ITEM(args, 0);
    for (int number = 0; number < fresh_count; number++) {
        PyObject *found = lowered_fresh(self, PyTuple_GET_ITEM(args, fresh[number]));
        if (found == NULL)
            return NULL;
        PyTuple_SET_ITEM(lowered, fresh[number], found);
    }
    int reads = reads_values(self, twin);
    if (reads < 0 || (reads && collect_slots(lowered, memory->reads) < 0) || save_old(self, memory, target) < 0)
        return NULL;
    PyObject *run = with_constant(write->facts, args, dtype), *out = NULL;
    if (run != NULL)
        out = run != args ? call_seen(SLOT(write->facts, fast), run, NULL) : call_seen(write->call, write->call_args, write->call_kwargs);
    Py_XDECREF(run);
    if (out == NULL)
        return NULL;
    Py_DECREF(out);
    if (PyObject_SetAttr(memory->alias, s_has_writes, Py_True) < 0 || append_record(self, twin, lowered, empty, target, dtype) < 0 ||
        climb(self, memory, target, dtype) < 0)
        return NULL;
    return Py_NewRef(target);
}

/* AliasTracker.write_plainly, with torch's handlers off; NotImplemented, with nothing written, leaves it to that. */
static PyObject *
run_write(Handler *self, PyObject *facts, PyObject *args, PyObject *call, PyObject *call_args, PyObject *call_kwargs)
{
    Py_ssize_t count = PyTuple_GET_SIZE(args), fresh[MOST_ARGUMENTS];
    PyObject *target = count ? PyTuple_GET_ITEM(args, 0) : Py_None, *twin;
    if (state.exclude == NULL || !self->sees_views || self->meets_saved || (self->below != NULL && self->below != Py_None) ||
        count > MOST_ARGUMENTS || SLOT(facts, rewrites) != Py_True || SLOT(facts, functional) == Py_None)
        return Py_NewRef(Py_NotImplemented);
    int fits = is_own_strided(target);
    if (fits <= 0)
        return fits < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    if ((twin = facts_of(self, SLOT(facts, functional))) == NULL)
        return NULL;
    PyObject *out = NULL, *dtype = GET(target, dtype), *lowered = PyTuple_New(count);
    int fresh_count = 0;
    Found seen = {0, 0};
    Memory memory = {NULL};
    const Write write = {facts, args, call, call_args, call_kwargs};
    if (dtype == NULL || lowered == NULL || memory_of(self, &memory) < 0 || settle_views(self, &memory) < 0)
        goto done;
    if ((fits = PySet_Contains(c_floating, dtype)) > 0)
        fits = lowered_of_write(self, args, lowered, fresh, &fresh_count, &seen);
    if (fits > 0 && !seen.touched) {
        if ((fits = is_unknown(self, &memory, target)) > 0)
            out = call_seen(call, call_args, call_kwargs);
        else if (fits == 0)
            out = Py_NewRef(Py_NotImplemented);
        goto done;
    }
    if (fits > 0 && (SLOT(facts, random) == Py_True || SLOT(twin, inactive) == Py_True))
        fits = 0;
    if (fits > 0 && self->respect_no_grad)
        fits = grad_is_enabled();
    if (fits >= 0)
        out = fits ? written(self, &memory, &write, twin, lowered, fresh, fresh_count, dtype) : Py_NewRef(Py_NotImplemented);
done:
    let_go(&memory);
    Py_XDECREF(dtype);
    Py_XDECREF(lowered);
    return out;
}

/* Whether the shapes of two tensors are the same, and whether the second one has more dimensions: 0, or -1 with an error set. */
static int
compare_shapes(PyObject *one, PyObject *other, int *same, int *deeper)
{
    PyObject *first = GET(one, shape), *second = first == NULL ? NULL : GET(other, shape);
    *same = second == NULL ? -1 : PyObject_RichCompareBool(first, second, Py_EQ);
    *deeper = second != NULL && PyTuple_GET_SIZE(second) > PyTuple_GET_SIZE(first);
    Py_XDECREF(first);
    Py_XDECREF(second);
    return *same < 0 ? -1 : 0;
}

/* A value as wide as the view that it is written to; a new reference, NotImplemented where torch has to see to it. */
static PyObject *
widened(Handler *self, PyObject *view, PyObject *value)
{
    int same, deeper;
    if (compare_shapes(view, value, &same, &deeper) < 0)
        return NULL;
    if (same || deeper)
        return Py_NewRef(same ? value : Py_NotImplemented);
    PyObject *shape = GET(view, shape), *sizes = shape == NULL ? NULL : PySequence_List(shape);
    PyObject *args = sizes == NULL ? NULL : PyTuple_Pack(2, value, sizes), *facts = args == NULL ? NULL : facts_of(self, c_expand_op);
    PyObject *out = facts == NULL ? NULL : run_common(self, facts, args, empty, SLOT(facts, fast), args, NULL);
    Py_XDECREF(shape);
    Py_XDECREF(sizes);
    Py_XDECREF(args);
    return out;
}

/* view[...] = value, with torch's handlers off; NotImplemented leaves it to Python. */
static PyObject *
write_to_view(Handler *self, PyObject *view, PyObject *value)
{
    int number = is_number(value);
    PyObject *given = number ? Py_NewRef(value) : widened(self, view, value);
    if (given == NULL || given == Py_NotImplemented)
        return given;
    PyObject *facts = facts_of(self, number ? c_fill_op : c_copy_op), *args = facts == NULL ? NULL : PyTuple_Pack(2, view, given);
    PyObject *out = args == NULL ? NULL : run_write(self, facts, args, SLOT(facts, fast), args, NULL);
    Py_XDECREF(args);
    Py_DECREF(given);
    return out;
}

/* Whether an index is numbers, slices, None and dots alone. */
static int
chooses_view(PyObject *index)
{
    PyObject *single[] = {index};
    PyObject **parts = PyTuple_CheckExact(index) ? &PyTuple_GET_ITEM(index, 0) : single;
    Py_ssize_t count = PyTuple_CheckExact(index) ? PyTuple_GET_SIZE(index) : 1;
    for (Py_ssize_t place = 0; place < count; place++)
        if (!PyLong_CheckExact(parts[place]) && !PySlice_Check(parts[place]) && parts[place] != Py_None && parts[place] != Py_Ellipsis)
            return 0;
    return count > 0;
}

/* tensor[index] = value at places that one tensor names, with torch's handlers off; NotImplemented leaves it to Python. */
static PyObject *
write_to_places(Handler *self, PyObject *tensor, PyObject *index, PyObject *value)
{
    PyObject *beside[] = {value, tensor}, *out = NULL, *list = NULL, *args = NULL, *facts;
    PyObject *given = is_number(value) ? PyObject_Vectorcall(c_constant_beside, beside, 2, NULL) : Py_NewRef(value);
    PyObject *own = given == NULL ? NULL : GET(tensor, dtype), *dtype = own == NULL ? NULL : GET(index, dtype), *other = NULL;
    PyObject *ranks[] = {GET(tensor, ndim), GET(index, ndim), NULL};
    if (dtype == NULL || ranks[0] == NULL || ranks[1] == NULL)
        goto done;
    long room = PyLong_AsLong(ranks[0]);
    room += dtype == c_bool ? 1 - PyLong_AsLong(ranks[1]) : PyLong_AsLong(ranks[1]) - 1;
    /* Beside a mask without dimensions torch gives the tensor one more. */
    if (given == Py_None || (dtype != c_bool && dtype != c_long) || (dtype == c_bool && PyLong_AsLong(ranks[1]) == 0))
        out = Py_NewRef(Py_NotImplemented);
    else if ((other = GET(given, dtype)) == NULL || (ranks[2] = GET(given, ndim)) == NULL)
        goto done;
    else if (other != own || PyLong_AsLong(ranks[2]) > room)
        out = Py_NewRef(Py_NotImplemented);
    else if ((list = PyList_New(1)) != NULL) {
        PyList_SET_ITEM(list, 0, Py_NewRef(index));
        if ((args = PyTuple_Pack(3, tensor, list, given)) != NULL && (facts = facts_of(self, c_put_op)) != NULL)
            out = run_write(self, facts, args, c_put, args, NULL);
    }
done:
    Py_XDECREF(given);
    Py_XDECREF(own);
    Py_XDECREF(dtype);
    Py_XDECREF(other);
    for (int number = 0; number < 3; number++)
        Py_XDECREF(ranks[number]);
    Py_XDECREF(list);
    Py_XDECREF(args);
    return out;
}

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

/* A view of a stored tensor as one of the level; a new reference. */
static PyObject *
wrapped_view(PyObject *level, PyObject *value, int batched, PyObject *dtype)
{
    if (!batched) {
        PyObject *args[] = {value, level};
        return PyObject_Vectorcall(c_wrap_constant, args, 2, NULL);
    }
    PyObject *tensor = NULL, *batch = ((PyTypeObject *)c_batched)->tp_alloc((PyTypeObject *)c_batched, 0);
    PyObject *shape = batch == NULL ? NULL : GET(value, shape), *device = shape == NULL ? NULL : GET(value, device);
    PyObject *strides = device == NULL ? NULL : PyObject_CallMethodNoArgs(value, s_stride);
    PyObject *offset = strides == NULL ? NULL : PyObject_CallMethodNoArgs(value, s_storage_offset);
    PyObject *sample = offset == NULL ? NULL : PyTuple_GetSlice(shape, 1, PyTuple_GET_SIZE(shape));
    PyObject *steps = sample == NULL ? NULL : PyTuple_GetSlice(strides, 1, PyTuple_GET_SIZE(strides));
    if (steps != NULL) {
        SLOT(batch, value) = Py_NewRef(value);
        PyObject *args[] = {c_batch_tensor, sample, steps, offset, Py_None, dtype, c_strided, device};
        if ((tensor = PyObject_Vectorcall(c_make_wrapper, args, 8, NULL)) != NULL) {
            SLOT(tensor, inner) = Py_NewRef(batch);
            SLOT(tensor, level) = Py_NewRef(level);
        }
    }
    Py_XDECREF(batch);
    Py_XDECREF(shape);
    Py_XDECREF(device);
    Py_XDECREF(strides);
    Py_XDECREF(offset);
    Py_XDECREF(sample);
    Py_XDECREF(steps);
    return tensor;
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

/* Give a view of a constant a slot, likewise. */
static Py_ssize_t
constant_of_level(Handler *self, PyObject *tensor, int batched)
{
    Py_ssize_t slot = append_constant(self, tensor);
    if (slot < 0)
        return -1;
    Py_ssize_t last = PyList_GET_SIZE(self->key) - 1;
    PyObject *key = PyList_GET_ITEM(self->key, last);
    PyObject *whole = PyTuple_Pack(4, PyTuple_GET_ITEM(key, 0), PyTuple_GET_ITEM(key, 1), PyTuple_GET_ITEM(key, 2), batched ? Py_True : Py_False);
    return whole == NULL || PyList_SetItem(self->key, last, whole) < 0 ? -1 : slot;
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
        PyObject *done = PyObject_CallMethod(level, "upgrade", "OO", tensor, c_setitem);
        Py_XDECREF(done);
        if (done == NULL)
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
                              : constant_of_level(self, chosen->views[number], chosen->batched);
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

/* tensor[index] = value on a tape that stands on a vmap which nothing is around; NotImplemented leaves it to Python. */
static PyObject *
run_assign_below(Handler *self, PyObject *args)
{
    Handler *level = (Handler *)vmap_below(self);
    PyObject *const *given = &PyTuple_GET_ITEM(args, 0);
    if (level == NULL || self->depth != 2 || is_listened(self) || self->meets_saved || notes_derived(self) || state.exclude == NULL ||
        !self->sees_views || level->guarded || level->graphs || PyObject_IsTrue(level->size) <= 0 || c_known == NULL ||
        (PyObject *)Py_TYPE(given[0]) != c_batch_tensor || !chooses_view(given[1]))
        return Py_NewRef(Py_NotImplemented);
    int off = autocast_is_on();
    if (off == 0 && self->respect_no_grad && (off = grad_is_enabled()) >= 0)
        off = !off;
    if (off)
        return off < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *excluded = exclude_python(1);
    if (excluded == NULL)
        return NULL;
    Py_DECREF(excluded);
    state.exclude(state.views, false);
    PyObject *out = assign_below(self, given);
    state.exclude(state.views, true);
    if (include_python() < 0)
        Py_CLEAR(out);
    return out;
}

/* tensor[index] = value; NotImplemented leaves it to Python, with nothing written. */
static PyObject *
run_assign(Handler *self, PyObject *args)
{
    if (PyTuple_GET_SIZE(args) != 3 || state.exclude == NULL || is_listened(self))
        return Py_NewRef(Py_NotImplemented);
    if (self->below != NULL && self->below != Py_None)
        return run_assign_below(self, args);
    PyObject *tensor = PyTuple_GET_ITEM(args, 0), *index = PyTuple_GET_ITEM(args, 1), *value = PyTuple_GET_ITEM(args, 2);
    if ((PyObject *)Py_TYPE(tensor) != c_tensor || !(is_number(value) || (PyObject *)Py_TYPE(value) == c_tensor))
        return Py_NewRef(Py_NotImplemented);
    PyObject *dtype = GET(tensor, dtype);
    int floating = dtype == NULL ? -1 : PySet_Contains(c_floating, dtype);
    Py_XDECREF(dtype);
    if (floating <= 0)
        return floating < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    int autocast = autocast_is_on(), views = chooses_view(index);
    if (autocast || (!views && (PyObject *)Py_TYPE(index) != c_tensor))
        return autocast < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *chosen = views ? PyTuple_Pack(2, tensor, index) : NULL;
    PyObject *view = chosen == NULL ? NULL : run_index(self, c_getitem, chosen);
    Py_XDECREF(chosen);
    if ((views && view == NULL) || view == Py_NotImplemented)
        return view;
    PyObject *off = exclude_python(1), *out = NULL;
    if (off != NULL) {
        Py_DECREF(off);
        out = views ? write_to_view(self, view, value) : write_to_places(self, tensor, index, value);
        if (include_python() < 0)
            Py_CLEAR(out);
    }
    Py_XDECREF(view);
    if (out != NULL && out != Py_NotImplemented)
        Py_SETREF(out, Py_NewRef(Py_None));
    return out;
}

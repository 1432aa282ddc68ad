/* Writes on a tape that stands alone or on a vmap, as chainrule.capture.aliasing does them. Part of shortcuts.c. */

static PyObject *
run_level_write(Handler *level, PyObject *facts, PyObject *args, PyObject *call); /* in mapped_writes.h */

static int
level_dtype(PyObject *level, PyObject *tensor, PyObject **dtype); /* in mapped_writes.h */

/* What is known of a function that is shown to a mode: its entry in the table and its reading, or None, and what sorts it is of. */
enum { FUNCTION, READING, SORTS, WRITER };

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

/* Add what the records since then read (AliasTracker._scan_reads): 0, or -1 with an error set. */
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
        PyObject *record = PyList_GET_ITEM(self->records, place), *op = PyTuple_GET_ITEM(record, RECORD_OP);
        PyObject *facts = found_for(self->facts, op);
        if (facts == NULL && PyErr_Occurred())
            return -1;
        int reads = facts != NULL ? reads_values(self, facts)
                                  : is_true_of(PyObject_CallMethodOneArg((PyObject *)self, s_reads_values, op));
        if (reads < 0)
            return -1;
        PyObject *outputs = PyTuple_GET_ITEM(record, RECORD_OUTPUTS);
        for (Py_ssize_t output = 0; reads && output < PyTuple_GET_SIZE(outputs); output++)
            if (PySet_Add(memory->reads, PyTuple_GET_ITEM(outputs, output)) < 0)
                return -1;
        if (reads && (collect_slots(PyTuple_GET_ITEM(record, RECORD_ARGS), memory->reads) < 0 ||
                      collect_slots(PyTuple_GET_ITEM(record, RECORD_KWARGS), memory->reads) < 0))
            return -1;
    }
    if (begun) {
        number = PyLong_FromSsize_t(count);
        int set = number == NULL ? -1 : PyObject_SetAttr(memory->alias, s__scanned, number);
        Py_XDECREF(number);
        if (set < 0)
            return -1;
    }
    return 0;
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
    PyObject *level = vmap_below(self), *batch = NULL, *stored = member, *dtype = NULL;
    if ((PyObject *)Py_TYPE(member) != c_tensor) {
        int known = level == NULL ? 0 : level_dtype(level, member, &dtype);
        if (known <= 0 || !find_stored_tensor(member, level, &stored, &batch)) {
            Py_XDECREF(dtype);
            return known < 0 ? -1 : 0;
        }
    } else {
        int graph = is_true_of(GET(member, requires_grad));
        if (graph)
            return graph < 0 ? -1 : 0;
    }
    PyObject *kept = PyObject_GetAttr((PyObject *)self, s_kept), *args = kept == NULL ? NULL : PyTuple_Pack(1, stored);
    PyObject *clone = args == NULL ? NULL : call_seen(c_clone, args, NULL);
    if (clone != NULL && dtype != NULL)
        Py_SETREF(clone, wrapped_view(level, clone, batch != NULL, dtype));
    Py_XDECREF(dtype);
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
    int outcome = scan_reads(self, memory) < 0 || family_of(memory, target, &root, &members) < 0 ? -1 : save_one(self, memory, root);
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
    if (scatter == NULL || PyDict_GET_SIZE(PyTuple_GET_ITEM(link, LINK_KWARGS)) ||
        !(is_own_strided(parent) > 0 || ((PyObject *)Py_TYPE(parent) == c_batch_tensor && is_tracked(self, parent))))
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
    return !seen->joined && !seen->complex;
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

/* A write: what is known of the op, its arguments, those given by name (pairs), and what computes it with arguments of its own. */
typedef struct {
    PyObject *facts, *args, *named, *call, *call_args, *call_kwargs;
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
    PyObject *level = vmap_below(self), *run = NULL, *out = NULL;
    if (level == NULL)
        run = write->named == empty ? with_constant(write->facts, args, dtype) : Py_NewRef(args);
    if (level != NULL)
        out = run_level_write((Handler *)level, write->facts, args, write->call);
    else if (run != NULL)
        out = run != args ? call_seen(SLOT(write->facts, fast), run, NULL) : call_seen(write->call, write->call_args, write->call_kwargs);
    Py_XDECREF(run);
    if (out == NULL || out == Py_NotImplemented)
        return out;
    Py_DECREF(out);
    if (PyObject_SetAttr(memory->alias, s_has_writes, Py_True) < 0 || append_record(self, twin, lowered, write->named, target, dtype) < 0 ||
        climb(self, memory, target, dtype) < 0)
        return NULL;
    return Py_NewRef(target);
}

/* Whether the new value of a view is written back to all that it is a view of by scatters: 1, 0, or -1 with an error set. */
static int
climbs_here(Handler *self, Memory *memory, PyObject *target)
{
    PyObject *link;
    int known = 1;
    for (; known && (link = found_for(memory->links, target)) != NULL; target = PyTuple_GET_ITEM(link, LINK_PARENT))
        known = scatter_of(self, link) != NULL;
    return PyErr_Occurred() ? -1 : known;
}

/* Whether tensors of a level are written to here. */
static int
may_write_to(Handler *level)
{
    return !level->guarded && !level->graphs && PyObject_IsTrue(level->size) > 0 && PyDict_GET_SIZE(c_copies) == 0 && c_known != NULL;
}

/* A write with arguments that are given by name, where the tape stands alone; as run_write. */
static PyObject *
run_named_write(Handler *self, PyObject *facts, PyObject *args, PyObject *named, PyObject *call, PyObject *call_args, PyObject *call_kwargs)
{
    Py_ssize_t count = PyTuple_GET_SIZE(args), fresh[MOST_ARGUMENTS];
    PyObject *target = count ? PyTuple_GET_ITEM(args, 0) : Py_None, *twin;
    PyObject *level = vmap_below(self);
    if (state.exclude == NULL || !self->sees_views || self->meets_saved ||
        (self->below != NULL && self->below != Py_None && !(level != NULL && may_write_to((Handler *)level))) ||
        count > MOST_ARGUMENTS || SLOT(facts, rewrites) != Py_True || SLOT(facts, functional) == Py_None)
        return Py_NewRef(Py_NotImplemented);
    PyObject *out = NULL, *dtype = NULL, *lowered = NULL;
    int fits = level == NULL ? is_own_strided(target) : (PyObject *)Py_TYPE(target) == c_batch_tensor ? level_dtype(level, target, &dtype) : 0;
    if (fits <= 0)
        return fits < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    if ((twin = facts_of(self, SLOT(facts, functional))) == NULL) {
        Py_XDECREF(dtype);
        return NULL;
    }
    if (dtype == NULL)
        dtype = GET(target, dtype);
    lowered = PyTuple_New(count);
    int fresh_count = 0;
    Found seen = {0, 0, 0};
    Memory memory = {NULL};
    const Write write = {facts, args, named, call, call_args, call_kwargs};
    if (dtype == NULL || lowered == NULL || memory_of(self, &memory) < 0 || settle_views(self, &memory) < 0)
        goto done;
    if ((fits = PySet_Contains(c_floating, dtype)) > 0 && level != NULL)
        fits = climbs_here(self, &memory, target);
    if (fits > 0)
        fits = lowered_of_write(self, args, lowered, fresh, &fresh_count, &seen);
    if (fits > 0 && !seen.touched) {
        if ((fits = is_unknown(self, &memory, target)) > 0)
            out = level == NULL ? call_seen(call, call_args, call_kwargs) : run_level_write((Handler *)level, facts, args, call);
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

/* AliasTracker.write_plainly, with torch's handlers off; NotImplemented, with nothing written, leaves it to that. */
static PyObject *
run_write(Handler *self, PyObject *facts, PyObject *args, PyObject *call, PyObject *call_args, PyObject *call_kwargs)
{
    return run_named_write(self, facts, args, empty, call, call_args, call_kwargs);
}

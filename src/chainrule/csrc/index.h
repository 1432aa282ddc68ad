/* Indexing on a tape: each part of an index is an op of its own, the tensors among them one together. Part of shortcuts.c. */

#define MOST_PARTS 16

static PyObject *whole = NULL; /* slice(None) */

/* Whether a slice is one of Python's numbers. */
static int
has_plain_ends(PyObject *item)
{
    PySliceObject *slice = (PySliceObject *)item;
    return (slice->start == Py_None || PyLong_CheckExact(slice->start)) && (slice->stop == Py_None || PyLong_CheckExact(slice->stop)) &&
           (slice->step == Py_None || PyLong_CheckExact(slice->step));
}

/* Whether an index is numbers, slices of numbers, None and dots alone. */
static int
chooses_view(PyObject *index)
{
    PyObject *single[] = {index};
    PyObject **parts = PyTuple_CheckExact(index) ? &PyTuple_GET_ITEM(index, 0) : single;
    Py_ssize_t count = PyTuple_CheckExact(index) ? PyTuple_GET_SIZE(index) : 1;
    for (Py_ssize_t place = 0; place < count; place++)
        if (!PyLong_CheckExact(parts[place]) && !(PySlice_Check(parts[place]) && has_plain_ends(parts[place])) &&
            parts[place] != Py_None && parts[place] != Py_Ellipsis)
            return 0;
    return count > 0;
}

/* How many dimensions what tensors of whole numbers and masks choose has, of a tensor with `rank`; -1 if they are left to Python, -2
 * with an error set. */
static long
picked_rank(PyObject *indices, long rank)
{
    Py_ssize_t count = PySequence_Fast_GET_SIZE(indices);
    long wide = 0;
    for (Py_ssize_t place = 0; place < count; place++) {
        PyObject *item = PySequence_Fast_GET_ITEM(indices, place);
        if ((PyObject *)Py_TYPE(item) != c_tensor)
            return -1;
        PyObject *dtype = GET(item, dtype), *ndim = dtype == NULL ? NULL : GET(item, ndim);
        long own = ndim == NULL ? -1 : PyLong_AsLong(ndim);
        int mask = dtype == c_bool, number = dtype == c_long;
        Py_XDECREF(dtype);
        Py_XDECREF(ndim);
        if (own < 0)
            return -2;
        if (!(mask ? own > 0 : number)) /* beside a mask without dimensions torch gives the tensor one more */
            return -1;
        rank -= mask ? own : 1;
        wide = mask ? (wide > 1 ? wide : 1) : (wide > own ? wide : own);
    }
    return count == 0 || rank < 0 ? -1 : rank + wide;
}

/* The tensors that an index is: a list, a new reference; NULL, maybe with an error set, for others. */
static PyObject *
tensors_of(PyObject *index)
{
    PyObject *single[] = {index};
    PyObject **items = PyTuple_CheckExact(index) ? &PyTuple_GET_ITEM(index, 0) : single;
    Py_ssize_t count = PyTuple_CheckExact(index) ? PyTuple_GET_SIZE(index) : 1;
    for (Py_ssize_t place = 0; place < count; place++)
        if ((PyObject *)Py_TYPE(items[place]) != c_tensor)
            return NULL;
    PyObject *list = count ? PyList_New(count) : NULL;
    for (Py_ssize_t place = 0; list != NULL && place < count; place++)
        PyList_SET_ITEM(list, place, Py_NewRef(items[place]));
    return list;
}

/* A part of an index: what it is alone, at its dimension, and the op with its arguments after the tensor. */
typedef struct {
    PyObject *index, *op, *args;
} Part;

static void
free_parts(Part *parts, int count)
{
    for (int number = 0; number < count; number++) {
        Py_XDECREF(parts[number].index);
        Py_XDECREF(parts[number].args);
    }
}

/* Where a part stands alone: slice(None) for the dimensions before it. A new reference. */
static PyObject *
alone_at(PyObject *part, Py_ssize_t dim)
{
    PyObject *index = PyTuple_New(dim + 1);
    for (Py_ssize_t place = 0; index != NULL && place < dim; place++)
        PyTuple_SET_ITEM(index, place, Py_NewRef(whole));
    if (index != NULL)
        PyTuple_SET_ITEM(index, dim, Py_NewRef(part));
    return index;
}

/* Whether a Python number had more digits than `found` holds; the error is cleared: Python's own path decides. */
static int
is_too_large(Py_ssize_t found)
{
    if (found != -1 || !PyErr_Occurred())
        return 0;
    PyErr_Clear();
    return 1;
}

/* A whole number of a slice; `absent` where there is none. 1, or 0 if it is something else or has too many digits. */
static int
slice_number(PyObject *item, Py_ssize_t absent, Py_ssize_t *found)
{
    *found = absent;
    if (item == Py_None)
        return 1;
    if (!PyLong_CheckExact(item))
        return 0;
    *found = PyLong_AsSsize_t(item);
    return !is_too_large(*found);
}

/* A part that is a number, a slice or None: 1 if it is an op, 2 if it changes nothing, 0 if it is left to Python, -1 with an
 * error set. */
static int
basic_part(PyObject *item, Py_ssize_t dim, Py_ssize_t size, Part *part)
{
    if (item == Py_None) {
        part->op = c_unsqueeze;
        part->args = Py_BuildValue("(n)", dim);
    } else if (PyLong_CheckExact(item)) {
        Py_ssize_t number = PyLong_AsSsize_t(item);
        if (is_too_large(number) || number < -size || number >= size)
            return 0;
        part->op = c_select;
        part->args = Py_BuildValue("(nn)", dim, number);
    } else {
        PySliceObject *slice = (PySliceObject *)item;
        Py_ssize_t start, stop, step;
        int first = slice_number(slice->start, 0, &start), last = slice_number(slice->stop, PY_SSIZE_T_MAX, &stop);
        int each = slice_number(slice->step, 1, &step);
        if (!first || !last || !each || step < 1)
            return 0;
        if (start == 0 && stop >= size && step == 1)
            return slice->stop == Py_None ? 2 : 0;
        part->op = c_slice;
        part->args = Py_BuildValue("(nnnn)", dim, start, stop, step);
    }
    part->index = part->args == NULL ? NULL : alone_at(item, dim);
    return part->index == NULL ? -1 : 1;
}

/* Whether a tensor picks along one dimension: whole numbers with dimensions, or a mask of one. 1, 0, or -1 with an error set. */
static int
picks_along_one(PyObject *tensor)
{
    PyObject *dtype = GET(tensor, dtype), *rank = dtype == NULL ? NULL : GET(tensor, ndim);
    long dims = rank == NULL ? -1 : PyLong_AsLong(rank);
    int fits = rank == NULL ? -1 : dtype == c_long ? dims > 0 : dtype == c_bool && dims == 1;
    Py_XDECREF(dtype);
    Py_XDECREF(rank);
    return fits;
}

/* The parts of an index: how many ops they are, 0 if they are left to Python, -1 with an error set. */
static int
index_parts(PyObject *shape, PyObject *index, Part *parts)
{
    PyObject *single[] = {index};
    PyObject **items = single, *tensors = NULL, *places = NULL;
    Py_ssize_t given = 1, rank = PyTuple_GET_SIZE(shape), named = 0, dim = 0, source = 0;
    int count = 0, outcome = 0, dots = 0;
    if (PyTuple_CheckExact(index)) {
        items = &PyTuple_GET_ITEM(index, 0);
        given = PyTuple_GET_SIZE(index);
    }
    if (given > MOST_PARTS)
        return 0;
    for (Py_ssize_t place = 0; place < given; place++) {
        PyObject *item = items[place];
        if (item == Py_Ellipsis)
            dots++;
        else if (PyLong_CheckExact(item) || PySlice_Check(item) || (PyObject *)Py_TYPE(item) == c_tensor)
            named++;
        else if (item != Py_None)
            return 0;
    }
    if (named > rank || dots > 1)
        return 0;
    tensors = PyList_New(0);
    for (Py_ssize_t place = 0; tensors != NULL && place < given; place++) {
        PyObject *item = items[place];
        if (item == Py_Ellipsis) {
            dim += rank - named;
            source += rank - named;
        } else if ((PyObject *)Py_TYPE(item) == c_tensor) {
            int picks = picks_along_one(item);
            if (picks <= 0) {
                outcome = picks;
                goto done;
            }
            while (PyList_GET_SIZE(tensors) < dim)
                if (PyList_Append(tensors, Py_None) < 0)
                    goto failed;
            if (PyList_Append(tensors, item) < 0)
                goto failed;
            dim++;
            source++;
        } else {
            Part *part = &parts[count];
            Py_ssize_t size = item == Py_None ? 0 : PyLong_AsSsize_t(PyTuple_GET_ITEM(shape, source));
            part->index = part->args = NULL;
            int kind = basic_part(item, dim, size, part);
            if (kind <= 0) {
                count += kind < 0; /* something may have been made */
                outcome = kind;
                goto done;
            }
            count += kind == 1;
            source += item != Py_None;
            dim += !PyLong_CheckExact(item);
        }
    }
    if (tensors == NULL)
        goto failed;
    if (PyList_GET_SIZE(tensors)) {
        Part *part = &parts[count++];
        part->op = c_index;
        part->args = PyTuple_Pack(1, tensors);
        places = PySequence_Tuple(tensors);
        part->index = NULL;
        if (part->args == NULL || places == NULL)
            goto failed;
        for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(places); place++)
            if (PyTuple_GET_ITEM(places, place) == Py_None) {
                PyTuple_SET_ITEM(places, place, Py_NewRef(whole));
                Py_DECREF(Py_None);
            }
        part->index = Py_NewRef(places);
    }
    outcome = count;
    goto done;
failed:
    outcome = -1;
done:
    Py_XDECREF(tensors);
    Py_XDECREF(places);
    if (outcome <= 0)
        free_parts(parts, count);
    return outcome;
}

/* One part of an index on a tensor, with torch's handlers off; a new reference. */
static PyObject *
run_part(Handler *self, PyObject *func, PyObject *tensor, Part *part, int is_first)
{
    Py_ssize_t count = PyTuple_GET_SIZE(part->args);
    PyObject *out = NULL, *facts = facts_of(self, part->op), *call_args = PyTuple_Pack(2, tensor, part->index);
    PyObject *args = PyTuple_New(count + 1);
    if (facts != NULL && call_args != NULL && args != NULL) {
        PyTuple_SET_ITEM(args, 0, Py_NewRef(tensor));
        for (Py_ssize_t place = 0; place < count; place++)
            PyTuple_SET_ITEM(args, place + 1, Py_NewRef(PyTuple_GET_ITEM(part->args, place)));
        out = run_common(self, facts, args, empty, func, call_args, NULL);
        if (out == Py_NotImplemented && !is_first) {
            Py_CLEAR(out);
            if (include_python() == 0) {
                out = PyObject_Call(func, call_args, NULL);
                PyObject *off = exclude_python(1);
                if (off == NULL)
                    Py_CLEAR(out);
                Py_XDECREF(off);
            }
        }
    }
    Py_XDECREF(call_args);
    Py_XDECREF(args);
    return out;
}

/* tensor[index]; NotImplemented, with nothing done, leaves it to Python. */
static PyObject *
run_index(Handler *self, PyObject *func, PyObject *args)
{
    Part parts[MOST_PARTS + 1];
    if (PyTuple_GET_SIZE(args) != 2 || !is_tensor(PyTuple_GET_ITEM(args, 0)))
        return Py_NewRef(Py_NotImplemented);
    PyObject *current = Py_NewRef(PyTuple_GET_ITEM(args, 0)), *shape = GET(current, shape);
    int count = shape == NULL ? -1 : index_parts(shape, PyTuple_GET_ITEM(args, 1), parts);
    Py_XDECREF(shape);
    if (count <= 0) {
        Py_DECREF(current);
        return count < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    }
    PyObject *off = count > 1 && self->depth > 1 && vmap_below(self) == NULL ? NULL : exclude_python(1);
    if (off == NULL && !PyErr_Occurred())
        Py_SETREF(current, Py_NewRef(Py_NotImplemented)); /* several ops of which another mode may refuse one */
    else if (off != NULL) {
        Py_DECREF(off);
        for (int number = 0; number < count && current != NULL && current != Py_NotImplemented; number++)
            Py_SETREF(current, run_part(self, func, current, &parts[number], number == 0));
        if (include_python() < 0)
            Py_CLEAR(current);
    } else
        Py_CLEAR(current);
    free_parts(parts, count);
    return current;
}

/* Handlers of vmap: functions of tensors that carry the batch, run on the stored tensors. Part of shortcuts.c. */

/* The `Batched` of a tensor of this level that carries the batch, borrowed; NULL, without an error, if it is none. */
static PyObject *
batch_of(Handler *self, PyObject *tensor)
{
    if ((PyObject *)Py_TYPE(tensor) != c_batch_tensor || SLOT(tensor, level) != (PyObject *)self)
        return NULL;
    PyObject *inner = SLOT(tensor, inner);
    return inner != NULL && (PyObject *)Py_TYPE(inner) == c_batched && SLOT(inner, value) != NULL ? inner : NULL;
}

/* The dtype of a stored tensor, if it is real, or complex and not lazy: 1 with a new reference; 0 if it is not; -1 with an error set. `joined` is set if
 * it has a graph. */
static int
stored_dtype(PyObject *batch, PyObject **dtype, int *joined)
{
    PyObject *known = SLOT(batch, dtype);
    if (known != NULL) {
        *dtype = Py_NewRef(known);
        return 1;
    }
    *dtype = numeric_dtype(SLOT(batch, value), joined);
    if (*dtype == NULL)
        return -1;
    if (*dtype != Py_None)
        return 1;
    Py_CLEAR(*dtype);
    return 0;
}

/* Whether a tensor may share the memory of a copy that stands for a view, where a write would be lost: 1, 0, or -1 with an error set. */
static int
may_be_copy(PyObject *tensor)
{
    if (PyDict_GET_SIZE(c_copies) == 0)
        return 0;
    PyObject *storage = PyObject_CallMethodNoArgs(tensor, s_untyped_storage);
    PyObject *place = storage == NULL ? NULL : PyObject_GetAttr(storage, s__cdata);
    int known = place == NULL ? -1 : PyDict_Contains(c_copies, place);
    Py_XDECREF(storage);
    Py_XDECREF(place);
    return known;
}

/* Whether the ranks of two tensors compare so (Py_EQ, Py_LT): 1, 0, or -1 with an error set. */
static int
ranks_compare(PyObject *one, PyObject *other, int how)
{
    PyObject *first = GET(one, ndim);
    PyObject *second = first == NULL ? NULL : GET(other, ndim);
    int outcome = second == NULL ? -1 : PyObject_RichCompareBool(first, second, how);
    Py_XDECREF(first);
    Py_XDECREF(second);
    return outcome;
}

/* A result as a tensor of this level; takes the reference of `out`. `like`, the `Batched` of `source`, has its dtype, shape and
 * layout, if it is given. */
static PyObject *
wrapped(Handler *self, PyObject *out, PyObject *like, PyObject *source)
{
    PyObject *tensor = NULL, *shape = NULL, *dtype = NULL, *sample = NULL, *contiguous = NULL, *batch, *shelf;
    if (like != NULL) {
        dtype = Py_NewRef(SLOT(like, dtype));
        sample = Py_NewRef(SLOT(like, sample));
    } else {
        int plain = (PyObject *)Py_TYPE(out) == c_tensor;
        if (plain) {
            contiguous = PyObject_CallMethodNoArgs(out, s_is_contiguous);
            if (contiguous == NULL)
                goto done;
            plain = contiguous == Py_True ? is_true_of(GET(out, is_cpu)) : 0;
            if (plain < 0)
                goto done;
        }
        if (!plain) {
            if ((batch = new_batch(out)) != NULL) {
                PyObject *args[] = {batch, (PyObject *)self};
                tensor = PyObject_Vectorcall(c_wrap_batched, args, 2, NULL);
                Py_DECREF(batch);
            }
            goto done;
        }
        shape = GET(out, shape);
        dtype = shape == NULL ? NULL : GET(out, dtype);
        sample = dtype == NULL ? NULL : PyTuple_GetSlice(shape, 1, PyTuple_GET_SIZE(shape));
        if (sample == NULL)
            goto done;
    }
    /* What is known of a tensor without a graph need not be asked of it when it is an argument. */
    int floating = like != NULL ? 1 : PySet_Contains(c_floating, dtype);
    if (floating > 0 && like == NULL)
        floating = !is_true_of(GET(out, requires_grad));
    shelf = like != NULL ? whole_shelf(source) : NULL;
    tensor = shelf != NULL ? tensor_on(shelf, sample, Py_None, Py_None, dtype, Py_None) : tensor_like(sample, Py_None, Py_None, dtype, Py_None);
    if (tensor == NULL || (batch = batch_for(tensor, out)) == NULL) {
        Py_CLEAR(tensor);
        goto done;
    }
    if (floating > 0) {
        SLOT(batch, dtype) = Py_NewRef(dtype);
        SLOT(batch, sample) = Py_NewRef(sample);
    }
    if (shelf != NULL && SLOT(like, signature) != NULL)
        SLOT(batch, signature) = Py_NewRef(SLOT(like, signature));
    SLOT(tensor, level) = Py_NewRef(self);
done:
    Py_XDECREF(contiguous);
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    Py_XDECREF(sample);
    Py_DECREF(out);
    return tensor;
}

/* A tensor that is the same for all samples as one of the level (chainrule.batching.tensor.wrap_constant); a new reference. */
static PyObject *
wrapped_constant(PyObject *level, PyObject *value)
{
    PyObject *args[] = {c_batch_tensor, value};
    if ((PyObject *)Py_TYPE(value) != c_tensor) {
        PyObject *given[] = {value, level};
        return PyObject_Vectorcall(c_wrap_constant, given, 2, NULL);
    }
    PyObject *tensor = PyObject_Vectorcall(c_make_subclass, args, 2, NULL);
    if (tensor != NULL) {
        SLOT(tensor, inner) = Py_NewRef(value);
        SLOT(tensor, level) = Py_NewRef(level);
    }
    return tensor;
}

/* A view of a stored tensor without a graph as one of the level; a new reference. */
static PyObject *
wrapped_view(PyObject *level, PyObject *value, int batched, PyObject *dtype)
{
    if (!batched)
        return wrapped_constant(level, value);
    PyObject *tensor = NULL, *batch, *shape = GET(value, shape), *device = shape == NULL ? NULL : GET(value, device);
    PyObject *strides = device == NULL ? NULL : PyObject_CallMethodNoArgs(value, s_stride);
    PyObject *offset = strides == NULL ? NULL : ASK(value, storage_offset);
    PyObject *sample = offset == NULL ? NULL : PyTuple_GetSlice(shape, 1, PyTuple_GET_SIZE(shape));
    PyObject *steps = sample == NULL ? NULL : PyTuple_GetSlice(strides, 1, PyTuple_GET_SIZE(strides));
    if (steps != NULL)
        tensor = tensor_like(sample, steps, offset, dtype, device);
    if (tensor != NULL && (batch = batch_for(tensor, value)) != NULL) {
        SLOT(tensor, level) = Py_NewRef(level);
        if (PyTuple_GET_SIZE(sample) == 0 && PySet_Contains(c_floating, dtype) > 0) { /* see `wrapped`: results are laid out alike */
            SLOT(batch, dtype) = Py_NewRef(dtype);
            SLOT(batch, sample) = Py_NewRef(sample);
        }
    } else
        Py_CLEAR(tensor);
    Py_XDECREF(shape);
    Py_XDECREF(device);
    Py_XDECREF(strides);
    Py_XDECREF(offset);
    Py_XDECREF(sample);
    Py_XDECREF(steps);
    return tensor;
}

static int
rank_is(PyObject *tensor, long wanted)
{
    PyObject *rank = GET(tensor, ndim);
    if (rank == NULL)
        return -1;
    long found = PyLong_AsLong(rank);
    Py_DECREF(rank);
    return found == wanted;
}

/* Whether a tensor is a plain matrix: torch multiplies a sparse one only with what is one matrix itself. */
static int
is_plain_matrix(PyObject *tensor)
{
    PyObject *layout = GET(tensor, layout);
    if (layout == NULL)
        return -1;
    Py_DECREF(layout);
    return layout == c_strided ? rank_is(tensor, 2) : 0;
}

/* The mode below, if it is a tape or another level; NULL for none. */
static Handler *
mode_below(Handler *self)
{
    if (self->below == NULL || self->below == Py_None || !PyObject_TypeCheck(self->below, &handler_type))
        return NULL;
    Handler *below = (Handler *)self->below;
    return below->kind == TAPE || below->kind == VMAP ? below : NULL;
}

/* Whether torch promotes two dtypes to the same one, whether the tensors have dimensions or not: those that are equal, and a real one
 * with that of complex numbers of its precision. 1, 0, or -1 with an error set. */
static int
promotes_alike(PyObject *one, PyObject *other)
{
    if (one == other)
        return 1;
    int first = PySet_Contains(c_complex, one), second = first < 0 ? -1 : PySet_Contains(c_complex, other);
    if (second < 0 || first == second)
        return second < 0 ? -1 : 0;
    PyObject *real = PyObject_CallMethodNoArgs(first ? one : other, s_to_real);
    Py_XDECREF(real);
    return real == NULL ? -1 : real == (first ? other : one);
}

/* An argument as it stands beside the stored tensor of another one, whose dtype is given where it decides: 1 with a new reference; 0 if
 * it is left to Python; -1 with an error set. `keeps` is cleared if the result may have another shape or layout, `joined` set for a
 * graph, `pads` where dimensions are missing after the batch. */
static int
stored_beside(Handler *self, PyObject *function, PyObject *first, PyObject *dtype, PyObject *item, Py_ssize_t place,
              PyObject **stored, int *keeps, int *joined, int *pads)
{
    PyObject *value = SLOT(first, value);
    int pointwise = PyTuple_GET_ITEM(function, POINTWISE) == Py_True, writes = PyTuple_GET_ITEM(function, WRITES) == Py_True;
    int may_pad = pointwise && !writes && mode_below(self) == NULL;
    if (is_any_number(item)) {
        if (PyTuple_GET_ITEM(function, NUMBER_OP) == Py_None || dtype == NULL)
            return 0;
        int complex = PyComplex_CheckExact(item) ? 1 : PySet_Contains(c_complex, dtype);
        if (complex < 0)
            return -1;
        if (complex)
            *keeps = 0;
        int constant = !complex && PyTuple_GET_ITEM(function, NUMBERS) == Py_True && mode_below(self) == NULL;
        *stored = constant ? constant_for(item, dtype) : Py_NewRef(item);
        return *stored == NULL ? -1 : 1;
    }
    PyObject *other = NULL;
    PyObject *batch = batch_of(self, item);
    int known, fits;
    if (batch != NULL) {
        if (!pointwise)
            return 0;
        Py_INCREF(batch);
        known = stored_dtype(batch, &other, joined);
        *stored = Py_NewRef(SLOT(batch, value));
        fits = known <= 0 ? known : dtype == NULL || other == dtype || !writes;
        if (dtype != NULL && other != dtype)
            *keeps = 0;
        if (fits > 0 && (SLOT(first, sample) == NULL || SLOT(first, sample) != SLOT(batch, sample))) {
            fits = ranks_compare(value, *stored, Py_EQ);
            if (fits == 0 && may_pad)
                *pads = fits = dtype == NULL ? 1 : promotes_alike(dtype, other);
            *keeps = 0;
        }
        Py_DECREF(batch);
    } else {
        Handler *below = mode_below(self);
        if ((PyObject *)Py_TYPE(item) == c_batch_tensor && SLOT(item, level) == (PyObject *)self && SLOT(item, inner) != NULL)
            item = SLOT(item, inner); /* the same for all samples */
        int around = below != NULL && (PyObject *)Py_TYPE(item) == c_batch_tensor && SLOT(item, level) == (PyObject *)below;
        if (!around && !is_constant_class(item))
            return 0;
        *keeps = 0;
        *stored = Py_NewRef(item);
        other = numeric_dtype(item, joined);
        int mixed = other != NULL && dtype != NULL && other != dtype;
        fits = other == NULL ? -1 : !mixed || (pointwise && !writes && other != Py_None);
        if (fits > 0 && mixed) { /* torch promotes tensors without dimensions otherwise, which stored samples of none have */
            int bare = rank_is(value, 1);
            if (bare)
                fits = bare < 0 ? -1 : promotes_alike(dtype, other);
        }
        /* Element by element it broadcasts against the last dimensions; of a product it is the matrix, or what is added. */
        if (fits > 0) {
            fits = pointwise ? ranks_compare(item, value, Py_LT) : place > 1 ? 1 : is_plain_matrix(item);
            if (fits == 0 && may_pad)
                *pads = fits = dtype == NULL ? 1 : promotes_alike(dtype, other);
        }
    }
    Py_XDECREF(other);
    if (fits <= 0)
        Py_CLEAR(*stored);
    return fits;
}

/* How many arguments a call of a function has; an absent last one of a function of tensors is no argument. */
static Py_ssize_t
given(PyObject *function, PyObject *const *args, Py_ssize_t count)
{
    if (count > 2 && args[count - 1] == Py_None && PyTuple_GET_ITEM(function, NUMBER_OP) == Py_None)
        count--;
    long fewest = PyLong_AsLong(PyTuple_GET_ITEM(function, FEWEST)), most = PyLong_AsLong(PyTuple_GET_ITEM(function, MOST));
    return count >= fewest && count <= most && count <= 3 ? count : 0;
}

static PyObject *
run_on_tape(Handler *self, PyObject *function, PyObject *args);

static PyObject *
run_under_vmap(Handler *self, PyObject *function, PyObject *const *args, Py_ssize_t count, int below_autograd);

/* A function of stored tensors as the mode below a level runs it. */
static PyObject *
run_stored(Handler *below, PyObject *function, PyObject *const *stored, Py_ssize_t count, int below_autograd)
{
    if (below->kind == VMAP)
        return run_under_vmap(below, function, stored, count, below_autograd);
    PyObject *args = PyTuple_New(count);
    if (args == NULL)
        return NULL;
    for (Py_ssize_t place = 0; place < count; place++)
        PyTuple_SET_ITEM(args, place, Py_NewRef(stored[place]));
    PyObject *out = run_on_tape(below, function, args);
    Py_DECREF(args);
    return out;
}

/* Insert the dimensions that samples lack after the batch, so that they broadcast against the others: 1, or -1 with an error set. */
static int
pad_stored(Handler *self, PyObject *const *args, PyObject **stored, Py_ssize_t count)
{
    long ranks[3] = {0, 0, 0}, most = 0;
    for (Py_ssize_t place = 0; place < count; place++) {
        PyObject *ndim = is_any_number(stored[place]) ? NULL : GET(stored[place], ndim);
        if (ndim == NULL && PyErr_Occurred())
            return -1;
        ranks[place] = ndim == NULL || ndim == Py_None ? 0 : PyLong_AsLong(ndim) - (batch_of(self, args[place]) != NULL);
        Py_XDECREF(ndim);
        most = ranks[place] > most ? ranks[place] : most;
    }
    for (Py_ssize_t place = 0; place < count; place++) {
        if (ranks[place] == most || batch_of(self, args[place]) == NULL)
            continue;
        PyObject *parts = PyTuple_New(most - ranks[place] + 1), *whole = PySlice_New(NULL, NULL, NULL);
        if (parts == NULL || whole == NULL) {
            Py_XDECREF(parts);
            Py_XDECREF(whole);
            return -1;
        }
        PyTuple_SET_ITEM(parts, 0, whole);
        for (long part = 1; part <= most - ranks[place]; part++)
            PyTuple_SET_ITEM(parts, part, Py_NewRef(Py_None));
        PyObject *given[] = {stored[place], parts}, *view = call_below(c_getitem, given, 2, 0);
        Py_DECREF(parts);
        if (view == NULL)
            return -1;
        Py_SETREF(stored[place], view);
    }
    return 1;
}

/* NotImplemented leaves the call to the Python method, with nothing done. `below_autograd`: whether autograd is off here. */
static PyObject *
run_under_vmap(Handler *self, PyObject *function, PyObject *const *args, Py_ssize_t count, int below_autograd)
{
    int writes = PyTuple_GET_ITEM(function, WRITES) == Py_True;
    Handler *below = mode_below(self);
    int refused = below == NULL ? self->guarded : writes || PyObject_IsTrue(self->size) <= 0;
    count = given(function, args, count);
    if (refused || self->graphs || count < 1 || PyTuple_GET_ITEM(function, MAPPED) != Py_True)
        return Py_NewRef(Py_NotImplemented);
    Py_ssize_t mapped = 0, from = below == NULL && PyTuple_GET_ITEM(function, CALL) == c_where; /* what a choice is made by is of a dtype of its own */
    PyObject *first = batch_of(self, args[from]);
    if (first != NULL)
        mapped = from;
    else if (PyTuple_GET_ITEM(function, POINTWISE) == Py_True && !writes && below == NULL)
        for (mapped = from + 1; mapped < count && (first = batch_of(self, args[mapped])) == NULL; mapped++)
            ;
    if (first == NULL || (mapped && is_any_number(args[from])))
        return Py_NewRef(Py_NotImplemented);
    PyObject *stored[3] = {NULL, NULL, NULL}, *dtype = NULL, *out = NULL;
    Py_INCREF(first); /* the call may run anything, a write to the argument included */
    int joined = 0;
    int fits = stored_dtype(first, &dtype, &joined);
    /* Whether the result has the dtype, the shape and the layout of the first argument. */
    int keeps = PyTuple_GET_ITEM(function, KEEPS) == Py_True && SLOT(first, sample) != NULL;
    stored[mapped] = Py_NewRef(SLOT(first, value));
    if (fits > 0 && PyTuple_GET_ITEM(function, POINTWISE) != Py_True) {
        fits = rank_is(stored[mapped], 1); /* a product of vectors has the batch before it nowhere */
        fits = fits < 0 ? fits : !fits;
    }
    int pads = 0;
    for (Py_ssize_t place = 0; fits > 0 && place < count; place++)
        if (place != mapped)
            fits = stored_beside(self, function, first, place < from ? NULL : dtype, args[place], place, &stored[place], &keeps, &joined, &pads);
    if (fits > 0 && pads)
        fits = joined ? 0 : pad_stored(self, args, stored, count);
    if (writes && fits > 0 && (fits = joined ? 0 : may_be_copy(stored[0])) >= 0)
        fits = !joined && !fits; /* autograd has to see it, or it may be lost in a copy that stands for a view */
    if (fits > 0 && joined && below == NULL) { /* the mode below shows it to autograd */
        fits = may_join();
        if (fits == 0 && !self->makes_graphs && !below_autograd) { /* no graphs are made where this level runs */
            fits = 1;
            joined = 0;
        }
    }
    if (fits > 0) {
        out = below != NULL ? run_stored(below, function, stored, count, below_autograd)
                            : call_below(PyTuple_GET_ITEM(function, CALL), stored, count, joined && below_autograd);
        if (out == Py_NotImplemented)
            ;
        else if (out != NULL && writes)
            Py_SETREF(out, Py_NewRef(args[0]));
        else if (out != NULL)
            out = wrapped(self, out, keeps ? first : NULL, args[mapped]);
    } else if (fits == 0)
        out = Py_NewRef(Py_NotImplemented);
    Py_DECREF(first);
    for (Py_ssize_t place = 0; place < 3; place++)
        Py_XDECREF(stored[place]);
    Py_XDECREF(dtype);
    return out;
}

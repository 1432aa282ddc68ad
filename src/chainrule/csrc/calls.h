/* Calls on mapped tensors that were made before (chainrule.execute.mapped_calls), replayed. Part of shortcuts.c. */

/* Fields of a replay and of what is known of one of its results, which are tuples. */
enum { RUN, KINDS, SEVERAL, SINGLE, REPLAY_FIELDS };
/* Fields of a replay that is a single call, and what its arguments are. */
enum { SINGLE_FUNCTION, SINGLE_ARGS, SINGLE_NAMES };
enum { FIXED_ARGUMENT, VALUE_ARGUMENT, LIST_ARGUMENT, TUPLE_ARGUMENT, MOST_ARGUMENTS = 12 };
enum { SHARES, SAMPLE, STRIDES, DTYPE, DEVICE, PLAIN, SIGNATURE, BATCHED, KIND_FIELDS };

/* The number of a tensor's signature (shape, strides, dtype, device): 1 with a new reference; 0 if the tensor is left to Python;
 * -1 with an error set. `batch` holds it, or is NULL. Complex tensors are left to Python but for `with_complex`. */
static int
signature_number(PyObject *value, PyObject *batch, PyObject **number, int with_complex)
{
    if (batch != NULL && SLOT(batch, signature) != NULL) {
        *number = Py_NewRef(SLOT(batch, signature));
        return 1;
    }
    if (!is_constant_class(value))
        return 0;
    Signature written, *place = place_of_signature(value, &written);
    if (place != NULL && place->number != NULL && same_signature(place, &written)) {
        *number = Py_NewRef(place->number);
        if (batch != NULL)
            SLOT(batch, signature) = Py_NewRef(*number);
        return 1;
    }
    int outcome = -1;
    PyObject *layout = GET(value, layout), *dtype = NULL, *shape = NULL, *strides = NULL, *device = NULL, *key = NULL;
    if (layout == NULL || (dtype = GET(value, dtype)) == NULL)
        goto done;
    int real = PySet_Contains(c_real, dtype);
    if (real == 0 && with_complex && (real = PySet_Contains(c_complex, dtype)) > 0) {
        /* What is conjugated when it is read is no part of the signature. */
        int lazy = is_lazy(value);
        real = lazy < 0 ? -1 : !lazy;
    }
    if (real <= 0 || layout != c_strided) {
        outcome = real < 0 ? -1 : 0;
        goto done;
    }
    if ((shape = GET(value, shape)) == NULL || (strides = PyObject_CallMethodNoArgs(value, s_stride)) == NULL ||
        (device = GET(value, device)) == NULL || (key = PyTuple_Pack(4, shape, dtype, strides, device)) == NULL)
        goto done;
    *number = PyDict_GetItemWithError(c_numbers, key);
    if (*number != NULL)
        Py_INCREF(*number);
    else if (PyErr_Occurred() || (*number = PyObject_CallOneArg(c_new_number, key)) == NULL)
        goto done;
    if (batch != NULL)
        SLOT(batch, signature) = Py_NewRef(*number);
    if (place != NULL)
        keep_signature(place, &written, *number);
    outcome = 1;
done:
    Py_XDECREF(layout);
    Py_XDECREF(dtype);
    Py_XDECREF(shape);
    Py_XDECREF(strides);
    Py_XDECREF(device);
    Py_XDECREF(key);
    return outcome;
}

/* The stored tensor behind one, and its batch where it is mapped (else NULL), both borrowed: 1; 0 if it is of another level. */
static int
find_stored_tensor(PyObject *item, PyObject *level, PyObject **value, PyObject **batch)
{
    *value = item, *batch = NULL;
    if ((PyObject *)Py_TYPE(item) != c_batch_tensor)
        return 1;
    if (SLOT(item, level) != level || (*value = SLOT(item, inner)) == NULL)
        return 0;
    if ((PyObject *)Py_TYPE(*value) == c_batched) {
        *batch = *value;
        *value = SLOT(*batch, value);
    }
    return *value != NULL;
}

#include "seen.h"

/* Write down the signature of a tensor, and the tensor among the values: 1; 0 if it is left to Python; -1 with an error set.
 * `joined` is set for one with a graph. */
static int
read_tensor(Handler *self, PyObject *item, PyObject *signature, PyObject *values, int *joined)
{
    PyObject *value, *batch, *number = NULL;
    if (!find_stored_tensor(item, (PyObject *)self, &value, &batch))
        return 0;
    if (!reads_conjugates() && is_complex(value))
        return PyErr_Occurred() ? -1 : 0;
    int graph = is_true_of(GET(value, requires_grad));
    /* What is the same for all samples is of the level nevertheless, where the function made it: its views are. */
    int own = batch == NULL && value != item;
    if (graph < 0 || append_new(signature, PyLong_FromLong((batch != NULL) + 2 * graph + 4 * own)) < 0)
        return -1;
    *joined |= graph;
    for (Py_ssize_t place = 0; place < PyList_GET_SIZE(values); place++)
        if (PyList_GET_ITEM(values, place) == value)
            return append_new(signature, PyLong_FromSsize_t(-1 - place)) < 0 ? -1 : 1;
    int taken = signature_number(value, batch, &number, 1);
    if (taken <= 0)
        return taken;
    return append_new(signature, number) < 0 || PyList_Append(values, value) < 0 ? -1 : 1;
}

/* How a tensor is written down. */
typedef int (*TensorReader)(Handler *self, PyObject *item, PyObject *signature, PyObject *values, int *joined);

/* Write down the signature of some arguments, as `chainrule.execute.mapped_signatures._read` does, with the same results. */
static int
read_items(Handler *self, PyObject *const *items, Py_ssize_t count, PyObject *signature, PyObject *values, int *joined,
           TensorReader read)
{
    int taken = 1;
    for (Py_ssize_t place = 0; taken > 0 && place < count; place++) {
        PyObject *item = items[place], *type = (PyObject *)Py_TYPE(item);
        if (type == c_batch_tensor || is_constant_class(item)) {
            taken = read(self, item, signature, values, joined);
            continue;
        }
        if (PyFloat_CheckExact(item)) {
            int negative = signbit(PyFloat_AS_DOUBLE(item)) != 0;
            PyObject *sign = negative ? PyUnicode_FromString("-") : Py_NewRef((PyObject *)&PyFloat_Type);
            taken = append_new(signature, sign) < 0 || PyList_Append(signature, item) < 0 ? -1 : 1;
            continue;
        }
        if (PyComplex_CheckExact(item)) {
            PyObject *sign = has_negative_zero(item) ? signs_of(item) : Py_NewRef(type);
            taken = append_new(signature, sign) < 0 || PyList_Append(signature, item) < 0 ? -1 : 1;
            continue;
        }
        if (PySlice_Check(item)) {
            PySliceObject *slice = (PySliceObject *)item;
            PyObject *parts[] = {slice->start, slice->stop, slice->step};
            taken = PyList_Append(signature, type) < 0 ? -1 : read_items(self, parts, 3, signature, values, joined, read);
            continue;
        }
        if (PyList_CheckExact(item) || PyTuple_CheckExact(item) || type == c_size) {
            Py_ssize_t within = PySequence_Fast_GET_SIZE(item);
            if (PyList_Append(signature, type) < 0 || append_new(signature, PyLong_FromSsize_t(within)) < 0)
                return -1;
            taken = read_items(self, PySequence_Fast_ITEMS(item), within, signature, values, joined, read);
            continue;
        }
        taken = PySet_Contains(c_constants_of_calls, type);
        if (taken > 0 && (PyList_Append(signature, type) < 0 || PyList_Append(signature, item) < 0))
            taken = -1;
    }
    return taken;
}

/* A tensor of a kind that begins at a place, without its level and what it stores. The shelves of kinds are found by their addresses. */
static PyObject *
tensor_of_kind(PyObject *kind, PyObject *offset)
{
    static struct {
        PyObject *kind, *offset, *shelf;
    } found[512], *place;
    PyObject *sample = PyTuple_GET_ITEM(kind, SAMPLE), *strides = PyTuple_GET_ITEM(kind, STRIDES), *dtype = PyTuple_GET_ITEM(kind, DTYPE),
             *device = PyTuple_GET_ITEM(kind, DEVICE);
    place = &found[((uintptr_t)kind >> 4) % 512];
    if (!uses_shelves())
        return tensor_on(NULL, sample, strides, offset, dtype, device);
    if (place->kind != kind || place->offset != offset) {
        PyObject *shelf = shelf_of(sample, strides, offset, dtype, device);
        if (shelf == NULL)
            return NULL;
        Py_XSETREF(place->shelf, Py_NewRef(shelf));
        Py_XSETREF(place->kind, Py_NewRef(kind));
        Py_XSETREF(place->offset, Py_NewRef(offset));
    }
    return tensor_on(place->shelf, sample, strides, offset, dtype, device);
}

/* A result of a replay as a tensor of the level. */
static PyObject *
wrapped_as(Handler *self, PyObject *value, PyObject *kind)
{
    if (PyTuple_GET_ITEM(kind, BATCHED) != Py_True)
        return wrapped_constant((PyObject *)self, value);
    PyObject *offset = PyTuple_GET_ITEM(kind, SHARES) == Py_True ? ASK(value, storage_offset) : Py_NewRef(Py_None);
    if (offset == NULL)
        return NULL;
    PyObject *tensor = tensor_of_kind(kind, offset), *batch;
    Py_DECREF(offset);
    if (tensor == NULL || (batch = batch_for(tensor, value)) == NULL) {
        Py_XDECREF(tensor);
        return NULL;
    }
    SLOT(tensor, level) = Py_NewRef((PyObject *)self);
    SLOT(batch, signature) = Py_NewRef(PyTuple_GET_ITEM(kind, SIGNATURE));
    if (PyTuple_GET_ITEM(kind, PLAIN) == Py_True) {
        SLOT(batch, dtype) = Py_NewRef(PyTuple_GET_ITEM(kind, DTYPE));
        SLOT(batch, sample) = Py_NewRef(PyTuple_GET_ITEM(kind, SAMPLE));
    }
    return tensor;
}

/* An argument of a single call; a new reference. */
static PyObject *
single_argument(PyObject *argument, PyObject *values)
{
    PyObject *content = PyTuple_GET_ITEM(argument, 1), *made = NULL;
    long kind = PyLong_AsLong(PyTuple_GET_ITEM(argument, 0));
    if (kind == FIXED_ARGUMENT)
        return Py_NewRef(content);
    if (kind == VALUE_ARGUMENT)
        return Py_XNewRef(PyList_GetItem(values, PyLong_AsSsize_t(content)));
    Py_ssize_t count = PyTuple_GET_SIZE(content);
    made = kind == LIST_ARGUMENT ? PyList_New(count) : PyTuple_New(count);
    for (Py_ssize_t place = 0; made != NULL && place < count; place++) {
        PyObject *item = single_argument(PyTuple_GET_ITEM(content, place), values);
        if (item == NULL)
            Py_CLEAR(made);
        else if (kind == LIST_ARGUMENT)
            PyList_SET_ITEM(made, place, item);
        else
            PyTuple_SET_ITEM(made, place, item);
    }
    return made;
}

/* The result of a single call. */
static PyObject *
run_single(PyObject *single, PyObject *values)
{
    PyObject *arguments = PyTuple_GET_ITEM(single, SINGLE_ARGS), *names = PyTuple_GET_ITEM(single, SINGLE_NAMES), *out = NULL;
    PyObject *args[MOST_ARGUMENTS] = {NULL};
    Py_ssize_t count = PyTuple_GET_SIZE(arguments), made = 0, named = names == Py_None ? 0 : PyTuple_GET_SIZE(names);
    while (made < count && (args[made] = single_argument(PyTuple_GET_ITEM(arguments, made), values)) != NULL)
        made++;
    if (made == count)
        out = PyObject_Vectorcall(PyTuple_GET_ITEM(single, SINGLE_FUNCTION), args, count - named, named ? names : NULL);
    while (made)
        Py_DECREF(args[--made]);
    return out;
}

/* The results of a replay for stored tensors of its signature. Torch's handlers are off. */
static PyObject *
replayed(Handler *self, PyObject *replay, PyObject *values)
{
    PyObject *kinds = PyTuple_GET_ITEM(replay, KINDS), *several = PyTuple_GET_ITEM(replay, SEVERAL), *out = NULL;
    PyObject *args[] = {values, empty}, *single = PyTuple_GET_ITEM(replay, SINGLE), *found;
    if (single != Py_None && PyTuple_GET_SIZE(PyTuple_GET_ITEM(single, SINGLE_ARGS)) <= MOST_ARGUMENTS && several == Py_None) {
        found = run_single(single, values);
        if (found != NULL)
            out = wrapped_as(self, found, PyTuple_GET_ITEM(kinds, 0));
        Py_XDECREF(found);
        return out;
    }
    found = PyObject_Vectorcall(PyTuple_GET_ITEM(replay, RUN), args, 2, NULL);
    Py_ssize_t count = PyTuple_GET_SIZE(kinds);
    if (found != NULL && (!PyTuple_CheckExact(found) || PyTuple_GET_SIZE(found) != count))
        PyErr_SetString(PyExc_TypeError, "a replay returns a tuple of its results");
    else if (found != NULL && several == Py_None)
        out = wrapped_as(self, PyTuple_GET_ITEM(found, 0), PyTuple_GET_ITEM(kinds, 0));
    else if (found != NULL && (out = PyList_New(count)) != NULL) {
        for (Py_ssize_t place = 0; out != NULL && place < count; place++) {
            PyObject *tensor = wrapped_as(self, PyTuple_GET_ITEM(found, place), PyTuple_GET_ITEM(kinds, place));
            if (tensor == NULL)
                Py_CLEAR(out);
            else
                PyList_SET_ITEM(out, place, tensor);
        }
    }
    Py_XDECREF(found);
    if (out != NULL && several != Py_None && several != (PyObject *)&PyList_Type)
        Py_SETREF(out, PyObject_CallOneArg(several, out));
    return out;
}

/* What is known of a call by its signature as an object, and the stored tensors among its arguments: 1 with new references; 0 if it is
 * no replay; -1 with an error set. */
static int
look_up_replay(Handler *self, PyObject *func, PyObject *const *args, Py_ssize_t count, PyObject *kwargs, PyObject **replay,
               PyObject **values, int *joined)
{
    PyObject *key = NULL, *signature = PyList_New(0), *name, *item;
    Py_ssize_t place = 0;
    int taken = -1;
    *joined = 0;
    *replay = NULL;
    *values = PyList_New(0);
    /* Numbers take the default dtype. */
    if (signature == NULL || *values == NULL || PyList_Append(signature, func) < 0 ||
        append_new(signature, PyObject_CallNoArgs(c_default_dtype)) < 0)
        goto done;
    taken = read_items(self, args, count, signature, *values, joined, read_tensor);
    while (taken > 0 && kwargs != NULL && PyDict_Next(kwargs, &place, &name, &item))
        taken = PyList_Append(signature, name) < 0 ? -1 : read_items(self, &item, 1, signature, *values, joined, read_tensor);
    if (taken > 0 && (key = PyList_AsTuple(signature)) == NULL)
        taken = -1;
    if (taken > 0 && (*replay = PyDict_GetItemWithError(c_known, key)) == NULL && PyErr_Occurred())
        taken = -1;
    if (taken > 0)
        taken = *replay != NULL && PyTuple_Check(*replay);
done:
    if (taken > 0)
        Py_INCREF(*replay);
    else
        Py_CLEAR(*values);
    Py_XDECREF(key);
    Py_XDECREF(signature);
    return taken;
}

/* The function of an attribute that is asked for now; torch makes others of the kind for one call. */
static PyObject *lasting = NULL;

/* The same by what was seen before, where it was. */
static int
find_replay(Handler *self, PyObject *func, PyObject *const *args, Py_ssize_t count, PyObject *kwargs, PyObject **replay,
            PyObject **values, int *joined)
{
    Words words;
    *replay = NULL;
    *values = PyList_New(0);
    int taken = *values == NULL ? -1 : add_call(self, func, args, count, kwargs, &words, NULL, *values, joined);
    int writable = taken > 0 && (Py_TYPE(func) != &_PyMethodWrapper_Type || func == lasting);
    if (taken > 0 && (*replay = replay_seen(&words, hash_words(&words))) != NULL)
        Py_INCREF(*replay);
    else {
        Py_CLEAR(*values);
        if (taken >= 0)
            taken = look_up_replay(self, func, args, count, kwargs, replay, values, joined);
        if (taken > 0 && writable && note_seen(self, func, args, count, kwargs, *replay) < 0)
            taken = -1;
    }
    if (taken > 0 && *joined)
        taken = may_join();
    if (taken <= 0) {
        Py_CLEAR(*values);
        Py_CLEAR(*replay);
    }
    return taken;
}

/* A call that was seen, with torch's handlers on; NotImplemented, with nothing done, for others. */
static PyObject *
replay_if_seen(Handler *self, PyObject *func, PyObject *const *args, Py_ssize_t count)
{
    Words words;
    int joined;
    PyObject *values = PyList_New(0), *replay = NULL, *out = NULL;
    int taken = values == NULL ? -1 : add_call(self, func, args, count, NULL, &words, NULL, values, &joined);
    if (taken > 0 && (joined || (replay = replay_seen(&words, hash_words(&words))) == NULL))
        taken = 0;
    if (taken == 0)
        out = Py_NewRef(Py_NotImplemented);
    else if (taken > 0) {
        PyObject *off = exclude_python(1);
        Py_INCREF(replay);
        if (off != NULL)
            out = replayed(self, replay, values);
        Py_DECREF(replay);
        if (off != NULL && include_python() < 0)
            Py_CLEAR(out);
        Py_XDECREF(off);
    }
    Py_XDECREF(values);
    return out;
}

/* Keep a call of one tensor that carries the batch, and has no graph, the result of which is a view of it on the CPU: as a single call
 * with these arguments after the stored tensor (their number is 1 or 2). 0, or -1 with an error set. */
static int
note_view(Handler *self, PyObject *func, PyObject *const *args, Py_ssize_t count, PyObject *single, PyObject *const *given,
          Py_ssize_t others, PyObject *view, PyObject *tensor)
{
    PyObject *batch = batch_of(self, tensor), *number = NULL, *strides = NULL, *shape = NULL, *dtype = NULL, *replay = NULL;
    int taken = batch == NULL || others < 1 || others > 2 ? 0 : is_true_of(GET(view, is_cpu));
    if (taken > 0)
        taken = signature_number(view, batch, &number, 0);
    if (taken <= 0)
        return taken;
    taken = -1;
    if ((strides = PyObject_CallMethodNoArgs(view, s_stride)) == NULL || (shape = GET(view, shape)) == NULL || (dtype = GET(view, dtype)) == NULL)
        goto done;
    PyObject *sample = PyTuple_GetSlice(shape, 1, PyTuple_GET_SIZE(shape)), *steps = PyTuple_GetSlice(strides, 1, PyTuple_GET_SIZE(strides));
    if (sample != NULL && steps != NULL)
        replay = others == 1 ? Py_BuildValue("(O((OOOOOOOO))O(O((ii)(iO))O))", Py_True, Py_True, sample, steps, dtype, Py_None,
                                             SLOT(batch, sample) != NULL ? Py_True : Py_False, number, Py_True, Py_None, single,
                                             VALUE_ARGUMENT, 0, FIXED_ARGUMENT, given[0], Py_None)
                             : Py_BuildValue("(O((OOOOOOOO))O(O((ii)(iO)(iO))O))", Py_True, Py_True, sample, steps, dtype, Py_None,
                                             SLOT(batch, sample) != NULL ? Py_True : Py_False, number, Py_True, Py_None, single,
                                             VALUE_ARGUMENT, 0, FIXED_ARGUMENT, given[0], FIXED_ARGUMENT, given[1], Py_None);
    Py_XDECREF(sample);
    Py_XDECREF(steps);
    if (replay != NULL)
        taken = note_seen(self, func, args, count, NULL, replay);
done:
    Py_XDECREF(replay);
    Py_XDECREF(number);
    Py_XDECREF(strides);
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    return taken;
}

/* function_globals.calls_torch: 1, 0, or -1 with an error set. */
static int
calls_torch(PyObject *function)
{
    PyObject *places = c_places == NULL ? Py_NewRef(Py_None) : PyObject_GetItem(c_places, function);
    if (places == NULL)
        return -1;
    int own = places != Py_None;
    for (Py_ssize_t place = 0; own > 0 && place < PyTuple_GET_SIZE(places); place += 3) {
        PyObject *found = PyDict_GetItemWithError(PyTuple_GET_ITEM(places, place), PyTuple_GET_ITEM(places, place + 1));
        own = found == NULL && PyErr_Occurred() ? -1 : (found == NULL ? Py_Ellipsis : found) == PyTuple_GET_ITEM(places, place + 2);
    }
    Py_DECREF(places);
    return own;
}

/* A call under the only mode that is on; NotImplemented, with nothing done, leaves it to Python. */
static PyObject *
run_known(Handler *self, PyObject *func, PyObject *const *args, Py_ssize_t count, PyObject *kwargs)
{
    PyObject *replay, *values;
    int joined, taken = PyFunction_Check(func) ? PySet_Contains(c_written, func) : PySet_Contains(c_calls, (PyObject *)Py_TYPE(func));
    if (taken > 0 && PyFunction_Check(func))
        taken = calls_torch(func);
    if (taken > 0) {
        int autocast = autocast_is_on();
        taken = autocast < 0 ? -1 : !autocast;
    }
    if (taken > 0)
        taken = find_replay(self, func, args, count, kwargs, &replay, &values, &joined);
    if (taken <= 0)
        return taken < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *kinds = PyTuple_GET_ITEM(replay, KINDS), *out = NULL, *done = NULL;
    Py_ssize_t place = PyLong_CheckExact(kinds) ? PyLong_AsSsize_t(kinds) : -1;
    if (place >= 0) /* the argument itself */
        out = Py_NewRef(args[place]);
    else if ((done = exclude_python(1)) != NULL) {
        if (PyTuple_GET_ITEM(replay, RUN) == Py_None) /* the call concerns no mapped tensor */
            out = PyObject_VectorcallDict(func, args, count, kwargs);
        else
            out = replayed(self, replay, values);
        if (include_python() < 0)
            Py_CLEAR(out);
    }
    Py_XDECREF(done);
    Py_DECREF(replay);
    Py_DECREF(values);
    return out;
}

/* An op on tensors of the outermost level, below a tape; the same. Torch's handlers are off. */
static PyObject *
run_known_op(Handler *self, PyObject *op, PyObject *args, int is_view)
{
    PyObject *replay, *values;
    int joined;
    if (c_known == NULL || self->guarded || self->graphs || (is_view && state.exclude == NULL))
        return Py_NewRef(Py_NotImplemented);
    int taken = find_replay(self, op, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), NULL, &replay, &values, &joined);
    if (taken <= 0)
        return taken < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    /* Autograd must see views, so that writes through them are counted as writes, and what has a graph. */
    if ((is_view || joined) && state.exclude != NULL)
        state.exclude(state.views, false);
    if (joined)
        exclude_autograd(false);
    PyObject *out = replayed(self, replay, values);
    if (joined)
        exclude_autograd(true);
    if ((is_view || joined) && state.exclude != NULL)
        state.exclude(state.views, true);
    Py_DECREF(replay);
    Py_DECREF(values);
    return out;
}

/* The same of an op by its function, which is none that makes a view, on the first arguments of a call. The handlers are on. */
static PyObject *
run_known_call(Handler *level, PyObject *op, PyObject *args, Py_ssize_t count)
{
    PyObject *given = PyTuple_GetSlice(args, 0, count), *off = given == NULL ? NULL : exclude_python(1);
    PyObject *out = off == NULL ? NULL : run_known_op(level, op, given, 0);
    if (off != NULL && include_python() < 0)
        Py_CLEAR(out);
    Py_XDECREF(off);
    Py_XDECREF(given);
    return out;
}

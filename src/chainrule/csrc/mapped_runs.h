/* A transform of samples that nothing is around, in one call (chainrule.transforms.routes). Part of shortcuts.c. */

/* The dimension that an argument is mapped over, borrowed; NULL, without an error, if it has none that fits. */
static PyObject *
dimension_of(PyObject *dims, Py_ssize_t place, Py_ssize_t count)
{
    PyObject *dim = dims;
    if (PyTuple_CheckExact(dims))
        dim = PyTuple_GET_SIZE(dims) == count ? PyTuple_GET_ITEM(dims, place) : NULL;
    return dim == Py_None || (dim != NULL && PyLong_CheckExact(dim)) ? dim : NULL;
}

/* A mapped argument whose first dimension is the batch and of the given size (-1 for any, then set): 1; 0 if it is left to
 * Python; -1 with an error set. */
static int
is_mapped_plainly(PyObject *item, long dim, long *size)
{
    if (!is_constant_class(item))
        return 0;
    PyObject *dtype = GET(item, dtype), *layout = dtype == NULL ? NULL : GET(item, layout);
    int plain = layout == NULL ? -1 : layout != c_strided ? 0 : PySet_Contains(c_real, dtype);
    if (plain == 0 && layout == c_strided)
        plain = PySet_Contains(c_complex, dtype);
    Py_XDECREF(dtype);
    Py_XDECREF(layout);
    if (plain > 0)
        plain = is_lazy(item) ? 0 : PyErr_Occurred() ? -1 : 1;
    PyObject *shape = plain <= 0 ? NULL : GET(item, shape);
    if (shape == NULL)
        return plain > 0 ? -1 : plain;
    Py_ssize_t rank = PyTuple_GET_SIZE(shape);
    plain = rank > 0 && (dim == 0 || dim == -rank);
    if (plain) {
        long first = PyLong_AsLong(PyTuple_GET_ITEM(shape, 0));
        plain = first > 0 && (*size < 0 || *size == first);
        *size = first;
    }
    Py_DECREF(shape);
    return plain;
}

/* An argument as a tensor of a level. */
static PyObject *
mapped_argument(Handler *mode, PyObject *item)
{
    PyObject *offset = PyObject_CallMethodNoArgs(item, s_storage_offset);
    long start = offset == NULL ? -1 : PyLong_AsLong(offset);
    Py_XDECREF(offset);
    if (start < 0)
        return NULL;
    if (start == 0)
        return wrapped(mode, Py_NewRef(item), NULL, NULL);
    PyObject *batch = ((PyTypeObject *)c_batched)->tp_alloc((PyTypeObject *)c_batched, 0);
    if (batch == NULL)
        return NULL;
    SLOT(batch, value) = Py_NewRef(item);
    PyObject *args[] = {batch, (PyObject *)mode};
    PyObject *tensor = PyObject_Vectorcall(c_wrap_batched, args, 2, NULL);
    Py_DECREF(batch);
    return tensor;
}

/* The arguments of a mapped function: 1 with new references to them and to the size; 0 if they are left to Python; -1 with an error. */
static int
mapped_arguments(PyObject *route, PyObject *args, Handler **mode, PyObject **given)
{
    PyObject *dims = PyTuple_GET_ITEM(route, R_DIMS);
    Py_ssize_t count = PyTuple_GET_SIZE(args);
    long size = -1;
    int fits = 1;
    for (Py_ssize_t place = 0; fits > 0 && place < count; place++) {
        PyObject *dim = dimension_of(dims, place, count);
        fits = dim == NULL ? 0 : dim == Py_None ? 1 : is_mapped_plainly(PyTuple_GET_ITEM(args, place), PyLong_AsLong(dim), &size);
    }
    if (fits <= 0 || size < 0)
        return fits < 0 ? -1 : 0;
    PyObject *number = PyLong_FromLong(size), *randomness = number == NULL ? NULL : PyUnicode_InternFromString("error");
    *given = NULL;
    *mode = randomness == NULL ? NULL : (Handler *)handler_new((PyTypeObject *)c_vmap_mode, NULL, NULL);
    if (*mode != NULL && begin_level(*mode, number, randomness, PyTuple_GET_ITEM(route, R_CALLS), 0, 0) == 0)
        *given = PyTuple_New(count);
    Py_XDECREF(number);
    Py_XDECREF(randomness);
    for (Py_ssize_t place = 0; *given != NULL && place < count; place++) {
        PyObject *item = PyTuple_GET_ITEM(args, place);
        item = dimension_of(dims, place, count) == Py_None ? Py_NewRef(item) : mapped_argument(*mode, item);
        PyTuple_SET_ITEM(*given, place, item);
        if (item == NULL)
            Py_CLEAR(*given);
    }
    if (*given == NULL)
        Py_CLEAR(*mode);
    return *given == NULL ? -1 : 1;
}

/* Add a value as the replay on stored tensors reads it, and what the key says of it (chainrule.execute.batched.stored_values): 1;
 * 0 if it is left to Python; -1 with an error set. */
static int
read_stored(Handler *mode, PyObject *value, PyObject *tensors, PyObject *parts)
{
    if ((PyObject *)Py_TYPE(value) == c_batch_tensor) {
        if (SLOT(value, level) != (PyObject *)mode)
            return 0;
        int graph = known_batch(value) != NULL ? 0 : is_true_of(GET(value, requires_grad));
        if (graph)
            return graph < 0 ? -1 : 0;
        value = SLOT(value, inner);
        if (value != NULL && (PyObject *)Py_TYPE(value) == c_batched) {
            value = SLOT(value, value);
            if (PyList_Append(parts, Py_True) < 0)
                return -1;
        }
    }
    if (value == NULL || !is_constant_class(value))
        return 0;
    int joined = 0;
    PyObject *dtype = numeric_dtype(value, &joined);
    if (dtype == NULL)
        return -1;
    Py_DECREF(dtype);
    if (dtype == Py_None || joined)
        return 0;
    PyObject *layout = GET(value, layout);
    if (layout == NULL)
        return -1;
    if (layout == c_strided)
        Py_SETREF(layout, PyObject_CallMethodNoArgs(value, s_stride));
    PyObject *shape = layout == NULL ? NULL : GET(value, shape);
    int outcome = shape != NULL && PyList_Append(tensors, value) == 0 && PyList_Append(parts, shape) == 0 && PyList_Append(parts, layout) == 0;
    Py_XDECREF(shape);
    Py_XDECREF(layout);
    return outcome ? 1 : -1;
}

/* The replay on stored tensors that is known for these values, and the tensors: 1 with new references; 0 if it is left to Python;
 * -1 with an error set. */
static int
find_stored(Handler *mode, Handler *tape, PyObject *plan, PyObject *needs, PyObject **run, PyObject **tensors)
{
    PyObject *parts = PyList_New(0), *key = NULL, *batched = NULL, *known;
    int found = -1;
    *run = NULL;
    *tensors = PyList_New(0);
    if (parts == NULL || *tensors == NULL || PyList_Append(parts, mode->size) < 0)
        goto done;
    found = 1;
    for (Py_ssize_t place = 0; found > 0 && place < PyTuple_GET_SIZE(needs); place++) {
        PyObject *value = needed(tape, empty, PyTuple_GET_ITEM(needs, place));
        found = value == NULL ? -1 : read_stored(mode, value, *tensors, parts);
    }
    if (found <= 0)
        goto done;
    found = -1;
    if ((key = PyList_AsTuple(parts)) == NULL || (batched = PyObject_GetAttr(plan, s_batched)) == NULL)
        goto done;
    known = PyDict_GetItemWithError(batched, key);
    if (known == NULL || PyTuple_GET_ITEM(known, 0) == Py_None) {
        found = PyErr_Occurred() ? -1 : 0;
        goto done;
    }
    found = 1;
    PyObject *flags = PyTuple_GET_ITEM(known, 1); /* a list: which of the results have the batch dimension */
    for (Py_ssize_t place = 0; found && place < PyList_GET_SIZE(flags); place++)
        found = PyList_GET_ITEM(flags, place) == Py_True;
    if (found && (*run = PyObject_GetAttr(PyTuple_GET_ITEM(known, 0), s_plain)) == NULL)
        found = -1;
done:
    Py_XDECREF(parts);
    Py_XDECREF(key);
    Py_XDECREF(batched);
    if (found <= 0)
        Py_CLEAR(*tensors);
    return found;
}

/* The same under a vmap that was left. */
static int
replay_mapped(PyObject *route, Handler *mode, Handler *tape, PyObject *out, int grad, PyObject **result)
{
    PyObject *plan, *quick, *run, *tensors;
    int found = find_plan(route, tape, out, grad, &plan, &quick);
    if (found <= 0)
        return found;
    found = find_stored(mode, tape, plan, PyTuple_GET_ITEM(quick, Q_NEEDS), &run, &tensors);
    if (found > 0) {
        /* The values are let go as the plan has read them. */
        PyObject *spent = PyObject_CallOneArg(c_spent, tensors);
        PyObject *args[] = {spent, empty};
        Py_DECREF(tensors);
        found = spent == NULL || PyList_SetSlice(tape->values, 0, PyList_GET_SIZE(tape->values), NULL) < 0 ? -1 : 1;
        Py_CLEAR(tape->alias);
        Py_CLEAR(tape->pending);
        Py_CLEAR(tape->derived);
        Py_CLEAR(tape->kept);
        if (found > 0) {
            *result = assembled(PyObject_Vectorcall(run, args, 2, NULL), quick);
            found = *result == NULL ? -1 : 1;
        }
        Py_XDECREF(spent);
        Py_DECREF(run);
    }
    Py_DECREF(plan);
    Py_DECREF(quick);
    return found;
}

/* call_mapped(route, args, kwargs): as call_alone, for a vmap of a transform; the run has the level in the place of None. */
static PyObject *
call_mapped(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    PyObject *route = args[0], *leaf, *given, *out = NULL, *result = NULL, *made = NULL;
    Handler *tape = NULL, *mode;
    Py_ssize_t place = place_of(route, args, count);
    if (place < 0)
        return place == -2 ? NULL : Py_NewRef(Py_NotImplemented);
    int fits = stands_alone();
    if (fits > 0)
        fits = is_plain_floating(PyTuple_GET_ITEM(args[1], place));
    if (fits > 0 && dimension_of(PyTuple_GET_ITEM(route, R_DIMS), place, PyTuple_GET_SIZE(args[1])) == Py_None)
        fits = 0; /* the same for all samples: its alias is made under the level */
    if (fits > 0)
        fits = mapped_arguments(route, args[1], &mode, &given);
    if (fits <= 0)
        return fits < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    leaf = PyTuple_GET_ITEM(given, place);
    PyObject *key = NULL, *shape = GET(leaf, shape), *dtype = shape == NULL ? NULL : GET(leaf, dtype);
    PyObject *device = dtype == NULL ? NULL : GET(leaf, device);
    if (device != NULL)
        key = PyTuple_Pack(4, shape, dtype, device, Py_True);
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    Py_XDECREF(device);
    int grad = grad_is_enabled();
    if (key != NULL && grad >= 0 && (grad || call_and_drop(c_set_grad, Py_True) == 0)) {
        PyObject *entered = enter_mode(mode, 1);
        if (entered != NULL) {
            Py_DECREF(entered);
            tape = tape_of(route, leaf, Py_NewRef(key));
            if (tape != NULL)
                out = run_recorded(tape, PyTuple_GET_ITEM(route, R_FUNCTION), given, PyDict_GET_SIZE(args[2]) ? args[2] : NULL);
            out = leave_mode(mode, out);
        }
        if (!grad && switch_grad(Py_False) < 0)
            Py_CLEAR(out);
    }
    if (out != NULL) {
        int found = replay_mapped(route, mode, tape, out, grad, &result);
        made = outcome_of(found, result, (PyObject *)mode, tape, leaf, out, grad, given);
    }
    Py_XDECREF(key);
    Py_XDECREF(tape);
    Py_XDECREF(out);
    Py_DECREF(given);
    Py_DECREF(mode);
    return made;
}

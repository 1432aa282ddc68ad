/* The door of the functions that torch has in Python: what hands such a function to the innermost function mode. Part of shortcuts.c. */

/* The classes among some arguments that have a way for functions, as torch tells them to a mode: 1 with a new reference; 0 where there
 * are others than torch's own; -1 with an error set. */
static int
overloading_types(PyObject *items, PyObject **found)
{
    PyObject *only = NULL;
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(items); place++) {
        PyObject *item = PyTuple_GET_ITEM(items, place), *type = (PyObject *)Py_TYPE(item);
        if (type == only || type == c_parameter || type == c_batch_tensor || item == Py_None || is_number(item) || PyBool_Check(item))
            continue; /* of these classes torch tells none; see chainrule.function_doors */
        if (type != c_tensor)
            return 0;
        only = type;
    }
    *found = only == NULL ? Py_NewRef(empty) : PyTuple_Pack(1, only);
    return *found == NULL ? -1 : 1;
}

/* The arguments that were given by name; NULL with an error set. */
static PyObject *
named_given(PyObject *const *values, PyObject *names)
{
    PyObject *kwargs = PyDict_New();
    for (Py_ssize_t place = 0; kwargs != NULL && place < PyTuple_GET_SIZE(names); place++)
        if (PyDict_SetItem(kwargs, PyTuple_GET_ITEM(names, place), values[place]) < 0)
            Py_CLEAR(kwargs);
    return kwargs;
}

/* Call a mode's handler with the mode off, as torch does; a new reference. */
static PyObject *
call_mode_aside(PyObject *mode, PyObject *function, PyObject *types, PyObject *args, PyObject *kwargs)
{
    PyObject *given[] = {function, types, args, kwargs};
    if (call_and_drop(c_pop_function, NULL) < 0)
        return NULL;
    PyObject *out = torch_function((Handler *)mode, given, kwargs == NULL ? 3 : 4, NULL);
    PyObject *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace);
    if (call_and_drop(c_push_function, mode) < 0) {
        Py_CLEAR(out);
        Py_XDECREF(kind);
        Py_XDECREF(error);
        Py_XDECREF(trace);
    } else
        PyErr_Restore(kind, error, trace);
    return out;
}

/* handle_torch_function(function, relevant, *args, **kwargs): torch's own, but for a mode of this package and plain arguments. */
static PyObject *
handle_function(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    int64_t modes = count < 2 || state.exclude == NULL || state.get_functions() || !PyTuple_CheckExact(args[1]) ? 0 : state.function_modes();
    PyObject *top = modes ? mode_at(c_function_at, modes - 1) : NULL, *types = NULL, *given = NULL, *kwargs = NULL, *out = NULL;
    if (modes && top == NULL)
        return NULL;
    int taken = top != NULL && is_handler(top) ? overloading_types(args[1], &types) : 0;
    if (taken <= 0) {
        Py_XDECREF(top);
        return taken < 0 ? NULL : PyObject_Vectorcall(c_door, args, count, names);
    }
    if ((given = PyTuple_New(count - 2)) != NULL) {
        for (Py_ssize_t place = 2; place < count; place++)
            PyTuple_SET_ITEM(given, place - 2, Py_NewRef(args[place]));
        if (names == NULL || PyTuple_GET_SIZE(names) == 0 || (kwargs = named_given(args + count, names)) != NULL)
            out = call_mode_aside(top, args[0], types, given, kwargs);
    }
    Py_XDECREF(given);
    Py_XDECREF(kwargs);
    Py_DECREF(types);
    Py_DECREF(top);
    if (out == Py_NotImplemented)
        Py_SETREF(out, PyObject_Vectorcall(c_door, args, count, names));
    return out;
}

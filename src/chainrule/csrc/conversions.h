/* Floating-point conversions, and torch.where beside a number, on a tape that stands alone. Part of shortcuts.c. */

/* The dtype that a call converts to, borrowed; NULL for another call, or with an error set. */
static PyObject *
converted_to(PyObject *fixed, PyObject *args, PyObject *kwargs)
{
    Py_ssize_t given = PyTuple_GET_SIZE(args), named = kwargs == NULL ? 0 : PyDict_GET_SIZE(kwargs);
    if (fixed != Py_None)
        return given == 1 && named == 0 ? fixed : NULL;
    if (given == 2 && named == 0)
        return PyTuple_GET_ITEM(args, 1);
    return given == 1 && named == 1 ? PyDict_GetItemWithError(kwargs, s_dtype) : NULL;
}

/* Whether an argument is the device of a tensor: 1, 0, or -1 with an error set. */
static int
is_device_of(PyObject *item, PyObject *tensor)
{
    if (PyUnicode_CheckExact(item))
        return PyUnicode_CompareWithASCIIString(item, "cpu") == 0 ? is_true_of(GET(tensor, is_cpu)) : 0;
    if (!PyObject_TypeCheck(item, Py_TYPE(c_device)))
        return 0;
    PyObject *device = GET(tensor, device);
    int same = device == NULL ? -1 : PyObject_RichCompareBool(device, item, Py_EQ);
    Py_XDECREF(device);
    return same;
}

/* What a conversion of an active tensor from one floating-point dtype to another is recorded as; `fixed` is the dtype that the
 * function names, or None. NotImplemented, with nothing done, leaves it to Python. */
static PyObject *
run_conversion(Handler *self, PyObject *func, PyObject *fixed, PyObject *args, PyObject *kwargs)
{
    PyObject *wanted = PyTuple_GET_SIZE(args) ? converted_to(fixed, args, kwargs) : NULL;
    if (wanted != NULL && (PyObject *)Py_TYPE(PyTuple_GET_ITEM(args, 0)) == c_tensor) {
        int there = is_device_of(wanted, PyTuple_GET_ITEM(args, 0)); /* then it is returned as it is */
        if (there)
            return there < 0 ? NULL : Py_NewRef(PyTuple_GET_ITEM(args, 0));
    }
    int fits = PyErr_Occurred() ? -1 : wanted == NULL || !PyObject_TypeCheck(wanted, Py_TYPE(c_long)) ? 0 : PySet_Contains(c_floating, wanted);
    PyObject *tensor = fits > 0 ? PyTuple_GET_ITEM(args, 0) : NULL;
    Py_ssize_t slot = fits > 0 && (PyObject *)Py_TYPE(tensor) == c_tensor ? known_slot(self, tensor) : -1;
    if (fits < 0 || slot == -2)
        return NULL;
    if (slot < 0 || slot >= PyList_GET_SIZE(c_slot_objects) || PyList_GET_ITEM(self->active, slot) != Py_True)
        return Py_NewRef(Py_NotImplemented);
    int graph = 0;
    PyObject *dtype = plain_dtype(tensor, &graph);
    if (dtype == NULL)
        return NULL;
    int changes = dtype != wanted ? PySet_Contains(c_floating, dtype) : 0;
    Py_DECREF(dtype);
    if (dtype == wanted && !graph)
        return Py_NewRef(tensor);
    PyObject *facts = changes > 0 && !graph ? facts_of(self, c_to_copy) : NULL;
    if (changes < 0 || (facts == NULL && PyErr_Occurred()))
        return NULL;
    if (facts == NULL || SLOT(facts, common) != Py_True)
        return Py_NewRef(Py_NotImplemented);
    PyObject *out = call_given_below(func, args, kwargs);
    int blocked = out == NULL ? 1 : is_blocked(self, args, 1);
    if (blocked) {
        if (blocked < 0)
            Py_CLEAR(out);
        return out;
    }
    PyObject *lowered = PyTuple_Pack(1, PyList_GET_ITEM(c_slot_objects, slot)), *named = Py_BuildValue("((OO))", s_dtype, wanted);
    PyObject *outer = self->origin;
    if (outer == Py_None)
        self->origin = c_to_op; /* borrowed while the record is made, of which this is a part */
    if (lowered == NULL || named == NULL || append_record(self, facts, lowered, named, out, wanted) < 0)
        Py_CLEAR(out);
    self->origin = outer;
    Py_XDECREF(lowered);
    Py_XDECREF(named);
    return out;
}

/* torch.where with a number for one of the two choices, as one with a constant; NotImplemented, with nothing done, for others. */
static PyObject *
run_choice(Handler *self, PyObject *func, PyObject *args)
{
    if (PyTuple_GET_SIZE(args) != 3)
        return Py_NewRef(Py_NotImplemented);
    int place = is_number(PyTuple_GET_ITEM(args, 1)) ? 1 : 2;
    PyObject *number = PyTuple_GET_ITEM(args, place), *beside = PyTuple_GET_ITEM(args, 3 - place);
    PyObject *level = vmap_below(self);
    int mapped = level != NULL && (PyObject *)Py_TYPE(beside) == c_batch_tensor && SLOT(beside, level) == level;
    if (!is_number(number) || !(mapped || (PyObject *)Py_TYPE(beside) == c_tensor))
        return Py_NewRef(Py_NotImplemented);
    PyObject *asked[] = {number, beside}, *out = NULL, *constant = PyObject_Vectorcall(c_constant_beside, asked, 2, NULL);
    if (constant == NULL || constant == Py_None) {
        Py_XDECREF(constant);
        return constant == NULL ? NULL : Py_NewRef(Py_NotImplemented);
    }
    PyObject *given = PyTuple_Pack(3, PyTuple_GET_ITEM(args, 0), place == 1 ? constant : beside, place == 1 ? beside : constant);
    PyObject *facts = given == NULL ? NULL : facts_of(self, c_where_op), *off = facts == NULL ? NULL : exclude_python(1);
    if (off != NULL) {
        Py_DECREF(off);
        out = SLOT(facts, plain) == Py_True ? run_common(self, facts, given, empty, func, given, NULL) : Py_NewRef(Py_NotImplemented);
        if (include_python() < 0)
            Py_CLEAR(out);
    }
    Py_XDECREF(given);
    Py_DECREF(constant);
    return out;
}

/* These two kinds of calls; NotImplemented, with nothing done, for others. */
static PyObject *
run_converted(Handler *self, PyObject *func, PyObject *args, PyObject *kwargs)
{
    if (self->below != NULL && self->below != Py_None && (func != c_where || vmap_below(self) == NULL || is_listened(self)))
        return Py_NewRef(Py_NotImplemented);
    PyObject *fixed = func == c_where ? NULL : PyDict_GetItemWithError(c_conversions, func);
    if (func != c_where && fixed == NULL)
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_NotImplemented);
    int autocast = autocast_is_on();
    if (autocast || (fixed == NULL && kwargs != NULL))
        return autocast < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    return fixed == NULL ? run_choice(self, func, args) : run_conversion(self, func, fixed, args, kwargs);
}

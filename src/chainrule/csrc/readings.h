/* Which op a call means, by the schemas of the function's overloads (chainrule.function_schemas). Part of shortcuts.c. */

/* Kinds of parameters. */
enum { OTHER = 0, TENSOR = 1, TENSORS = 2, INT = 3, INTS = 4, FLOAT = 5, BOOL = 6, NUMBER = 7, STRING = 8, OPTIONAL = 16 };

/* Fields of a parameter. */
enum { NAME, KIND, DEFAULT, LENGTH };

#define MOST_PARAMETERS 16

/* Whether an object is a tensor of any class: 1, 0, or -1 with an error set. */
static int
is_any_tensor(PyObject *item)
{
    return is_tensor(item) ? 1 : PyObject_IsInstance(item, c_tensor);
}

/* A list of the items of a list or tuple that are all of one kind: 1 with a new reference; 0 if they are not; -1 with an error. */
static int
read_list(PyObject *item, int kind, PyObject **found)
{
    if (!PyList_CheckExact(item) && !PyTuple_CheckExact(item))
        return 0;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(item);
    for (Py_ssize_t place = 0; place < count; place++) {
        PyObject *one = PySequence_Fast_GET_ITEM(item, place);
        int fits = kind == TENSORS ? is_any_tensor(one) : PyLong_CheckExact(one);
        if (fits <= 0)
            return fits;
    }
    if (!count && kind == TENSORS)
        return 0;
    *found = PySequence_List(item);
    return *found == NULL ? -1 : 1;
}

/* An argument as the op gets it, with the same results. */
static int
read_argument(PyObject *item, int kind, Py_ssize_t length, PyObject **found)
{
    int fits = 0;
    if (item == Py_None && kind & OPTIONAL)
        fits = 1;
    else
        switch (kind & ~OPTIONAL) {
        case TENSOR:
            fits = is_any_tensor(item);
            break;
        case INT:
            fits = PyLong_CheckExact(item);
            break;
        case NUMBER:
            fits = is_number(item);
            break;
        case FLOAT:
            fits = PyFloat_CheckExact(item);
            break;
        case BOOL:
            fits = PyBool_Check(item);
            break;
        case STRING:
            fits = PyUnicode_CheckExact(item);
            break;
        case INTS:
            if (PyLong_CheckExact(item)) {
                *found = PyList_New(length);
                for (Py_ssize_t place = 0; *found != NULL && place < length; place++)
                    PyList_SET_ITEM(*found, place, Py_NewRef(item));
                return *found == NULL ? -1 : 1;
            }
            return read_list(item, INTS, found);
        case TENSORS:
            return read_list(item, TENSORS, found);
        }
    if (fits > 0)
        *found = Py_NewRef(item);
    return fits;
}

/* The positional arguments of an overload: a new reference; NULL with an error set, or without one if the call is not meant. */
static PyObject *
bound_arguments(PyObject *parameters, PyObject *args, PyObject *kwargs)
{
    Py_ssize_t count = PyTuple_GET_SIZE(parameters), given = PyTuple_GET_SIZE(args), named = 0, kept = 0, place = 0;
    PyObject *values[MOST_PARAMETERS] = {NULL}, *several = NULL, *bound = NULL;
    if (count > MOST_PARAMETERS)
        return NULL;
    if (given > count) {
        /* Whole numbers one by one, as methods take them. */
        if (count != 2 || PyLong_AsLong(PyTuple_GET_ITEM(PyTuple_GET_ITEM(parameters, 1), KIND)) != INTS)
            return NULL;
        several = PyTuple_GetSlice(args, 1, given);
        if (several == NULL)
            return NULL;
        given = 2;
    }
    for (; place < count; place++) {
        PyObject *parameter = PyTuple_GET_ITEM(parameters, place), *item = NULL;
        PyObject *absent = PyTuple_GET_ITEM(parameter, DEFAULT);
        if (place < given)
            item = place == 1 && several != NULL ? several : PyTuple_GET_ITEM(args, place);
        else if (kwargs != NULL) {
            item = PyDict_GetItemWithError(kwargs, PyTuple_GET_ITEM(parameter, NAME));
            if (item != NULL)
                named++;
            else if (PyErr_Occurred())
                goto done;
        }
        if (item == NULL) {
            if (absent == c_required)
                goto done;
            values[place] = Py_NewRef(absent);
            continue;
        }
        long kind = PyLong_AsLong(PyTuple_GET_ITEM(parameter, KIND));
        if (read_argument(item, (int)kind, PyLong_AsSsize_t(PyTuple_GET_ITEM(parameter, LENGTH)), &values[place]) <= 0)
            goto done;
        int same = Py_TYPE(values[place]) == Py_TYPE(absent) ? PyObject_RichCompareBool(values[place], absent, Py_EQ) : 0;
        if (same < 0)
            goto done;
        if (!same)
            kept = place + 1;
    }
    if (named == (kwargs == NULL ? 0 : PyDict_GET_SIZE(kwargs)))
        bound = PyTuple_New(kept);
    for (Py_ssize_t number = 0; bound != NULL && number < kept; number++)
        PyTuple_SET_ITEM(bound, number, Py_NewRef(values[number]));
done:
    for (Py_ssize_t number = 0; number < count; number++)
        Py_XDECREF(values[number]);
    Py_XDECREF(several);
    return bound;
}

/* The op of a function of a list of tensors and a dimension (chainrule.function_arguments.Joined): 1 with a new reference; 0 for
 * calls that are left to Python; -1 with an error set. */
static int
read_joined(PyObject *op, PyObject *args, PyObject *kwargs, PyObject **read)
{
    Py_ssize_t given = PyTuple_GET_SIZE(args);
    PyObject *dim = given == 2 && kwargs == NULL ? PyTuple_GET_ITEM(args, 1) : NULL, *dtype = NULL;
    if (given == 1 && kwargs != NULL && PyDict_GET_SIZE(kwargs) == 1)
        dim = PyDict_GetItemWithError(kwargs, s_dim);
    if (given < 1 || (dim == NULL ? given > 1 || kwargs != NULL : !PyLong_CheckExact(dim)))
        return PyErr_Occurred() ? -1 : 0;
    PyObject *items = PyTuple_GET_ITEM(args, 0);
    if ((!PyList_CheckExact(items) && !PyTuple_CheckExact(items)) || PySequence_Fast_GET_SIZE(items) == 0)
        return 0;
    long rank = -1;
    int fits = 1;
    for (Py_ssize_t place = 0; fits > 0 && place < PySequence_Fast_GET_SIZE(items); place++) {
        PyObject *item = PySequence_Fast_GET_ITEM(items, place);
        if (!is_tensor(item)) {
            fits = 0;
            break;
        }
        PyObject *own = GET(item, dtype), *dims = own == NULL ? NULL : GET(item, ndim);
        long number = dims == NULL ? -1 : PyLong_AsLong(dims);
        fits = number < 0 ? -1 : place == 0 || (own == dtype && number == rank);
        if (place == 0) {
            dtype = own; /* of which torch keeps one each */
            rank = number;
        }
        Py_XDECREF(own);
        Py_XDECREF(dims);
    }
    PyObject *list = fits > 0 ? PySequence_List(items) : NULL;
    if (list == NULL)
        return fits > 0 ? -1 : fits;
    *read = dim == NULL ? Py_BuildValue("(O(Ni))", op, list, 0) : Py_BuildValue("(O(NO))", op, list, dim);
    return *read == NULL ? -1 : 1;
}

/* The op of a reduction (chainrule.function_arguments.Over), with the same results. */
static int
read_over(PyObject *op, PyObject *all, PyObject *args, PyObject *kwargs, PyObject **read)
{
    Py_ssize_t given = PyTuple_GET_SIZE(args), named = kwargs == NULL ? 0 : PyDict_GET_SIZE(kwargs);
    if (given < 1 || given > 3 || !is_tensor(PyTuple_GET_ITEM(args, 0)))
        return 0;
    if (given == 1 && named == 0) {
        if (all == Py_None)
            return 0;
        *read = PyTuple_Pack(2, all, args);
        return *read == NULL ? -1 : 1;
    }
    PyObject *tensor = PyTuple_GET_ITEM(args, 0), *dtype = GET(tensor, dtype);
    int floating = dtype == NULL ? -1 : PySet_Contains(c_floating, dtype);
    Py_XDECREF(dtype);
    if (floating <= 0)
        return floating;
    PyObject *dims = given > 1 ? PyTuple_GET_ITEM(args, 1) : NULL, *keep = given > 2 ? PyTuple_GET_ITEM(args, 2) : NULL, *list = NULL;
    if (dims == NULL && (dims = PyDict_GetItemWithError(kwargs, s_dim)) != NULL)
        named--;
    if (keep == NULL && named && (keep = PyDict_GetItemWithError(kwargs, s_keepdim)) != NULL)
        named--;
    if (dims == NULL || named || (keep != NULL && !PyBool_Check(keep)))
        return PyErr_Occurred() ? -1 : 0;
    if ((PyList_CheckExact(dims) || PyTuple_CheckExact(dims)) && PySequence_Fast_GET_SIZE(dims) == 0)
        return 0; /* which is all of them */
    int taken = read_argument(dims, INTS, 1, &list);
    if (taken > 0 && (*read = Py_BuildValue("(O(ONO))", op, tensor, list, keep == NULL ? Py_False : keep)) == NULL)
        taken = -1;
    return taken;
}

/* What a reading says of a call: the op and its arguments, or None; a new reference. */
static PyObject *
read_call(PyObject *reading, PyObject *args, PyObject *kwargs)
{
    PyObject *sort = (PyObject *)Py_TYPE(reading);
    if (sort == c_joined || sort == c_over) {
        PyObject *read = NULL;
        int taken = sort == c_joined ? read_joined(PyTuple_GET_ITEM(reading, 0), args, kwargs, &read)
                                     : read_over(PyTuple_GET_ITEM(reading, 0), PyTuple_GET_ITEM(reading, 1), args, kwargs, &read);
        if (taken)
            return taken < 0 ? NULL : read;
    }
    if (sort != c_by_schema) {
        PyObject *named = kwargs == NULL ? PyDict_New() : Py_NewRef(kwargs);
        if (named == NULL)
            return NULL;
        PyObject *given[] = {args, named};
        PyObject *read = PyObject_Vectorcall(reading, given, 2, NULL);
        Py_DECREF(named);
        return read;
    }
    PyObject *overloads = PyTuple_GET_ITEM(reading, 0);
    for (Py_ssize_t number = 0; number < PyTuple_GET_SIZE(overloads); number++) {
        PyObject *overload = PyTuple_GET_ITEM(overloads, number);
        PyObject *bound = bound_arguments(PyTuple_GET_ITEM(overload, 1), args, kwargs);
        if (bound != NULL) {
            PyObject *read = PyTuple_Pack(2, PyTuple_GET_ITEM(overload, 0), bound);
            Py_DECREF(bound);
            return read;
        }
        if (PyErr_Occurred())
            return NULL;
    }
    return Py_NewRef(Py_None);
}

/* read(reading, args, kwargs): what the compiled handlers read. */
static PyObject *
read_given(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3 || !PyTuple_CheckExact(args[1]) || !PyDict_CheckExact(args[2]))
        return PyErr_Format(PyExc_TypeError, "read: a reading, a tuple and a dictionary are expected");
    return read_call(args[0], args[1], PyDict_GET_SIZE(args[2]) ? args[2] : NULL);
}

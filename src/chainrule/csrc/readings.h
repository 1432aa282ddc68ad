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

/* The arguments of an overload that are given by name only, as pairs, but for those that are the defaults: how many are given, with
 * a new reference; -1, with an error set or without one, if the call is not meant. */
static Py_ssize_t
named_arguments(PyObject *parameters, PyObject *kwargs, PyObject **pairs)
{
    Py_ssize_t named = 0;
    PyObject *list = PyList_New(0);
    for (Py_ssize_t place = 0; list != NULL && place < PyTuple_GET_SIZE(parameters); place++) {
        PyObject *parameter = PyTuple_GET_ITEM(parameters, place), *name = PyTuple_GET_ITEM(parameter, NAME), *value = NULL;
        PyObject *item = PyDict_GetItemWithError(kwargs, name), *absent = PyTuple_GET_ITEM(parameter, DEFAULT);
        if (item == NULL && !PyErr_Occurred())
            continue;
        named++;
        long kind = item == NULL ? 0 : PyLong_AsLong(PyTuple_GET_ITEM(parameter, KIND));
        int fits = item == NULL ? -1 : read_argument(item, (int)kind, PyLong_AsSsize_t(PyTuple_GET_ITEM(parameter, LENGTH)), &value);
        int same = fits > 0 && Py_TYPE(value) == Py_TYPE(absent) ? PyObject_RichCompareBool(value, absent, Py_EQ) : 0;
        if (fits > 0 && same == 0) {
            if (PyList_CheckExact(value))
                Py_SETREF(value, PyList_AsTuple(value));
            fits = value != NULL && append_new(list, PyTuple_Pack(2, name, value)) == 0;
        }
        Py_XDECREF(value);
        if (fits <= 0 || same < 0)
            Py_CLEAR(list);
    }
    *pairs = list == NULL ? NULL : PyList_AsTuple(list);
    Py_XDECREF(list);
    return *pairs == NULL ? -1 : named;
}

/* The positional arguments of an overload, of which `named` are given by name only: a new reference; NULL with an error set, or
 * without one if the call is not meant. */
static PyObject *
bound_arguments(PyObject *parameters, PyObject *args, PyObject *kwargs, Py_ssize_t named)
{
    Py_ssize_t count = PyTuple_GET_SIZE(parameters), given = PyTuple_GET_SIZE(args), kept = 0, place = 0;
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

/* What readings in Python said, by what they can go by: the reading, and of the arguments the plain values, and of tensors shape,
 * dtype, device and layout. An entry has the op, the arguments, the places of the call's tensors among these (-1 for other
 * arguments), and pairs or None. */
static PyObject *remembered = NULL;

enum { MOST_REMEMBERED = 4096 };
enum { SAID_OP, SAID_ARGS, SAID_PLACES, SAID_PAIRS };

/* Add what a reading can go by of an argument: 1; 0 if it is not written down; -1 with an error set. */
static int
add_to_key(PyObject *key, PyObject *item, int tensors)
{
    if (tensors && is_constant_class(item)) {
        int kept = append_new(key, GET(item, shape)) < 0 || append_new(key, GET(item, dtype)) < 0 ||
                   append_new(key, GET(item, device)) < 0 || append_new(key, GET(item, layout)) < 0;
        return kept ? -1 : 1;
    }
    if (PyList_Append(key, (PyObject *)Py_TYPE(item)) < 0)
        return -1;
    if (PyList_CheckExact(item) || PyTuple_CheckExact(item)) {
        int outcome = append_new(key, PyLong_FromSsize_t(PySequence_Fast_GET_SIZE(item))) < 0 ? -1 : 1;
        for (Py_ssize_t place = 0; outcome > 0 && place < PySequence_Fast_GET_SIZE(item); place++)
            outcome = add_to_key(key, PySequence_Fast_GET_ITEM(item, place), 0);
        return outcome;
    }
    /* Zeros of either sign are equal. */
    if (PyFloat_CheckExact(item) && PyFloat_AS_DOUBLE(item) == 0.0 &&
        PyList_Append(key, signbit(PyFloat_AS_DOUBLE(item)) ? Py_True : Py_False) < 0)
        return -1;
    int plain = PySet_Contains(c_plain, (PyObject *)Py_TYPE(item));
    return plain > 0 && PyList_Append(key, item) < 0 ? -1 : plain;
}

/* The key of a call: 1 with a new reference; 0 if it has none; -1 with an error set. */
static int
key_of_call(PyObject *reading, PyObject *args, PyObject *kwargs, PyObject **key)
{
    PyObject *parts = PyList_New(0), *name, *item;
    Py_ssize_t next = 0;
    int outcome = parts == NULL || PyList_Append(parts, reading) < 0 ? -1 : 1;
    for (Py_ssize_t place = 0; outcome > 0 && place < PyTuple_GET_SIZE(args); place++) {
        item = PyTuple_GET_ITEM(args, place);
        outcome = add_to_key(parts, item, 1);
        /* One tensor given twice is not two of one shape: what was said goes by the place of each. */
        for (Py_ssize_t other = 0; outcome > 0 && other < place; other++)
            if (PyTuple_GET_ITEM(args, other) == item && is_constant_class(item)) {
                outcome = append_new(parts, PyLong_FromSsize_t(other)) < 0 ? -1 : 1;
                break;
            }
    }
    while (outcome > 0 && kwargs != NULL && PyDict_Next(kwargs, &next, &name, &item))
        outcome = PyList_Append(parts, name) < 0 ? -1 : add_to_key(parts, item, 0);
    if (outcome > 0 && (*key = PyList_AsTuple(parts)) == NULL)
        outcome = -1;
    Py_XDECREF(parts);
    return outcome;
}

/* Whether no tensor is inside of an argument: 1, 0, or -1 with an error set. */
static int
has_no_tensor(PyObject *item)
{
    int outcome = is_any_tensor(item);
    outcome = outcome < 0 ? -1 : !outcome;
    if (outcome > 0 && (PyList_Check(item) || PyTuple_Check(item)))
        for (Py_ssize_t place = 0; outcome > 0 && place < PySequence_Fast_GET_SIZE(item); place++)
            outcome = has_no_tensor(PySequence_Fast_GET_ITEM(item, place));
    return outcome;
}

/* The place of an object among the arguments of a call, if it is a tensor that is known by its shape; -1 otherwise. */
static Py_ssize_t
place_among(PyObject *args, PyObject *item)
{
    Py_ssize_t found = is_constant_class(item) ? PyTuple_GET_SIZE(args) - 1 : -1;
    while (found >= 0 && PyTuple_GET_ITEM(args, found) != item)
        found--;
    return found;
}

/* Where an argument of an op comes from: the place of a tensor, a tuple of such places for a list of tensors, or -1; a new reference,
 * None where it cannot be said. */
static PyObject *
source_of(PyObject *args, PyObject *item)
{
    Py_ssize_t found = place_among(args, item);
    if (found >= 0)
        return PyLong_FromSsize_t(found);
    if (PyList_CheckExact(item) && PyList_GET_SIZE(item) && place_among(args, PyList_GET_ITEM(item, 0)) >= 0) {
        PyObject *places = PyTuple_New(PyList_GET_SIZE(item));
        for (Py_ssize_t number = 0; places != NULL && number < PyList_GET_SIZE(item); number++) {
            found = place_among(args, PyList_GET_ITEM(item, number));
            PyObject *place = PyLong_FromSsize_t(found);
            if (found < 0 || place == NULL) {
                Py_XDECREF(place);
                Py_DECREF(places);
                return found < 0 ? Py_NewRef(Py_None) : NULL;
            }
            PyTuple_SET_ITEM(places, number, place);
        }
        return places;
    }
    int plain = has_no_tensor(item);
    return plain < 0 ? NULL : plain ? PyLong_FromLong(-1) : Py_NewRef(Py_None);
}

/* An argument as its source says; a new reference. */
static PyObject *
from_source(PyObject *source, PyObject *item, PyObject *args)
{
    if (!PyTuple_CheckExact(source)) {
        Py_ssize_t place = PyLong_AsSsize_t(source);
        return Py_NewRef(place < 0 ? item : PyTuple_GET_ITEM(args, place));
    }
    PyObject *list = PyList_New(PyTuple_GET_SIZE(source));
    for (Py_ssize_t number = 0; list != NULL && number < PyTuple_GET_SIZE(source); number++)
        PyList_SET_ITEM(list, number, Py_NewRef(PyTuple_GET_ITEM(args, PyLong_AsSsize_t(PyTuple_GET_ITEM(source, number)))));
    return list;
}

/* Write down what a reading said: 0, or -1 with an error set. */
static int
remember(PyObject *key, PyObject *args, PyObject *read)
{
    if (read == Py_None)
        return PyDict_SetItem(remembered, key, read);
    PyObject *said = PyTuple_GET_ITEM(read, 1), *places = PyTuple_New(PyTuple_GET_SIZE(said)), *kept = PySequence_List(said);
    int outcome = places == NULL || kept == NULL ? -1 : 1;
    for (Py_ssize_t number = 0; outcome > 0 && number < PyTuple_GET_SIZE(said); number++) {
        PyObject *source = source_of(args, PyTuple_GET_ITEM(said, number));
        outcome = source == NULL ? -1 : source != Py_None;
        int kept_here = outcome > 0 && PyLong_CheckExact(source) && PyLong_AsSsize_t(source) < 0;
        if (outcome > 0 && !kept_here && PyList_SetItem(kept, number, Py_NewRef(Py_None)) < 0)
            outcome = -1;
        PyTuple_SET_ITEM(places, number, source);
    }
    PyObject *items = outcome > 0 ? PyList_AsTuple(kept) : NULL, *entry = NULL;
    if (items != NULL) {
        PyObject *pairs = PyTuple_GET_SIZE(read) > 2 ? PyTuple_GET_ITEM(read, 2) : Py_None;
        if (PyDict_GET_SIZE(remembered) >= MOST_REMEMBERED)
            PyDict_Clear(remembered);
        entry = PyTuple_Pack(4, PyTuple_GET_ITEM(read, 0), items, places, pairs);
        outcome = entry == NULL ? -1 : PyDict_SetItem(remembered, key, entry);
    }
    Py_XDECREF(entry);
    Py_XDECREF(items);
    Py_XDECREF(places);
    Py_XDECREF(kept);
    return outcome < 0 ? -1 : 0;
}

/* What was said of a call like this one, about its own tensors; a new reference. */
static PyObject *
said_again(PyObject *entry, PyObject *args)
{
    if (entry == Py_None)
        return Py_NewRef(entry);
    PyObject *items = PyTuple_GET_ITEM(entry, SAID_ARGS), *places = PyTuple_GET_ITEM(entry, SAID_PLACES);
    PyObject *pairs = PyTuple_GET_ITEM(entry, SAID_PAIRS), *given = PyTuple_New(PyTuple_GET_SIZE(items)), *read;
    if (given == NULL)
        return NULL;
    for (Py_ssize_t number = 0; number < PyTuple_GET_SIZE(items); number++) {
        PyObject *item = from_source(PyTuple_GET_ITEM(places, number), PyTuple_GET_ITEM(items, number), args);
        if (item == NULL) {
            Py_DECREF(given);
            return NULL;
        }
        PyTuple_SET_ITEM(given, number, item);
    }
    read = pairs == Py_None ? PyTuple_Pack(2, PyTuple_GET_ITEM(entry, SAID_OP), given)
                            : PyTuple_Pack(3, PyTuple_GET_ITEM(entry, SAID_OP), given, pairs);
    Py_DECREF(given);
    return read;
}

/* What a reading in Python says of a call; a new reference. */
static PyObject *
ask_reading(PyObject *reading, PyObject *args, PyObject *kwargs)
{
    PyObject *key = NULL;
    if (remembered == NULL && (remembered = PyDict_New()) == NULL)
        return NULL;
    int has_key = key_of_call(reading, args, kwargs, &key);
    PyObject *entry = has_key > 0 ? PyDict_GetItemWithError(remembered, key) : NULL, *read = NULL;
    if (entry != NULL) {
        Py_INCREF(entry);
        read = said_again(entry, args);
        Py_DECREF(entry);
    } else if (has_key >= 0 && !PyErr_Occurred()) {
        PyObject *named = kwargs == NULL ? PyDict_New() : Py_NewRef(kwargs), *given[] = {args, named};
        read = named == NULL ? NULL : PyObject_Vectorcall(reading, given, 2, NULL);
        Py_XDECREF(named);
        if (read != NULL && key != NULL && remember(key, args, read) < 0)
            Py_CLEAR(read);
    }
    Py_XDECREF(key);
    return read;
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
    if (sort != c_by_schema)
        return ask_reading(reading, args, kwargs);
    PyObject *overloads = PyTuple_GET_ITEM(reading, 0);
    for (Py_ssize_t number = 0; number < PyTuple_GET_SIZE(overloads); number++) {
        PyObject *overload = PyTuple_GET_ITEM(overloads, number);
        PyObject *by_name = PyTuple_GET_ITEM(overload, 2), *pairs = NULL, *read = NULL;
        Py_ssize_t named = kwargs != NULL && PyTuple_GET_SIZE(by_name) ? named_arguments(by_name, kwargs, &pairs) : 0;
        PyObject *bound = named < 0 ? NULL : bound_arguments(PyTuple_GET_ITEM(overload, 1), args, kwargs, named);
        if (bound != NULL && pairs != NULL && PyTuple_GET_SIZE(pairs))
            read = PyTuple_Pack(3, PyTuple_GET_ITEM(overload, 0), bound, pairs);
        else if (bound != NULL)
            read = PyTuple_Pack(2, PyTuple_GET_ITEM(overload, 0), bound);
        Py_XDECREF(pairs);
        Py_XDECREF(bound);
        if (bound != NULL)
            return read;
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

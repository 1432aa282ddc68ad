/* Whether places hold what they held: what a compiled function found outside of its arguments. Part of shortcuts.c. */

enum { CELL = 0, ITEM = 1, ATTRIBUTE = 2, SIZE = 3, EQUAL = 4, TABLE = 5, TYPE = 6, LACKS = 7, EMPTY = 8 };

/* Watch(same, places): each place is (kind, container, key, value, by_value), see chainrule.shortcuts. */
typedef struct {
    PyObject_HEAD
    PyObject *same;
    PyObject *places;
} Watch;

/* What stands at a place, a new reference; NULL with an error set, or without one where it is known that nothing does. */
static PyObject *
watched(long kind, PyObject *container, PyObject *key)
{
    if (kind == CELL && PyCell_Check(container))
        return Py_XNewRef(PyCell_GET(container));
    if (kind == ITEM && PyDict_CheckExact(container))
        return Py_XNewRef(PyDict_GetItemWithError(container, key));
    if (kind == CELL)
        return PyObject_GetAttrString(container, "cell_contents");
    return kind == ITEM ? PyObject_GetItem(container, key) : PyObject_GetAttr(container, key);
}

/* Whether two plain values are the same: 1, 0, or -1 with an error set. */
static int
holds_by_value(Watch *self, PyObject *found, PyObject *value)
{
    PyObject *args[] = {found, value};
    Py_INCREF(found);
    PyObject *answer = PyObject_Vectorcall(self->same, args, 2, NULL);
    Py_DECREF(found);
    int holds = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return holds;
}

/* Whether a dictionary, a list or a class has the entries that it had: 1, 0, or -1 with an error set. */
static int
table_holds(Watch *self, PyObject *container, PyObject *keys, PyObject *values, PyObject *by_value)
{
    Py_ssize_t count = PyTuple_GET_SIZE(keys), next = 0;
    int is_list = PyList_Check(container), holds = 1;
    PyObject *table = Py_NewRef(container);
    if (PyType_Check(container))
#if PY_VERSION_HEX >= 0x030C0000
        Py_SETREF(table, PyType_GetDict((PyTypeObject *)container));
#else
        Py_SETREF(table, Py_XNewRef(((PyTypeObject *)container)->tp_dict));
#endif
    if (table == NULL || (is_list ? PyList_GET_SIZE(table) : PyDict_GET_SIZE(table)) != count)
        holds = 0;
    for (Py_ssize_t number = 0; holds > 0 && number < count; number++) {
        PyObject *key = PyTuple_GET_ITEM(keys, number), *value = PyTuple_GET_ITEM(values, number), *at = NULL, *found = NULL;
        if (is_list)
            found = number < PyList_GET_SIZE(table) ? PyList_GET_ITEM(table, number) : NULL;
        else if (!PyDict_Next(table, &next, &at, &found) || at != key)
            found = PyDict_GetItemWithError(table, key);
        if (found == NULL)
            holds = PyErr_Occurred() ? -1 : 0;
        else if (found != value && value != Py_NotImplemented)
            holds = by_value != Py_False && PyTuple_GET_ITEM(by_value, number) == Py_True ? holds_by_value(self, found, value) : 0;
    }
    Py_XDECREF(table);
    return holds;
}

/* Whether a dictionary has none of some names: 1, 0, or -1 with an error set. */
static int
lacks_all(PyObject *table, PyObject *names)
{
    for (Py_ssize_t number = 0; number < PyTuple_GET_SIZE(names); number++) {
        int has = PyDict_Contains(table, PyTuple_GET_ITEM(names, number));
        if (has)
            return has < 0 ? -1 : 0;
    }
    return 1;
}

/* Whether dictionaries have no entries. */
static int
all_empty(PyObject *tables)
{
    for (Py_ssize_t number = 0; number < PyTuple_GET_SIZE(tables); number++)
        if (PyDict_GET_SIZE(PyTuple_GET_ITEM(tables, number)))
            return 0;
    return 1;
}

/* 1, 0, or -1 with an error set. */
static int
place_holds(Watch *self, PyObject *place)
{
    long kind = PyLong_AsLong(PyTuple_GET_ITEM(place, 0));
    PyObject *container = PyTuple_GET_ITEM(place, 1), *key = PyTuple_GET_ITEM(place, 2), *value = PyTuple_GET_ITEM(place, 3);
    if (kind == SIZE) {
        Py_ssize_t size = PyObject_Size(container);
        return size < 0 ? -1 : size == PyLong_AsSsize_t(value);
    }
    if (kind == TYPE)
        return (PyObject *)Py_TYPE(container) == value;
    if (kind == TABLE)
        return table_holds(self, container, key, value, PyTuple_GET_ITEM(place, 4));
    if (kind == LACKS)
        return lacks_all(container, value);
    if (kind == EMPTY)
        return all_empty(value);
    PyObject *answer = NULL;
    if (kind == EQUAL) {
        PyObject *args[] = {key, value};
        answer = PyObject_Vectorcall(container, args, 2, NULL);
    } else {
        PyObject *found = watched(kind, container, key);
        if (found == NULL)
            return PyErr_Occurred() ? -1 : 0;
        if (found == value || PyTuple_GET_ITEM(place, 4) != Py_True) {
            int holds = found == value;
            Py_DECREF(found);
            return holds;
        }
        int holds = holds_by_value(self, found, value);
        Py_DECREF(found);
        return holds;
    }
    if (answer == NULL)
        return -1;
    int holds = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return holds;
}

static PyObject *
watch_call(Watch *self, PyObject *args, PyObject *kwargs)
{
    for (Py_ssize_t number = 0; number < PyTuple_GET_SIZE(self->places); number++) {
        int holds = place_holds(self, PyTuple_GET_ITEM(self->places, number));
        if (holds < 0) {
            if (!PyErr_ExceptionMatches(PyExc_AttributeError) && !PyErr_ExceptionMatches(PyExc_LookupError) &&
                !PyErr_ExceptionMatches(PyExc_ValueError))
                return NULL;
            PyErr_Clear();
        }
        if (holds <= 0)
            Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

/* Whether what a place holds is what its kind is read by. */
static int
fits_its_kind(PyObject *place)
{
    long kind = PyLong_AsLong(PyTuple_GET_ITEM(place, 0));
    PyObject *container = PyTuple_GET_ITEM(place, 1), *keys = PyTuple_GET_ITEM(place, 2), *values = PyTuple_GET_ITEM(place, 3);
    PyObject *by_value = PyTuple_GET_ITEM(place, 4);
    if (kind == LACKS)
        return PyDict_Check(container) && PyTuple_CheckExact(values);
    if (kind == EMPTY) {
        int fits = PyTuple_CheckExact(values);
        for (Py_ssize_t number = 0; fits && number < PyTuple_GET_SIZE(values); number++)
            fits = PyDict_Check(PyTuple_GET_ITEM(values, number));
        return fits;
    }
    if (kind != TABLE)
        return 1;
    if (!(PyDict_Check(container) || PyList_Check(container) || PyType_Check(container)) || !PyTuple_CheckExact(keys))
        return 0;
    Py_ssize_t count = PyTuple_GET_SIZE(keys);
    if (!PyTuple_CheckExact(values) || PyTuple_GET_SIZE(values) != count)
        return 0;
    return by_value == Py_False || (PyTuple_CheckExact(by_value) && PyTuple_GET_SIZE(by_value) == count);
}

static PyObject *
watch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *same, *places;
    if (!PyArg_ParseTuple(args, "OO!", &same, &PyTuple_Type, &places))
        return NULL;
    for (Py_ssize_t number = 0; number < PyTuple_GET_SIZE(places); number++) {
        PyObject *place = PyTuple_GET_ITEM(places, number);
        if (!PyTuple_CheckExact(place) || PyTuple_GET_SIZE(place) != 5 || !PyLong_CheckExact(PyTuple_GET_ITEM(place, 0)))
            return PyErr_Format(PyExc_TypeError, "Watch: a place is (kind, container, key, value, by_value), got %R", place);
        if (!fits_its_kind(place))
            return PyErr_Format(PyExc_TypeError, "Watch: a table, or names that are lacking, are other than expected: %R", place);
    }
    Watch *self = (Watch *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->same = Py_NewRef(same);
        self->places = Py_NewRef(places);
    }
    return (PyObject *)self;
}

static int
watch_traverse(Watch *self, visitproc visit, void *arg)
{
    Py_VISIT(self->same);
    Py_VISIT(self->places);
    return 0;
}

static int
watch_clear(Watch *self)
{
    Py_CLEAR(self->same);
    Py_CLEAR(self->places);
    return 0;
}

static void
watch_dealloc(Watch *self)
{
    PyObject_GC_UnTrack(self);
    watch_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject watch_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "chainrule._shortcuts.Watch",
    .tp_doc = "Called, it says whether places hold what they held.",
    .tp_basicsize = sizeof(Watch),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = watch_new,
    .tp_dealloc = (destructor)watch_dealloc,
    .tp_traverse = (traverseproc)watch_traverse,
    .tp_clear = (inquiry)watch_clear,
    .tp_call = (ternaryfunc)watch_call,
};

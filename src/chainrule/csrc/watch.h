/* Whether places hold what they held: what a compiled function found outside of its arguments. Part of shortcuts.c. */

enum { CELL = 0, ITEM = 1, ATTRIBUTE = 2, SIZE = 3, EQUAL = 4 };

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
        PyObject *args[] = {found, value};
        answer = PyObject_Vectorcall(self->same, args, 2, NULL);
        Py_DECREF(found);
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

/* Methods of BatchTensor. Part of shortcuts.c. */

/* Method(function, otherwise): a function of the table as a method of BatchTensor, which needs no function mode under its own
 * level; with None for the function, calls that are known are replayed. Every other call goes to `otherwise`, torch's own method. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *function;
    PyObject *otherwise;
} Method;

/* A call that was made before; NotImplemented, with nothing done, for others. */
static PyObject *
replay_method(Handler *handler, PyObject *func, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    if (handler->guarded || handler->graphs || c_known == NULL)
        return Py_NewRef(Py_NotImplemented);
    PyObject *given = PyTuple_New(count), *kwargs = names == NULL ? NULL : PyDict_New(), *out = NULL;
    if (given == NULL || (names != NULL && kwargs == NULL))
        goto done;
    for (Py_ssize_t place = 0; place < count; place++)
        PyTuple_SET_ITEM(given, place, Py_NewRef(args[place]));
    for (Py_ssize_t place = 0; names != NULL && place < PyTuple_GET_SIZE(names); place++)
        if (PyDict_SetItem(kwargs, PyTuple_GET_ITEM(names, place), args[count + place]) < 0)
            goto done;
    out = run_known(handler, func, given, kwargs);
done:
    Py_XDECREF(given);
    Py_XDECREF(kwargs);
    return out;
}

static PyObject *
method_call(PyObject *callable, PyObject *const *args, size_t flagged, PyObject *names)
{
    Method *self = (Method *)callable;
    Py_ssize_t count = PyVectorcall_NARGS(flagged);
    int replayed = self->function == Py_None;
    if (count >= 1 && (replayed || (names == NULL && count <= 2)) && (PyObject *)Py_TYPE(args[0]) == c_batch_tensor) {
        Handler *handler = (Handler *)SLOT(args[0], level);
        /* A mode that stands among the functions stands there alone, unless another was entered inside of it. */
        if (handler != NULL && PyObject_TypeCheck(handler, &handler_type) && handler->kind == VMAP &&
            (handler->below == NULL || handler->below == Py_None) && state.function_modes() == 1 &&
            state.functions_shown() && stands_innermost(handler)) {
            int disabled = state.get_functions();
            state.set_functions(2);
            PyObject *out = replayed ? replay_method(handler, self->otherwise, args, count, names)
                                     : run_under_vmap(handler, self->function, args, count, 0);
            state.set_functions(disabled);
            if (out != Py_NotImplemented)
                return out;
            Py_DECREF(out);
        }
    }
    return PyObject_Vectorcall(self->otherwise, args, flagged, names);
}

static PyObject *
method_bound(PyObject *self, PyObject *object, PyObject *type)
{
    return object == NULL || object == Py_None ? Py_NewRef(self) : PyMethod_New(self, object);
}

static PyObject *
method_attribute(PyObject *self, PyObject *name)
{
    PyObject *found = PyObject_GenericGetAttr(self, name);
    if (found != NULL || !PyErr_ExceptionMatches(PyExc_AttributeError))
        return found;
    PyErr_Clear();
    return PyObject_GetAttr(((Method *)self)->otherwise, name);
}

static PyObject *
method_doc(PyObject *self, void *unused)
{
    return PyObject_GetAttrString(((Method *)self)->otherwise, "__doc__");
}

static PyGetSetDef method_properties[] = {
    {"__doc__", method_doc, NULL, NULL, NULL},
    {NULL},
};

static PyObject *
method_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *function, *otherwise;
    if (!PyArg_ParseTuple(args, "OO", &function, &otherwise))
        return NULL;
    if (function != Py_None && (!PyTuple_Check(function) || PyTuple_GET_SIZE(function) != FIELDS))
        return PyErr_Format(PyExc_TypeError, "Method: a function of the table has %d fields", FIELDS);
    Method *self = (Method *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->vectorcall = method_call;
        self->function = Py_NewRef(function);
        self->otherwise = Py_NewRef(otherwise);
    }
    return (PyObject *)self;
}

static int
method_traverse(Method *self, visitproc visit, void *arg)
{
    Py_VISIT(self->function);
    Py_VISIT(self->otherwise);
    return 0;
}

static int
method_clear(Method *self)
{
    Py_CLEAR(self->function);
    Py_CLEAR(self->otherwise);
    return 0;
}

static void
method_dealloc(Method *self)
{
    PyObject_GC_UnTrack(self);
    method_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject method_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "chainrule._shortcuts.Method",
    .tp_basicsize = sizeof(Method),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR,
    .tp_vectorcall_offset = offsetof(Method, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_descr_get = method_bound,
    .tp_getattro = method_attribute,
    .tp_getset = method_properties,
    .tp_new = method_new,
    .tp_dealloc = (destructor)method_dealloc,
    .tp_traverse = (traverseproc)method_traverse,
    .tp_clear = (inquiry)method_clear,
};

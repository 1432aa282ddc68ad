/* The base class of the modes: which calls are taken here. Part of shortcuts.c. */

/* Whether the innermost mode is this one, and torch.func is not at work: 1, 0, or -1 with an error set. */
static int
stands_innermost(Handler *self)
{
    if (state.exclude != NULL)
        return state.dispatch_modes() == self->depth && !state.included(state.functorch);
    PyObject *count = PyObject_CallNoArgs(c_count);
    if (count == NULL)
        return -1;
    Py_ssize_t depth = PyLong_AsSsize_t(count);
    Py_DECREF(count);
    if (depth != self->depth)
        return 0;
    PyObject *level = PyObject_CallNoArgs(c_level);
    if (level == NULL)
        return -1;
    Py_DECREF(level);
    return level == Py_None;
}

/* Whether the classes that torch names beside a call take no functions themselves. Methods without arguments name their own. */
static int
are_plain(PyObject *types)
{
    for (Py_ssize_t place = 0; place < PyTuple_GET_SIZE(types); place++) {
        PyObject *type = PyTuple_GET_ITEM(types, place);
        if (type != c_tensor && type != c_batch_tensor)
            return 0;
    }
    return 1;
}

/* Whether the named arguments of a function of the table change nothing (chainrule.functions.NEUTRAL). */
static int
is_neutral(PyObject *kwargs)
{
    return PyDict_GET_SIZE(kwargs) == 1 && PyDict_GetItemWithError(kwargs, s_inplace) == Py_False;
}

enum { QUERY = 1, MAKES_NEW = 2 };

/* tensor[index] where that is a view of a tensor from outside of a vmap, which is none of the level's; NotImplemented for others. */
static PyObject *
view_outside(PyObject *args)
{
    if (PyTuple_GET_SIZE(args) != 2 || (PyObject *)Py_TYPE(PyTuple_GET_ITEM(args, 0)) != c_tensor || !chooses_view(PyTuple_GET_ITEM(args, 1)))
        return Py_NewRef(Py_NotImplemented);
    return call_below(c_getitem, &PyTuple_GET_ITEM(args, 0), 2, 0);
}

/* A new tensor of numbers, which is the same for all samples of a level; NotImplemented for other calls. */
static PyObject *
made_on_level(Handler *level, PyObject *func, PyObject *args, PyObject *kwargs)
{
    int made = level->guarded || level->graphs ? 0 : PySet_Contains(c_makers, func);
    Py_ssize_t next = 0;
    PyObject *name, *value;
    for (Py_ssize_t place = 0; made > 0 && place < PyTuple_GET_SIZE(args); place++) {
        value = PyTuple_GET_ITEM(args, place);
        made = is_any_number(value) || holds_numbers(value) ? 1 : PySet_Contains(c_plain, (PyObject *)Py_TYPE(value));
    }
    while (made > 0 && kwargs != NULL && PyDict_Next(kwargs, &next, &name, &value))
        made = PyUnicode_CompareWithASCIIString(name, "requires_grad") == 0 ? 0
               : holds_numbers(value)                                      ? 1
                                                                           : PySet_Contains(c_plain, (PyObject *)Py_TYPE(value));
    if (made <= 0)
        return made < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *out = call_given_below(func, args, kwargs);
    PyObject *layout = out == NULL ? NULL : GET(out, layout);
    Py_XDECREF(layout);
    if (layout == c_strided)
        Py_SETREF(out, wrapped_constant((PyObject *)level, out));
    else if (layout == NULL)
        Py_CLEAR(out);
    return out;
}

/* A call that is shown to the mode, taken here: NotImplemented, with nothing done, leaves it to the Python method. */
static PyObject *
take(Handler *self, PyObject *func, PyObject *types, PyObject *args, PyObject *kwargs)
{
    PyObject *entry = PyDict_GetItemWithError(c_entries, func);
    if (entry == NULL && PyErr_Occurred())
        return NULL;
    long sorts = entry == NULL ? 0 : PyLong_AsLong(PyTuple_GET_ITEM(entry, SORTS));
    if (sorts & QUERY)
        return PyObject_Call(func, args, kwargs);
    int near = is_near_torch(self); /* with a level between two modes, functions and ops of the table alone are taken */
    if (!(near || stands_among_handlers(self)) || !are_plain(types))
        return Py_NewRef(Py_NotImplemented);
    PyObject *function = NULL, *reading = NULL;
    if (entry != NULL && PyTuple_GET_ITEM(entry, FUNCTION) != Py_None && (kwargs == NULL || is_neutral(kwargs)))
        function = PyTuple_GET_ITEM(entry, FUNCTION);
    if (entry != NULL && self->kind == TAPE && PyTuple_GET_ITEM(entry, READING) != Py_None)
        reading = PyTuple_GET_ITEM(entry, READING);
    if (self->kind == VMAP && (self->below == NULL || self->below == Py_None) && !self->guarded && !self->graphs &&
        c_known != NULL) {
        int innermost = stands_innermost(self);
        if (innermost <= 0)
            return innermost < 0 ? NULL : Py_NewRef(Py_NotImplemented);
        PyObject *out = Py_NewRef(Py_NotImplemented);
        if (entry != NULL && kwargs == NULL && PyTuple_GET_ITEM(entry, WRITER) != Py_None)
            function = PyTuple_GET_ITEM(entry, WRITER);
        if (func == c_getitem)
            Py_SETREF(out, view_outside(args));
        if (function != NULL && PyTuple_GET_SIZE(function) == FIELDS)
            Py_SETREF(out, run_under_vmap(self, function, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), 0));
        if (out == Py_NotImplemented && sorts & MAKES_NEW)
            Py_SETREF(out, made_on_level(self, func, args, kwargs));
        if (out == Py_NotImplemented)
            Py_SETREF(out, run_known(self, func, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), kwargs));
        return out;
    }
    int fresh = self->kind == TAPE && self->depth == 1 && sorts & MAKES_NEW;
    int makes_shape = !fresh && sorts & MAKES_NEW && kwargs == NULL && vmap_below(self) != NULL && !is_listened(self) &&
                      c_known != NULL && !((Handler *)self->below)->guarded && !((Handler *)self->below)->graphs
                          ? PySet_Contains(c_shaped, func) : 0;
    if (makes_shape < 0)
        return NULL;
    int composite = near && entry == NULL && takes_composites(self) ? may_be_composite(func) : 0;
    if (composite < 0)
        return NULL;
    int assigns = near && self->kind == TAPE && func == c_setitem && kwargs == NULL;
    int ignores = self->kind == TAPE && !fresh && !makes_shape && sorts & MAKES_NEW && vmap_below(self) != NULL && !is_listened(self);
    int compares = ignores && kwargs == NULL && function != NULL ? PySet_Contains(c_comparisons, func) : 0;
    int converts = ignores && kwargs == NULL && function == NULL ? PySet_Contains(c_converting, func) : 0;
    int makes = ignores && function == NULL ? PySet_Contains(c_makers, func) : 0;
    if (compares < 0 || converts < 0 || makes < 0)
        return NULL;
    if (function == NULL && reading == NULL && !fresh && !makes_shape && !converts && !makes && !(ignores && func == c_make_tensor) && !composite && !assigns) /* conversions are among the fresh ones */
        return Py_NewRef(Py_NotImplemented);
    int innermost = stands_innermost(self);
    if (innermost <= 0)
        return innermost < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    if (composite) {
        int autocast = autocast_is_on();
        if (autocast)
            return autocast < 0 ? NULL : Py_NewRef(Py_NotImplemented);
        return run_composite(self, func, types, args, kwargs);
    }
    PyObject *out = Py_NewRef(Py_NotImplemented);
    if (assigns)
        Py_SETREF(out, run_assign(self, args));
    if (fresh || (ignores && func == c_make_tensor)) /* a tensor made of numbers is a constant for every mode */
        Py_SETREF(out, run_ignored(self, func, args, kwargs));
    else if (makes)
        Py_SETREF(out, made_on_level((Handler *)self->below, func, args, kwargs));
    else if (compares || converts)
        Py_SETREF(out, run_ignored_below(self, func, compares ? function : NULL, args));
    else if (makes_shape) /* that of another tensor: nothing of it is recorded */
        Py_SETREF(out, run_known((Handler *)self->below, func, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), NULL));
    if (out == Py_NotImplemented && function != NULL && PyTuple_GET_SIZE(function) == FIELDS && !compares)
        Py_SETREF(out, self->kind == TAPE ? run_on_tape(self, function, args)
                                          : run_under_vmap(self, function, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), 0));
    if (out == Py_NotImplemented && fresh + (func == c_where))
        Py_SETREF(out, run_converted(self, func, args, kwargs));
    if (out == Py_NotImplemented && reading != NULL && func == c_getitem)
        Py_SETREF(out, kwargs == NULL ? run_index(self, func, args) : Py_NewRef(Py_NotImplemented));
    else if (out == Py_NotImplemented && reading != NULL)
        Py_SETREF(out, run_read(self, func, reading, args, kwargs));
    return out;
}

static PyObject *
torch_function(Handler *self, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    if (names == NULL && nargs >= 3 && PyTuple_CheckExact(args[2]) && PyTuple_Check(args[1]) &&
        (nargs == 3 || args[3] == Py_None || PyDict_CheckExact(args[3]))) {
        PyObject *kwargs = nargs > 3 && args[3] != Py_None && PyDict_GET_SIZE(args[3]) ? args[3] : NULL;
        PyObject *out = take(self, args[0], args[1], args[2], kwargs);
        if (out != Py_NotImplemented)
            return out;
        Py_DECREF(out);
    }
    PyObject *method = PyObject_GetAttr((PyObject *)self, s_take_function);
    if (method == NULL)
        return NULL;
    PyObject *out = PyObject_Vectorcall(method, args, nargs, names);
    Py_DECREF(method);
    return out;
}

static int
handler_traverse(Handler *self, visitproc visit, void *arg)
{
#define VISIT_FIELD(name) Py_VISIT(self->name);
    OBJECTS(VISIT_FIELD)
    return 0;
}

static int
handler_clear(Handler *self)
{
#define CLEAR_FIELD(name) Py_CLEAR(self->name);
    OBJECTS(CLEAR_FIELD)
    return 0;
}

static void
handler_dealloc(Handler *self)
{
    PyObject_GC_UnTrack(self);
    handler_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef handler_methods[] = {
    {"__torch_function__", (PyCFunction)(void (*)(void))torch_function, METH_FASTCALL | METH_KEYWORDS,
     "Take a function of the table; whatever is not plain goes to take_function."},
    {"_run_common", (PyCFunction)(void (*)(void))handler_run_common, METH_FASTCALL,
     "Run an op of plain arguments and record it; NotImplemented, with nothing done, for others."},
    {"_run_part_at_once", (PyCFunction)(void (*)(void))handler_run_part, METH_FASTCALL | METH_KEYWORDS,
     "Run and record a part of an op."},
    {"_run_seen", (PyCFunction)(void (*)(void))handler_run_seen, METH_FASTCALL,
     "Call a function on tensors without a graph, as views and writes have to be."},
    {"__enter__", (PyCFunction)handler_enter, METH_NOARGS, "Enter the mode."},
    {"__exit__", (PyCFunction)(void (*)(void))handler_exit, METH_FASTCALL, "Leave the mode."},
    {"_begin", (PyCFunction)(void (*)(void))handler_begin, METH_FASTCALL, "Make the tables of a tape."},
    {"_begin_level", (PyCFunction)(void (*)(void))handler_begin_level, METH_FASTCALL, "Begin a level of vmap."},
    {"_run_recorded", (PyCFunction)(void (*)(void))handler_run, METH_FASTCALL, "Call a function below autograd with this tape on."},
    {NULL},
};

static PyMemberDef handler_members[] = {
    {"_depth", T_PYSSIZET, offsetof(Handler, depth), 0, NULL},
    {"below", T_OBJECT, offsetof(Handler, below), 0, NULL},
    {"graphs", T_BOOL, offsetof(Handler, graphs), 0, NULL},
    {"kind", T_BYTE, offsetof(Handler, kind), 0, NULL},
    {"_always_guard", T_BOOL, offsetof(Handler, guarded), 0, NULL},
    {"_records", T_BOOL, offsetof(Handler, makes_graphs), 0, NULL},
    {"respect_no_grad", T_BOOL, offsetof(Handler, respect_no_grad), 0, NULL},
    {"values", T_OBJECT, offsetof(Handler, values), 0, NULL},
    {"active", T_OBJECT, offsetof(Handler, active), 0, NULL},
    {"slots", T_OBJECT, offsetof(Handler, slots), 0, NULL},
    {"key", T_OBJECT, offsetof(Handler, key), 0, NULL},
    {"records", T_OBJECT, offsetof(Handler, records), 0, NULL},
    {"_facts", T_OBJECT, offsetof(Handler, facts), 0, NULL},
    {"_origin", T_OBJECT, offsetof(Handler, origin), 0, NULL},
    {"_alias", T_OBJECT, offsetof(Handler, alias), 0, NULL},
    {"_derived", T_OBJECT, offsetof(Handler, derived), 0, NULL},
    {"pending", T_OBJECT, offsetof(Handler, pending), 0, NULL},
    {"heard", T_OBJECT, offsetof(Handler, heard), 0, NULL},
    {"_entered", T_OBJECT, offsetof(Handler, entered), 0, NULL},
    {"_sees_views", T_BOOL, offsetof(Handler, sees_views), 0, NULL},
    {"meets_saved", T_BOOL, offsetof(Handler, meets_saved), 0, NULL},
    {"kernels", T_BOOL, offsetof(Handler, kernels), 0, NULL},
    {"policy", T_OBJECT, offsetof(Handler, policy), 0, NULL},
    {"inputs", T_OBJECT, offsetof(Handler, inputs), 0, NULL},
    {"kept", T_OBJECT, offsetof(Handler, kept), 0, NULL},
    {"derived", T_OBJECT, offsetof(Handler, derived_slots), 0, NULL},
    {"prepared", T_OBJECT, offsetof(Handler, prepared), 0, NULL},
    {"hooks", T_OBJECT, offsetof(Handler, hooks), 0, NULL},
    {"sources", T_OBJECT, offsetof(Handler, sources), 0, NULL},
    {"_outside", T_OBJECT, offsetof(Handler, outside), 0, NULL},
    {"_nested", T_BOOL, offsetof(Handler, nested), 0, NULL},
    {"_calls", T_OBJECT, offsetof(Handler, calls), 0, NULL},
    {"size", T_OBJECT, offsetof(Handler, size), 0, NULL},
    {"randomness", T_OBJECT, offsetof(Handler, randomness), 0, NULL},
    {"fallbacks", T_OBJECT, offsetof(Handler, fallbacks), 0, NULL},
    {"_include", T_OBJECT, offsetof(Handler, include), 0, NULL},
    {"_exclude", T_OBJECT, offsetof(Handler, exclude), 0, NULL},
    {NULL},
};

static PyTypeObject handler_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "chainrule._shortcuts.Handler",
    .tp_doc = "What a mode's function handler reads, and the handler itself for plain calls.",
    .tp_basicsize = sizeof(Handler),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = handler_new,
    .tp_dealloc = (destructor)handler_dealloc,
    .tp_traverse = (traverseproc)handler_traverse,
    .tp_clear = (inquiry)handler_clear,
    .tp_methods = handler_methods,
    .tp_members = handler_members,
};

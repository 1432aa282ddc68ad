/* Methods of BatchTensor. Part of shortcuts.c. */

/* Method(function, otherwise): a function of the table as a method of BatchTensor, which needs no function mode under its own
 * level; with None for the function, calls that are known are replayed, and with True it is a query. Every other call goes to
 * `otherwise`, torch's own method. */
typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *function;
    PyObject *otherwise;
} Method;

/* How many dimensions what an index of numbers, slices, None and dots chooses has; -1 if it does not fit. */
static long
chosen_rank(PyObject *index, long rank)
{
    PyObject *single[] = {index};
    PyObject **parts = PyTuple_CheckExact(index) ? &PyTuple_GET_ITEM(index, 0) : single;
    Py_ssize_t count = PyTuple_CheckExact(index) ? PyTuple_GET_SIZE(index) : 1;
    long numbers = 0, slices = 0, added = 0, dots = 0;
    for (Py_ssize_t place = 0; place < count; place++) {
        numbers += PyLong_CheckExact(parts[place]);
        slices += PySlice_Check(parts[place]);
        added += parts[place] == Py_None;
        dots += parts[place] == Py_Ellipsis;
    }
    return dots > 1 || numbers + slices > rank ? -1 : rank - numbers + added;
}

/* A value as it is assigned to stored tensors whose samples have `rank` dimensions: 1 with a new reference; 0 if it is left to Python;
 * -1 with an error set. */
static int
stored_value(Handler *self, PyObject *value, long rank, PyObject **stored)
{
    if (is_any_number(value)) {
        *stored = Py_NewRef(value);
        return 1;
    }
    PyObject *batch = batch_of(self, value), *own = value, *dtype = NULL;
    int joined = 0, fits;
    if (batch != NULL)
        own = SLOT(batch, value);
    else if ((PyObject *)Py_TYPE(value) == c_batch_tensor && SLOT(value, level) == (PyObject *)self && SLOT(value, inner) != NULL)
        own = SLOT(value, inner);
    if (!is_constant_class(own))
        return 0;
    dtype = numeric_dtype(own, &joined);
    PyObject *layout = dtype == NULL ? NULL : GET(own, layout), *ndim = layout == NULL ? NULL : GET(own, ndim);
    fits = ndim == NULL ? -1 : dtype != Py_None && !joined && layout == c_strided;
    long missing = ndim == NULL ? 0 : rank - PyLong_AsLong(ndim) + (batch != NULL);
    Py_XDECREF(dtype);
    Py_XDECREF(layout);
    Py_XDECREF(ndim);
    if (fits <= 0 || missing < 0)
        return fits < 0 ? -1 : 0;
    if (batch == NULL || missing == 0) {
        *stored = Py_NewRef(own);
        return 1;
    }
    /* The dimensions that a sample lacks come after the batch. */
    PyObject *parts = PyTuple_New(missing + 1);
    if (parts == NULL || (PyTuple_SET_ITEM(parts, 0, PySlice_New(NULL, NULL, NULL)), PyTuple_GET_ITEM(parts, 0) == NULL)) {
        Py_XDECREF(parts);
        return -1;
    }
    for (long place = 1; place <= missing; place++)
        PyTuple_SET_ITEM(parts, place, Py_NewRef(Py_None));
    PyObject *args[] = {own, parts};
    *stored = call_below(c_getitem, args, 2, 0);
    Py_DECREF(parts);
    return *stored == NULL ? -1 : 1;
}

/* The `Batched` of a tensor that a value is written to, borrowed. One that was the same for all samples carries the batch from here
 * on if the value does. NULL, maybe with an error set, for others. */
static PyObject *
batch_to_write(Handler *self, PyObject *tensor, PyObject *value)
{
    PyObject *batch = batch_of(self, tensor);
    if (batch != NULL || (PyObject *)Py_TYPE(tensor) != c_batch_tensor || SLOT(tensor, level) != (PyObject *)self ||
        SLOT(tensor, inner) == NULL || !is_constant_class(SLOT(tensor, inner)) || batch_of(self, value) == NULL)
        return batch;
    int graph = is_true_of(GET(SLOT(tensor, inner), requires_grad));
    PyObject *off = graph ? NULL : exclude_python(1);
    if (off == NULL)
        return NULL;
    Py_DECREF(off);
    int done = carry_batch((PyObject *)self, tensor);
    if (include_python() < 0)
        done = -1;
    return done < 0 ? NULL : batch_of(self, tensor);
}

/* An index of a sample as one of the stored tensor; a new reference. */
static PyObject *
stored_index(PyObject *chosen)
{
    Py_ssize_t parts = PyTuple_CheckExact(chosen) ? PyTuple_GET_SIZE(chosen) : 1;
    PyObject *index = PyTuple_New(parts + 1);
    if (index == NULL)
        return NULL;
    PyTuple_SET_ITEM(index, 0, Py_NewRef(whole));
    for (Py_ssize_t place = 0; place < parts; place++)
        PyTuple_SET_ITEM(index, place + 1, Py_NewRef(PyTuple_CheckExact(chosen) ? PyTuple_GET_ITEM(chosen, place) : chosen));
    return index;
}

/* The stored tensor of one of this level that is the same for all samples and has no graph, borrowed; NULL, maybe with an error set,
 * for others. */
static PyObject *
common_of(Handler *self, PyObject *tensor)
{
    PyObject *inner = (PyObject *)Py_TYPE(tensor) == c_batch_tensor && SLOT(tensor, level) == (PyObject *)self ? SLOT(tensor, inner) : NULL;
    if (inner == NULL || !is_constant_class(inner))
        return NULL;
    int joined = 0;
    PyObject *dtype = numeric_dtype(inner, &joined);
    Py_XDECREF(dtype);
    return dtype == NULL || dtype == Py_None || joined ? NULL : inner;
}

/* tensor[index] = value where both are the same for all samples; the same. */
static PyObject *
assign_common(Handler *self, PyObject *const *args)
{
    PyObject *target = common_of(self, args[0]), *value = is_any_number(args[2]) ? args[2] : target == NULL ? NULL : common_of(self, args[2]);
    if (value == NULL && !PyErr_Occurred() && target != NULL && (PyObject *)Py_TYPE(args[2]) == c_tensor) {
        int graph = is_true_of(GET(args[2], requires_grad));
        value = graph == 0 ? args[2] : NULL;
    }
    int copy = target == NULL || value == NULL ? 1 : may_be_copy(target);
    if (copy)
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *given[] = {target, args[1], value};
    return call_below(c_setitem, given, 3, 0);
}

/* tensor[index] = value where the index chooses a view of a mapped tensor; NotImplemented, with nothing written, for others. */
static PyObject *
assign_mapped(Handler *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3 || self->guarded || self->graphs || state.exclude == NULL || !chooses_view(args[1]))
        return Py_NewRef(Py_NotImplemented);
    PyObject *batch = batch_to_write(self, args[0], args[2]), *dtype = NULL, *stored = NULL, *index = NULL, *out = NULL;
    if (batch == NULL)
        return PyErr_Occurred() ? NULL : assign_common(self, args);
    PyObject *whole = Py_NewRef(SLOT(batch, value)), *chosen = args[1];
    int joined = 0, fits = is_constant_class(whole) ? stored_dtype(batch, &dtype, &joined) : 0;
    Py_XDECREF(dtype);
    PyObject *ndim = fits > 0 ? GET(whole, ndim) : NULL;
    long rank = ndim == NULL ? -1 : chosen_rank(chosen, PyLong_AsLong(ndim) - 1);
    if (fits > 0)
        fits = ndim == NULL ? -1 : rank >= 0 && !joined;
    Py_XDECREF(ndim);
    if (fits > 0 && (fits = may_be_copy(whole)) >= 0)
        fits = fits ? 0 : stored_value(self, args[2], rank, &stored);
    if (fits > 0) {
        index = stored_index(chosen);
        PyObject *given[] = {whole, index, stored};
        if (index != NULL)
            out = call_below(c_setitem, given, 3, 0);
        if (out == NULL && PyErr_ExceptionMatches(PyExc_Exception)) {
            PyErr_Clear(); /* what torch says of the whole is not what it says of a sample */
            fits = 0;
        }
    }
    Py_DECREF(whole);
    Py_XDECREF(stored);
    Py_XDECREF(index);
    return fits == 0 ? Py_NewRef(Py_NotImplemented) : out;
}

/* target.index_put_(indices, value) at places that are the same for all samples; NotImplemented, with nothing written, for others. */
static PyObject *
put_mapped(Handler *self, PyObject *target, PyObject *indices, PyObject *value)
{
    if (self->guarded || self->graphs || state.exclude == NULL || (!PyTuple_CheckExact(indices) && !PyList_CheckExact(indices)))
        return Py_NewRef(Py_NotImplemented);
    if (value != Py_None && !is_number(value) && !is_constant_class(value) && (PyObject *)Py_TYPE(value) != c_batch_tensor)
        return Py_NewRef(Py_NotImplemented); /* a number of another class, or a tensor of another */
    PyObject *batch = batch_to_write(self, target, value), *whole = batch != NULL ? SLOT(batch, value) : NULL, *beside[] = {value, target};
    if (batch == NULL && !PyErr_Occurred())
        whole = common_of(self, target);
    if (whole == NULL || !is_constant_class(whole))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *stored = NULL, *list = NULL, *out = NULL, *own = NULL, *dtype = NULL, *ndim = NULL, *given = NULL;
    int joined = 0, fits = 0, copy = may_be_copy(whole);
    Py_INCREF(whole);
    given = is_number(value) ? PyObject_Vectorcall(c_constant_beside, beside, 2, NULL) : Py_NewRef(value);
    if (copy < 0 || given == NULL || (dtype = numeric_dtype(whole, &joined)) == NULL || (ndim = GET(whole, ndim)) == NULL)
        goto done;
    long rank = picked_rank(indices, PyLong_AsLong(ndim) - (batch != NULL));
    if (rank == -2)
        goto done;
    fits = rank >= 0 && !copy && !joined && dtype != Py_None && given != Py_None ? stored_value(self, given, rank, &stored) : 0;
    if (fits > 0)
        fits = (own = GET(stored, dtype)) == NULL ? -1 : own == dtype;
    if (fits > 0) {
        Py_ssize_t first = batch != NULL, count = PySequence_Fast_GET_SIZE(indices);
        if ((list = PyTuple_New(count + first)) == NULL)
            goto done;
        if (first)
            PyTuple_SET_ITEM(list, 0, PySlice_New(NULL, NULL, NULL));
        for (Py_ssize_t place = 0; place < count; place++)
            PyTuple_SET_ITEM(list, place + first, Py_NewRef(PySequence_Fast_GET_ITEM(indices, place)));
        PyObject *args[] = {whole, list, stored};
        out = PyErr_Occurred() ? NULL : call_below(c_setitem, args, 3, 0);
        if (out != NULL)
            Py_SETREF(out, Py_NewRef(target));
        else if (PyErr_ExceptionMatches(PyExc_Exception)) {
            PyErr_Clear(); /* what torch says of the whole is not what it says of a sample */
            fits = 0;
        }
    }
    if (fits == 0)
        out = Py_NewRef(Py_NotImplemented);
done:
    Py_DECREF(whole);
    Py_XDECREF(given);
    Py_XDECREF(stored);
    Py_XDECREF(list);
    Py_XDECREF(own);
    Py_XDECREF(dtype);
    Py_XDECREF(ndim);
    return out;
}

/* A method that writes to a tensor of the level, which is the result; NotImplemented, with nothing written, for others. */
static PyObject *
write_method(Handler *self, PyObject *func, PyObject *const *args, Py_ssize_t count)
{
    PyObject *given[] = {args[0], Py_Ellipsis, count > 1 ? args[1] : Py_None}, *out;
    if (func == c_put)
        return count == 3 ? put_mapped(self, args[0], args[1], args[2]) : Py_NewRef(Py_NotImplemented);
    if (func == c_zero_ ? count != 1 : count != 2 || (func == c_fill_ ? !is_number(args[1]) : is_number(args[1])))
        return Py_NewRef(Py_NotImplemented);
    PyObject *zero = func == c_zero_ ? PyLong_FromLong(0) : NULL;
    if (zero != NULL)
        given[2] = zero;
    out = PyErr_Occurred() ? NULL : assign_mapped(self, given, 3);
    Py_XDECREF(zero);
    if (out != NULL && out != Py_NotImplemented)
        Py_SETREF(out, Py_NewRef(args[0]));
    return out;
}

/* tensor[index] = value for a tensor of the level; the same. */
static PyObject *
set_item(Handler *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3 || chooses_view(args[1]))
        return assign_mapped(self, args, count);
    PyObject *indices = tensors_of(args[1]), *out = NULL;
    if (indices != NULL)
        out = put_mapped(self, args[0], indices, args[2]);
    else if (!PyErr_Occurred())
        out = Py_NewRef(Py_NotImplemented);
    Py_XDECREF(indices);
    if (out != NULL && out != Py_NotImplemented)
        Py_SETREF(out, Py_NewRef(Py_None));
    return out;
}

/* tensor[index] for a tensor that carries the batch, where that is a view; NotImplemented for others. */
static PyObject *
view_mapped(Handler *self, PyObject *const *args, Py_ssize_t count)
{
    PyObject *batch = count == 2 ? batch_of(self, args[0]) : NULL, *out = NULL;
    if (batch == NULL || self->guarded || self->graphs || state.exclude == NULL || !chooses_view(args[1]) ||
        !is_constant_class(SLOT(batch, value)))
        return Py_NewRef(Py_NotImplemented);
    int copy = may_be_copy(SLOT(batch, value));
    if (copy)
        return copy < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    if ((out = replay_if_seen(self, c_getitem, args, count)) != Py_NotImplemented)
        return out;
    Py_SETREF(out, NULL);
    int joined = 0;
    PyObject *value = Py_NewRef(SLOT(batch, value)), *dtype = numeric_dtype(value, &joined), *ndim = dtype == NULL ? NULL : GET(value, ndim);
    long rank = ndim == NULL ? -2 : joined || dtype == Py_None ? -1 : chosen_rank(args[1], PyLong_AsLong(ndim) - 1);
    int number = PyLong_CheckExact(args[1]); /* by the shortest way, since it is the commonest */
    PyObject *index = rank < 0 ? NULL : number ? PyLong_FromLong(1) : stored_index(args[1]);
    if (index != NULL) {
        PyObject *given[] = {value, index, args[1]}, *view = call_below(number ? c_choose : c_getitem, given, 2 + number, 0);
        if (view != NULL && view != value)
            out = wrapped_view((PyObject *)self, view, 1, dtype);
        if (out != NULL && note_view(self, c_getitem, args, count, number ? c_choose : c_getitem, given + 1, 1 + number, view, out) < 0)
            Py_CLEAR(out);
        if (view == NULL && PyErr_ExceptionMatches(PyExc_Exception)) {
            PyErr_Clear(); /* what torch says of the whole is not what it says of a sample */
            rank = -1;
        } else if (view != NULL && view == value)
            rank = -1;
        Py_XDECREF(view);
    }
    if (rank == -1)
        out = Py_NewRef(Py_NotImplemented);
    Py_DECREF(value);
    Py_XDECREF(dtype);
    Py_XDECREF(ndim);
    Py_XDECREF(index);
    return out;
}

/* A call that was made before; NotImplemented, with nothing done, for others. */
static PyObject *
replay_method(Handler *handler, PyObject *func, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    if (handler->guarded || handler->graphs || c_known == NULL)
        return Py_NewRef(Py_NotImplemented);
    PyObject *kwargs = names == NULL ? NULL : PyDict_New(), *out;
    if (names != NULL && kwargs == NULL)
        return NULL;
    for (Py_ssize_t place = 0; names != NULL && place < PyTuple_GET_SIZE(names); place++)
        if (PyDict_SetItem(kwargs, PyTuple_GET_ITEM(names, place), args[count + place]) < 0) {
            Py_DECREF(kwargs);
            return NULL;
        }
    out = run_known(handler, func, args, count, kwargs);
    Py_XDECREF(kwargs);
    return out;
}

static Handler *
lone_level(PyObject *tensor);

static PyObject *
method_call(PyObject *callable, PyObject *const *args, size_t flagged, PyObject *names)
{
    Method *self = (Method *)callable;
    Py_ssize_t count = PyVectorcall_NARGS(flagged);
    if (self->function == Py_True) { /* a query */
        if (count < 1 || lone_level(args[0]) == NULL)
            return PyObject_Vectorcall(self->otherwise, args, flagged, names);
        int disabled = state.get_functions();
        state.set_functions(2);
        PyObject *out = PyObject_Vectorcall(self->otherwise, args, flagged, names);
        state.set_functions(disabled);
        return out;
    }
    int replayed = self->function == Py_None;
    if (count >= 1 && (replayed || (names == NULL && count <= 2)) && (PyObject *)Py_TYPE(args[0]) == c_batch_tensor) {
        Handler *handler = (Handler *)SLOT(args[0], level);
        /* A mode that stands among the functions stands there alone, unless another was entered inside of it. */
        if (handler != NULL && PyObject_TypeCheck(handler, &handler_type) && handler->kind == VMAP &&
            (handler->below == NULL || handler->below == Py_None) && state.function_modes() == 1 &&
            state.functions_shown() && stands_innermost(handler)) {
            int disabled = state.get_functions();
            state.set_functions(2);
            int writes = names == NULL && (self->otherwise == c_copy_ || self->otherwise == c_fill_ || self->otherwise == c_zero_ ||
                                           self->otherwise == c_put);
            PyObject *out = self->otherwise == c_setitem && names == NULL
                                ? set_item(handler, args, count)
                            : writes ? write_method(handler, self->otherwise, args, count)
                            : self->otherwise == c_getitem && names == NULL ? view_mapped(handler, args, count)
                            : replayed ? replay_method(handler, self->otherwise, args, count, names)
                                     : run_under_vmap(handler, self->function, args, count, 0);
            if (out == Py_NotImplemented && self->otherwise == c_getitem)
                Py_SETREF(out, replay_method(handler, self->otherwise, args, count, names));
            state.set_functions(disabled);
            if (out != Py_NotImplemented)
                return out;
            Py_DECREF(out);
        }
    }
    return PyObject_Vectorcall(self->otherwise, args, flagged, names);
}

/* The level of a tensor, if it stands alone among the functions; NULL, without an error, for others. */
static Handler *
lone_level(PyObject *tensor)
{
    Handler *handler = (PyObject *)Py_TYPE(tensor) == c_batch_tensor ? (Handler *)SLOT(tensor, level) : NULL;
    return handler != NULL && PyObject_TypeCheck(handler, &handler_type) && handler->kind == VMAP &&
                   (handler->below == NULL || handler->below == Py_None) && state.function_modes() == 1 && state.functions_shown() &&
                   stands_innermost(handler) > 0
               ? handler
               : NULL;
}

/* Property(asked, replayed): an attribute of BatchTensor as torch has it, which needs no function mode under its own level. One that is
 * no query is a call that is replayed, by the function as torch shows it to a mode. */
typedef struct {
    PyObject_HEAD
    PyObject *asked;
    PyObject *replayed;
} Property;

static PyObject *
property_get(PyObject *callable, PyObject *tensor, PyObject *type)
{
    Property *self = (Property *)callable;
    if (tensor == NULL || tensor == Py_None)
        return Py_NewRef(self->asked);
    Handler *handler = lone_level(tensor);
    if (handler != NULL) {
        int disabled = state.get_functions();
        state.set_functions(2);
        lasting = self->replayed;
        PyObject *out = self->replayed != Py_None ? replay_method(handler, self->replayed, &tensor, 1, NULL)
                                                  : Py_TYPE(self->asked)->tp_descr_get(self->asked, tensor, type);
        state.set_functions(disabled);
        if (out != Py_NotImplemented)
            return out;
        Py_DECREF(out);
    }
    return Py_TYPE(self->asked)->tp_descr_get(self->asked, tensor, type);
}

static int
property_set(PyObject *callable, PyObject *tensor, PyObject *value)
{
    PyObject *asked = ((Property *)callable)->asked;
    return Py_TYPE(asked)->tp_descr_set(asked, tensor, value);
}

static PyObject *
property_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *asked, *replayed;
    if (!PyArg_ParseTuple(args, "OO", &asked, &replayed))
        return NULL;
    if (Py_TYPE(asked)->tp_descr_get == NULL || Py_TYPE(asked)->tp_descr_set == NULL)
        return PyErr_Format(PyExc_TypeError, "Property: %R is no attribute", asked);
    Property *self = (Property *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->asked = Py_NewRef(asked);
        self->replayed = Py_NewRef(replayed);
    }
    return (PyObject *)self;
}

static void
property_dealloc(Property *self)
{
    Py_CLEAR(self->asked);
    Py_CLEAR(self->replayed);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *
property_attribute(PyObject *self, PyObject *name)
{
    return PyObject_GetAttr(((Property *)self)->asked, name); /* `__get__`, as torch shows it to modes, and its documentation */
}

static PyTypeObject property_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "chainrule._shortcuts.Property",
    .tp_basicsize = sizeof(Property),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_dealloc = (destructor)property_dealloc,
    .tp_descr_get = property_get,
    .tp_descr_set = property_set,
    .tp_getattro = property_attribute,
    .tp_new = property_new,
};

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
    if (function != Py_None && function != Py_True && (!PyTuple_Check(function) || PyTuple_GET_SIZE(function) != FIELDS))
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

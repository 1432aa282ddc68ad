/* How a mode is entered and left, and what a tape holds when it begins. Part of shortcuts.c. */

static PyTypeObject handler_type;

static PyObject *
handler_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Handler *self = (Handler *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->depth = -1;
        self->origin = Py_NewRef(Py_None);
    }
    return (PyObject *)self;
}

static int
is_handler(PyObject *object)
{
    return PyObject_TypeCheck(object, &handler_type);
}

/* An attribute by a name in C, as torch asks every mode for its handler at every call: without a new string where it does. */
static PyObject *
attribute_by_text(PyObject *self, char *name)
{
    if (strcmp(name, "__torch_function__") == 0)
        return PyObject_GetAttr(self, s___torch_function__);
    PyObject *text = PyUnicode_FromString(name), *found = text == NULL ? NULL : PyObject_GetAttr(self, text);
    Py_XDECREF(text);
    return found;
}

/* An entry of one of torch's stacks of modes: a new reference. */
static PyObject *
mode_at(PyObject *function, int64_t place)
{
    PyObject *number = PyLong_FromLongLong(place);
    PyObject *found = number == NULL ? NULL : PyObject_CallOneArg(function, number);
    Py_XDECREF(number);
    return found;
}

/* Whether calls of a mode's functions may go to the mode under it on torch's stack: 1, 0, or -1 with an error set. */
static int
goes_on(PyObject *under, int64_t depth)
{
    return is_handler(under) && ((Handler *)under)->depth == depth ? attribute_is_true(under, s_takes_functions) : 0;
}

static int
call_and_drop(PyObject *function, PyObject *argument)
{
    PyObject *done = argument == NULL ? PyObject_CallNoArgs(function) : PyObject_CallOneArg(function, argument);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Whether a mode stands on the stack of function modes once it is entered: 1 with the modes under it there (borrowed from the
 * stacks; NULL for none), 0, or -1 with an error set. */
static int
may_stand(Handler *self, int64_t depth, PyObject **under, int *replaces)
{
    int takes = attribute_is_true((PyObject *)self, s_takes_functions);
    if (takes <= 0)
        return takes;
    if (depth > 1) {
        *under = mode_at(c_at, depth - 2);
        int fits = *under == NULL ? -1 : goes_on(*under, depth - 1);
        if (fits <= 0)
            return fits;
    }
    int64_t functions = state.function_modes();
    if (functions == 0)
        return 1;
    PyObject *top = mode_at(c_function_at, functions - 1);
    if (top == NULL)
        return -1;
    int stands = *replaces = is_handler(top);
    Py_DECREF(top);
    return stands;
}

/* What LightMode._enter does, where the state of the dispatcher is known and `data` need not be watched. Functions are not
 * shown to a mode that another one is entered over at once (`covered`). */
static PyObject *
enter_mode(Handler *self, int covered)
{
    if (state.exclude == NULL)
        return PyObject_CallMethodNoArgs((PyObject *)self, s__enter);
    if (Py_TYPE(self)->tp_getattr == NULL)
        Py_TYPE(self)->tp_getattr = attribute_by_text;
    int64_t depth = state.dispatch_modes() + 1;
    int replaces = 0;
    PyObject *under = NULL, *taken = NULL, *entry = NULL, *result = NULL;
    int stands = may_stand(self, depth, &under, &replaces);
    int watches = stands ? 0 : attribute_is_true((PyObject *)self, s_reads_data);
    if (stands < 0 || watches < 0)
        goto done;
    if (watches) {
        result = PyObject_CallMethodNoArgs((PyObject *)self, s__enter);
        goto done;
    }
    if (self->entered == NULL && (self->entered = PyList_New(0)) == NULL)
        goto done;
    PyObject *inside = PyDict_GetItemWithError(c_flags, s__is_in_torch_dispatch_mode);
    PyObject *real = PyDict_GetItemWithError(c_flags, s__is_in_non_infra_torch_dispatch_mode);
    if (inside == NULL || real == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "torch has no flags for its dispatch modes");
        goto done;
    }
    if (replaces && (taken = PyObject_CallNoArgs(c_pop_function)) == NULL)
        goto done;
    entry = Py_BuildValue("(OOOnOO)", inside, real, taken == NULL ? Py_None : taken, self->depth,
                          self->below == NULL ? Py_None : self->below, stands && !covered ? Py_True : Py_False);
    if (entry == NULL || PyList_Append(self->entered, entry) < 0 || call_and_drop(c_push, (PyObject *)self) < 0 ||
        (stands && !covered && call_and_drop(c_push_function, (PyObject *)self) < 0) ||
        PyDict_SetItem(c_flags, s__is_in_torch_dispatch_mode, Py_True) < 0 ||
        PyDict_SetItem(c_flags, s__is_in_non_infra_torch_dispatch_mode, Py_True) < 0)
        goto done;
    self->depth = stands ? (Py_ssize_t)depth : -1;
    if (stands)
        Py_XSETREF(self->below, Py_NewRef(under == NULL ? Py_None : under));
    result = Py_NewRef((PyObject *)self);
done:
    Py_XDECREF(under);
    Py_XDECREF(taken);
    Py_XDECREF(entry);
    return result;
}

static PyObject *
handler_enter(Handler *self, PyObject *unused)
{
    return enter_mode(self, 0);
}

/* __exit__(kind, error, traceback): back to what was noted on entry. */
static PyObject *
handler_exit(Handler *self, PyObject *const *unused, Py_ssize_t count)
{
    Py_ssize_t entered = self->entered == NULL || !PyList_CheckExact(self->entered) ? 0 : PyList_GET_SIZE(self->entered);
    if (entered == 0)
        return PyErr_Format(PyExc_RuntimeError, "a mode was left that was not entered");
    PyObject *entry = Py_NewRef(PyList_GET_ITEM(self->entered, entered - 1)), *result = NULL;
    if (PyList_SetSlice(self->entered, entered - 1, entered, NULL) < 0 ||
        PyDict_SetItem(c_flags, s__is_in_torch_dispatch_mode, PyTuple_GET_ITEM(entry, 0)) < 0 ||
        PyDict_SetItem(c_flags, s__is_in_non_infra_torch_dispatch_mode, PyTuple_GET_ITEM(entry, 1)) < 0)
        goto done;
    PyObject *taken = PyTuple_GET_ITEM(entry, 2);
    self->depth = PyLong_AsSsize_t(PyTuple_GET_ITEM(entry, 3));
    Py_XSETREF(self->below, Py_NewRef(PyTuple_GET_ITEM(entry, 4)));
    if (PyTuple_GET_ITEM(entry, 5) == Py_True &&
        (call_and_drop(c_pop_function, NULL) < 0 || (taken != Py_None && call_and_drop(c_push_function, taken) < 0)))
        goto done;
    if (call_and_drop(c_pop, Py_None) == 0)
        result = Py_NewRef(Py_None);
done:
    Py_DECREF(entry);
    return result;
}

/* The keys that torch's dispatcher includes and excludes here; 0, or -1 with an error set. */
static int
read_keys(PyObject **included, PyObject **excluded)
{
    *excluded = NULL;
    *included = PyObject_CallNoArgs(c_included_keys);
    if (*included != NULL && (*excluded = PyObject_CallNoArgs(c_excluded_keys)) != NULL)
        return 0;
    Py_CLEAR(*included);
    return -1;
}

/* What a tape holds when it begins (chainrule.shortcuts.Handler._begin); 0, or -1 with an error set. */
static int
begin_tape(Handler *self, PyObject *facts, PyObject *policy, int respect_no_grad, int kernels)
{
    PyObject **lists[] = {&self->values, &self->active, &self->key, &self->records, &self->pending, &self->entered,
                          &self->inputs, &self->kept};
    PyObject **tables[] = {&self->slots, &self->derived, &self->prepared, &self->hooks, &self->sources};
    for (size_t number = 0; number < sizeof(lists) / sizeof(*lists); number++) {
        PyObject *made = PyList_New(0);
        if (made == NULL)
            return -1;
        Py_XSETREF(*lists[number], made);
    }
    for (size_t number = 0; number < sizeof(tables) / sizeof(*tables); number++) {
        PyObject *made = PyDict_New();
        if (made == NULL)
            return -1;
        Py_XSETREF(*tables[number], made);
    }
    PyObject *included, *excluded, *derived = PySet_New(NULL);
    if (derived == NULL)
        return -1;
    Py_XSETREF(self->derived_slots, derived);
    if (read_keys(&included, &excluded) < 0)
        return -1;
    PyObject *outside = PyTuple_Pack(2, included, excluded);
    Py_DECREF(included);
    Py_DECREF(excluded);
    if (outside == NULL)
        return -1;
    Py_XSETREF(self->outside, outside);
    Py_XSETREF(self->facts, Py_NewRef(facts));
    Py_XSETREF(self->policy, Py_NewRef(policy));
    self->respect_no_grad = respect_no_grad;
    self->kernels = kernels;
    self->kind = TAPE;
    return 0;
}

/* _begin(facts, policy, respect_no_grad, kernels) */
static PyObject *
handler_begin(Handler *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 4)
        return PyErr_Format(PyExc_TypeError, "_begin: facts, a policy and two flags are expected");
    if (begin_tape(self, args[0], args[1], args[2] == Py_True, args[3] == Py_True) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* A level of vmap that begins (chainrule.shortcuts.Handler._begin_level), where it is known whether another mode is on and
 * whether it has to be guarded; 0, or -1 with an error set. */
static int
begin_level(Handler *self, PyObject *size, PyObject *randomness, PyObject *calls, int nested, int guarded)
{
    PyObject *included, *excluded, *fallbacks = PyList_New(0), *entered = fallbacks == NULL ? NULL : PyList_New(0);
    if (entered == NULL) {
        Py_XDECREF(fallbacks);
        return -1;
    }
    Py_XSETREF(self->fallbacks, fallbacks);
    Py_XSETREF(self->entered, entered);
    if (read_keys(&included, &excluded) < 0)
        return -1;
    Py_XSETREF(self->include, included);
    /* Autocast has acted on the outer op already. */
    Py_SETREF(excluded, PyNumber_Or(excluded, c_autocast_keys));
    if (excluded == NULL)
        return -1;
    Py_XSETREF(self->exclude, excluded);
    Py_XSETREF(self->size, Py_NewRef(size));
    Py_XSETREF(self->randomness, Py_NewRef(randomness));
    Py_XSETREF(self->calls, Py_NewRef(calls));
    int graphs = grad_is_enabled();
    if (graphs < 0)
        return -1;
    self->kind = VMAP;
    self->makes_graphs = graphs;
    self->nested = nested;
    self->guarded = guarded;
    return 0;
}

/* _begin_level(size, randomness, calls, nested, guarded) */
static PyObject *
handler_begin_level(Handler *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 5)
        return PyErr_Format(PyExc_TypeError, "_begin_level: a size, a randomness, calls and two flags are expected");
    if (begin_level(self, args[0], args[1], args[2], args[3] == Py_True, args[4] == Py_True) < 0)
        return NULL;
    Py_RETURN_NONE;
}

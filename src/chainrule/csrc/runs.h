/* A run of a function under a tape, and the replay of the plan that is known for it: the calls of a transform that nothing is
 * around (chainrule.transforms.routes). Part of shortcuts.c. */

/* Leave a mode that was entered; takes the reference of `out`, which is returned. An error that is on its way stays. */
static PyObject *
leave_mode(Handler *mode, PyObject *out)
{
    PyObject *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace);
    PyObject *done = handler_exit(mode, NULL, 0);
    if (done == NULL) {
        Py_XDECREF(out);
        Py_XDECREF(kind);
        Py_XDECREF(error);
        Py_XDECREF(trace);
        return NULL;
    }
    Py_DECREF(done);
    PyErr_Restore(kind, error, trace);
    return out;
}

/* Call a function below torch's autograd, with a tape on. The dispatcher's state is known. */
static PyObject *
run_recorded(Handler *tape, PyObject *function, PyObject *args, PyObject *kwargs)
{
    bool before[AUTOGRAD_KEYS];
    for (int number = 0; number < AUTOGRAD_KEYS; number++) {
        before[number] = state.excluded(state.autograd[number]);
        state.exclude(state.autograd[number], true);
    }
    PyObject *out = NULL, *entered = enter_mode(tape, 0);
    if (entered != NULL) {
        Py_DECREF(entered);
        out = leave_mode(tape, PyObject_Call(function, args, kwargs));
    }
    for (int number = 0; number < AUTOGRAD_KEYS; number++)
        state.exclude(state.autograd[number], before[number]);
    return out;
}

/* _run_recorded(function, args, kwargs) */
static PyObject *
handler_run(Handler *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3 || !PyTuple_CheckExact(args[1]) || !PyDict_CheckExact(args[2]))
        return PyErr_Format(PyExc_TypeError, "_run_recorded: a function, a tuple and a dictionary are expected");
    if (state.exclude == NULL)
        return PyErr_Format(PyExc_RuntimeError, "_run_recorded: the state of torch's dispatcher is not known");
    return run_recorded(self, args[0], args[1], PyDict_GET_SIZE(args[2]) ? args[2] : NULL);
}

/* Fields of a route (chainrule.transforms.routes.Route), which is a tuple. */
enum { R_FUNCTION, R_TYPE, R_FACTS, R_POLICY, R_RESPECT, R_REVERSE, R_KERNELS, R_NUMBER, R_KIND, R_EXTRAS, R_PLANS, R_EXTRA, R_DIMS,
       R_CALLS, R_NAME, ROUTE_FIELDS };
/* R_KIND: a Jacobian by a request of its own, a gradient, a pushed tangent, a nest, a nest whose linear function is asked for, a run
 * of which nothing is asked yet. */
enum { JACOBIAN, GRADIENT, PUSHED, NEST, LINEARIZED, RECORDED };
/* Fields of a plan that is replayed here (CachedPlan.quick). */
enum { Q_RUN, Q_NEEDS, Q_SPEC };
/* From so many elements on a Jacobian may have to be computed in blocks (chainrule.transforms.jacobians). */
static const Py_ssize_t LARGE = (1 << 28) / 8;

/* Whether a variable of the context is None: 1, 0, or -1 with an error set. */
static int
is_unset(PyObject *variable)
{
    PyObject *found;
    if (PyContextVar_Get(variable, Py_None, &found) < 0)
        return -1;
    Py_XDECREF(found);
    return found == Py_None;
}

/* Whether nothing is around a transform: no mode, no torch.func, no dual level, and nobody who wants an account: likewise. */
static int
stands_alone(void)
{
    if (state.exclude == NULL || state.dispatch_modes() || state.function_modes() || state.included(state.functorch))
        return 0;
    PyObject *level = PyDict_GetItemWithError(c_forward_mode, s__current_level);
    if (level == NULL)
        return PyErr_Occurred() ? -1 : 0;
    if (PyLong_AsLong(level) >= 0)
        return 0;
    int unset = is_unset(c_ledger);
    return unset <= 0 ? unset : is_unset(c_watch);
}

/* Whether a tensor is plain, floating-point, and without a graph: likewise. */
static int
is_plain_floating(PyObject *tensor)
{
    if ((PyObject *)Py_TYPE(tensor) != c_tensor)
        return 0;
    int graph = is_true_of(GET(tensor, requires_grad));
    if (graph)
        return graph < 0 ? -1 : 0;
    PyObject *layout = GET(tensor, layout), *dtype = layout == NULL ? NULL : GET(tensor, dtype);
    int plain = dtype == NULL ? -1 : layout != c_strided ? 0 : PySet_Contains(c_floating, dtype);
    Py_XDECREF(layout);
    Py_XDECREF(dtype);
    return plain;
}

/* Give a tape an input, with what the key says of that, the reference of which is taken; 0, or -1 with an error set. */
static int
append_input(Handler *tape, PyObject *input, PyObject *key)
{
    int outcome = -1;
    PyObject *identity = NULL, *slot = key == NULL ? NULL : PyLong_FromSsize_t(PyList_GET_SIZE(tape->values));
    if (slot != NULL && (identity = PyLong_FromVoidPtr(input)) != NULL && PyList_Append(tape->values, input) == 0 &&
        PyList_Append(tape->active, Py_True) == 0 && PyDict_SetItem(tape->slots, identity, slot) == 0 &&
        PyList_Append(tape->inputs, slot) == 0 && PyList_Append(tape->key, key) == 0)
        outcome = 0;
    Py_XDECREF(slot);
    Py_XDECREF(identity);
    Py_XDECREF(key);
    return outcome;
}

/* A tape for a route, without inputs. */
static Handler *
bare_tape(PyObject *route)
{
    Handler *tape = (Handler *)handler_new((PyTypeObject *)PyTuple_GET_ITEM(route, R_TYPE), NULL, NULL);
    if (tape == NULL ||
        begin_tape(tape, PyTuple_GET_ITEM(route, R_FACTS), PyTuple_GET_ITEM(route, R_POLICY),
                   PyTuple_GET_ITEM(route, R_RESPECT) == Py_True, PyTuple_GET_ITEM(route, R_KERNELS) == Py_True) < 0)
        goto failed;
    tape->sees_views = !state.excluded(state.views);
    if (PyTuple_GET_ITEM(route, R_REVERSE) == Py_True && PyObject_SetAttr((PyObject *)tape, s_reverse, Py_True) < 0)
        goto failed;
    return tape;
failed:
    Py_XDECREF(tape);
    return NULL;
}

/* A tape for a route whose input is given, with what the key says of that; takes the reference of `key`. */
static Handler *
tape_of(PyObject *route, PyObject *input, PyObject *key)
{
    Handler *tape = key == NULL ? NULL : bare_tape(route);
    if (tape == NULL)
        Py_XDECREF(key);
    else if (append_input(tape, input, key) < 0)
        Py_CLEAR(tape);
    return tape;
}

/* Whether a record holds a number that may stand for a value (chainrule.capture.numbers): 1, 0, or -1 with an error set. */
static int
has_numbers(Handler *tape)
{
    int found = 0;
    for (Py_ssize_t place = 0; !found && place < PyList_GET_SIZE(tape->records); place++) {
        PyObject *record = PyList_GET_ITEM(tape->records, place), *args = PyTuple_GET_ITEM(record, RECORD_ARGS);
        PyObject *second = PyTuple_Check(args) && PyTuple_GET_SIZE(args) == 2 ? PyTuple_GET_ITEM(args, 1) : NULL;
        if (second != NULL && (PyFloat_CheckExact(second) || PyLong_CheckExact(second)))
            found = PySet_Contains(c_numbered, PyTuple_GET_ITEM(record, RECORD_OP));
    }
    return found;
}

/* The slot of an output that is one tensor and depends on the inputs, where nothing else happened that has to be looked at: -1 if
 * it is left to Python, -2 with an error set. */
static Py_ssize_t
plain_output(Handler *tape, PyObject *out)
{
    if (!is_tensor(out) || PyDict_GET_SIZE(tape->hooks))
        return -1;
    int blocked = attribute_is_true((PyObject *)tape, s_saw_blocked);
    if (blocked)
        return blocked < 0 ? -2 : -1;
    if (PySet_GET_SIZE(c_lengths)) { /* numbers of such records are known to change */
        PyObject *length = PyLong_FromSsize_t(PyList_GET_SIZE(tape->records));
        int change = length == NULL ? -1 : PySet_Contains(c_lengths, length);
        Py_XDECREF(length);
        if (change > 0)
            change = has_numbers(tape);
        if (change)
            return change < 0 ? -2 : -1;
    }
    Py_ssize_t slot = known_slot(tape, out);
    return slot < 0 || PyList_GET_ITEM(tape->active, slot) == Py_True ? slot : -1;
}

/* What the key of a route's plan holds beside the run, borrowed. */
static PyObject *
extra_of(PyObject *route, Py_ssize_t slot, int grad)
{
    PyObject *extras = PyTuple_GET_ITEM(route, R_EXTRAS), *number = PyLong_FromSsize_t(2 * slot + grad);
    if (number == NULL)
        return NULL;
    PyObject *extra = PyDict_GetItemWithError(extras, number);
    if (extra == NULL && !PyErr_Occurred()) {
        PyObject *made = PyObject_CallFunction(PyTuple_GET_ITEM(route, R_EXTRA), "nO", slot, grad ? Py_True : Py_False);
        if (made != NULL && PyDict_SetItem(extras, number, made) == 0)
            extra = made;
        Py_XDECREF(made); /* the table keeps it */
    }
    Py_DECREF(number);
    return extra;
}

/* What the key of a request says of seeds. */
static PyObject *
seeds_key(PyObject *seeds)
{
    PyObject *key = PyTuple_New(PyTuple_GET_SIZE(seeds));
    for (Py_ssize_t place = 0; key != NULL && place < PyTuple_GET_SIZE(seeds); place++) {
        PyObject *seed = PyTuple_GET_ITEM(seeds, place), *shape = GET(seed, shape), *dtype = shape == NULL ? NULL : GET(seed, dtype);
        PyObject *one = dtype == NULL ? NULL : PyTuple_Pack(2, shape, dtype);
        Py_XDECREF(shape);
        Py_XDECREF(dtype);
        if (one == NULL)
            Py_CLEAR(key);
        else
            PyTuple_SET_ITEM(key, place, one);
    }
    return key;
}

/* The plan of a run, as it is replayed here (a new reference): 1; 0 if there is none; -1 with an error set. */
static int
find_seeded_plan(PyObject *route, Handler *tape, PyObject *out, PyObject *seeds, int grad, PyObject **plan, PyObject **quick)
{
    *plan = *quick = NULL;
    Py_ssize_t slot = plain_output(tape, out);
    if (slot < 0)
        return slot == -2 ? -1 : 0;
    int found = -1;
    PyObject *key = NULL, *inputs = NULL, *extra = extra_of(route, slot, grad), *known = extra == NULL ? NULL : PyList_AsTuple(tape->key);
    if (known == NULL || (inputs = PyList_AsTuple(tape->inputs)) == NULL || (key = PyTuple_Pack(3, known, inputs, extra)) == NULL)
        goto done;
    if (PyLong_AsLong(PyTuple_GET_ITEM(route, R_KIND)) < NEST) {
        PyObject *given = seeds_key(seeds);
        Py_SETREF(key, given == NULL ? NULL : PyTuple_Pack(2, key, given));
        Py_XDECREF(given);
        if (key == NULL)
            goto done;
    }
    *plan = PyDict_GetItemWithError(PyTuple_GET_ITEM(route, R_PLANS), key);
    if (*plan == NULL) {
        if (PyErr_Occurred()) {
            if (!PyErr_ExceptionMatches(PyExc_TypeError))
                goto done;
            PyErr_Clear(); /* an argument that has no hash */
        }
        found = 0;
        goto done;
    }
    Py_INCREF(*plan);
    *quick = PyObject_GetAttr(*plan, s_quick);
    if (*quick == NULL && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Clear();
    else if (*quick == NULL || PyObject_SetAttr(*plan, s_used, Py_True) < 0)
        goto done;
    found = *quick != NULL && PyTuple_Check(*quick);
done:
    if (found <= 0) {
        Py_CLEAR(*plan);
        Py_CLEAR(*quick);
    }
    Py_XDECREF(known);
    Py_XDECREF(inputs);
    Py_XDECREF(key);
    return found;
}

/* The same without seeds. */
static int
find_plan(PyObject *route, Handler *tape, PyObject *out, int grad, PyObject **plan, PyObject **quick)
{
    return find_seeded_plan(route, tape, out, empty, grad, plan, quick);
}

/* The results of a replay, of which the reference is taken, in their structure. */
static PyObject *
assembled(PyObject *found, PyObject *quick)
{
    if (found == NULL)
        return NULL;
    PyObject *result = NULL, *spec = PyTuple_GET_ITEM(quick, Q_SPEC);
    if (!PyTuple_CheckExact(found) || PyTuple_GET_SIZE(found) == 0)
        PyErr_SetString(PyExc_TypeError, "a replay returns a tuple of its results");
    else if (spec == Py_None)
        result = Py_NewRef(PyTuple_GET_ITEM(found, 0));
    else if (spec == Py_True) /* a tuple of tensors */
        result = Py_NewRef(found);
    else {
        PyObject *leaves = PySequence_List(found);
        PyObject *args[] = {leaves, spec};
        result = leaves == NULL ? NULL : PyObject_Vectorcall(c_unflatten, args, 2, NULL);
        Py_XDECREF(leaves);
    }
    Py_DECREF(found);
    return result;
}

/* Whether a Jacobian is small enough to be computed at once, or a gradient is one of a scalar: 1, 0, or -1 with an error set. */
static int
fits_kind(long kind, PyObject *leaf, PyObject *out)
{
    if (kind >= PUSHED || !is_tensor(out))
        return kind >= PUSHED;
    PyObject *dtype = GET(out, dtype);
    int fits = dtype == NULL ? -1 : PySet_Contains(c_floating, dtype);
    Py_XDECREF(dtype);
    if (fits > 0 && kind == GRADIENT)
        return rank_is(out, 0);
    Py_ssize_t elements = 1;
    PyObject *tensors[] = {leaf, out};
    for (int number = 0; fits > 0 && number < 2; number++) {
        PyObject *shape = GET(tensors[number], shape);
        if (shape == NULL)
            return -1;
        for (Py_ssize_t place = 0; fits && place < PyTuple_GET_SIZE(shape); place++) {
            Py_ssize_t size = PyLong_AsSsize_t(PyTuple_GET_ITEM(shape, place));
            elements *= size;
            fits = size < LARGE && elements < LARGE; /* neither factor nor product overflows */
        }
        Py_DECREF(shape);
    }
    return fits;
}

/* What a replay reads: a value of the tape, or a seed, of which the key is a pair; borrowed. */
static PyObject *
needed(Handler *tape, PyObject *seeds, PyObject *key)
{
    if (PyLong_CheckExact(key))
        return PyList_GetItem(tape->values, PyLong_AsSsize_t(key));
    return PyTuple_GetItem(seeds, PyLong_AsSsize_t(PyTuple_GET_ITEM(key, 1)));
}

/* Replay the plan of a run that nothing is around: 1 with the result; 0, with nothing done, if it is left to Python; -1 with an
 * error set. */
static int
replay_run(PyObject *route, Handler *tape, PyObject *leaf, PyObject *out, PyObject *seeds, int grad, PyObject **result)
{
    PyObject *plan, *quick;
    int fits = fits_kind(PyLong_AsLong(PyTuple_GET_ITEM(route, R_KIND)), leaf, out);
    if (fits <= 0)
        return fits;
    int found = find_seeded_plan(route, tape, out, seeds, grad, &plan, &quick);
    if (found <= 0)
        return found;
    PyObject *needs = PyTuple_GET_ITEM(quick, Q_NEEDS);
    for (Py_ssize_t place = 0; found > 0 && place < PyTuple_GET_SIZE(needs); place++) {
        PyObject *value = needed(tape, seeds, PyTuple_GET_ITEM(needs, place));
        int graph = value == NULL ? -1 : (PyObject *)Py_TYPE(value) != c_tensor ? 1 : is_true_of(GET(value, requires_grad));
        found = graph < 0 ? -1 : !graph;
    }
    if (found > 0) {
        /* The values are let go as the plan has read them. */
        PyObject *spent = PyObject_CallOneArg(c_spent, tape->values);
        PyObject *args[] = {spent, seeds};
        found = spent == NULL || PyList_SetSlice(tape->values, 0, PyList_GET_SIZE(tape->values), NULL) < 0 ? -1 : 1;
        if (found > 0) {
            Py_CLEAR(tape->alias);
            Py_CLEAR(tape->pending);
            Py_CLEAR(tape->derived);
            Py_CLEAR(tape->kept);
            *result = assembled(PyObject_Vectorcall(PyTuple_GET_ITEM(quick, Q_RUN), args, 2, NULL), quick);
            found = *result == NULL ? -1 : 1;
        }
        Py_XDECREF(spent);
    }
    Py_DECREF(plan);
    Py_DECREF(quick);
    return found;
}

/* Switch torch's gradients on or off; an error that is on its way stays. */
static int
switch_grad(PyObject *enabled)
{
    PyObject *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace);
    int outcome = call_and_drop(c_set_grad, enabled);
    if (outcome < 0) {
        Py_XDECREF(kind);
        Py_XDECREF(error);
        Py_XDECREF(trace);
        return -1;
    }
    PyErr_Restore(kind, error, trace);
    return 0;
}

/* The place of the argument that a route differentiates; -1 if the arguments are left to Python. */
static Py_ssize_t
place_of(PyObject *route, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3 || !PyTuple_Check(args[0]) || PyTuple_GET_SIZE(args[0]) != ROUTE_FIELDS || !PyTuple_CheckExact(args[1]) ||
        !PyDict_CheckExact(args[2])) {
        PyErr_SetString(PyExc_TypeError, "a route, a tuple and a dictionary are expected");
        return -2;
    }
    if (PyTuple_GET_ITEM(route, R_NUMBER) == Py_None) /* all of them */
        return PyTuple_GET_SIZE(args[1]) ? 0 : -1;
    Py_ssize_t place = PyLong_AsSsize_t(PyTuple_GET_ITEM(route, R_NUMBER));
    return place >= 0 && place < PyTuple_GET_SIZE(args[1]) ? place : -1;
}

/* Aliases of some tensors, the inputs of a new tape. */
static Handler *
tape_of_all(PyObject *route, PyObject *leaves, PyObject **given)
{
    Handler *tape = bare_tape(route);
    *given = tape == NULL ? NULL : PyTuple_New(PyTuple_GET_SIZE(leaves));
    for (Py_ssize_t number = 0; *given != NULL && number < PyTuple_GET_SIZE(leaves); number++) {
        PyObject *alias = PyObject_CallMethodNoArgs(PyTuple_GET_ITEM(leaves, number), s_detach);
        if (alias == NULL || append_input(tape, alias, tensor_key(alias)) < 0) {
            Py_XDECREF(alias);
            Py_CLEAR(*given);
        } else
            PyTuple_SET_ITEM(*given, number, alias);
    }
    if (*given == NULL)
        Py_CLEAR(tape);
    return tape;
}

/* Arguments with another one at a place. */
static PyObject *
replaced(PyObject *args, Py_ssize_t place, PyObject *item)
{
    PyObject *given = PyTuple_New(PyTuple_GET_SIZE(args));
    for (Py_ssize_t number = 0; given != NULL && number < PyTuple_GET_SIZE(args); number++)
        PyTuple_SET_ITEM(given, number, Py_NewRef(number == place ? item : PyTuple_GET_ITEM(args, number)));
    return given;
}

/* What a call returns to Python: whether the result is there, and it or the run. */
static PyObject *
outcome_of(int found, PyObject *result, PyObject *mode, Handler *tape, PyObject *leaf, PyObject *out, int grad, PyObject *given)
{
    if (found < 0)
        return NULL;
    if (found)
        return Py_BuildValue("(ONO)", Py_True, result, out);
    return Py_BuildValue("(OOOOOOO)", Py_False, mode, (PyObject *)tape, leaf, out, grad ? Py_True : Py_False, given);
}

/* Whether a seed is plain, without a graph, and as the tensor it belongs to: 1, 0, or -1 with an error set. */
static int
is_alike(PyObject *seed, PyObject *leaf)
{
    int alike = is_plain_floating(seed);
    PyObject *dtype = NULL, *other = NULL;
    if (alike <= 0)
        return alike;
    if ((dtype = GET(seed, dtype)) == NULL || (other = GET(leaf, dtype)) == NULL)
        alike = -1;
    else
        alike = dtype == other;
    Py_XDECREF(dtype);
    Py_XDECREF(other);
    if (alike > 0) {
        PyObject *shape = GET(seed, shape), *wanted = shape == NULL ? NULL : GET(leaf, shape);
        alike = wanted == NULL ? -1 : PyObject_RichCompareBool(shape, wanted, Py_EQ);
        Py_XDECREF(shape);
        Py_XDECREF(wanted);
    }
    if (alike > 0) {
        PyObject *device = GET(seed, device), *wanted = device == NULL ? NULL : GET(leaf, device);
        alike = wanted == NULL ? -1 : PyObject_RichCompareBool(device, wanted, Py_EQ);
        Py_XDECREF(device);
        Py_XDECREF(wanted);
    }
    return alike;
}

/* call_alone(route, args, kwargs, seeds=(), function=None): (tape, leaf, output, whether gradients are on, plan or None, its `quick` or None) where the
 * linear function of a nest is asked for. With a function in the place of the route's, seeds have to be as the argument. Of others (True, result, output of the function), (False, None, tape, leaf, output, whether gradients are
 * on, arguments) where the plan is left to Python, or NotImplemented with nothing done. */
static PyObject *
call_alone(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    PyObject *route = args[0], *leaf, *alias = NULL, *given = NULL, *out = NULL, *result = NULL, *made = NULL;
    Handler *tape = NULL;
    Py_ssize_t place = place_of(route, args, count >= 3 && count <= 5 ? 3 : 0);
    if (place < 0)
        return place == -2 ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *seeds = count > 3 ? args[3] : empty, *function = count > 4 ? args[4] : PyTuple_GET_ITEM(route, R_FUNCTION);
    if (!PyTuple_CheckExact(seeds))
        return PyErr_Format(PyExc_TypeError, "call_alone: seeds are expected in a tuple");
    int all = PyTuple_GET_ITEM(route, R_NUMBER) == Py_None, fits = stands_alone();
    leaf = all ? args[1] : PyTuple_GET_ITEM(args[1], place);
    if (fits > 0 && all && PyTuple_GET_SIZE(seeds) && PyTuple_GET_SIZE(seeds) != PyTuple_GET_SIZE(leaf))
        fits = 0;
    for (Py_ssize_t number = 0; fits > 0 && number < (all ? PyTuple_GET_SIZE(leaf) : 1); number++)
        fits = is_plain_floating(all ? PyTuple_GET_ITEM(leaf, number) : leaf);
    for (Py_ssize_t number = 0; count > 4 && fits > 0 && number < PyTuple_GET_SIZE(seeds); number++)
        fits = is_alike(PyTuple_GET_ITEM(seeds, number), all ? PyTuple_GET_ITEM(leaf, number) : leaf);
    if (fits <= 0)
        return fits < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    int grad = grad_is_enabled();
    if (grad < 0 || (!grad && call_and_drop(c_set_grad, Py_True) < 0))
        return NULL;
    if (all)
        tape = tape_of_all(route, leaf, &given);
    else if ((alias = PyObject_CallMethodNoArgs(leaf, s_detach)) != NULL && (given = replaced(args[1], place, alias)) != NULL)
        tape = tape_of(route, alias, tensor_key(alias));
    if (tape != NULL)
        out = run_recorded(tape, function, given, PyDict_GET_SIZE(args[2]) ? args[2] : NULL);
    if (!grad && switch_grad(Py_False) < 0)
        Py_CLEAR(out);
    Py_XDECREF(given);
    Py_XDECREF(alias);
    long kind = PyLong_AsLong(PyTuple_GET_ITEM(route, R_KIND));
    if (out != NULL && kind >= LINEARIZED) {
        PyObject *plan = NULL, *quick = NULL;
        int found = kind == RECORDED ? 0 : find_seeded_plan(route, tape, out, seeds, grad, &plan, &quick);
        if (found >= 0)
            made = Py_BuildValue("(OOOOOO)", (PyObject *)tape, leaf, out, grad ? Py_True : Py_False, plan == NULL ? Py_None : plan,
                                 quick == NULL ? Py_None : quick);
        Py_XDECREF(plan);
        Py_XDECREF(quick);
    } else if (out != NULL) {
        int found = replay_run(route, tape, leaf, out, seeds, grad, &result);
        made = outcome_of(found, result, Py_None, tape, leaf, out, grad, args[1]);
    }
    Py_XDECREF(tape);
    Py_XDECREF(out);
    return made;
}

/* Assignments to what an index chooses, as chainrule.capture.assignments does them. Part of shortcuts.c. */

/* Whether the shapes of two tensors are the same, and whether the second one has more dimensions: 0, or -1 with an error set. */
static int
compare_shapes(PyObject *one, PyObject *other, int *same, int *deeper)
{
    PyObject *first = GET(one, shape), *second = first == NULL ? NULL : GET(other, shape);
    *same = second == NULL ? -1 : PyObject_RichCompareBool(first, second, Py_EQ);
    *deeper = second != NULL && PyTuple_GET_SIZE(second) > PyTuple_GET_SIZE(first);
    Py_XDECREF(first);
    Py_XDECREF(second);
    return *same < 0 ? -1 : 0;
}

/* A value as wide as the view that it is written to; a new reference, NotImplemented where torch has to see to it. */
static PyObject *
widened(Handler *self, PyObject *view, PyObject *value)
{
    int same, deeper;
    if (compare_shapes(view, value, &same, &deeper) < 0)
        return NULL;
    if (same || deeper)
        return Py_NewRef(same ? value : Py_NotImplemented);
    PyObject *shape = GET(view, shape), *sizes = shape == NULL ? NULL : PySequence_List(shape);
    PyObject *args = sizes == NULL ? NULL : PyTuple_Pack(2, value, sizes), *facts = args == NULL ? NULL : facts_of(self, c_expand_op);
    PyObject *out = facts == NULL ? NULL : run_common(self, facts, args, empty, SLOT(facts, fast), args, NULL);
    Py_XDECREF(shape);
    Py_XDECREF(sizes);
    Py_XDECREF(args);
    return out;
}

/* view[...] = value, with torch's handlers off; NotImplemented leaves it to Python. */
static PyObject *
write_to_view(Handler *self, PyObject *view, PyObject *value)
{
    int number = is_number(value);
    PyObject *given = number ? Py_NewRef(value) : widened(self, view, value);
    if (given == NULL || given == Py_NotImplemented)
        return given;
    PyObject *facts = facts_of(self, number ? c_fill_op : c_copy_op), *args = facts == NULL ? NULL : PyTuple_Pack(2, view, given);
    PyObject *out = args == NULL ? NULL : run_write(self, facts, args, SLOT(facts, fast), args, NULL);
    Py_XDECREF(args);
    Py_DECREF(given);
    return out;
}

/* tensor[index] = value at places that tensors name, with torch's handlers off; NotImplemented leaves it to Python. */
static PyObject *
write_to_places(Handler *self, PyObject *tensor, PyObject *indices, PyObject *value)
{
    if (!is_number(value) && !PyObject_TypeCheck(value, (PyTypeObject *)c_tensor)) /* True, say */
        return Py_NewRef(Py_NotImplemented);
    PyObject *beside[] = {value, tensor}, *out = NULL, *args = NULL, *facts;
    PyObject *given = is_number(value) ? PyObject_Vectorcall(c_constant_beside, beside, 2, NULL) : Py_NewRef(value);
    PyObject *own = given == NULL ? NULL : GET(tensor, dtype), *rank = own == NULL ? NULL : GET(tensor, ndim), *other = NULL, *dims = NULL;
    long room = rank == NULL ? -2 : picked_rank(indices, PyLong_AsLong(rank));
    if (room == -1 || given == Py_None)
        out = Py_NewRef(Py_NotImplemented);
    else if (room >= 0 && (other = GET(given, dtype)) != NULL && (dims = GET(given, ndim)) != NULL) {
        if (other != own || PyLong_AsLong(dims) > room)
            out = Py_NewRef(Py_NotImplemented);
        else if ((args = PyTuple_Pack(3, tensor, indices, given)) != NULL && (facts = facts_of(self, c_put_op)) != NULL)
            out = run_write(self, facts, args, c_put, args, NULL);
    }
    Py_XDECREF(given);
    Py_XDECREF(own);
    Py_XDECREF(rank);
    Py_XDECREF(other);
    Py_XDECREF(dims);
    Py_XDECREF(args);
    return out;
}

/* tensor[index] = value on a tape that stands on a vmap which nothing is around; NotImplemented leaves it to Python. */
static PyObject *
run_assign_below(Handler *self, PyObject *args)
{
    Handler *level = (Handler *)vmap_below(self);
    PyObject *const *given = &PyTuple_GET_ITEM(args, 0);
    if (level == NULL || self->depth != 2 || is_listened(self) || self->meets_saved || notes_derived(self) || state.exclude == NULL ||
        !self->sees_views || level->guarded || level->graphs || PyObject_IsTrue(level->size) <= 0 || c_known == NULL ||
        (PyObject *)Py_TYPE(given[0]) != c_batch_tensor)
        return Py_NewRef(Py_NotImplemented);
    int off = autocast_is_on();
    if (off == 0 && self->respect_no_grad && (off = grad_is_enabled()) >= 0)
        off = !off;
    if (off)
        return off < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    int views = chooses_view(given[1]);
    PyObject *indices = views ? NULL : tensors_of(given[1]), *excluded = views || indices != NULL ? exclude_python(1) : NULL, *out = NULL;
    if (excluded == NULL) {
        Py_XDECREF(indices);
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_NotImplemented);
    }
    Py_DECREF(excluded);
    if (views) {
        state.exclude(state.views, false);
        out = assign_below(self, given);
        state.exclude(state.views, true);
    } else
        out = write_to_places(self, given[0], indices, given[2]);
    Py_XDECREF(indices);
    if (include_python() < 0)
        Py_CLEAR(out);
    if (out != NULL && out != Py_NotImplemented)
        Py_SETREF(out, Py_NewRef(Py_None));
    return out;
}

/* tensor[index] = value; NotImplemented leaves it to Python, with nothing written. */
static PyObject *
run_assign(Handler *self, PyObject *args)
{
    if (PyTuple_GET_SIZE(args) != 3 || state.exclude == NULL || is_listened(self))
        return Py_NewRef(Py_NotImplemented);
    if (self->below != NULL && self->below != Py_None)
        return run_assign_below(self, args);
    PyObject *tensor = PyTuple_GET_ITEM(args, 0), *index = PyTuple_GET_ITEM(args, 1), *value = PyTuple_GET_ITEM(args, 2);
    if ((PyObject *)Py_TYPE(tensor) != c_tensor || !(is_number(value) || (PyObject *)Py_TYPE(value) == c_tensor))
        return Py_NewRef(Py_NotImplemented);
    PyObject *dtype = GET(tensor, dtype);
    int floating = dtype == NULL ? -1 : PySet_Contains(c_floating, dtype);
    Py_XDECREF(dtype);
    if (floating <= 0)
        return floating < 0 ? NULL : Py_NewRef(Py_NotImplemented);
    int autocast = autocast_is_on(), views = chooses_view(index);
    PyObject *indices = views || autocast ? NULL : tensors_of(index);
    if (autocast || (!views && indices == NULL))
        return autocast < 0 || PyErr_Occurred() ? NULL : Py_NewRef(Py_NotImplemented);
    PyObject *chosen = views ? PyTuple_Pack(2, tensor, index) : NULL;
    PyObject *view = chosen == NULL ? NULL : run_index(self, c_getitem, chosen);
    Py_XDECREF(chosen);
    if ((views && view == NULL) || view == Py_NotImplemented)
        return view;
    PyObject *off = exclude_python(1), *out = NULL;
    if (off != NULL) {
        Py_DECREF(off);
        out = views ? write_to_view(self, view, value) : write_to_places(self, tensor, indices, value);
        if (include_python() < 0)
            Py_CLEAR(out);
    }
    Py_XDECREF(view);
    Py_XDECREF(indices);
    if (out != NULL && out != Py_NotImplemented)
        Py_SETREF(out, Py_NewRef(Py_None));
    return out;
}

/* Tensors of a vmap that are the same for all samples, and carry the batch from a write on (chainrule.batching.tensor.make_batched).
 * Part of shortcuts.c. */

/* Whether an attribute of a tensor is None: 1, 0, or -1 with an error set. */
static int
has_none(PyObject *tensor, PyObject *name)
{
    PyObject *found = PyObject_GetAttr(tensor, name);
    Py_XDECREF(found);
    return found == NULL ? -1 : found == Py_None;
}

/* A copy of a tensor for each sample; a new reference. */
static PyObject *
spread(PyObject *value, PyObject *size, PyObject *shape)
{
    Py_ssize_t rank = PyTuple_GET_SIZE(shape);
    PyObject *wide = PyTuple_New(rank + 1);
    if (wide == NULL)
        return NULL;
    PyTuple_SET_ITEM(wide, 0, Py_NewRef(size));
    for (Py_ssize_t place = 0; place < rank; place++)
        PyTuple_SET_ITEM(wide, place + 1, Py_NewRef(PyTuple_GET_ITEM(shape, place)));
    PyObject *made = PyObject_CallMethodOneArg(value, s_new_empty, wide), *args[] = {made, value};
    PyObject *done = made == NULL ? NULL : PyObject_Vectorcall(c_copy_, args, 2, NULL);
    Py_DECREF(wide);
    if (done == NULL)
        Py_CLEAR(made);
    Py_XDECREF(done);
    return made;
}

/* Have a tensor of the level without a graph carry the batch, with torch's handlers off: 0, or -1 with an error set. Views of it, and
 * what lies in memory otherwise than row by row, are left to Python. */
static int
carry_batch(PyObject *level, PyObject *tensor)
{
    PyObject *value = SLOT(tensor, inner), *batch = NULL;
    int plain = (PyObject *)Py_TYPE(value) == c_tensor ? has_none(tensor, s_parent) : 0;
    if (plain > 0 && (plain = has_none(tensor, s_views)) > 0)
        plain = is_true_of(PyObject_CallMethodNoArgs(value, s_is_contiguous));
    if (plain < 0)
        return -1;
    PyObject *shape = plain ? GET(value, shape) : NULL;
    PyObject *copy = shape == NULL ? NULL : spread(value, ((Handler *)level)->size, shape);
    /* What is known of others without asking (that they have no graph) is not of this one: a graph may be written to it. */
    if (copy != NULL && (batch = ((PyTypeObject *)c_batched)->tp_alloc((PyTypeObject *)c_batched, 0)) != NULL)
        SLOT(batch, value) = Py_NewRef(copy);
    Py_XDECREF(copy);
    Py_XDECREF(shape);
    if (plain) {
        if (batch == NULL)
            return -1;
        Py_SETREF(SLOT(tensor, inner), batch);
        return 0;
    }
    PyObject *done = PyObject_CallMethod(level, "upgrade", "OO", tensor, c_setitem);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

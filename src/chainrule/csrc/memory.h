/* Which tensors are views of which on a tape, as chainrule.capture.aliasing keeps it. Part of shortcuts.c. */

/* Fields of chainrule.capture.aliasing.Link, which is a tuple. */
enum { LINK_VIEW, LINK_PARENT, LINK_OP, LINK_ARGS, LINK_KWARGS, LINK_FIELDS };

/* The tables of a tape's AliasTracker. */
typedef struct {
    PyObject *alias, *links, *roots, *families, *reads;
} Memory;

static void
let_go(Memory *memory)
{
    Py_CLEAR(memory->alias);
    Py_CLEAR(memory->links);
    Py_CLEAR(memory->roots);
    Py_CLEAR(memory->families);
    Py_CLEAR(memory->reads);
}

/* Those tables, made if there are none: 0, or -1 with an error set. */
static int
memory_of(Handler *self, Memory *memory)
{
    memset(memory, 0, sizeof(*memory));
    if ((memory->alias = PyObject_GetAttr((PyObject *)self, s_alias)) != NULL &&
        (memory->links = PyObject_GetAttr(memory->alias, s_links)) != NULL &&
        (memory->roots = PyObject_GetAttr(memory->alias, s_roots)) != NULL &&
        (memory->families = PyObject_GetAttr(memory->alias, s_families)) != NULL &&
        (memory->reads = PyObject_GetAttr(memory->alias, s__read_slots)) != NULL)
        return 0;
    let_go(memory);
    return -1;
}

/* What a table has for the identity of an object, borrowed; NULL for nothing, or with an error set. */
static PyObject *
found_for(PyObject *table, PyObject *object)
{
    PyObject *identity = PyLong_FromVoidPtr(object);
    PyObject *found = identity == NULL ? NULL : PyDict_GetItemWithError(table, identity);
    Py_XDECREF(identity);
    return found;
}

static int
put_for(PyObject *table, PyObject *object, PyObject *value)
{
    PyObject *identity = PyLong_FromVoidPtr(object);
    int outcome = identity == NULL ? -1 : PyDict_SetItem(table, identity, value);
    Py_XDECREF(identity);
    return outcome;
}

/* Whether a tensor is torch's own and has its elements at their places: 1, 0, or -1 with an error set. */
static int
is_own_strided(PyObject *tensor)
{
    if ((PyObject *)Py_TYPE(tensor) != c_tensor)
        return 0;
    PyObject *layout = GET(tensor, layout);
    Py_XDECREF(layout);
    return layout == NULL ? -1 : layout == c_strided;
}

/* The memory of the tensor that is stored for one, as a new reference to its address; NULL with an error set, or without one where it
 * is not told here. */
static PyObject *
memory_behind(PyObject *tensor)
{
    while ((PyObject *)Py_TYPE(tensor) == c_batch_tensor) {
        tensor = SLOT(tensor, inner);
        if (tensor != NULL && (PyObject *)Py_TYPE(tensor) == c_batched)
            tensor = SLOT(tensor, value);
        if (tensor == NULL)
            return NULL;
    }
    if (is_own_strided(tensor) <= 0)
        return NULL;
    PyObject *storage = PyObject_CallMethodNoArgs(tensor, s_untyped_storage);
    PyObject *place = storage == NULL ? NULL : PyObject_GetAttr(storage, s__cdata);
    Py_XDECREF(storage);
    return place;
}

/* Whether a mapped tensor is a view of another one, and no copy that stands for one: 1, 0, or -1 with an error set. */
static int
shares_memory(PyObject *view, PyObject *parent)
{
    if ((PyObject *)Py_TYPE(view) != c_batch_tensor || (PyObject *)Py_TYPE(parent) != c_batch_tensor)
        return 0;
    PyObject *one = memory_behind(view), *other = one == NULL ? NULL : memory_behind(parent);
    int same = other == NULL ? (PyErr_Occurred() ? -1 : 0) : PyObject_RichCompareBool(one, other, Py_EQ);
    Py_XDECREF(one);
    Py_XDECREF(other);
    return same;
}

/* Remember how a view was made: 1; 0 if Python has to look at it; -1 with an error set. */
static int
link_view(Memory *memory, PyObject *pending)
{
    PyObject *op = PyTuple_GET_ITEM(pending, 0), *args = PyTuple_GET_ITEM(pending, 1), *kwargs = PyTuple_GET_ITEM(pending, 2);
    PyObject *view = PyTuple_GET_ITEM(pending, 3), *parent = PyTuple_GET_SIZE(args) ? PyTuple_GET_ITEM(args, 0) : Py_None;
    if (kwargs != Py_None && !(PyDict_CheckExact(kwargs) && PyDict_GET_SIZE(kwargs) == 0))
        return 0;
    int fits = found_for(c_always_views, op) != NULL;
    if (!fits)
        return PyErr_Occurred() ? -1 : 0;
    if ((fits = is_own_strided(view)) < 0 || (fits && (fits = is_own_strided(parent)) < 0))
        return fits;
    if (!fits && (fits = shares_memory(view, parent)) <= 0)
        return fits;
    if (view == parent)
        return 1;
    PyObject *link = ((PyTypeObject *)c_link)->tp_alloc((PyTypeObject *)c_link, LINK_FIELDS);
    PyObject *rest = PyTuple_GetSlice(args, 1, PyTuple_GET_SIZE(args)), *none = PyDict_New();
    int outcome = -1;
    if (link == NULL || rest == NULL || none == NULL) {
        Py_XDECREF(rest);
        Py_XDECREF(none);
        Py_XDECREF(link);
        return -1;
    }
    PyTuple_SET_ITEM(link, LINK_VIEW, Py_NewRef(view));
    PyTuple_SET_ITEM(link, LINK_PARENT, Py_NewRef(parent));
    PyTuple_SET_ITEM(link, LINK_OP, Py_NewRef(op));
    PyTuple_SET_ITEM(link, LINK_ARGS, rest);
    PyTuple_SET_ITEM(link, LINK_KWARGS, none);
    PyObject *root = found_for(memory->roots, parent);
    root = root != NULL || PyErr_Occurred() ? root : parent;
    PyObject *family = root == NULL ? NULL : found_for(memory->families, root), *made = NULL;
    if (root != NULL && family == NULL && !PyErr_Occurred() && (made = PyList_New(0)) != NULL &&
        put_for(memory->families, root, made) == 0)
        family = made;
    if (family != NULL && PyList_CheckExact(family) && put_for(memory->links, view, link) == 0 &&
        put_for(memory->roots, view, root) == 0 && PyList_Append(family, view) == 0)
        outcome = 1;
    Py_XDECREF(made);
    Py_DECREF(link);
    return outcome;
}

/* Look at the views that were made since (AliasTracker._settle_views): 0, or -1 with an error set. */
static int
settle_views(Handler *self, Memory *memory)
{
    PyObject *pending = self->pending;
    if (pending == NULL || !PyList_CheckExact(pending))
        return 0;
    for (Py_ssize_t place = 0; place < PyList_GET_SIZE(pending); place++) {
        PyObject *item = PyList_GET_ITEM(pending, place);
        int linked = link_view(memory, item);
        if (linked < 0)
            return -1;
        if (linked)
            continue;
        PyObject *named = PyTuple_GET_ITEM(item, 2) == Py_None ? PyDict_New() : Py_NewRef(PyTuple_GET_ITEM(item, 2));
        PyObject *done = named == NULL ? NULL
                                       : PyObject_CallMethodObjArgs(memory->alias, s__note_view, PyTuple_GET_ITEM(item, 0),
                                                                    PyTuple_GET_ITEM(item, 1), named, PyTuple_GET_ITEM(item, 3), NULL);
        Py_XDECREF(named);
        Py_XDECREF(done);
        if (done == NULL)
            return -1;
    }
    return PyList_SetSlice(pending, 0, PyList_GET_SIZE(pending), NULL);
}

/* Whether a tensor is known by its identity alone: torch's own, or one of the level below. */
static int
is_tracked(Handler *self, PyObject *tensor)
{
    PyObject *level = vmap_below(self);
    if ((PyObject *)Py_TYPE(tensor) == c_tensor)
        return level != NULL || self->below == NULL || self->below == Py_None;
    return level != NULL && (PyObject *)Py_TYPE(tensor) == c_batch_tensor && SLOT(tensor, level) == level;
}

/* Whether a tensor without a slot may stand for values of the tape all the same, a view of something that was written: 1, 0, or -1
 * with an error set. */
static int
may_be_known(Handler *self, PyObject *tensor)
{
    if (self->alias == NULL || self->alias == Py_None)
        return 0;
    if (self->meets_saved || !is_tracked(self, tensor))
        return 1;
    Memory memory;
    if (memory_of(self, &memory) < 0)
        return -1;
    int outcome = settle_views(self, &memory);
    PyObject *link = outcome < 0 ? NULL : found_for(memory.links, tensor);
    while (link != NULL && !outcome) { /* what it is a view of, and so on */
        PyObject *parent = PyTuple_GET_ITEM(link, LINK_PARENT);
        outcome = found_for(self->slots, parent) != NULL;
        link = found_for(memory.links, parent);
    }
    if (PyErr_Occurred())
        outcome = -1;
    let_go(&memory);
    return outcome;
}

/* Tensors of a level that were let go, kept to be the next ones that are made alike. Part of shortcuts.c.
 *
 * A tensor of a level is little more than a shape: making and freeing one takes as long as a small kernel. One that nobody holds any
 * more, and of which nothing but that shape was ever set, is as good as a new one. */

/* Those of one kind. It lives as long as one of them does. */
enum { MOST_SHELLS = 16, MOST_SHELVES = 1024 };
typedef struct {
    PyObject_HEAD
    int whole; /* contiguous, from the beginning of its memory, on the CPU */
    Py_ssize_t count;
    PyObject *tensors[MOST_SHELLS];
} Shelf;

static PyTypeObject shelf_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "chainrule._shortcuts.Shelf",
    .tp_basicsize = sizeof(Shelf),
    .tp_flags = Py_TPFLAGS_DEFAULT,
};

static PyObject *shelves = NULL; /* by what a tensor of the kind is made of */
static destructor free_tensor = NULL;

/* Let those of all kinds go. */
static void
empty_shelves(void)
{
    PyObject *key, *shelf;
    Py_ssize_t place = 0;
    while (PyDict_Next(shelves, &place, &key, &shelf))
        while (((Shelf *)shelf)->count) {
            PyObject *tensor = ((Shelf *)shelf)->tensors[--((Shelf *)shelf)->count];
            Py_CLEAR(SLOT(tensor, shelf));
            Py_DECREF(tensor);
        }
    PyDict_Clear(shelves);
}

/* Whether tensors may be taken from there: in torch's inference mode it makes another kind of them. */
static int
uses_shelves(void)
{
    return state.set_functions != NULL && state.included(state.views);
}

/* The shelf of a kind, borrowed; NULL with an error set. */
static PyObject *
shelf_of(PyObject *sample, PyObject *strides, PyObject *offset, PyObject *dtype, PyObject *device)
{
    PyObject *key = PyTuple_Pack(5, sample, strides, offset, dtype, device), *shelf;
    if (key == NULL)
        return NULL;
    shelf = PyDict_GetItemWithError(shelves, key);
    if (shelf == NULL && !PyErr_Occurred()) {
        if (PyDict_GET_SIZE(shelves) >= MOST_SHELVES)
            empty_shelves();
        shelf = shelf_type.tp_alloc(&shelf_type, 0);
        if (shelf != NULL)
            ((Shelf *)shelf)->whole = strides == Py_None && offset == Py_None && device == Py_None;
        if (shelf != NULL && PyDict_SetItem(shelves, key, shelf) < 0)
            Py_CLEAR(shelf);
        Py_XDECREF(shelf); /* the table keeps it */
    }
    Py_DECREF(key);
    return shelf;
}

/* A tensor without its level and what it stores, of a kind or, without a shelf, to be used once; a new reference. */
static PyObject *
tensor_on(PyObject *shelf, PyObject *sample, PyObject *strides, PyObject *offset, PyObject *dtype, PyObject *device)
{
    Shelf *found = (Shelf *)shelf;
    if (found != NULL && found->count) {
        PyObject *known = found->tensors[--found->count];
        PyObject_GC_Track(known);
        return known;
    }
    PyObject *args[] = {c_batch_tensor, sample, strides, offset, Py_None, dtype, c_strided, device};
    PyObject *tensor = PyObject_Vectorcall(c_make_wrapper, args, device == Py_None ? 6 : 8, NULL);
    if (tensor != NULL && shelf != NULL)
        SLOT(tensor, shelf) = Py_NewRef(shelf);
    return tensor;
}

static PyObject *
tensor_like(PyObject *sample, PyObject *strides, PyObject *offset, PyObject *dtype, PyObject *device)
{
    PyObject *shelf = !uses_shelves() ? NULL : shelf_of(sample, strides, offset, dtype, device);
    return PyErr_Occurred() ? NULL : tensor_on(shelf, sample, strides, offset, dtype, device);
}

/* What stores a tensor that carries the batch; a new reference. */
static PyObject *
new_batch(PyObject *value)
{
    PyObject *batch = ((PyTypeObject *)c_batched)->tp_alloc((PyTypeObject *)c_batched, 0);
    if (batch != NULL)
        SLOT(batch, value) = Py_NewRef(value);
    return batch;
}

/* The shelf of a tensor if it is a whole one, borrowed; NULL for others. */
static PyObject *
whole_shelf(PyObject *tensor)
{
    PyObject *shelf = SLOT(tensor, shelf);
    return shelf != NULL && Py_TYPE(shelf) == &shelf_type && ((Shelf *)shelf)->whole && uses_shelves() ? shelf : NULL;
}

/* The `Batched` of such a tensor for what it stores now, a new one if the last is held elsewhere; borrowed, NULL with an error set. */
static PyObject *
batch_for(PyObject *tensor, PyObject *value)
{
    PyObject *batch = SLOT(tensor, inner);
    if (batch == NULL)
        return SLOT(tensor, inner) = new_batch(value);
    SLOT(batch, value) = Py_NewRef(value);
    return batch;
}

/* Whether torch, or somebody else, has made more of a tensor than a shape. Torch's functions are shown to nobody. */
static int
is_touched(PyObject *tensor)
{
    PyObject **weak = (PyObject **)((char *)tensor + Py_TYPE(tensor)->tp_weaklistoffset), **names;
    if (Py_TYPE(tensor)->tp_weaklistoffset <= 0 || *weak != NULL)
        return 1;
    names = _PyObject_GetDictPtr(tensor);
    if (names == NULL || (*names != NULL && (PyDict_GET_SIZE(*names) || Py_REFCNT(*names) > 1)))
        return 1;
    if (getters.requires_grad == NULL || getters._version == NULL ||
        is_true_of(getters.requires_grad->get(tensor, getters.requires_grad->closure)) != 0 ||
        is_true_of(getters._version->get(tensor, getters._version->closure)) != 0 || is_true_of(ASK(tensor, _is_view)) != 0)
        return 1;
    PyObject *count = ASK(tensor, _use_count);
    int shared = count == NULL || PyLong_AsLong(count) != 1;
    Py_XDECREF(count);
    return shared;
}

static void
let_tensor_go(PyObject *tensor);

/* Free a tensor. The class's own way to do so looks where that ends among the class and its bases, and has to find itself there. */
static void
really_free(PyObject *tensor)
{
    static int freeing = 0;
    PyTypeObject *type = (PyTypeObject *)c_batch_tensor;
    freeing++;
    type->tp_dealloc = free_tensor;
    free_tensor(tensor);
    if (--freeing == 0)
        type->tp_dealloc = let_tensor_go;
}

/* In the place of the class's own way to free a tensor. */
static void
let_tensor_go(PyObject *tensor)
{
    Shelf *shelf = (Shelf *)SLOT(tensor, shelf);
    if (shelf == NULL || Py_TYPE(shelf) != &shelf_type || shelf->count >= MOST_SHELLS || state.set_functions == NULL || (PyObject *)Py_TYPE(tensor) != c_batch_tensor) {
        Py_CLEAR(SLOT(tensor, shelf));
        really_free(tensor);
        return;
    }
    PyObject *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace);
    int disabled = state.get_functions();
    state.set_functions(2);
    Py_SET_REFCNT(tensor, 1);
    int touched = is_touched(tensor);
    PyErr_Clear();
    state.set_functions(disabled);
    PyObject *batch = SLOT(tensor, inner);
    if (!touched && Py_REFCNT(tensor) == 1) {
        if (batch != NULL && ((PyObject *)Py_TYPE(batch) != c_batched || Py_REFCNT(batch) > 1))
            Py_CLEAR(SLOT(tensor, inner));
        else if (batch != NULL) {
            Py_CLEAR(SLOT(batch, value));
            Py_CLEAR(SLOT(batch, dtype));
            Py_CLEAR(SLOT(batch, sample));
            Py_CLEAR(SLOT(batch, signature));
        }
        Py_CLEAR(SLOT(tensor, level));
        if (shelf->count < MOST_SHELLS) {
            PyObject_GC_UnTrack(tensor); /* the garbage collector may be about to clear it */
            shelf->tensors[shelf->count++] = tensor;
        } else
            touched = 1;
    } else
        touched = 1;
    if (touched && Py_REFCNT(tensor) == 1) {
        Py_CLEAR(SLOT(tensor, shelf));
        Py_SET_REFCNT(tensor, 0);
        really_free(tensor);
    } else if (touched)
        Py_DECREF(tensor);
    PyErr_Restore(kind, error, trace);
}

/* Setting anything of a tensor but what it stores makes it one of its kind. */
static int
set_of_tensor(PyObject *tensor, PyObject *name, PyObject *value)
{
    if (name != s_inner && name != s_level)
        Py_CLEAR(SLOT(tensor, shelf));
    return PyObject_GenericSetAttr(tensor, name, value);
}

static PyObject *no_functions = NULL; /* the class's `__torch_function__` */

/* An attribute by a name in C: torch asks every tensor of a class of its own at every call whether that takes functions. */
static PyObject *
tensor_by_text(PyObject *tensor, char *name)
{
    if (strcmp(name, "__torch_function__") == 0 && (PyObject *)Py_TYPE(tensor) == c_batch_tensor)
        return Py_NewRef(no_functions);
    PyObject *text = PyUnicode_FromString(name), *found = text == NULL ? NULL : PyObject_GetAttr(tensor, text);
    Py_XDECREF(text);
    return found;
}

static void
keep_shells(PyTypeObject *type)
{
    if (type->tp_dealloc == let_tensor_go)
        return;
    no_functions = PyObject_GetAttr((PyObject *)type, s___torch_function__);
    if (no_functions == NULL)
        PyErr_Clear();
    else
        type->tp_getattr = tensor_by_text;
    free_tensor = type->tp_dealloc;
    type->tp_dealloc = let_tensor_go;
    type->tp_setattro = set_of_tensor;
}

/* Calls on mapped tensors that were replayed before, found without making their signature as an object (see calls.h). Part of
 * shortcuts.c. */

/* A signature as numbers: what stands for each object of the call, in the order of calls.h. Objects that stand for themselves are
 * kept by an entry of the table, so that their addresses are theirs. */
enum { MOST_WORDS = 256, MOST_SEEN = 2048 };
enum { AT_TENSOR = 1, AT_CONSTANT, AT_AGAIN, AT_INT, AT_FLOAT, AT_SLICE, AT_SEQUENCE, AT_OBJECT, AT_NAME };
typedef struct {
    int count;
    uint64_t words[MOST_WORDS];
} Words;

typedef struct {
    uint64_t hash;
    int count, age;
    uint64_t *words;
    PyObject *kept, *replay;
} Seen;

enum { OLDEST = 4 }; /* so many others that find their place taken a call stays after its last use */

static Seen seen[MOST_SEEN];
static Py_ssize_t seen_known = 0; /* how many calls were known when the last one was added */

static int
add_word(Words *words, uint64_t word)
{
    if (words->count >= MOST_WORDS)
        return 0;
    words->words[words->count++] = word;
    return 1;
}

/* Something by its address; it is kept with the call. */
static int
add_object(Words *words, int tag, PyObject *object, PyObject *kept)
{
    if (!add_word(words, tag) || !add_word(words, (uint64_t)(uintptr_t)object))
        return 0;
    return kept == NULL || PyList_Append(kept, object) == 0 ? 1 : -1;
}

/* The entries of a tuple of integers, and how many they are; 0 if one is too large. */
static int
add_lengths(Words *words, PyObject *lengths)
{
    Py_ssize_t count = PyTuple_GET_SIZE(lengths);
    int taken = add_word(words, (uint64_t)count);
    for (Py_ssize_t place = 0; taken && place < count; place++) {
        long long length = PyLong_AsLongLong(PyTuple_GET_ITEM(lengths, place));
        if (length == -1 && PyErr_Occurred()) {
            PyErr_Clear();
            return 0;
        }
        taken = add_word(words, (uint64_t)length);
    }
    return taken;
}

/* What a signature says of a tensor that has no number: shape, strides, dtype. */
static int
add_layout(Words *words, PyObject *value, PyObject *kept)
{
    PyObject *layout = GET(value, layout);
    if (layout != c_strided) {
        Py_XDECREF(layout);
        return layout == NULL ? -1 : 0;
    }
    PyObject *dtype = GET(value, dtype), *shape = dtype == NULL ? NULL : GET(value, shape);
    PyObject *strides = shape == NULL ? NULL : PyObject_CallMethodNoArgs(value, s_stride);
    int taken = strides == NULL ? -1 : PySet_Contains(c_real, dtype);
    if (taken > 0 && (taken = is_true_of(GET(value, is_cpu))) > 0 && (taken = add_object(words, AT_CONSTANT, dtype, kept)) > 0)
        taken = add_lengths(words, shape) && add_lengths(words, strides);
    Py_XDECREF(layout);
    Py_XDECREF(dtype);
    Py_XDECREF(shape);
    Py_XDECREF(strides);
    return taken;
}

/* read_tensor (calls.h) in numbers. */
static int
add_tensor(Handler *self, PyObject *item, Words *words, PyObject *kept, PyObject *values, int *joined)
{
    PyObject *value, *batch;
    if (!find_stored_tensor(item, (PyObject *)self, &value, &batch))
        return 0;
    if (!reads_conjugates() && is_complex(value))
        return PyErr_Occurred() ? -1 : 0;
    int graph = known_batch(item) != NULL ? 0 : is_true_of(GET(value, requires_grad));
    if (graph < 0)
        return -1;
    *joined |= graph;
    if (!add_word(words, AT_TENSOR) || !add_word(words, (batch != NULL) + 2 * graph + 4 * (batch == NULL && value != item)))
        return 0;
    for (Py_ssize_t place = 0; place < PyList_GET_SIZE(values); place++)
        if (PyList_GET_ITEM(values, place) == value)
            return add_word(words, AT_AGAIN) && add_word(words, (uint64_t)place);
    int taken;
    if (batch != NULL) {
        PyObject *number;
        if ((taken = signature_number(value, batch, &number, 1)) <= 0)
            return taken;
        taken = add_word(words, PyLong_AsUnsignedLongLong(number));
        Py_DECREF(number);
    } else
        taken = is_constant_class(value) ? add_layout(words, value, kept) : 0;
    return taken <= 0 ? taken : PyList_Append(values, value) < 0 ? -1 : 1;
}

/* Write down a call in numbers, with its tensors and, if there is a list for them, the objects that are to be kept: 1; 0 if it is
 * left to calls.h; -1 with an error set. */
static int
add_items(Handler *self, PyObject *const *items, Py_ssize_t count, Words *words, PyObject *kept, PyObject *values, int *joined)
{
    int taken = 1;
    for (Py_ssize_t place = 0; taken > 0 && place < count; place++) {
        PyObject *item = items[place], *type = (PyObject *)Py_TYPE(item);
        if (type == c_batch_tensor || is_constant_class(item))
            taken = add_tensor(self, item, words, kept, values, joined);
        else if (PyLong_CheckExact(item)) {
            int overflow;
            long long number = PyLong_AsLongLongAndOverflow(item, &overflow);
            taken = !overflow && add_word(words, AT_INT) && add_word(words, (uint64_t)number);
        } else if (PyFloat_CheckExact(item)) {
            double number = PyFloat_AS_DOUBLE(item);
            uint64_t bits;
            memcpy(&bits, &number, sizeof(bits));
            taken = number == number && add_word(words, AT_FLOAT) && add_word(words, bits);
        } else if (PySlice_Check(item)) {
            PySliceObject *slice = (PySliceObject *)item;
            PyObject *parts[] = {slice->start, slice->stop, slice->step};
            taken = add_word(words, AT_SLICE) ? add_items(self, parts, 3, words, kept, values, joined) : 0;
        } else if (PyList_CheckExact(item) || PyTuple_CheckExact(item) || type == c_size) {
            Py_ssize_t within = PySequence_Fast_GET_SIZE(item);
            taken = add_object(words, AT_SEQUENCE, type, NULL); /* these classes stay */
            if (taken > 0 && (taken = add_word(words, (uint64_t)within)))
                taken = add_items(self, PySequence_Fast_ITEMS(item), within, words, kept, values, joined);
        } else if (item == Py_None || PyBool_Check(item) || item == Py_Ellipsis)
            taken = add_object(words, AT_OBJECT, item, NULL);
        else if ((taken = PySet_Contains(c_constants_of_calls, type)) > 0)
            taken = add_object(words, AT_OBJECT, item, kept);
    }
    return taken;
}

static int
add_call(Handler *self, PyObject *func, PyObject *const *args, Py_ssize_t count, PyObject *kwargs, Words *words, PyObject *kept,
         PyObject *values, int *joined)
{
    PyObject *name, *item, *dtype = PyObject_CallNoArgs(c_default_dtype); /* which numbers take */
    Py_ssize_t place = 0;
    words->count = 0;
    *joined = 0;
    if (dtype == NULL)
        return -1;
    int taken = add_object(words, AT_OBJECT, func, kept);
    if (taken > 0)
        taken = add_object(words, AT_OBJECT, dtype, kept);
    Py_DECREF(dtype);
    if (taken > 0)
        taken = add_items(self, args, count, words, kept, values, joined);
    while (taken > 0 && kwargs != NULL && PyDict_Next(kwargs, &place, &name, &item))
        if ((taken = add_object(words, AT_NAME, name, kept)) > 0)
            taken = add_items(self, &item, 1, words, kept, values, joined);
    return taken;
}

static uint64_t
hash_words(const Words *words)
{
    uint64_t hash = 14695981039346656037ULL;
    for (int place = 0; place < words->count; place++) {
        hash = (hash ^ words->words[place]) * 0x9E3779B97F4A7C15ULL;
        hash ^= hash >> 29;
    }
    return hash;
}

static void
forget_seen(Seen *entry)
{
    PyObject *kept = entry->kept, *replay = entry->replay;
    PyMem_Free(entry->words);
    memset(entry, 0, sizeof(*entry));
    Py_XDECREF(kept);
    Py_XDECREF(replay);
}

/* The replay of a call that was seen, borrowed; NULL for others. */
static PyObject *
replay_seen(const Words *words, uint64_t hash)
{
    if (PyDict_GET_SIZE(c_known) < seen_known) { /* they were forgotten */
        seen_known = 0;
        for (int place = 0; place < MOST_SEEN; place++)
            forget_seen(&seen[place]);
    }
    Seen *entry = &seen[hash % MOST_SEEN];
    if (entry->replay == NULL || entry->hash != hash || entry->count != words->count ||
        memcmp(entry->words, words->words, sizeof(uint64_t) * words->count) != 0)
        return NULL;
    entry->age = OLDEST;
    return entry->replay;
}

/* Keep a call: 0, or -1 with an error set. */
static int
note_seen(Handler *self, PyObject *func, PyObject *const *args, Py_ssize_t count, PyObject *kwargs, PyObject *replay)
{
    Words words;
    int joined, taken = -1;
    PyObject *values = PyList_New(0), *kept = values == NULL ? NULL : PyList_New(0);
    if (kept != NULL)
        taken = add_call(self, func, args, count, kwargs, &words, kept, values, &joined);
    Py_XDECREF(values);
    if (taken > 0) {
        uint64_t hash = hash_words(&words), *copy = PyMem_Malloc(sizeof(uint64_t) * words.count);
        Seen *entry = &seen[hash % MOST_SEEN];
        if (copy == NULL) {
            PyErr_NoMemory();
            taken = -1;
        } else if (entry->age > 0) {
            entry->age--;
            PyMem_Free(copy);
        } else {
            memcpy(copy, words.words, sizeof(uint64_t) * words.count);
            forget_seen(entry);
            *entry = (Seen){hash, words.count, OLDEST, copy, Py_NewRef(kept), Py_NewRef(replay)};
            seen_known = PyDict_GET_SIZE(c_known);
        }
    }
    Py_XDECREF(kept);
    return taken < 0 ? -1 : 0;
}

/* The numbers of tensors' signatures (shape, strides, dtype, device) without the objects that Python has for these. Part of shortcuts.c. */

/* Torch's own functions on a tensor (chainrule.tensor_facts), and where the tensor is in its object; all of them, or none. They return
 * zero where they have an answer. */
static struct {
    int32_t (*dim)(void *tensor, int64_t *found);
    int32_t (*sizes)(void *tensor, int64_t **found);
    int32_t (*strides)(void *tensor, int64_t **found);
    int32_t (*dtype)(void *tensor, int32_t *found);
    int32_t (*layout)(void *tensor, int32_t *found);
    int32_t (*device)(void *tensor, int32_t *found);
    int32_t (*device_index)(void *tensor, int32_t *found);
    Py_ssize_t offset;
    int32_t strided;
    uint64_t real; /* a bit for each dtype that is real */
} facts_in_memory;

/* Of tensors with more dimensions the objects are asked. */
#define MOST_DIMENSIONS 8
/* Signatures that are kept, each at the place of its hash; a later one takes the place of an earlier one. */
#define SIGNATURES 2048

typedef struct {
    uint64_t hash;
    int64_t rank;
    int32_t dtype, device, device_index, unused;
    int64_t sizes[2 * MOST_DIMENSIONS]; /* and strides */
    PyObject *number;
} Signature;

static Signature *signatures = NULL;
static Py_ssize_t numbers_seen = 0;

static int
same_signature(const Signature *one, const Signature *other)
{
    return one->hash == other->hash && one->rank == other->rank && one->dtype == other->dtype && one->device == other->device &&
           one->device_index == other->device_index && memcmp(one->sizes, other->sizes, 2 * one->rank * sizeof(int64_t)) == 0;
}

/* The place of a tensor's signature, which is written down; NULL, without an error, where the objects have to be asked. */
static Signature *
place_of_signature(PyObject *tensor, Signature *found)
{
    void *held = (char *)tensor + facts_in_memory.offset;
    int32_t layout;
    int64_t *sizes, *strides;
    if (facts_in_memory.offset == 0 || facts_in_memory.layout(held, &layout) || layout != facts_in_memory.strided ||
        facts_in_memory.dtype(held, &found->dtype) || found->dtype < 0 || found->dtype > 63 ||
        !(facts_in_memory.real >> found->dtype & 1) || facts_in_memory.dim(held, &found->rank) || found->rank > MOST_DIMENSIONS ||
        facts_in_memory.sizes(held, &sizes) || facts_in_memory.strides(held, &strides) ||
        facts_in_memory.device(held, &found->device) || facts_in_memory.device_index(held, &found->device_index))
        return NULL;
    Py_ssize_t numbers = c_numbers == NULL ? 0 : PyDict_GET_SIZE(c_numbers);
    if (numbers < numbers_seen && signatures != NULL) { /* the numbers were given up */
        for (int place = 0; place < SIGNATURES; place++)
            Py_CLEAR(signatures[place].number);
    }
    numbers_seen = numbers;
    if (signatures == NULL && (signatures = PyMem_Calloc(SIGNATURES, sizeof(Signature))) == NULL)
        return NULL;
    uint64_t hash = (uint64_t)found->dtype * 31 + (uint64_t)found->device * 7 + (uint64_t)found->device_index + (uint64_t)found->rank;
    for (int64_t place = 0; place < found->rank; place++) {
        found->sizes[place] = sizes[place];
        found->sizes[found->rank + place] = strides[place];
        hash = (hash ^ (uint64_t)sizes[place]) * 0x9E3779B97F4A7C15u;
        hash = (hash ^ hash >> 29 ^ (uint64_t)strides[place]) * 0xBF58476D1CE4E5B9u;
    }
    found->hash = hash;
    return signatures + (hash ^ hash >> 32) % SIGNATURES;
}

/* Keep the number of a signature. */
static void
keep_signature(Signature *place, const Signature *found, PyObject *number)
{
    PyObject *before = place->number;
    *place = *found;
    place->number = Py_NewRef(number);
    Py_XDECREF(before);
    numbers_seen = PyDict_GET_SIZE(c_numbers);
}

/* use_tensor_facts(addresses, offset, strided, real) */
static PyObject *
use_tensor_facts(PyObject *module, PyObject *args)
{
    unsigned long long dim, sizes, strides, dtype, layout, device, device_index, real;
    Py_ssize_t offset;
    int strided;
    if (!PyArg_ParseTuple(args, "(KKKKKKK)niK", &dim, &sizes, &strides, &dtype, &layout, &device, &device_index, &offset, &strided, &real))
        return NULL;
    facts_in_memory.dim = (int32_t(*)(void *, int64_t *))(uintptr_t)dim;
    facts_in_memory.sizes = (int32_t(*)(void *, int64_t **))(uintptr_t)sizes;
    facts_in_memory.strides = (int32_t(*)(void *, int64_t **))(uintptr_t)strides;
    facts_in_memory.dtype = (int32_t(*)(void *, int32_t *))(uintptr_t)dtype;
    facts_in_memory.layout = (int32_t(*)(void *, int32_t *))(uintptr_t)layout;
    facts_in_memory.device = (int32_t(*)(void *, int32_t *))(uintptr_t)device;
    facts_in_memory.device_index = (int32_t(*)(void *, int32_t *))(uintptr_t)device_index;
    facts_in_memory.strided = strided;
    facts_in_memory.real = real;
    facts_in_memory.offset = offset;
    Py_RETURN_NONE;
}

/* read_tensor_facts(tensor): its dtype by its number, the device likewise, and its sizes and strides; None where they are not known. */
static PyObject *
read_tensor_facts(PyObject *module, PyObject *tensor)
{
    Signature found;
    if (!is_constant_class(tensor) || place_of_signature(tensor, &found) == NULL)
        Py_RETURN_NONE;
    PyObject *sizes = PyTuple_New(found.rank), *strides = sizes == NULL ? NULL : PyTuple_New(found.rank);
    for (int64_t place = 0; strides != NULL && place < found.rank; place++) {
        PyTuple_SET_ITEM(sizes, place, PyLong_FromLongLong(found.sizes[place]));
        PyTuple_SET_ITEM(strides, place, PyLong_FromLongLong(found.sizes[found.rank + place]));
    }
    if (strides == NULL || PyErr_Occurred()) {
        Py_XDECREF(sizes);
        Py_XDECREF(strides);
        return NULL;
    }
    return Py_BuildValue("(iiiNN)", found.dtype, found.device, found.device_index, sizes, strides);
}

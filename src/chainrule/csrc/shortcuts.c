/* The commonest calls of the function modes (chainrule.dispatch.LightMode), and the guards of compiled functions, in C.
 *
 * A function of chainrule.functions.TABLE that is called under one mode costs more in the interpreter of the mode's handler
 * than in torch. What the handlers do for plain arguments is done here: VmapMode.run_function beside tensors that
 * carry the batch alike, numbers and constants, and Tape.run_function for plain tensors and for those of one vmap. Every other
 * call, and everything where this module could not be compiled, goes to the Python methods of the same meaning: they are the
 * reference.
 *
 * Only the interpreter's own interface is used. Of torch's, the state of the dispatcher is asked for and set in its own
 * functions where chainrule.dispatcher_state has found and tried them (`state`), and by their bindings for Python otherwise.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <structmember.h>

#include "common.h"
#include "shells.h"
#include "vmap.h"
#include "upgrades.h"
#include "tape.h"
#include "readings.h"
#include "signatures.h"
#include "calls.h"
#include "composites.h"
#include "ops.h"
#include "index.h"
#include "memory.h"
#include "writes.h"
#include "mapped_writes.h"
#include "assignments.h"
#include "conversions.h"
#include "entry.h"
#include "runs.h"
#include "mapped_runs.h"
#include "handler.h"
#include "doors.h"
#include "methods.h"
#include "watch.h"

static PyObject *
configure(PyObject *module, PyObject *args, PyObject *kwargs)
{
    PyObject *name, *value;
    Py_ssize_t place = 0;
    while (kwargs != NULL && PyDict_Next(kwargs, &place, &name, &value)) {
        PyObject **where = NULL;
#define PLACE(known)                                                                                                   \
    if (PyUnicode_CompareWithASCIIString(name, #known) == 0)                                                           \
        where = &c_##known;
        CONFIGURED(PLACE)
        if (where == NULL)
            return PyErr_Format(PyExc_TypeError, "configure: unknown name %R", name);
        Py_XSETREF(*where, Py_NewRef(value));
    }
#define FIND(name) getters.name = getter_of(s_##name);
#define FIND_CALLED(name) called.name = called_of(s_##name);
    if (c_tensor != NULL && c_parameter != NULL) {
        ATTRIBUTES(FIND)
        CALLED(FIND_CALLED)
    }
    Py_RETURN_NONE;
}

/* The place of a slot in the instances of a class; -1 with an error set. */
static Py_ssize_t
slot_offset(PyObject *type, const char *name)
{
    PyObject *descriptor = PyObject_GetAttrString(type, name);
    if (descriptor == NULL)
        return -1;
    Py_ssize_t offset = -1;
    if (Py_TYPE(descriptor) == &PyMemberDescr_Type)
        offset = ((PyMemberDescrObject *)descriptor)->d_member->offset;
    else
        PyErr_Format(PyExc_TypeError, "%R has no slot %s", type, name);
    Py_DECREF(descriptor);
    return offset;
}

static PyObject *
use_classes(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2 || !PyType_Check(args[0]) || !PyType_Check(args[1]))
        return PyErr_Format(PyExc_TypeError, "use_classes: two classes are expected");
    if ((offsets.inner = slot_offset(args[0], "inner")) < 0 || (offsets.level = slot_offset(args[0], "level")) < 0 ||
        (offsets.shelf = slot_offset(args[0], "shelf")) < 0 ||
        (offsets.value = slot_offset(args[1], "value")) < 0 || (offsets.dtype = slot_offset(args[1], "dtype")) < 0 ||
        (offsets.sample = slot_offset(args[1], "sample")) < 0 || (offsets.signature = slot_offset(args[1], "signature")) < 0)
        return NULL;
    Py_XSETREF(c_batch_tensor, Py_NewRef(args[0]));
    Py_XSETREF(c_batched, Py_NewRef(args[1]));
    keep_shells((PyTypeObject *)args[0]);
    Py_RETURN_NONE;
}

static PyObject *
use_facts(PyObject *module, PyObject *type)
{
    if ((offsets.common = slot_offset(type, "common")) < 0 || (offsets.plain = slot_offset(type, "plain")) < 0 ||
        (offsets.op = slot_offset(type, "op")) < 0 || (offsets.is_view = slot_offset(type, "is_view")) < 0 ||
        (offsets.fast = slot_offset(type, "fast")) < 0 || (offsets.joining = slot_offset(type, "joining")) < 0 ||
        (offsets.alone = slot_offset(type, "alone")) < 0 || (offsets.direct = slot_offset(type, "direct")) < 0 ||
        (offsets.rewrites = slot_offset(type, "rewrites")) < 0 || (offsets.with_complex = slot_offset(type, "with_complex")) < 0 ||
        (offsets.functional = slot_offset(type, "functional")) < 0 || (offsets.inactive = slot_offset(type, "inactive")) < 0 ||
        (offsets.reads = slot_offset(type, "reads")) < 0 || (offsets.numbers = slot_offset(type, "numbers")) < 0 ||
        (offsets.random = slot_offset(type, "random")) < 0 || (offsets.shaped = slot_offset(type, "shaped")) < 0 ||
        (offsets.whole = slot_offset(type, "whole")) < 0 || (offsets.unfollowed = slot_offset(type, "unfollowed")) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
use_state(PyObject *module, PyObject *args)
{
    unsigned long long exclude, included, dispatch_modes, function_modes, functions_shown, set_functions, get_functions, excluded, grad;
    unsigned short python, snapshot, functorch, views, conjugate, first, last, autograd[AUTOGRAD_KEYS];
    if (!PyArg_ParseTuple(args, "KKKKKKKKKHHHHHHH(HHHH)", &exclude, &included, &dispatch_modes, &function_modes, &functions_shown,
                          &set_functions, &get_functions, &excluded, &grad, &python, &snapshot, &functorch, &views, &conjugate, &first, &last,
                          &autograd[0], &autograd[1], &autograd[2], &autograd[3]))
        return NULL;
    state.exclude = (void (*)(uint16_t, bool))(uintptr_t)exclude;
    state.included = (bool (*)(uint16_t))(uintptr_t)included;
    state.dispatch_modes = (int64_t(*)(void))(uintptr_t)dispatch_modes;
    state.function_modes = (int64_t(*)(void))(uintptr_t)function_modes;
    state.functions_shown = (bool (*)(void))(uintptr_t)functions_shown;
    state.set_functions = (void (*)(int))(uintptr_t)set_functions;
    state.get_functions = (int (*)(void))(uintptr_t)get_functions;
    state.python = python;
    state.snapshot = snapshot;
    state.functorch = functorch;
    memcpy(state.autograd, autograd, sizeof(autograd));
    state.views = views;
    state.conjugate = conjugate;
    state.excluded = (bool (*)(uint16_t))(uintptr_t)excluded;
    state.grad_enabled = (bool (*)(void))(uintptr_t)grad;
    state.first_autocast = first;
    state.last_autocast = last;
    Py_RETURN_NONE;
}

static PyObject *
read_state(PyObject *module, PyObject *unused)
{
    if (state.exclude == NULL)
        Py_RETURN_NONE;
    return Py_BuildValue("(NLLNNN)", PyBool_FromLong(state.included(state.functorch)), (long long)state.dispatch_modes(),
                         (long long)state.function_modes(), PyBool_FromLong(state.functions_shown()),
                         PyBool_FromLong(autocast_is_on()), PyBool_FromLong(grad_is_enabled()));
}

static PyObject *
set_excluded(PyObject *module, PyObject *excluded)
{
    return exclude_python(excluded == Py_True);
}

static PyObject *
set_functions(PyObject *module, PyObject *disabled)
{
    long wanted = PyLong_AsLong(disabled);
    if (wanted == -1 && PyErr_Occurred())
        return NULL;
    if (wanted < 0 || wanted > 2 || state.set_functions == NULL)
        return PyErr_Format(PyExc_ValueError, "set_functions: 0, 1 or 2 where the state is known");
    long before = state.get_functions();
    state.set_functions((int)wanted);
    return PyLong_FromLong(before);
}

static PyMethodDef module_methods[] = {
    {"use_classes", (PyCFunction)(void (*)(void))use_classes, METH_FASTCALL, "Give BatchTensor and Batched."},
    {"use_facts", use_facts, METH_O, "Give OpFacts."},
    {"use_state", use_state, METH_VARARGS,
     "Give the addresses of torch's functions on the dispatcher's state, and its keys; zeros for none."},
    {"use_tensor_facts", use_tensor_facts, METH_VARARGS,
     "Give the addresses of torch's functions on a tensor, its place in an object, and the numbers of layout and dtypes."},
    {"read_tensor_facts", read_tensor_facts, METH_O, "What those functions say: dtype and device by their numbers, sizes, strides."},
    {"read_state", read_state, METH_NOARGS, "What those functions say: functorch's key, the numbers of modes, functions shown, autocast and"
     " gradients on."},
    {"set_functions", set_functions, METH_O,
     "Hide functions from classes (1), from modes as well (2), or not (0); returns what it was."},
    {"read", (PyCFunction)(void (*)(void))read_given, METH_FASTCALL, "What a reading of a call's arguments says."},
    {"handle_torch_function", (PyCFunction)(void (*)(void))handle_function, METH_FASTCALL | METH_KEYWORDS,
     "Hand a function that torch has in Python to the innermost mode, or to a class."},
    {"call_alone", (PyCFunction)(void (*)(void))call_alone, METH_FASTCALL, "Run a transform that nothing is around."},
    {"call_mapped", (PyCFunction)(void (*)(void))call_mapped, METH_FASTCALL, "Run a vmap of a transform that nothing is around."},
    {"set_excluded", set_excluded, METH_O, "Exclude the key of Python's handlers, or not."},
    {"configure", (PyCFunction)(void (*)(void))configure, METH_VARARGS | METH_KEYWORDS,
     "Give the handlers the objects that they use, by name."},
    {NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "chainrule._shortcuts",
    .m_doc = "The commonest calls of the function modes, in C.",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC
PyInit__shortcuts(void)
{
#define INTERN(name)                                                                                                   \
    s_##name = PyUnicode_InternFromString(#name);                                                                      \
    if (s_##name == NULL)                                                                                              \
        return NULL;
    NAMES(INTERN)
    empty = PyTuple_New(0);
    whole = PySlice_New(NULL, NULL, NULL);
    shelves = PyDict_New();
    if (shelves == NULL || PyType_Ready(&shelf_type) < 0 || empty == NULL || whole == NULL || PyType_Ready(&handler_type) < 0 || PyType_Ready(&method_type) < 0 || PyType_Ready(&property_type) < 0 ||
        PyType_Ready(&watch_type) < 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made != NULL && (PyModule_AddObjectRef(made, "Handler", (PyObject *)&handler_type) < 0 ||
                         PyModule_AddObjectRef(made, "Method", (PyObject *)&method_type) < 0 ||
                         PyModule_AddObjectRef(made, "Property", (PyObject *)&property_type) < 0 ||
                         PyModule_AddObjectRef(made, "Watch", (PyObject *)&watch_type) < 0))
        Py_CLEAR(made);
    return made;
}

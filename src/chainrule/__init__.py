"""Function transforms for PyTorch that cost what the structure of the function costs."""

from chainrule.explain import Explanation, explain
from chainrule.transforms import autograd_bridge
from chainrule.transforms.derivatives import grad, grad_and_value, hvp, jvp, linearize, vhp, vjp
from chainrule.transforms.jacobians import hessian, jacfwd, jacobian, jacrev
from chainrule.transforms.modules import (
    functional_call,
    functionalize,
    replace_all_batch_norm_modules_,
    stack_module_state,
)
from chainrule.transforms.products import divergence, ggn, ntk
from chainrule.transforms.second_order import hessian_diagonal, laplacian
from chainrule.transforms.taylor import jet
from chainrule.transforms.vmap import vmap

autograd_bridge.install()

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "divergence",
    "explain",
    "functional_call",
    "functionalize",
    "ggn",
    "grad",
    "grad_and_value",
    "hessian",
    "hessian_diagonal",
    "hvp",
    "jacfwd",
    "jacobian",
    "jacrev",
    "jet",
    "jvp",
    "laplacian",
    "linearize",
    "ntk",
    "replace_all_batch_norm_modules_",
    "stack_module_state",
    "vhp",
    "vjp",
    "vmap",
]

"""Function transforms for PyTorch that cost what the structure of the function costs."""

from chainrule.transforms.derivatives import grad, grad_and_value, hvp, jvp, linearize, vhp, vjp
from chainrule.transforms.jacobians import hessian, jacfwd, jacobian, jacrev
from chainrule.transforms.vmap import vmap

__version__ = "0.1.0"

__all__ = [
    "grad",
    "grad_and_value",
    "hessian",
    "hvp",
    "jacfwd",
    "jacobian",
    "jacrev",
    "jvp",
    "linearize",
    "vhp",
    "vjp",
    "vmap",
]

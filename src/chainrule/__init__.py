"""Function transforms for PyTorch that cost what the structure of the function costs."""

from chainrule.explain import Explanation, explain
from chainrule.transforms import (
    array_conversions,
    autograd_bridge,
    deep_copies,
    function_doors,
    mapped_levels,
    sparse,
    subclass_views,
    tensor_hooks,
)
from chainrule.transforms.blocks import RowBlock, jacobian_blocks
from chainrule.transforms.compile import CompileError, compile  # noqa: A004 - torch's name
from chainrule.transforms.derivatives import grad, grad_and_value, hvp, jvp, linearize, vhp, vjp
from chainrule.transforms.jacobian_map import linear_map
from chainrule.transforms.jacobians import hessian, jacfwd, jacobian, jacrev
from chainrule.transforms.linear_map import LinearMap
from chainrule.transforms.modules import (
    functional_call,
    functionalize,
    replace_all_batch_norm_modules_,
    stack_module_state,
)
from chainrule.transforms.products import divergence, ggn, ntk
from chainrule.transforms.second_order import hessian_diagonal, laplacian
from chainrule.transforms.sparsity import Sparsity, sparsity
from chainrule.transforms.taylor import jet
from chainrule.transforms.vmap import vmap
from chainrule.uncompiled import hide_from_dynamo

autograd_bridge.install()
deep_copies.install()
function_doors.install()
mapped_levels.install()
subclass_views.install()
tensor_hooks.install()
array_conversions.install()
sparse.install()

# Inside of a function under torch.compile, transforms are made and called outside of its graphs.
for _transform in (
    compile, divergence, explain, ggn, grad, grad_and_value, hessian, hessian_diagonal, hvp, jacfwd, jacobian, jacobian_blocks,
    jacrev, jet, jvp, laplacian, linear_map, linearize, ntk, sparsity, vhp, vjp, vmap,
):  # fmt: skip
    hide_from_dynamo(_transform)

__version__ = "0.1.0"

__all__ = [
    "CompileError",
    "Explanation",
    "LinearMap",
    "RowBlock",
    "Sparsity",
    "compile",
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
    "jacobian_blocks",
    "jacrev",
    "jet",
    "jvp",
    "laplacian",
    "linear_map",
    "linearize",
    "ntk",
    "replace_all_batch_norm_modules_",
    "sparsity",
    "stack_module_state",
    "vhp",
    "vjp",
    "vmap",
]

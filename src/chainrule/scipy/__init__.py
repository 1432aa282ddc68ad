"""SciPy's solvers on torch functions: numpy in and out, float64, with exact derivatives in the form each solver takes.

Needs SciPy (``chainrule[scipy]``); ``import chainrule`` does not import it.
"""

try:
    import scipy as _scipy  # noqa: F401
except ImportError as error:
    raise ImportError("chainrule.scipy needs SciPy; install chainrule[scipy]") from error

from chainrule.capture.whole_recorder import CompileError
from chainrule.scipy.fitting import curve_fit, least_squares, root
from chainrule.scipy.integrate import solve_bvp, solve_ivp
from chainrule.scipy.nlp import NLPProblem, nlp_problem
from chainrule.scipy.optimize import minimize, nonlinear_constraint
from chainrule.scipy.trees import ravel

__all__ = [
    "CompileError",
    "NLPProblem",
    "curve_fit",
    "least_squares",
    "minimize",
    "nlp_problem",
    "nonlinear_constraint",
    "ravel",
    "root",
    "solve_bvp",
    "solve_ivp",
]

import sys; sys.path.insert(0,'src')
import torch, chainrule as cr, torch.func as tf
torch.manual_seed(0); torch.set_default_dtype(torch.float64)
x=torch.randn(4)
class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx,x): ctx.save_for_backward(x); return x**3
    @staticmethod
    def backward(ctx,g): x,=ctx.saved_tensors; return g*5*x**2
class New(torch.autograd.Function):
    generate_vmap_rule=True
    @staticmethod
    def forward(x): return x**3
    @staticmethod
    def setup_context(ctx,i,o): ctx.save_for_backward(*i)
    @staticmethod
    def backward(ctx,g): x,=ctx.saved_tensors; return g*5*x**2
def T(n,f):
    try: print(n, f())
    except ZeroDivisionError as e: print(n,'EXC',type(e).__name__, str(e)[:200])
for C in (Cube,New):
    f=lambda x: (C.apply(x)*x).sum()
    T('grad', lambda: cr.grad(f)(x)- (5*x**3+x**3))
    T('jacfwd', lambda: cr.jacfwd(C.apply)(x)-torch.diag(5*x**2))
    T('jacrev', lambda: cr.jacrev(C.apply)(x)-torch.diag(5*x**2))
    T('hess', lambda: cr.hessian(lambda x: C.apply(x).sum())(x)-torch.diag(10*x))
    T('hess revrev', lambda: cr.jacrev(cr.jacrev(lambda x: C.apply(x).sum()))(x)-torch.diag(10*x))
    T('vmapgrad', lambda: cr.vmap(cr.grad(lambda x: C.apply(x)))(x)-5*x**2)
    T('gradvmap', lambda: cr.grad(lambda x: cr.vmap(C.apply)(x).sum())(x)-5*x**2)
    y=x.clone().requires_grad_()
    T('join', lambda: torch.autograd.grad(cr.grad(f)(y).sum(),y)[0]-18*x**2-0*x)
def pinn(create, rg):
    def f(x):
        if rg: x=x.requires_grad_()
        u=(x.sin()*x.exp()); (g,)=torch.autograd.grad(u.sum(),x,create_graph=create); return g
    return f
want=torch.diag(2*x.cos()*x.exp())
for rg in (0,1):
    T(f'pinn rg{rg} rev', lambda: (cr.jacrev(pinn(True,rg))(x)-want).abs().max())
    T(f'pinn rg{rg} fwd', lambda: (cr.jacfwd(pinn(True,rg))(x)-want).abs().max())
    T(f'pinn rg{rg} hess', lambda: (cr.hessian(lambda x: pinn(True,rg)(x).sum())(x)-tf.hessian(lambda x:(x.exp()*(x.sin()+x.cos())).sum())(x)).abs().max())
    T(f'pinn rg{rg} nograph', lambda: (cr.jacrev(pinn(False,rg))(x)).abs().max())
    T(f'pinn rg{rg} vmap', lambda: (cr.vmap(cr.grad(lambda x: pinn(True,rg)(x)))(x)-want.diag()).abs().max())
def bw(x):
    u=(x**3).sum(); u.backward(create_graph=True); return x.grad*x
T('backward inside', lambda: cr.jacrev(bw)(x)-torch.diag(9*x**2))
T('ckpt', lambda: cr.jacrev(lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True))(x)-torch.diag(x.cos()))
T('ckpt2', lambda: cr.jacrev(lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False))(x)-torch.diag(x.cos()))
T('tf in cr', lambda: cr.jacrev(lambda x: tf.grad(lambda y:(y**3).sum())(x)*x)(x)-torch.diag(9*x**2))
T('cr in tf', lambda: tf.jacrev(lambda x: cr.grad(lambda y:(y**3).sum())(x)*x)(x)-torch.diag(9*x**2))
T('tf vmap cr', lambda: tf.vmap(lambda x: cr.grad(lambda y:(y**3).sum())(x)*x)(x))

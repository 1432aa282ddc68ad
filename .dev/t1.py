import sys; sys.path.insert(0,'src')
import torch, chainrule as cr, torch.func as tf
torch.manual_seed(0); torch.set_default_dtype(torch.float64)
F=torch.nn.functional
def predict(W,b,x): return F.linear(x,W,b).tanh()
W,b,x=torch.randn(4,3),torch.randn(4),torch.randn(3)
def chk(n,a,b):
    la,sa=torch.utils._pytree.tree_flatten(a); lb,sb=torch.utils._pytree.tree_flatten(b)
    ok = sa==sb and all(p.shape==q.shape and p.dtype==q.dtype and torch.allclose(p,q) for p,q in zip(la,lb))
    print('ok ' if ok else 'BAD', n)
for rep in range(2):
  for t in ('jacrev','jacfwd','hessian'):
    for an in (0,1,2,(0,1),(2,0)):
        chk(f'{t} {an}', getattr(cr,t)(predict,argnums=an)(W,b,x), getattr(tf,t)(predict,argnums=an)(W,b,x))
  chk('jacobian', cr.jacobian(predict,argnums=(0,1,2))(W,b,x), tf.jacrev(predict,argnums=(0,1,2))(W,b,x))
  X=torch.randn(5,3)
  chk('batch', cr.jacrev(predict,argnums=2)(W,b,X), tf.jacrev(predict,argnums=2)(W,b,X))
  chk('batchsum', cr.jacrev(lambda W,b,x: predict(W,b,x).sum(0),argnums=2)(W,b,X), tf.jacrev(lambda W,b,x: predict(W,b,x).sum(0),argnums=2)(W,b,X))
  f=lambda x: x.sin().sum()
  chk('grad', cr.grad(f)(x), tf.grad(f)(x))
  chk('hvp', cr.hvp(f,(x,),(x,)), tf.jvp(tf.grad(f),(x,),(x,))[1])
  chk('vhp', cr.vhp(f,(x,),(x,)), tf.jvp(tf.grad(f),(x,),(x,))[1])
  chk('nest', cr.jacrev(lambda x: x*cr.jacrev(lambda y: x*y)(x).sum())(x), tf.jacrev(lambda x: x*tf.jacrev(lambda y: x*y)(x).sum())(x))
  def g(x):
    o=torch.zeros(3,dtype=x.dtype); o[0]=x[1]**2; o[1:]=x[:2]*x[1:]; o.mul_(x); y=o.view(3,1); y.add_(x[0]); return o.sin()
  chk('inplace', cr.jacrev(g)(x), tf.jacrev(g)(x)); chk('inplace f', cr.jacfwd(g)(x), tf.jacrev(g)(x))
  l=lambda t: (F.softplus(X@t)).sum() - (X@t).sum()
  chk('logit', cr.hessian(l)(x), tf.hessian(l)(x))
  try:
    chk('vmapjac', cr.vmap(cr.jacrev(predict,argnums=2),in_dims=(None,None,0))(W,b,X), tf.vmap(tf.jacrev(predict,argnums=2),in_dims=(None,None,0))(W,b,X))
    chk('vmaphess', cr.vmap(cr.hessian(predict,argnums=2),in_dims=(None,None,0))(W,b,X), tf.vmap(tf.hessian(predict,argnums=2),in_dims=(None,None,0))(W,b,X))
    chk('jacvmap', cr.jacrev(cr.vmap(lambda x: x.sin()*x.sum()))(X), tf.jacrev(tf.vmap(lambda x: x.sin()*x.sum()))(X))
  except Exception as e: import traceback; traceback.print_exc()

"""Section B, networks: per-sample derivatives, Jacobians of layers, products with vectors, pure overhead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import chainrule
from benchmarks.networks import dense_layers, mlp, unbatched_mlp
from benchmarks.workload import Expression, Targets, Workload

tf = torch.func
Tensor = torch.Tensor

WIDTHS = (32, 128, 128, 10)
PARAMETERS = tuple(range(1, 2 * len(WIDTHS) - 1))


# --- B3, B4, B10: curvature and Jacobians with respect to parameters --------------------------------------------------


def _sample_and_layers(batch: int, widths: tuple[int, ...] = WIDTHS) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(batch, widths[0]).double(), *dense_layers(widths))


def _signals(x: Tensor, *layers: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of each layer, and the derivatives of all outputs with respect to what each layer gives, for two hidden layers."""
    w1, b1, w2, b2, w3, b3 = layers
    h1 = torch.tanh(torch.addmm(b1, x, w1.t()))
    h2 = torch.tanh(torch.addmm(b2, h1, w2.t()))
    s2 = (1 - h2 * h2).unsqueeze(1) * w3
    s1 = (s2.flatten(0, 1) @ w2).unflatten(0, (len(x), -1)) * (1 - h1 * h1).unsqueeze(1)
    return [x, h1, h2], [s1, s2]


def hand_parameter_jacobian(x: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
    """For each weight (batch, outputs, *weight.shape), for each bias (batch, outputs, *bias.shape)."""
    (x, h1, h2), (s1, s2) = _signals(x, *layers)
    outputs = len(layers[-1])
    w3 = x.new_zeros(len(x), outputs, outputs, h2.shape[1])
    w3.diagonal(0, 1, 2).copy_(h2.unsqueeze(-1).expand(-1, -1, outputs))
    eye = torch.eye(outputs, dtype=x.dtype, device=x.device).expand(len(x), -1, -1).clone()
    return (
        s1.unsqueeze(-1) * x[:, None, None, :], s1,
        s2.unsqueeze(-1) * h1[:, None, None, :], s2,
        w3, eye,
    )  # fmt: skip


def hand_kernel(x: Tensor, *layers: Tensor) -> Tensor:
    """Shape (batch, outputs, batch, outputs)."""
    (x, h1, h2), (s1, s2) = _signals(x, *layers)
    total = None
    for inputs, signals in ((x, s1), (h1, s2)):
        gram = signals.flatten(0, 1) @ signals.flatten(0, 1).t()
        part = gram.unflatten(1, (len(x), -1)).unflatten(0, (len(x), -1)) * (inputs @ inputs.t() + 1)[:, None, :, None]
        total = part if total is None else total + part
    assert total is not None
    total.diagonal(0, 1, 3).add_((h2 @ h2.t() + 1).unsqueeze(-1))
    return total


def _parameter_jacobians(module: Any, name: str) -> Expression:
    transform = getattr(module, name)(unbatched_mlp, argnums=PARAMETERS)
    return module.vmap(transform, in_dims=(0, *(None,) * len(PARAMETERS)))


def _contracted_jacobians(name: str) -> Expression:
    jacobians = _parameter_jacobians(tf, name)

    def kernel(x: Tensor, *layers: Tensor) -> Tensor:
        parts = [j.flatten(2) for j in jacobians(x, *layers)]
        return torch.stack([torch.einsum("naf,mbf->namb", j, j) for j in parts]).sum(0)

    return kernel


def _kernel_by_products(x: Tensor, *layers: Tensor) -> Tensor:
    """The tangent kernel from products with unit vectors, sample against sample."""

    def pair(one: Tensor, two: Tensor) -> Tensor:
        output, pullback = tf.vjp(lambda *p: unbatched_mlp(one, *p), *layers)

        def column(unit: Tensor) -> Tensor:
            return tf.jvp(lambda *p: unbatched_mlp(two, *p), layers, pullback(unit))[1]

        return tf.vmap(column)(torch.eye(len(output), dtype=x.dtype, device=x.device))

    found = tf.vmap(tf.vmap(pair, (None, 0)), (0, None))(x, x)
    return found.permute(0, 2, 1, 3)


def _our_kernel(x: Tensor, *layers: Tensor) -> Tensor:
    return chainrule.ntk(mlp, PARAMETERS)(x, *layers)


def _product_inputs() -> tuple[Tensor, ...]:
    layers = dense_layers(WIDTHS)
    tangents = tuple(torch.randn_like(p) for p in layers)
    return (torch.randn(128, WIDTHS[0]).double(), torch.randint(WIDTHS[-1], (128,)), *layers, *tangents)


def _split(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    half = len(tensors) // 2
    return tensors[:half], tensors[half:]


def _our_product(x: Tensor, labels: Tensor, *tensors: Tensor) -> Any:
    layers, tangents = _split(tensors)
    return chainrule.ggn(partial(mlp, x), lambda y: F.cross_entropy(y, labels), layers, tangents)


def _their_product(x: Tensor, labels: Tensor, *tensors: Tensor) -> Any:
    layers, tangents = _split(tensors)
    output, pushed = tf.jvp(partial(mlp, x), layers, tangents)
    curved = tf.jvp(tf.grad(lambda y: F.cross_entropy(y, labels)), (output,), (pushed,))[1]
    return tf.vjp(partial(mlp, x), *layers)[1](curved)


def _their_linearized_product(x: Tensor, labels: Tensor, *tensors: Tensor) -> Any:
    layers, tangents = _split(tensors)
    output, pullback = tf.vjp(partial(mlp, x), *layers)
    pushed = tf.jvp(partial(mlp, x), layers, tangents)[1]
    probabilities = output.softmax(-1)
    curved = probabilities * pushed
    return pullback((curved - probabilities * curved.sum(-1, keepdim=True)) / len(x))


# --- B5, B6: a small convolutional network ----------------------------------------------------------------------------


def _convolutional(x: Tensor, first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = F.relu(F.conv2d(x, first, padding=1))
    h = F.max_pool2d(F.relu(F.conv2d(h, second, padding=1)), 2)
    return F.linear(h.flatten(-3), weight, bias)


def _images() -> tuple[Tensor, ...]:
    return (
        torch.randn(32, 1, 28, 28).double(), torch.randn(8, 1, 3, 3).double() / 3, torch.randn(16, 8, 3, 3).double() / 9,
        torch.randn(10, 16 * 14 * 14).double() / 56, torch.randn(10).double(),
    )  # fmt: skip


def _image_loss(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor, x: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(_convolutional(x, first, second, weight, bias), label)


def _per_image(module: Any, name: str) -> Expression:
    return module.vmap(getattr(module, name)(_convolutional), in_dims=(0, None, None, None, None))


def _image_sum(x: Tensor, *layers: Tensor) -> Tensor:
    return tf.jacrev(lambda x: _convolutional(x, *layers).sum(0))(x).movedim(1, 0)


def _our_image_sum(x: Tensor, *layers: Tensor) -> Tensor:
    return chainrule.jacrev(lambda x: _convolutional(x, *layers).sum(0))(x).movedim(1, 0)


def _image_gradients(module: Any) -> Expression:
    found = module.vmap(module.grad(_image_loss, argnums=(0, 1, 2, 3)), in_dims=(None, None, None, None, 0, 0))
    return lambda x, first, second, weight, bias, labels: found(first, second, weight, bias, x, labels)


# --- B7: the gradient of a training loss ------------------------------------------------------------------------------

NETWORK = torch.nn.Sequential(
    torch.nn.Linear(32, 128), torch.nn.Tanh(), torch.nn.Linear(128, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10)
)
NAMES = tuple(name for name, _ in NETWORK.named_parameters())


def _training_gradient(module: Any) -> Expression:
    def loss(parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(module.functional_call(NETWORK, parameters, (x,)), labels)

    gradient = module.grad(loss)
    return lambda x, labels, *layers: tuple(gradient(dict(zip(NAMES, layers, strict=True)), x, labels).values())


def _autograd_gradient(x: Tensor, labels: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
    leaves = [p.detach().requires_grad_() for p in layers]
    return torch.autograd.grad(F.cross_entropy(mlp(x, *leaves), labels), leaves)


def _training_inputs() -> tuple[Tensor, ...]:
    return (torch.randn(128, 32).double(), torch.randint(10, (128,)), *dense_layers(WIDTHS))


# --- B8, B16, B17: Jacobians of larger layers -------------------------------------------------------------------------

BLOCK = torch.nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, dropout=0.0, batch_first=True)
BLOCK_NAMES = tuple(name for name, _ in BLOCK.named_parameters())


def _block(module: Any) -> Expression:
    def call(x: Tensor, *layers: Tensor) -> Tensor:
        parameters = dict(zip(BLOCK_NAMES, layers, strict=True))
        found: Tensor = module.functional_call(BLOCK, parameters, (x.unsqueeze(0),)).squeeze(0)
        return found

    return call


def _block_inputs() -> tuple[Tensor, ...]:
    return (torch.randn(32, 64).double(), *(torch.randn_like(p).double().detach() / 8 for p in BLOCK.parameters()))


def _attention(x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = (x @ query) @ (x @ key).t() / query.shape[1] ** 0.5
    return scores.softmax(-1) @ (x @ value)


def hand_attention(x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Shape (length, width, length, width)."""
    scale = query.shape[1] ** -0.5
    q, k, v = x @ query, x @ key, x @ value
    weights = (q @ k.t() * scale).softmax(-1)
    output = weights @ v
    # what moves the keys: weights[i, j] (v[j, c] - output[i, c]) (key q[i])[d]
    moved = weights.unsqueeze(1) * (v.t().unsqueeze(0) - output.unsqueeze(-1))
    found = moved.unsqueeze(-1) * (q @ key.t() * scale)[:, None, None, :]
    found.addcmul_(weights[:, None, :, None], value.t()[None, :, None, :])
    found.diagonal(0, 0, 2).add_((moved @ (k @ query.t() * scale)).permute(1, 2, 0))
    return found


def _attention_row(key: str, length: int) -> Workload:
    return Workload(
        key=key,
        title=f"Jacobian of a self-attention head, {length}×64",
        inputs=lambda: (torch.randn(length, 64).double(), *(torch.randn(64, 64).double() / 8 for _ in range(3))),
        ours={"jacobian": chainrule.jacobian(_attention)},
        peers={"jacrev": tf.jacrev(_attention), "jacfwd": tf.jacfwd(_attention)}
        | {f"jacrev chunk {c}": tf.jacrev(_attention, chunk_size=c) for c in (256, 1024)},
        hand=hand_attention,
        targets=Targets(10, 1.5),
    )


def _convolutions(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return F.conv2d(torch.tanh(F.conv2d(x, first, padding=1)), second, padding=1)


# --- B12, B13, B14: overhead ------------------------------------------------------------------------------------------


def chain(x: Tensor) -> Tensor:
    """Twenty element-wise ops."""
    for _ in range(5):
        x = (torch.sin(x) * 1.1 + 0.1).tanh()
    return x


def _chain_sum(x: Tensor) -> Tensor:
    return chain(x).sum()


def _push(module: Any) -> Expression:
    return lambda x, v: module.jvp(chain, (x,), (v,))


def _pull(module: Any) -> Expression:
    def run(x: Tensor, v: Tensor) -> Any:
        output, pullback = module.vjp(chain, x)
        return output, pullback(v)

    return run


def _linear(module: Any) -> Expression:
    def run(x: Tensor, v: Tensor) -> Any:
        output, push = module.linearize(chain, x)
        return output, push(v)

    return run


def _many_pushes(module: Any) -> Expression:
    def run(x: Tensor, tangents: Tensor, *layers: Tensor) -> Any:
        _, push = module.linearize(lambda x: unbatched_mlp(x, *layers), x)
        return [push(v) for v in tangents]

    return run


def _many_single_pushes(x: Tensor, tangents: Tensor, *layers: Tensor) -> Any:
    return [tf.jvp(lambda x: unbatched_mlp(x, *layers), (x,), (v,))[1] for v in tangents]


def _many_pulls(module: Any) -> Expression:
    def run(x: Tensor, cotangents: Tensor, *layers: Tensor) -> Any:
        _, pullback = module.vjp(lambda x: unbatched_mlp(x, *layers), x)
        return [pullback(v)[0] for v in cotangents]

    return run


def _pair() -> tuple[Tensor, ...]:
    return torch.randn(16).double(), torch.randn(16).double()


def _two(module: Callable[[Any], Expression], name: str) -> tuple[Mapping[str, Expression], Mapping[str, Expression]]:
    return {name: module(chainrule)}, {name: module(tf)}


def _both(
    key: str, title: str, inputs: Callable[[], tuple[Tensor, ...]], pair: Any, targets: Targets, **options: Any
) -> Workload:
    return Workload(key=key, title=title, inputs=inputs, ours=pair[0], peers=pair[1], targets=targets, **options)


WORKLOADS: tuple[Workload, ...] = (
    Workload(
        key="B3",
        title="per-sample parameter Jacobian, MLP 32-128-128-10, batch 32",
        inputs=_sample_and_layers(32),
        ours={"vmap(jacobian)": _parameter_jacobians(chainrule, "jacobian")},
        peers={"vmap(jacrev)": _parameter_jacobians(tf, "jacrev")},  # forward mode would push 22 000 tangents per sample
        hand=hand_parameter_jacobian,
        targets=Targets(1.5, 1.5),
    ),
    Workload(
        key="B4",
        title="empirical tangent kernel of that MLP, 32×32×10×10",
        inputs=_sample_and_layers(32),
        ours={"ntk": _our_kernel},
        peers={"vmap(jacrev), contracted": _contracted_jacobians("jacrev"), "products with unit vectors": _kernel_by_products},
        hand=hand_kernel,
        targets=Targets(20, 2),
    ),
    Workload(
        key="B5",
        title="Jacobian of a small CNN wrt its input, batch 32",
        inputs=_images,
        ours={"vmap(jacobian)": _per_image(chainrule, "jacobian"), "jacrev of the sum": _our_image_sum},
        peers={"vmap(jacrev)": _per_image(tf, "jacrev"), "jacrev of the sum": _image_sum},
        targets=Targets(1.5),
    ),
    _both(
        "B6", "per-sample gradients of that CNN, batch 32",
        lambda: (*_images(), torch.randint(10, (32,))),
        _two(_image_gradients, "vmap(grad)"), Targets(1),
    ),
    Workload(
        key="B7",
        title="gradient of an MLP's loss wrt all parameters, batch 128",
        inputs=_training_inputs,
        ours={"grad": _training_gradient(chainrule)},
        peers={"grad": _training_gradient(tf)},
        hand=_autograd_gradient,
        targets=Targets(1),
    ),
    Workload(
        key="B8",
        title="Jacobian of a transformer encoder block wrt its input, 32×64, 4 heads",
        inputs=_block_inputs,
        ours={"jacobian": chainrule.jacobian(_block(chainrule))},
        peers={"jacrev": tf.jacrev(_block(tf)), "jacrev chunk 512": tf.jacrev(_block(tf), chunk_size=512)},
        targets=Targets(1.5),
    ),
    Workload(
        key="B10",
        title="Gauss-Newton product of that MLP with cross-entropy, batch 128",
        inputs=_product_inputs,
        ours={"ggn": _our_product},
        peers={"jvp, jvp(grad), vjp": _their_product, "jvp, softmax by hand, vjp": _their_linearized_product},
        targets=Targets(1.2),
    ),
    _both(
        "B12a", "vmap of 20 element-wise ops on 8×16", lambda: (torch.randn(8, 16).double(),),
        _two(lambda m: m.vmap(chain), "vmap"), Targets(1), hand=chain,
    ),
    _both(
        "B12b", "vmap of the MLP on 32 rows", _sample_and_layers(32),
        _two(lambda m: m.vmap(unbatched_mlp, in_dims=(0, *(None,) * len(PARAMETERS))), "vmap"), Targets(1), hand=mlp,
    ),
    _both("B13a", "jvp of 20 element-wise ops, n=16", _pair, _two(_push, "jvp"), Targets(1.3)),
    _both("B13b", "vjp of 20 element-wise ops and its function", _pair, _two(_pull, "vjp"), Targets(1.3)),
    _both(
        "B13c", "gradient of 20 element-wise ops", lambda: (torch.randn(16).double(),),
        _two(lambda m: m.grad(_chain_sum), "grad"), Targets(1.3),
    ),
    _both("B13d", "linearize of 20 element-wise ops and its function", _pair, _two(_linear, "linearize"), Targets(100)),
    Workload(
        key="B14a",
        title="linearize of the MLP once, 100 tangents",
        inputs=lambda: (torch.randn(32).double(), torch.randn(100, 32).double(), *dense_layers(WIDTHS)),
        ours={"linearize": _many_pushes(chainrule)},
        peers={"linearize": _many_pushes(tf), "jvp": _many_single_pushes},
        targets=Targets(2),
    ),
    _both(
        "B14b", "vjp of the MLP once, 100 cotangents",
        lambda: (torch.randn(32).double(), torch.randn(100, 10).double(), *dense_layers(WIDTHS)),
        _two(_many_pulls, "vjp"), Targets(2),
    ),
    _attention_row("B16", 128),
    _attention_row("B16s", 32),
    Workload(
        key="B17",
        title="Jacobian of conv · tanh · conv, 16 channels, 16×16, dense",
        inputs=lambda: (torch.randn(1, 16, 16, 16).double(), *(torch.randn(16, 16, 3, 3).double() / 12 for _ in range(2))),
        ours={"jacobian": chainrule.jacobian(_convolutions)},
        peers={"jacrev": tf.jacrev(_convolutions), "jacfwd": tf.jacfwd(_convolutions)}
        | {f"jacrev chunk {c}": tf.jacrev(_convolutions, chunk_size=c) for c in (256, 1024)},
        targets=Targets(5),
    ),
)  # fmt: skip


"""The neural tangent kernel of a ReLU network: towards its limit at infinite width, and what training makes of it.

The tangent kernel of a network f(theta, x) is Theta = J J^T, with J the Jacobian of its outputs by its parameters. As the
network gets wider it tends to a fixed function of the inputs that has a closed form, and gradient descent on the squared error
tends to kernel regression with it. chainrule is used for the kernel (``chainrule.ntk`` contracts the factors of J and
never forms it, and ``vmap`` over it gives the kernels of many random networks at once), for J as an object (``linear_map``:
its products with vectors train the linearised network), and for ``J.gram()``. What to look for:

* ``ntk``, ``linear_map(...).gram()`` and J J^T from the dense Jacobian agree.
* The distance of a random network's kernel from the closed form falls as width^(-1/2).
* The linearised network, trained by gradient descent, does what the kernel alone predicts, to rounding.
* The network itself, trained in the same way, comes closer to that prediction as it gets wider.

Source: Jacot, Gabriel and Hongler, *Neural tangent kernel*, NeurIPS 2018; the closed form: Cho and Saul, *Kernel methods for
deep learning*, NIPS 2009; the training: Lee et al., *Wide neural networks of any depth evolve as linear models under
gradient descent*, NeurIPS 2019.
"""

from __future__ import annotations

import math
import sys

import torch
from support import Report, main, seconds

import chainrule

Tensor = torch.Tensor
Parameters = dict[str, Tensor]


# --- the network and its limit ----------------------------------------------------------------------------------------


def network(parameters: Parameters, x: Tensor) -> Tensor:
    """Two hidden ReLU layers in the scaling where the limit exists: weights of unit variance, factors 1/sqrt(width).

    Inputs of shape (n, d); outputs (n,).
    """
    for name in ("first", "second"):
        weight = parameters[name]
        x = torch.relu(x @ weight.mT) * math.sqrt(2 / weight.shape[0])
    return x @ parameters["last"]


def initial(width: int, dimension: int, *networks: int) -> Parameters:
    """Random parameters, of as many networks as asked for."""
    return {
        "first": torch.randn(*networks, width, dimension),
        "second": torch.randn(*networks, width, width),
        "last": torch.randn(*networks, width),
    }


def limit_kernel(x: Tensor, z: Tensor) -> Tensor:
    """The tangent kernel at infinite width between inputs (n, d) and (m, d), by the arc-cosine kernels layer by layer."""
    covariance = x @ z.mT
    scale = x.norm(dim=1)[:, None] * z.norm(dim=1)
    kernel = torch.zeros_like(covariance)
    for layer in range(3):
        kernel = kernel + covariance  # what the weights of this layer add
        if layer < 2:
            cosine = (covariance / scale).clamp(-1, 1)
            angle = torch.arccos(cosine)
            kernel = kernel * (math.pi - angle) / math.pi
            covariance = scale * (torch.sin(angle) + (math.pi - angle) * cosine) / math.pi
    return kernel


def circle(points: int) -> Tensor:
    """Points on the unit circle."""
    angle = torch.arange(points) * (2 * math.pi / points)
    return torch.stack([torch.cos(angle), torch.sin(angle)], 1)


def relative(found: Tensor, expected: Tensor) -> float:
    """The distance in the Frobenius norm, relative."""
    return float((found - expected).norm() / expected.norm())


# --- the kernel at one width, and at many -----------------------------------------------------------------------------


def check_one_kernel(report: Report, width: int) -> None:
    """The same kernel by four routes; its symmetry and its eigenvalues."""
    x, parameters = torch.randn(24, 5), initial(width, 5)
    kernel = chainrule.ntk(network)(parameters, x)
    blocks = chainrule.jacobian(network)(parameters, x)
    jacobian = torch.cat([block.flatten(1) for block in blocks.values()], 1)
    as_object = chainrule.linear_map(network, parameters, x, argnums=0)
    report.say(f"\nOne network of width {width}, {jacobian.shape[1]} parameters, 24 inputs:")
    # Sums of about P products: rounding grows as sqrt(P) at most, relative to the diagonal.
    rounding = 4 * torch.finfo(kernel.dtype).eps * math.sqrt(jacobian.shape[1])
    report.check("ntk beside J J^T of the dense Jacobian", relative(kernel, jacobian @ jacobian.mT), below=rounding)
    report.check("ntk beside linear_map(...).gram()", relative(kernel, as_object.gram().dense()), below=rounding)
    report.check("ntk beside J J^T by torch.func's Jacobian", relative(kernel, peer(parameters, x)), below=rounding)
    vector = torch.randn(24)
    report.check("gram() @ v, which forms no matrix", relative(as_object.gram() @ vector, kernel @ vector), below=10 * rounding)
    report.check("asymmetry", relative(kernel, kernel.mT), below=rounding)
    values = torch.linalg.eigvalsh(kernel)
    report.check("most negative eigenvalue over the largest", float(-values[0] / values[-1]), below=24 * rounding)
    ours = min(seconds(lambda: chainrule.ntk(network)(parameters, x)) for _ in range(5))
    theirs = min(seconds(lambda: peer(parameters, x)) for _ in range(5))
    report.say(f"  chainrule.ntk {ours * 1e3:.2f} ms, J J^T by torch.func.jacrev {theirs * 1e3:.2f} ms (not checked)")


def peer(parameters: Parameters, x: Tensor) -> Tensor:
    """The kernel as one writes it with torch.func."""
    blocks = torch.func.jacrev(network)(parameters, x)
    return sum((block.flatten(1) @ block.flatten(1).mT for block in blocks.values()), torch.zeros(()))


def check_limit(report: Report, widths: list[int], networks: int) -> dict[int, Tensor]:
    """The kernels of random networks of growing width; returns them on the points of a circle."""
    x = circle(16)
    limit = limit_kernel(x, x)
    kernels = {}
    report.say(f"\nDistance of a random network's kernel from the limit, root mean square of {networks} networks:")
    for width in widths:
        kernels[width] = chainrule.vmap(chainrule.ntk(network), in_dims=(0, None))(initial(width, 2, networks), x)
    distances = [distance_from(kernels[width], limit) for width in widths]
    report.say("  " + ", ".join(f"{width}: {distance:.3f}" for width, distance in zip(widths, distances, strict=True)))
    # A root mean square over R draws is known to about 1 / sqrt(2 R): three of these, carried through the fit of a line.
    logs = torch.tensor([[math.log(width), math.log(distance)] for width, distance in zip(widths, distances, strict=True)])
    centred = logs - logs.mean(0)
    slope = float((centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum())
    allowed = 3 / math.sqrt(2 * networks) / float(centred[:, 0].norm())
    report.check(f"exponent of the width, {slope:.3f}, distance from -1/2", abs(slope + 0.5), below=allowed)
    mean = kernels[widths[-1]].mean(0)
    # The mean is off by the spread of the mean, and by a bias of the order of 1 / width.
    allowed = 3 * distances[-1] / math.sqrt(networks) + 2 / widths[-1]
    report.check("mean kernel at the largest width beside the closed form", relative(mean, limit), below=allowed)
    return kernels


def distance_from(kernels: Tensor, limit: Tensor) -> float:
    """The root mean square over networks of the relative distance."""
    return float(((kernels - limit).square().sum((1, 2)) / limit.square().sum()).mean().sqrt())


# --- training ---------------------------------------------------------------------------------------------------------


def predicted(parameters: Parameters, x: Tensor, y: Tensor, z: Tensor, rate: float, steps: int) -> Tensor:
    """What the kernel says of gradient descent: the outputs at z after so many steps on the data (x, y)."""
    inputs = torch.cat([x, z])
    kernel, output = chainrule.ntk(network)(parameters, inputs), network(parameters, inputs)
    count = len(x)
    values, vectors = torch.linalg.eigh(kernel[:count, :count])
    # The residual is multiplied by I - rate Theta in each step: a geometric series, written in eigenvectors.
    series = -torch.expm1(steps * torch.log1p(-rate * values)) / values
    weights = vectors @ (series * (vectors.mT @ (y - output[:count])))
    return output[count:] + kernel[count:, :count] @ weights


def train_linearised(parameters: Parameters, x: Tensor, y: Tensor, z: Tensor, rate: float, steps: int) -> Tensor:
    """Gradient descent on the network's first-order Taylor polynomial in the parameters, by products with J alone."""
    at_data = chainrule.linear_map(network, parameters, x, argnums=0)
    change = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for _ in range(steps):
        residual = y - at_data.output - at_data @ change
        for name, step in (at_data.T @ residual).items():
            change[name] += rate * step
    elsewhere = chainrule.linear_map(network, parameters, z, argnums=0)
    return elsewhere.output + elsewhere @ change


def train(parameters: Parameters, x: Tensor, y: Tensor, z: Tensor, rate: float, steps: int) -> Tensor:
    """Gradient descent on the network itself."""
    gradient = chainrule.grad(lambda at: (network(at, x) - y).square().sum() / 2)
    for _ in range(steps):
        slopes = gradient(parameters)
        parameters = {name: value - rate * slopes[name] for name, value in parameters.items()}
    return network(parameters, z)


def check_training(report: Report, widths: list[int], networks: int, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Train on eight points of the circle and compare with the prediction all around it; returns curves to draw."""
    angle = torch.linspace(-2.4, 2.4, 8)
    x = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    y, z = torch.sin(2 * angle), circle(60)
    rate = 0.5 / float(torch.linalg.matrix_norm(limit_kernel(x, x), 2))  # a narrow network's kernel may be larger
    report.say(f"\nTraining on 8 points, {steps} steps of gradient descent:")
    gaps = []
    for width in widths:
        gap = 0.0
        for _ in range(networks):
            start = initial(width, 2)
            expected = predicted(start, x, y, z, rate, steps)
            gap += relative(train(start, x, y, z, rate, steps), expected) / networks
        gaps.append(gap)
    linear = train_linearised(start, x, y, z, rate, steps)
    # Each step rounds outputs of size one; the contraction by I - rate Theta never makes a rounding error larger.
    allowed = 10 * steps * torch.finfo(y.dtype).eps
    report.check("linearised network beside the kernel's prediction, relative", relative(linear, expected), below=allowed)
    report.say("  the network beside it, by width: " + ", ".join(f"{w}: {g:.3f}" for w, g in zip(widths, gaps, strict=True)))
    ratio = gaps[-1] / gaps[0]
    rate_of_fall = math.sqrt(widths[0] / widths[-1])
    report.check(f"widest over narrowest, where theory says {rate_of_fall:.2f}", ratio, below=2 * rate_of_fall)
    curves = {"network": train(start, x, y, z, rate, steps), "linearised": linear}
    kernel, cross = limit_kernel(x, x), limit_kernel(z, x)
    curves["regression with the limit"] = cross @ torch.linalg.solve(kernel, y)
    return torch.stack([angle, y], 1), curves


def draw(report: Report, kernels: dict[int, Tensor], data: Tensor, curves: dict[str, Tensor]) -> None:
    """The kernels around the circle, their distance from the limit, and what training makes of the data."""
    if report.picture is None:
        return
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    figure = Figure(figsize=(14, 4), layout="constrained")
    one, two, three = figure.subplots(1, 3)
    x = circle(16)
    limit, angle = limit_kernel(x, x), torch.arange(16) * (2 * math.pi / 16)
    for width, colour in zip((min(kernels), max(kernels)), ("tab:orange", "tab:blue"), strict=True):
        one.plot(angle, kernels[width][:8, 0].mT, color=colour, alpha=0.4, lw=1)
        one.plot([], [], color=colour, label=f"width {width}, eight networks")
    one.plot(angle, limit[0], "k--", label="infinite width")
    one.set(xlabel="angle between the inputs", title="Tangent kernel on the circle")
    one.legend()
    widths = list(kernels)
    distances = [distance_from(kernels[width], limit) for width in widths]
    two.loglog(widths, distances, "o-", label="random networks")
    two.loglog(widths, [distances[0] * math.sqrt(widths[0] / width) for width in widths], "k--", label="width$^{-1/2}$")
    two.set_xticks(widths, labels=[str(width) for width in widths], minor=False)
    two.tick_params(axis="x", which="minor", labelbottom=False)
    two.set(xlabel="width", ylabel="relative distance", title="Towards the limit")
    two.legend()
    around = torch.arange(60) * (2 * math.pi / 60)
    order = torch.argsort((around + math.pi) % (2 * math.pi))
    shifted = ((around + math.pi) % (2 * math.pi) - math.pi)[order]
    for name, curve in curves.items():
        three.plot(shifted, curve[order], "--" if name != "network" else "-", label=name)
    three.plot(*data.mT, "ko", label="data")
    three.set(xlabel="angle", title=f"After training, width {max(kernels)}", ylim=(None, 2.2))
    three.legend(loc="upper right")
    report.save(figure)


def example(report: Report) -> None:
    torch.set_default_dtype(torch.float64)
    widths = [32, 64, 128, 256] if report.small else [32, 64, 128, 256, 512]
    check_one_kernel(report, 64 if report.small else 256)
    kernels = check_limit(report, widths, networks=60)
    data, curves = check_training(report, [widths[0], widths[-1]], networks=4, steps=200 if report.small else 400)
    draw(report, kernels, data, curves)


if __name__ == "__main__":
    sys.exit(main(example, __doc__))

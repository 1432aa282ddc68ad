"""The functions of section C, and formulas for their derivatives by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

tf = torch.func
Tensor = torch.Tensor

_FORCE = 5.0


def brusselator(laplacian: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The right-hand side of the Brusselator on a periodic square, as a function of ``(2, N, N)`` values."""

    def rhs(state: Tensor) -> Tensor:
        size = state.shape[-1]
        alpha = 10.0 * (size - 1) ** 2
        grid = torch.linspace(0, 1, size, dtype=state.dtype, device=state.device)
        inside = (grid[:, None] - 0.3) ** 2 + (grid[None, :] - 0.6) ** 2 <= 0.01
        u, v = state[0], state[1]
        product = u * u * v
        first = 1 + product - 4.4 * u + alpha * laplacian(u) + _FORCE * inside.to(state.dtype)
        return torch.stack([first, 3.4 * u - product + alpha * laplacian(v)])

    return rhs


def rolled(u: Tensor) -> Tensor:
    """The five-point stencil by ``torch.roll``."""
    return u.roll(1, 0) + u.roll(-1, 0) + u.roll(1, 1) + u.roll(-1, 1) - 4 * u


def sliced(u: Tensor) -> Tensor:
    """The five-point stencil by slices and concatenation."""
    rows = torch.cat([u[-1:], u[:-1]]) + torch.cat([u[1:], u[:1]])
    return rows + torch.cat([u[:, -1:], u[:, :-1]], 1) + torch.cat([u[:, 1:], u[:, :1]], 1) - 4 * u


def rosenbrock(x: Tensor) -> Tensor:
    """The chained Rosenbrock function."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def brusselator_state(size: int) -> Tensor:
    """The usual initial values. Shape (2, N, N)."""
    grid = torch.linspace(0, 1, size, dtype=torch.float64)
    first = (22 * (grid * (1 - grid)) ** 1.5).expand(size, size)
    second = (27 * (grid * (1 - grid)) ** 1.5)[:, None].expand(size, size)
    return torch.stack([first, second])


@lru_cache(maxsize=8)
def _stencil(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The Brusselator's pattern: row pointers, columns, and where its entries are in the order of :func:`hand_brusselator`."""
    place = torch.arange(size * size).view(size, size)
    around = [place.roll(shift, axis) for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1))]
    own = [torch.stack([near, near + size * size]) for near in (place, *around)]
    other = torch.stack([place + size * size, place])
    columns = torch.stack([*own, other], -1).reshape(-1, 6)
    order = columns.argsort(1)
    flat = (order + 6 * torch.arange(len(order))[:, None]).reshape(-1)
    return torch.arange(0, columns.numel() + 1, 6), columns.gather(1, order).reshape(-1), flat


def hand_brusselator(state: Tensor) -> Tensor:
    """The Jacobian of the right-hand side in CSR, for sides of three at least: six entries a row, sorted once per size."""
    size = state.shape[-1]
    pointers, columns, order = _stencil(size)
    alpha = 10.0 * (size - 1) ** 2
    u, v = state[0], state[1]
    product, square = 2 * u * v, u * u
    values = state.new_full((2, size, size, 6), alpha)
    values[0, ..., 0], values[0, ..., 5] = product - (4.4 + 4 * alpha), square
    values[1, ..., 0], values[1, ..., 5] = -4 * alpha - square, 3.4 - product
    return torch.sparse_csr_tensor(pointers, columns, values.view(-1)[order], (state.numel(),) * 2, check_invariants=False)


@lru_cache(maxsize=8)
def _tridiagonal(size: int) -> tuple[Tensor, Tensor]:
    columns = (torch.arange(size)[:, None] + torch.arange(-1, 2)).reshape(-1)[1:-1]
    pointers = (3 * torch.arange(size + 1) - 1).clamp(0, 3 * size - 2)
    return pointers, columns


def hand_rosenbrock(x: Tensor) -> Tensor:
    """The tridiagonal Hessian of the chain in CSR."""
    pointers, columns = _tridiagonal(len(x))
    values = x.new_empty(len(x), 3)
    values[:, 1] = 200.0
    values[0, 1] = 0.0
    values[:-1, 1] += 1200 * x[:-1] ** 2 - 400 * x[1:] + 2
    values[:-1, 2] = values[1:, 0] = -400 * x[:-1]
    return torch.sparse_csr_tensor(pointers, columns, values.view(-1)[1:-1], (len(x),) * 2, check_invariants=False)


def rotate(angles: Tensor, points: Tensor) -> Tensor:
    """Rodrigues' formula, row by row. Shapes (n, 3)."""
    squared = (angles * angles).sum(-1, keepdim=True)
    theta = squared.sqrt()
    axis = angles / theta
    along = (axis * points).sum(-1, keepdim=True)
    cosine, sine = theta.cos(), theta.sin()
    return points * cosine + torch.linalg.cross(axis, points) * sine + axis * along * (1 - cosine)


def project(cameras: Tensor, points: Tensor) -> Tensor:
    """The image of points in cameras: rotation 3, centre 3, focal length, principal point 2, distortion 2. Shape (n, 2)."""
    seen = rotate(cameras[:, :3], points - cameras[:, 3:6])
    flat = seen[:, :2] / seen[:, 2:]
    squared = (flat * flat).sum(-1, keepdim=True)
    distortion = 1 + cameras[:, 9:10] * squared + cameras[:, 10:11] * squared * squared
    return flat * distortion * cameras[:, 6:7] + cameras[:, 7:9]


class Adjustment:
    """A synthetic bundle adjustment problem.

    Args:
        cameras: how many cameras.
        points: how many points.
        observations: how many observations.
    """

    def __init__(self, cameras: int, points: int, observations: int) -> None:
        self.sizes = (cameras * 11, points * 3, observations)
        drawn = torch.Generator().manual_seed(0)
        self.camera = torch.randint(0, cameras, (observations,), generator=drawn)
        self.point = torch.cat([torch.arange(points), torch.randint(0, points, (observations - points,), generator=drawn)])
        self.features = torch.randn(observations, 2, dtype=torch.float64, generator=drawn)

    def start(self) -> Tensor:
        """Parameters: all cameras, all points, all weights."""
        cameras = torch.randn(self.sizes[0] // 11, 11, dtype=torch.float64) * 0.1
        cameras[:, 5] -= 5.0
        cameras[:, 6] += 1.0
        points = torch.randn(self.sizes[1], dtype=torch.float64)
        weights = 1 + 0.1 * torch.randn(self.sizes[2], dtype=torch.float64)
        return torch.cat([cameras.reshape(-1), points, weights])

    def residuals(self, parameters: Tensor) -> Tensor:
        """``w (project(camera, point) − feature)`` and ``1 − w²``, all of the first kind before the second."""
        cameras, points, weights = parameters.split(self.sizes)
        cameras, points = cameras.reshape(-1, 11)[self.camera], points.reshape(-1, 3)[self.point]
        errors = weights[:, None] * (project(cameras, points) - self.features)
        return torch.cat([errors.reshape(-1), 1 - weights * weights])

    def own(self, parameters: Tensor) -> Tensor:
        """The 15 parameters of every observation: its camera, its point, its weight. Shape (n, 15)."""
        cameras, points, weights = parameters.split(self.sizes)
        return torch.cat([cameras.reshape(-1, 11)[self.camera], points.reshape(-1, 3)[self.point], weights[:, None]], 1)

    def gathered(self, parameters: Tensor) -> Tensor:
        """The blocks of the Jacobian per observation, gathered by hand, by ``vmap(jacfwd)``. Shape (n, 3, 15)."""

        def residual(row: Tensor, feature: Tensor) -> Tensor:
            error = row[14] * (project(row[None, :11], row[None, 11:14])[0] - feature)
            return torch.cat([error, (1 - row[14] * row[14])[None]])

        return tf.vmap(tf.jacfwd(residual))(self.own(parameters), self.features)

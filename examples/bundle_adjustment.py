"""Bundle adjustment: cameras and points of a scene from their images, with wrong matches among the observations.

Every observation says where a camera sees a point. Unknown are the cameras (rotation, centre, focal length, principal point,
two coefficients of radial distortion: 11 numbers each), the points (3 each), and a weight w per observation. Its residuals are

    w · (projection - observation) / tolerance    and    1 - w²,

so that for an observation that fits nothing it is cheaper to give up its weight than to bend the scene: robust least squares.
At full size these are 95 529 residuals of 55 710 unknowns. Each depends on one camera, one point and one weight, and
923 447 of the 5.3 · 10⁹ entries of the Jacobian are not zero.

chainrule is used for that Jacobian: ``jacobian(residuals, layout="sparse_csr")`` finds its pattern through the gathers
``cameras[observation.camera]``, and computes the entries in a few times what the residuals cost. ``linear_map`` is the same
Jacobian without a matrix; with it, ``scipy.sparse.linalg.lsmr`` checks a step. Levenberg's and Marquardt's method is
written out: weights and points are eliminated from the normal equations first, which leaves a small dense system for
the cameras (the Schur complement).

Sources: B. Triggs et al., *Bundle adjustment: a modern synthesis* (2000); the residuals: F. Šrajer, Z. Kukelova, A. Fitzgibbon,
*A benchmark of selected algorithmic differentiation tools on some problems in computer vision and machine learning*,
Optimization Methods and Software 33 (2018), where the weights come from C. Zach, *Robust bundle adjustment revisited* (2014);
damping: H. Nielsen, *Damping parameter in Marquardt's method* (1999); alignment: S. Umeyama, IEEE PAMI 13 (1991).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg, sparse
from scipy.sparse.linalg import aslinearoperator, lsmr
from scipy.spatial.transform import Rotation
from support import Report, main, seconds, to_scipy

import chainrule

NOISE = 1e-3  # of the observations, in units in which a focal length is about one: half a pixel where that is 500
TOLERANCE = 5 * NOISE  # where an error begins to look like a wrong match
CAMERA = 11


def rotate(angles: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Rodrigues' formula, row by row. Shapes (n, 3)."""
    theta = angles.square().sum(-1, keepdim=True).sqrt()
    axis = angles / theta
    along = (axis * points).sum(-1, keepdim=True)
    return points * theta.cos() + torch.linalg.cross(axis, points) * theta.sin() + axis * along * (1 - theta.cos())


def project(cameras: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Where cameras see points. Shapes (n, 11) and (n, 3); returns (n, 2)."""
    rotation, centre, focal, principal, distortion = cameras.split([3, 3, 1, 2, 2], 1)
    seen = rotate(rotation, points - centre)
    flat = seen[:, :2] / seen[:, 2:]
    squared = flat.square().sum(-1, keepdim=True)
    distorted = 1 + distortion[:, :1] * squared + distortion[:, 1:] * squared.square()
    return focal * distorted * flat + principal


@dataclass
class Problem:
    """Which camera saw which point where: ``camera`` and ``point`` (n,), ``observed`` (n, 2)."""

    camera: torch.Tensor
    point: torch.Tensor
    observed: torch.Tensor
    tolerance: torch.Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many unknowns are of cameras, of points, and weights."""
        return CAMERA * (int(self.camera.max()) + 1), 3 * (int(self.point.max()) + 1), len(self.camera)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cameras, points, weights = x.split(self.sizes)
        return cameras.view(-1, CAMERA), points.view(-1, 3), weights

    def errors(self, x: torch.Tensor) -> torch.Tensor:
        """Projections less observations. Shape (n, 2)."""
        cameras, points, _ = self.split(x)
        return project(cameras[self.camera], points[self.point]) - self.observed

    def residuals(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.split(x)[2]
        return torch.cat([(weights[:, None] * self.errors(x) / self.tolerance).reshape(-1), 1 - weights.square()])


def scene(cameras: int, points: int, observations: int) -> tuple[Problem, torch.Tensor, torch.Tensor]:
    """A synthetic scene: the problem, the true unknowns, and which observations are wrong (2 %).

    Points lie on two crossing tubes; cameras stand around them on three heights and look at the middle.
    """
    turn = torch.rand(points, 2) * 2 * torch.pi
    radius = 1 + 0.35 * turn[:, 1].cos()
    ring = torch.stack([radius * turn[:, 0].cos(), radius * turn[:, 0].sin(), 0.35 * turn[:, 1].sin()], 1)
    upright = torch.arange(points)[:, None] % 2 == 0
    positions = torch.where(upright, ring[:, [0, 2, 1]] + torch.tensor([1.0, 0, 0]), ring).double()

    angle = torch.arange(cameras) * 2 * torch.pi / cameras
    height = torch.tensor([-1.0, 0.5, 2.0]).repeat(cameras)[:cameras]
    centres = torch.stack([0.5 + 3.4 * angle.cos(), 3.4 * angle.sin(), height], 1) + 0.2 * torch.randn(cameras, 3)
    truth = torch.zeros(cameras, CAMERA, dtype=torch.float64)
    for camera, centre in zip(truth, centres.double(), strict=True):
        camera[:3] = torch.from_numpy(looking(np.array([0.5, 0, 0]) - centre.numpy()))
        camera[3:6] = centre
    truth[:, 6] = 1 + 0.1 * torch.randn(cameras)
    truth[:, 7:9] = 0.02 * torch.randn(cameras, 2)
    truth[:, 9:] = torch.tensor([-0.1, 0.02]) * (1 + 0.3 * torch.randn(cameras, 2))

    # Every point is seen three times at least, by cameras that follow each other around the scene.
    first = torch.randint(0, cameras, (points,))
    further = observations - 3 * points
    three = [(first + k * (cameras // 7 + 1)) % cameras for k in range(3)]
    camera = torch.cat([*three, torch.randint(0, cameras, (further,))])
    point = torch.cat([torch.arange(points).repeat(3), torch.randint(0, points, (further,))])
    observed = project(truth[camera], positions[point]) + NOISE * torch.randn(observations, 2)
    wrong = torch.rand(observations) < 0.02
    observed[wrong] += 0.1 * torch.randn(int(wrong.sum()), 2)
    unknowns = torch.cat([truth.reshape(-1), positions.reshape(-1), torch.ones(observations)])
    return Problem(camera, point, observed.double(), torch.tensor(TOLERANCE, dtype=torch.float64)), unknowns, wrong


def looking(direction: np.ndarray) -> np.ndarray:
    """The rotation vector of a camera that looks along a direction, its second axis downwards."""
    ahead = direction / np.linalg.norm(direction)
    right = np.cross(ahead, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    matrix = np.stack([right, np.cross(ahead, right), ahead])
    return Rotation.from_matrix(matrix).as_rotvec()


class Normal:
    """The normal equations ``(JᵀJ + λ D) step = -Jᵀ r`` with ``D`` the diagonal of JᵀJ, by two eliminations."""

    def __init__(self, problem: Problem, jacobian: sparse.csr_array, residuals: np.ndarray) -> None:
        self.cameras, self.points, self.weights = problem.sizes
        self.matrix, self.right = (jacobian.T @ jacobian).tocsr(), -(jacobian.T @ residuals)
        self.diagonal = np.maximum(self.matrix.diagonal(), 1e-12)

    def solve(self, damping: float) -> np.ndarray:
        """The step; a weight's row holds itself, its camera and its point, and a point's only itself and its cameras."""
        first = self.cameras + self.points
        matrix = self.matrix + damping * sparse.diags_array(self.diagonal)
        geometry, mixed, own = matrix[:first, :first], matrix[:first, first:], matrix.diagonal()[first:]
        over = mixed @ sparse.diags_array(1 / own)
        geometry = (geometry - over @ mixed.T).tocsr()
        right = self.right[:first] - over @ self.right[first:]

        split = self.cameras
        blocks = sparse.bsr_array(geometry[split:, split:], blocksize=(3, 3))
        blocks.data = np.linalg.inv(blocks.data)  # block-diagonal: no residual holds two points
        coupling = geometry[:split, split:]
        over_points = coupling @ blocks.tocsr()
        complement = (geometry[:split, :split] - over_points @ coupling.T).toarray()
        cameras = linalg.solve(complement, right[:split] - over_points @ right[split:], assume_a="pos")
        points = blocks @ (right[split:] - coupling.T @ cameras)
        solved = np.concatenate([cameras, points])
        return np.concatenate([solved, (self.right[first:] - mixed.T @ solved) / own])


class LevenbergMarquardt:
    """Gauss-Newton steps, damped by what the last steps were worth (Nielsen's rule)."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.jacobian = chainrule.jacobian(problem.residuals, layout="sparse_csr")
        self.steps = 0

    def cost(self, x: torch.Tensor) -> float:
        return float(self.problem.residuals(x).square().sum())

    def linearise(self, x: torch.Tensor) -> Normal:
        return Normal(self.problem, to_scipy(self.jacobian(x)), self.problem.residuals(x).numpy())

    def minimise(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        """At most so many steps, until one gains less than a millionth of the cost."""
        damping, growth = 1e-3, 2.0
        cost = self.cost(x)
        normal = self.linearise(x)
        for _ in range(steps):
            self.steps += 1
            step = normal.solve(damping)
            tried = x + torch.from_numpy(step)
            gained = cost - self.cost(tried)
            if not gained > 0:
                damping, growth = damping * growth, 2 * growth
                continue
            expected = step @ (normal.right + damping * normal.diagonal * step)
            damping, growth = max(1e-12, damping * max(0.1, 1 - (2 * gained / expected - 1) ** 3)), 2.0
            x, cost = tried, cost - gained
            if gained < 1e-6 * cost:
                break
            normal = self.linearise(x)
        return x

    def minimise_gradually(self, x: torch.Tensor) -> torch.Tensor:
        """The minimum for the tolerance that is asked for, by way of larger ones: far from it everything seems wrong."""
        cameras, points, weights = self.problem.sizes
        for tolerance, steps in ((20 * TOLERANCE, 5), (4 * TOLERANCE, 5), (TOLERANCE, 30)):
            self.problem.tolerance = torch.tensor(tolerance, dtype=torch.float64)
            x = self.minimise(torch.cat([x[: cameras + points], x.new_ones(weights)]), steps)
        return x


def aligned(found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, float]:
    """Points moved, turned and scaled onto others as well as that goes (Umeyama), and the scale."""
    centre, goal = found.mean(0), truth.mean(0)
    left, sizes, right = np.linalg.svd((truth - goal).T @ (found - centre))
    signs = np.array([1, 1, np.sign(np.linalg.det(left @ right))])
    scale = (sizes * signs).sum() / ((found - centre) ** 2).sum()
    return goal + scale * (found - centre) @ (left * signs @ right).T, scale


def rms(errors: torch.Tensor | np.ndarray) -> float:
    return float((errors**2).mean() ** 0.5)


def perturbed(problem: Problem, truth: torch.Tensor) -> torch.Tensor:
    """Where to start: poses and points somewhat off, calibrations unknown."""
    x = truth.clone()
    cameras, points, _ = problem.split(x)
    cameras[:, :3] += 0.02 * torch.randn_like(cameras[:, :3])
    cameras[:, 3:6] += 0.1 * torch.randn_like(cameras[:, 3:6])
    cameras[:, 6:] = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    points += 0.1 * torch.randn_like(points)
    return x


def check_derivatives(report: Report, solver: LevenbergMarquardt, x: torch.Tensor) -> None:
    """The Jacobian against finite differences, its pattern against a count by hand, and a step against SciPy's lsmr."""
    problem = solver.problem
    jacobian = solver.jacobian(x)
    rows, columns = jacobian.shape
    count, n = jacobian.values().numel(), len(problem.camera)
    report.say(f"Jacobian {rows}×{columns}, {count} non-zeros ({count / rows / columns:.1e} of all)")
    # An image coordinate depends on all but one (the other one of the principal point) of 11 + 3 + 1 unknowns.
    report.check("non-zeros more or fewer than 2 · 14 + 1 per observation", abs(count - 29 * n), below=1)
    direction, h = torch.randn_like(x), 1e-6
    difference = (problem.residuals(x + h * direction) - problem.residuals(x - h * direction)) / (2 * h)
    error = (jacobian @ direction - difference).norm() / difference.norm()
    # Third derivatives grow with the distortion's fourth power of the distance: h² times hundreds; rounding: 1e-16 / h.
    report.check("Jacobian times a vector, against finite differences (relative)", float(error), below=1e-7)

    normal, damping = solver.linearise(x), 1.0
    operator = chainrule.linear_map(problem.residuals, x)
    scale = 1 / np.sqrt(normal.diagonal)
    scaled = operator.scipy() @ aslinearoperator(sparse.diags_array(scale))
    step, *_ = lsmr(scaled, -operator.output.numpy(), damp=damping**0.5, atol=1e-13, btol=1e-13, maxiter=300)
    error = np.linalg.norm(normal.solve(damping) - scale * step) / np.linalg.norm(scale * step)
    report.check("step by elimination against lsmr without a matrix (relative)", error, below=1e-6)
    own, function = (min(seconds(call) for _ in range(3)) for call in (lambda: solver.jacobian(x), lambda: problem.residuals(x)))
    report.say(f"one Jacobian: {1e3 * own:.1f} ms; the residuals alone: {1e3 * function:.1f} ms")


def check_solution(report: Report, problem: Problem, x: torch.Tensor, truth: torch.Tensor, wrong: torch.Tensor) -> np.ndarray:
    """Errors at the level of the noise, wrong matches found, points where they are. Returns the points, aligned."""
    errors, weights = problem.errors(x), problem.split(x)[2].abs()
    kept = weights > 0.5
    cameras, points, n = problem.sizes
    # Fitting takes up noise: of 2 per kept observation, as many degrees of freedom as there are unknowns, less the seven of a
    # similarity that changes no image.
    expected = NOISE * (1 - (cameras + points - 7) / (2 * int(kept.sum()))) ** 0.5
    found = rms(errors[kept])
    report.say(f"error of the kept observations: {found:.3e}, expected from the noise: {expected:.3e}")
    report.check("their ratio, distance from 1", abs(found / expected - 1), below=0.05)
    report.check("wrong observations that are kept (share)", float((kept & wrong).sum() / wrong.sum()), below=0.1)
    report.check("right observations that are given up (share)", float((~kept & ~wrong).sum() / n), below=0.005)

    goal = problem.split(truth)[1].numpy()
    moved, _ = aligned(problem.split(x)[1].numpy(), goal)
    distances = np.linalg.norm(moved - goal, axis=1)
    # A ray is uncertain by the noise times the distance of 3.4 that cameras have; a point is where three rays or more meet.
    report.check("distance of points from the truth after alignment, median", float(np.median(distances)), below=3 * 3.4 * NOISE)
    report.check("the same, 95 % of the points", float(np.quantile(distances, 0.95)), below=10 * 3.4 * NOISE)
    return moved


def draw(report: Report, problem: Problem, stages: dict[str, tuple[torch.Tensor, np.ndarray]], truth: torch.Tensor) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415 - needed for the picture alone

    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    cameras, goal, _ = (part.numpy() for part in problem.split(truth))
    for axis, (name, (_, points)) in zip(axes, stages.items(), strict=False):
        distances = np.linalg.norm(points - goal, axis=1)
        shown = axis.scatter(points[:, 0], points[:, 1], c=distances, s=4, vmin=0, vmax=0.2, cmap="viridis")
        axis.plot(cameras[:, 3], cameras[:, 4], "k^", ms=5)
        axis.set(title=f"points from above, {name}", aspect="equal")
    figure.colorbar(shown, ax=axes[:2].tolist(), label="distance from the truth", location="bottom", shrink=0.6)
    bins = np.geomspace(1e-5, 1, 60)
    for name, (x, _) in stages.items():
        axes[2].hist(problem.errors(x).norm(dim=1).numpy(), bins, alpha=0.6, label=name)
    axes[2].axvline(NOISE, color="k", ls=":", label="noise")
    axes[2].set(xscale="log", title="distance of projection and observation")
    axes[2].legend()
    report.save(figure)


def example(report: Report) -> None:
    problem, truth, wrong = scene(*((12, 200, 1200) if report.small else (49, 7776, 31843)))
    start = perturbed(problem, truth)
    solver = LevenbergMarquardt(problem)
    check_derivatives(report, solver, start)

    found: list[torch.Tensor] = []
    spent = seconds(lambda: found.append(solver.minimise_gradually(start)))
    report.say(f"Levenberg-Marquardt: {solver.steps} steps, {spent:.1f} s")
    gradients = [np.linalg.norm(solver.linearise(x).right) for x in (start, found[0])]
    report.check("gradient, beside that at the start", gradients[1] / gradients[0], below=1e-4)
    moved = check_solution(report, problem, found[0], truth, wrong)
    before = aligned(problem.split(start)[1].numpy(), problem.split(truth)[1].numpy())[0]
    draw(report, problem, {"at the start": (start, before), "adjusted": (found[0], moved)}, truth)


if __name__ == "__main__":
    sys.exit(main(example, __doc__))

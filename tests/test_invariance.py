"""What changes with the coordinates of the params, and what does not: theta = phi(psi)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference import dense_perturbation

import monge_sam_jax as ms

RHO = 0.1
MIX = np.array([[2.0, 0.3, 0.0], [-0.4, 1.0, 0.2], [0.1, 0.0, 0.5]])

MAPS = {  # name: (phi on arrays, whether it acts entry by entry)
    "scaling": (lambda psi: jnp.array([2.0, 0.5, 30.0]) * psi, True),
    "cubic": (lambda psi: psi**3 + psi, True),
    "linear": (lambda psi: jnp.asarray(MIX) @ psi, False),
    "nonlinear": (lambda psi: jnp.tanh(jnp.asarray(MIX) @ psi) + 2 * psi, False),
}


def loss(theta):
    return jnp.sum(jnp.sin(theta) * jnp.array([1.0, -2.0, 0.5])) + theta[0] * theta[1]


def perturb(metric, function, point):
    return ms.worst_case_perturbation(metric, jax.grad(function)(point), point, RHO)


@pytest.fixture
def psi(x64):
    return jnp.array([0.4, -0.7, 0.2])


def test_the_monge_formula_reapplied_depends_on_the_coordinates():
    """Theta = 2 psi, measured in theta: I + g g^T in psi is not the metric of theta."""
    theta = jnp.array([0.6, -0.3])
    function = lambda t: jnp.sum(t**2)  # noqa: E731
    in_theta = perturb(ms.monge(), function, theta)
    in_psi = 2 * perturb(ms.monge(), lambda p: function(2 * p), theta / 2)
    g = 2 * np.array([0.6, -0.3])
    n = np.linalg.norm(g)
    expected = RHO / np.sqrt(1 + n**2), 2 * RHO / np.sqrt(1 + 4 * n**2)
    assert float(jnp.linalg.norm(in_theta)) == pytest.approx(expected[0], rel=1e-5)
    assert float(jnp.linalg.norm(in_psi)) == pytest.approx(expected[1], rel=1e-5)
    assert abs(expected[1] / expected[0] - 1) > 0.1


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("name", MAPS)
def test_the_metric_pulled_back_does_not(psi, name, alpha):
    """J delta_psi is delta_theta: the same step in the tangent space, whatever the coordinates."""
    phi, diagonal = MAPS[name]
    J = jax.jacobian(phi)(psi)
    expected = perturb(ms.monge(alpha=alpha), loss, phi(psi))
    for metric in [ms.pullback(phi, tol=1e-14)] + [ms.pullback(phi, diagonal=True)] * diagonal:
        delta = perturb(ms.monge(metric, alpha), lambda p: loss(phi(p)), psi)
        np.testing.assert_allclose(J @ delta, expected, rtol=1e-9)
    reapplied = J @ perturb(ms.monge(alpha=alpha), lambda p: loss(phi(p)), psi)
    assert np.linalg.norm(reapplied - expected) > 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["cubic", "nonlinear"])
def test_invariance_is_of_first_order_for_a_nonlinear_map(psi, name):
    """The end points differ by a term of second order in rho: a quarter at half the radius."""
    phi, _ = MAPS[name]

    def gap(rho):
        g = jax.grad(lambda p: loss(phi(p)))(psi)
        delta = ms.worst_case_perturbation(ms.monge(ms.pullback(phi, tol=1e-14)), g, psi, rho)
        theta = phi(psi)
        there = ms.worst_case_perturbation(ms.monge(), jax.grad(loss)(theta), theta, rho)
        return float(jnp.linalg.norm(phi(psi + delta) - theta - there))

    assert gap(1e-2) / gap(5e-3) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("name", MAPS)
def test_pullback_is_the_dense_solution(psi, name):
    phi, _ = MAPS[name]
    g = np.array([1.0, -0.5, 2.0])
    J = np.asarray(jax.jacobian(phi)(psi))
    for alpha in (0.0, 2.0):
        G = J.T @ J + alpha**2 * np.outer(g, g)
        metric = ms.monge(ms.pullback(phi, tol=1e-14), alpha)
        actual = ms.worst_case_perturbation(metric, jnp.asarray(g), psi, RHO)
        np.testing.assert_allclose(actual, dense_perturbation(G, g, RHO), rtol=1e-9)


def test_asam_is_invariant_to_diagonal_scalings_alone(psi):
    """With eta = 0; the reason for its metric. A map that mixes entries is another matter."""
    metric = ms.adaptive(eta=0.0)
    for name, invariant in [("scaling", True), ("linear", False)]:
        phi, _ = MAPS[name]
        in_theta = perturb(metric, loss, phi(psi))
        in_psi = jax.jacobian(phi)(psi) @ perturb(metric, lambda p: loss(phi(p)), psi)  # noqa: B023
        assert np.allclose(in_psi, in_theta, rtol=1e-9) == invariant


def test_pullback_on_trees_and_at_zero_gradient():
    params = {"a": jnp.array([0.3, -0.2]), "b": jnp.asarray(0.5)}
    phi = lambda p: {"a": jnp.exp(p["a"]) * (1 + p["b"]), "b": p["b"] ** 3 + p["b"]}  # noqa: E731
    metric = ms.monge(ms.pullback(phi))
    zeros = jax.tree.map(jnp.zeros_like, params)
    delta = ms.worst_case_perturbation(metric, zeros, params, RHO)
    assert not np.any(ravel_pytree(delta)[0])
    grads = {"a": jnp.array([1e-20, 2e-20]), "b": jnp.asarray(-1e-20)}  # squares underflow
    delta = ravel_pytree(ms.worst_case_perturbation(metric, grads, params, RHO))[0]
    theta, unravel = ravel_pytree(params)
    J = np.asarray(jax.jacobian(lambda x: ravel_pytree(phi(unravel(x)))[0])(theta), float)
    g = 1e20 * np.asarray(ravel_pytree(grads)[0], float)
    np.testing.assert_allclose(delta, dense_perturbation(J.T @ J, g, RHO), rtol=1e-4)


def path_in_theta(metric, phi, psi, rho, steps=40, learning_rate=0.02):
    """Where a run in psi goes, seen in theta; descent is along (J^T J)^-1 g, itself invariant."""
    through = lambda psi: loss(phi(psi))  # noqa: E731

    @jax.jit
    def step(psi):
        g = jax.grad(through)(psi)
        second = jax.grad(through)(psi + ms.worst_case_perturbation(metric, g, psi, rho))
        J = jax.jacobian(phi)(psi)
        return psi - learning_rate * jnp.linalg.solve(J.T @ J, second)

    points = [phi(psi)]
    for _ in range(steps):
        psi = step(psi)
        points.append(phi(psi))
    return np.stack(points)


@pytest.mark.parametrize("name", ["scaling", "cubic"])
def test_trajectories_under_a_rescaling_and_a_nonlinear_map(psi, name):
    """Of SAM, ASAM and M-SAM: which of them does not see the coordinates, along a whole run."""
    phi, _ = MAPS[name]
    theta = phi(psi)
    gaps = {}
    for method, in_theta, in_psi in [
        ("SAM", ms.euclidean(), ms.euclidean()),
        ("ASAM", ms.adaptive(0.0), ms.adaptive(0.0)),
        ("M-SAM reapplied", ms.monge(), ms.monge()),
        ("M-SAM pulled back", ms.monge(), ms.monge(ms.pullback(phi, diagonal=True))),
    ]:
        expected = path_in_theta(in_theta, lambda theta: theta, theta, RHO)
        gaps[method] = np.abs(path_in_theta(in_psi, phi, psi, RHO) - expected).max()
    if name == "scaling":  # a linear map: exact
        assert max(gaps["ASAM"], gaps["M-SAM pulled back"]) < 1e-10
        assert min(gaps["SAM"], gaps["M-SAM reapplied"]) > 1e-3
    else:  # to first order in rho and the learning rate
        others = [gap for method, gap in gaps.items() if method != "M-SAM pulled back"]
        assert gaps["M-SAM pulled back"] < 0.5 * min(others)

r"""Sharpness-aware steps for the price of one gradient.

The worst step around the params is taken along the gradient of the step before, so no second
gradient is needed: the params in the training loop are the perturbed ones,
:math:`y_t = \theta_t + \delta_t`, and an ordinary gradient is the one that is wanted.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, Never, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax._core import secants
from monge_sam_jax._core import surroundings as around
from monge_sam_jax._core.ahead import perturb
from monge_sam_jax._core.checks import (
    check_of_one_pass,
    check_params,
    check_params_and_gradient,
    check_positive,
    check_state,
)
from monge_sam_jax._core.held import (
    Move,
    describe,
    held_perturbation,
    map_kept,
    map_moves,
    subtract,
    without_masked,
)
from monge_sam_jax._core.injection import injectable, unfixed
from monge_sam_jax._core.masks import check_mask, chosen_leaves, select
from monge_sam_jax._core.momentum import FromMomentum, find_momentum, is_from_momentum, is_marker
from monge_sam_jax._core.numerics import (
    as_arrays,
    rounded,
    scaled_norm,
    widen,
    without_variables,
    working_dtype,
)
from monge_sam_jax.diagnostics import Diagnostics, no_diagnostics
from monge_sam_jax.metrics import Grads, Params, State, monge
from monge_sam_jax.perturbation import (
    Mask,
    MetricOrFunction,
    SlotStates,
    check_ball,
    check_slots,
    fit,
    init_states,
    metric_at,
)
from monge_sam_jax.slots import is_link
from monge_sam_jax.when import When, WhenRule, check_when

__all__ = ["Direction", "FromMomentum", "OnePassState", "one_pass_sam", "unperturbed_params"]
__dir__ = __all__.copy

Direction: TypeAlias = Literal["gradient", "momentum"]


class OnePassState(NamedTuple):
    """State of `one_pass_sam`.

    Attributes:
      count: number of updates so far, an int32 scalar.
      base_state: state of the base optimizer.
      metric_state: state of the metric.
      delta: the perturbation that the params hold, as it was realised: theta = params - delta. At
        leaves that are not perturbed it is `optax.MaskedNode`, and `FromMomentum`, a kind of that,
        where delta is multiple * (inverse_scale * momentum).
      multiple: scalar in float32 or wider.
      inverse_scale: another, a power of two.
      diagnostics: of the perturbation that the params hold; zeros before the first update.
      ascent_state: state of the ascent; empty without.
      secant: the last y and its gradient, and the curvature between the last two; empty without a
        `stability_margin`.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    base_state: optax.OptState
    metric_state: State
    delta: Params
    multiple: jax.Array
    inverse_scale: jax.Array
    diagnostics: Diagnostics
    ascent_state: State = ()
    secant: State = ()


@injectable
def one_pass_sam(
    base_optimizer: optax.GradientTransformation,
    *,
    metric: MetricOrFunction = monge(),  # noqa: B008
    rho: chex.Numeric | optax.Schedule = 0.05,
    direction: Direction = "gradient",
    ascent: optax.GradientTransformation | None = None,
    mask: Mask = None,
    when: When | None = None,
    stability_margin: chex.Numeric | None = None,
    **of_two_passes: Never,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that every gradient is taken at perturbed params, without a second.

    .. math::
        g_t = \nabla \ell(y_t), \quad
        \theta_{t+1} = \theta_t + \text{base}(g_t, \theta_t), \quad
        y_{t+1} = \theta_{t+1} + \delta_{t+1}, \quad
        \delta_{t+1} = \rho \, \frac{G^{-1} g_t}{\sqrt{g_t^\top G^{-1} g_t}}
        \qquad \text{(eqs. 5 and 8)}

    from :math:`y_0 = \theta_0`. The params of the training loop are y: take an ordinary gradient
    there and hand it to `update`. Loss and running statistics (of batch normalisation, say) are
    those at y as well. The base optimizer, its weight decay and its schedules see theta, which
    `unperturbed_params` gives: evaluate and save that, with running statistics gathered anew.

    The last gradient points up the slope that the step has just gone down, and where the gradient
    is large a long perturbation along it does harm; the Monge metric shortens it just there.

    The state keeps delta, so that theta = y - delta is what the base optimizer made of it, up to
    the rounding of y; of leaves of 16 bits it keeps delta as it was realised, and theta is exact
    unless delta is about as large. What changes y from outside, such as `optax.lookahead`, weights
    that are loaded or pruned, or an averaging optimizer around it, moves theta by the same amount.

    With direction="momentum" the momentum in the base optimizer's state takes the place of
    :math:`g_t` in delta, and of leaves of 32 bits or more nothing is kept if the metric is
    isotropic (`euclidean`, and `monge` over it): delta is computed again from the momentum. What y
    was rounded by goes away again in theta's own rounding, where entries of delta are smaller than
    those of theta. After 10^5 noisy steps in float32 theta was off by 1e-4 for params of
    size 9, as plain training was; with entries of delta as large as those of theta, of size 0.09,
    by 2.5e-6 ("gradient") and 3.6e-6 ("momentum"), plain training by 5e-7.

    At a fixed rho one pass never settles, as minima repel it where :math:`r \lambda > 1`, with r
    the effective radius :math:`\|\delta\| / \|g\|` (`stability.one_pass_is_stable`). With a
    `stability_margin` c below one, delta is shortened to

    .. math:: \frac{\|\delta_{t+1}\|}{\|g_t\|} \le c \, \frac{\|y_t - y_{t-1}\|}{\|g_t - g_{t-1}\|}

    from the second update on, of the leaves that are perturbed (along the momentum, with that for
    :math:`g_t` on the left alone), so that theta goes on to the minimum. Where the base optimizer
    has momentum, the edge is lower (`stability` has it), and c should be. It is for gradients of
    the whole data set: between mini-batches noise is taken for curvature, and next to nothing is
    left of delta, or of what it gains, which averages over secants did not mend. The state keeps y
    and its gradient, two copies of these leaves.

    Nothing may come after it in `optax.chain`: an update moves the perturbation too. Clipping and
    the like go inside, or before it, where they shorten what the metric sees. What goes around an
    optimizer goes around it: `optax.apply_if_finite`, `optax.MultiSteps`, `optax.masked`,
    `optax.partition`; at rho = 0 every wrapper gives what it gives around the base optimizer. A
    gradient that is not finite makes the whole update not finite. For `optax.tree.map_params` with
    other trees, the leaves of which nothing is kept are `optax.MaskedNode`, as in `optax.masked`.

    Args:
      base_optimizer: any Optax optimizer; it gets the extra arguments of `update`.
      metric: the metric G, at :math:`\theta_{t+1}`; or a function of rho, as in `sharpness_aware`.
      rho: radius of the ball in the metric's units: a scalar, or a schedule, by which the gradient
        of update t = 1, 2, ... is taken at radius rho(t); that of update 0 is unperturbed. Traced
        values and schedules are not checked. At zero, y = theta is the base optimizer's, bit for
        bit, but for a last bit where XLA compiles params - learning_rate * grads to one rounding.
      direction: "gradient", or "momentum": what the base optimizer's state holds as `trace`
        (`optax.sgd`) or `mu` (`optax.adam`, `optax.lion`, `optax.contrib.muon` and others). The
        metric takes the momentum for the gradient: a trace with decay b is up to 1 / (1 - b) times
        as long, and `alpha` can make up for that. With ascent=optax.scale(-1.0) it is Momentum-SAM.
      ascent: as in `sharpness_aware`, of the gradient or the momentum, at every update.
      mask: which leaves are perturbed, as in `sharpness_aware`; nothing is kept of the others.
      when: a function of the number of the update, 1, 2, ..., that returns a bool: where it is not
        true, the gradient of that update is taken at rho = 0, at the unperturbed params.
      stability_margin: c, for gradients of the whole data set; see above. None: no limit.
      **of_two_passes: those of `sharpness_aware` that need two gradients are an error.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `OnePassState`. Updates are in the dtype of
      the params.

    Raises:
      TypeError: an argument is of the wrong type; at `init`, a leaf is no float or complex array;
        at an update, a gradient is float0 or integer, or the state another optimizer's.
      ValueError: rho is negative, NaN or infinite, stability_margin that or zero, or direction
        unknown; at `init`, the base optimizer does not have one momentum, or is sharpness-aware
        itself; at an update, params are missing or do not fit the gradient, the state is that of
        another mask, direction or metric, or of no stability_margin where there is one,
        or a link comes after it in a chain.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eqs. 5, 8 and 9.

    >>> import jax, optax
    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import one_pass_sam, unperturbed_params
    >>> tx = one_pass_sam(optax.sgd(0.5), rho=0.3)
    >>> params = jnp.array([0.0, 2.0])
    >>> state = tx.init(params)
    >>> grads = jax.grad(lambda params: 0.5 * jnp.sum(params**2))(params)
    >>> updates, state = tx.update(grads, state, params)
    >>> optax.apply_updates(params, updates)  # 2 - 0.5 * 2 + 0.3 / sqrt(1 + 2^2)
    Array([0.       , 1.1341641], dtype=float32)
    """
    if not isinstance(base_optimizer, optax.GradientTransformation):
        raise TypeError(f"base_optimizer must be an Optax optimizer, got {base_optimizer!r}")
    check_of_one_pass(of_two_passes)
    metric, mask, when = map(unfixed, (metric, mask, when))
    check_mask(mask)
    check_when(when)
    if isinstance(when, WhenRule):
        raise TypeError(
            "when must be a function of the count here: a rule that looks at the gradient saves a "
            "second one, and one_pass_sam takes none"
        )
    check_ball(metric, rho, schedule_allowed=True)
    check_slots(ascent, None)
    if stability_margin is not None:
        advice = "rho=0 is without a perturbation, None without a limit"
        check_positive("stability_margin", stability_margin, zero=advice)
    if direction not in get_args(Direction):
        raise ValueError(f"direction must be 'gradient' or 'momentum', got {direction!r}")
    base = optax.with_extra_args_support(base_optimizer)
    use_momentum = direction == "momentum"

    def radius(count: jax.Array) -> chex.Numeric:
        now = rho(count) if callable(rho) else rho
        return now if when is None else jnp.where(when(count), now, 0.0)

    def layout(chosen: Any, params: Params) -> Params:
        """What the state keeps of delta: of some leaves nothing."""
        is_along_momentum = use_momentum and ascent is None and metric_at(1.0, metric).isotropic

        def keep(choose: bool, p: Any) -> Any:
            if not choose:
                return optax.MaskedNode()
            return FromMomentum() if is_along_momentum and jnp.finfo(p.dtype).bits >= 32 else p

        return jax.tree.map(keep, chosen, params)

    def init(params: Params) -> OnePassState:
        params = as_arrays(params)
        chosen = chosen_leaves(mask, params)
        perturbed = select(chosen, params)
        check_params(perturbed)
        kept = layout(chosen, params)
        base_state = base.init(params)
        around.check_optax_sam(base_state)
        if any(around.count_links(is_kind, base_state) for is_kind in (_is_one_pass, is_link)):
            raise ValueError(
                "the base optimizer is sharpness-aware itself: give one_pass_sam what comes after "
                f"it in the chain. As it is, {around.ONE_LINK}"
            )
        if use_momentum and jax.tree.leaves(params):
            find_momentum(base_state, kept, params)
        states = init_states(metric, ascent, None, None, mask, params)
        return OnePassState(
            count=jnp.zeros((), jnp.int32),
            base_state=base_state,
            metric_state=states.metric,
            delta=jax.tree.map(jnp.zeros_like, kept),
            multiple=jnp.zeros((), working_dtype(perturbed)),
            inverse_scale=jnp.zeros((), working_dtype(perturbed)),
            diagnostics=no_diagnostics(),
            ascent_state=states.ascent,
            secant=() if stability_margin is None else secants.no_secant(perturbed),
        )

    def update(
        updates: Grads, state: OnePassState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, OnePassState]:
        grads = updates
        if params is None:
            raise ValueError("one_pass_sam needs the params: tx.update(grads, state, params)")
        check_state(state, OnePassState, "one_pass_sam")
        around.check_last(_is_one_pass, is_link, state)
        params = as_arrays(params)
        check_params_and_gradient(without_masked(params), without_masked(grads))
        chosen = chosen_leaves(mask, params)
        kept = layout(chosen, params)
        states = SlotStates(state.metric_state, state.ascent_state)
        fits = fit(states, metric, ascent, None, None, mask, params)
        fits &= bool(jax.tree.leaves(state.secant)) == (stability_margin is not None)
        if not (fits and describe(kept) == describe(state.delta)):
            raise ValueError(
                "the state of one_pass_sam was made with another mask, direction, ascent or kind "
                "of metric, with or without a stability_margin, or for other params. To go on from "
                "it, start at the unperturbed params: params = unperturbed_params(old_state, "
                "params), and the state tx.init(params)._replace(base_state=old_state.base_state)"
            )

        held = held_perturbation(state, params)
        theta = subtract(params, held)
        base_updates, base_state = base.update(grads, state.base_state, theta, **extra_args)
        theta = optax.apply_updates(theta, base_updates)

        g = select(chosen, find_momentum(base_state, kept, params) if use_momentum else grads)
        count = optax.safe_increment(state.count)
        dtype = state.multiple.dtype
        g = jax.tree.map(lambda x: widen(x, dtype), g)
        secant: Any = state.secant
        if stability_margin is not None:
            seen = select(chosen, params), select(chosen, grads)
            secant = secants.next_secant(secant, state.count, *seen)
        shorten = functools.partial(secants.shortening, secant, stability_margin)
        ahead = perturb(
            metric,
            ascent,
            g,
            select(chosen, theta),
            states,
            radius(count),
            None if stability_margin is None else shorten,
        )
        # Leaves that are not perturbed may be not finite too: `finite` is exactly one, or NaN.
        others = jax.tree.map(lambda choose, g: None if choose else g, chosen, grads)
        norms = ahead.scaled.unit_norm * scaled_norm(others).unit_norm.astype(dtype)
        finite = jax.lax.stop_gradient(norms / norms)

        def move(kept: Any, p: Any, held: Any, t: Any, u: Any, d: Any) -> Any:
            """What y moves by, and the perturbation that it then holds."""
            if is_marker(kept) and not is_from_momentum(kept):
                return Move(jax.tree.map(lambda u: u * finite.astype(u.dtype), u), kept)
            v = widen(u, d.dtype) + (d - widen(held, d.dtype))  # u itself where rho is zero
            v = rounded(v.astype(p.dtype))
            if not is_marker(kept):
                # What 32 bits round goes away again in theta's own rounding, and costs no copy.
                d = d if jnp.finfo(p.dtype).bits >= 32 else rounded(p + v) - rounded(t)
                kept = d.astype(p.dtype)
            return Move(v * finite.astype(v.dtype), kept)

        moves = map_kept(move, kept, params, held, theta, base_updates, ahead.delta)
        return map_moves(lambda m: m.update, moves), OnePassState(
            count=count,
            base_state=base_state,
            metric_state=ahead.states.metric,
            delta=map_moves(lambda m: m.delta, moves),
            multiple=ahead.multiple.astype(dtype),
            inverse_scale=ahead.scaled.inverse_scale.astype(dtype),
            diagnostics=ahead.diagnostics,
            ascent_state=ahead.states.ascent,
            secant=secant,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def unperturbed_params(opt_state: chex.ArrayTree, params: Params) -> Params:
    r"""The params :math:`\theta` that `one_pass_sam` trains: evaluate and save these.

    Args:
      opt_state: state of `one_pass_sam`, or of whatever was built around it. Under
        `optax.partition` and the like it may be there several times, each for its own leaves; made
        by `jax.vmap`, it is that of an ensemble, stacked along the first axis as the params are.
      params: y, the params of the training loop that belong to the state. Both may hold the
        `Variable`s of Flax NNX, `optimizer.opt_state` and `nnx.state(model, nnx.Param)`.

    Returns:
      A tree of the form of the params.

    Raises:
      ValueError: there is no such state, or something comes after it in `optax.chain`.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> from monge_sam_jax import one_pass_sam, unperturbed_params
    >>> tx = optax.chain(optax.clip(1.0), one_pass_sam(optax.sgd(0.5), rho=0.3))
    >>> params = jnp.array([0.0, 2.0])
    >>> updates, state = tx.update(jnp.array([0.0, 4.0]), tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> float(unperturbed_params(state, params)[1])  # 2 - 0.5 * 1
    1.500000
    """
    opt_state, theta = without_variables(opt_state), as_arrays(without_variables(params))
    found = optax.tree.get_all_with_path(opt_state, OnePassState.__name__)
    if not found:
        raise ValueError("found no state of one_pass_sam in opt_state; did it make the optimizer?")
    if around.is_followed(_is_one_pass, opt_state):
        raise ValueError(
            f"{around.LAST}. If the tuple in opt_state is no chain's, give the state of "
            "one_pass_sam alone"
        )
    for _, state in found:
        theta = _unperturbed(state, theta)
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(theta))


def _unperturbed(state: OnePassState, params: Params) -> Params:
    if jnp.ndim(state.count):  # of an ensemble, whose scalars have its axis too
        return jax.vmap(_unperturbed)(state, params)
    return subtract(params, held_perturbation(state, params))


def _is_one_pass(x: Any) -> bool:
    return isinstance(x, OnePassState)

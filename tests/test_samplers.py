"Each sampler equals diffusers' scheduler of the same name, and is exact on Gaussian data."

import math
import pytest, torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from vader_nb.core import VaderError, make_generator, randn
from vader_nb.diffusion.schedules import a_from_sigma, eps_from_x0, mixture_x0, prediction_target, sigma_from_a
from vader_nb.diffusion.samplers import (
    Step,
    DDIM,
    DPMpp,
    Euler,
    RFlow,
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    euler_step,
    gradient_factor,
    log_prob,
    sampler_from_config,
    spaced_timesteps,
)

close = torch.testing.assert_close
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')
SVD = dict(
    SD,
    use_karras_sigmas=True,
    sigma_min=0.002,
    sigma_max=700.0,
    timestep_spacing='leading',
    timestep_type='continuous',
    prediction_type='v_prediction',
    steps_offset=1,
)
shape = (2, 4, 3, 4, 4)


def network(x, t):
    "Any fixed nonlinear function of the input and the timestep will do."
    return torch.tanh(x.roll(1, -1) * 0.7 + 0.3 * x) + 0.1 * math.cos(float(t))


def ours(sampler, net=network, seed=0):
    "A whole trajectory of our sampler, all states."
    g = make_generator(seed)
    x, step, states = randn(shape, g) * sampler.init_sigma, None, []
    for i, t in enumerate(sampler.timesteps):
        pred = net(sampler.scale_input(x, i), t)
        step = sampler.step(i, x, pred, randn(shape, g) if sampler.stochastic else None, step)
        x = step.x
        states.append(x)
    return states


def theirs(scheduler, steps, seed=0, **kw):
    "The same with a diffusers scheduler and the same noise."
    scheduler.set_timesteps(steps)
    g = make_generator(seed)
    x, states = (
        randn(shape, g) * scheduler.init_noise_sigma if hasattr(scheduler, 'init_noise_sigma') else randn(shape, g),
        [],
    )
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, 'scale_model_input') else x
        x = scheduler.step(network(scaled, t), t, x, generator=g, **kw).prev_sample
        states.append(x)
    return states


def same(scheduler, kind, steps, eta=0.0):
    sampler = sampler_from_config(scheduler.config, kind, steps, eta)
    b = theirs(scheduler, steps, **(dict(eta=eta) if kind == 'ddim' else {}))
    close(sampler.timesteps.double(), scheduler.timesteps.double(), rtol=1e-6, atol=1e-5)
    for i, (u, w) in enumerate(zip(ours(sampler), b, strict=True)):
        assert (u - w).abs().max() <= 1e-5 * w.abs().max(), f'step {i}: {(u - w).abs().max() / w.abs().max():.1e}'


spacings = pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
predictions = pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])


@spacings
@predictions
@pytest.mark.parametrize('to_one', [True, False])
@pytest.mark.parametrize('eta', [0.0, 0.4, 1.0])
@pytest.mark.parametrize('steps,offset', [(25, 0), (25, 1), (7, 1), (1, 0)])
def test_ddim(spacing, prediction, to_one, eta, steps, offset):
    s = DDIMScheduler(
        **SD,
        timestep_spacing=spacing,
        prediction_type=prediction,
        set_alpha_to_one=to_one,
        steps_offset=offset,
        clip_sample=False,
    )
    same(s, 'ddim', steps, eta)


@spacings
@predictions
@pytest.mark.parametrize('steps,offset', [(25, 0), (25, 1), (7, 1), (1, 0)])
def test_ddpm(spacing, prediction, steps, offset):
    same(
        DDPMScheduler(
            **SD, timestep_spacing=spacing, prediction_type=prediction, steps_offset=offset, clip_sample=False
        ),
        'ddpm',
        steps,
    )


@pytest.mark.parametrize('kind,scheduler', [('ddim', DDIMScheduler), ('ddpm', DDPMScheduler)])
def test_all_training_steps(kind, scheduler):
    """Over 1,000 steps the rounding of diffusers' own float32 table shows (1 - a/a_prev loses four digits), so we hand
    it the table in float64.
    """
    s = scheduler(**SD, clip_sample=False)
    s.alphas_cumprod = s.alphas_cumprod.double()
    same(s, kind, 1000)


@spacings
@predictions
@pytest.mark.parametrize('end', ['zero', 'sigma_min'])
@pytest.mark.parametrize('steps,offset', [(25, 0), (25, 1), (14, 0), (2, 1), (1, 0)])
def test_dpmpp(spacing, prediction, end, steps, offset):
    same(
        DPMSolverMultistepScheduler(
            **SD, timestep_spacing=spacing, prediction_type=prediction, final_sigmas_type=end, steps_offset=offset
        ),
        'dpm++',
        steps,
    )


@pytest.mark.parametrize('kw', [dict(euler_at_final=True), dict(lower_order_final=False)])
def test_dpmpp_last_step(kw):
    same(
        DPMSolverMultistepScheduler(**SD, final_sigmas_type='sigma_min', **kw),
        'dpm++',
        20 if 'euler_at_final' in kw else 10,
    )


@spacings
@predictions
@pytest.mark.parametrize('end', ['zero', 'sigma_min'])
@pytest.mark.parametrize('karras', [True, False])
@pytest.mark.parametrize('steps,offset', [(25, 0), (25, 1), (3, 0)])
def test_euler(spacing, prediction, end, karras, steps, offset):
    same(
        EulerDiscreteScheduler(
            **SD,
            timestep_spacing=spacing,
            prediction_type=prediction,
            final_sigmas_type=end,
            use_karras_sigmas=karras,
            steps_offset=offset,
        ),
        'euler',
        steps,
    )


@pytest.mark.parametrize('steps', [25, 10])
def test_euler_svd(steps):
    s = EulerDiscreteScheduler(**SVD)
    same(s, 'euler', steps)
    s.set_timesteps(steps)
    assert math.isclose(
        sampler_from_config(s.config, 'euler', steps).init_sigma, float(s.init_noise_sigma), rel_tol=1e-6
    )


@spacings
@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('steps', [25, 3])
def test_euler_with_eta_one_is_ancestral(spacing, prediction, steps):
    config = dict(**SD, timestep_spacing=spacing, prediction_type=prediction)
    same(EulerAncestralDiscreteScheduler(**config), 'euler', steps, eta=1.0)


@pytest.mark.parametrize('shift', [1.0, 3.0])
@pytest.mark.parametrize('steps', [30, 4, 1])
def test_rflow(shift, steps):
    same(FlowMatchEulerDiscreteScheduler(shift=shift), 'rflow', steps)


@pytest.mark.parametrize('steps', range(1, 51))
@spacings
def test_timesteps(steps, spacing):
    assert len(spaced_timesteps(steps, spacing)) == steps and spaced_timesteps(steps, spacing).min() >= 0
    for cls, kind in (
        (DDIMScheduler, 'ddim'),
        (DDPMScheduler, 'ddpm'),
        (DPMSolverMultistepScheduler, 'dpm++'),
        (EulerDiscreteScheduler, 'euler'),
    ):
        s = cls(timestep_spacing=spacing)
        s.set_timesteps(steps)
        if len(s.timesteps) != steps:
            continue  # a rounding slip of numpy.arange in diffusers
        close(sampler_from_config(s.config, kind, steps).timesteps.double(), s.timesteps.double())


def test_trained_betas_and_size():
    s = DDIMScheduler(trained_betas=[0.01, 0.02, 0.05, 0.1] * 5, num_train_timesteps=20, clip_sample=False)
    same(s, 'ddim', 5)
    same(s, 'ddim', 20)


def test_defaults_are_not_carried_over():
    """diffusers' from_config forgets values that were never set, so DDIM's leading spacing becomes DPM-Solver's
    linspace; the published t=40 comes from there.
    """
    config = DDIMScheduler(**SD, steps_offset=1).config
    theirs = DPMSolverMultistepScheduler.from_config(config)
    theirs.set_timesteps(25)
    sampler = sampler_from_config(config, 'dpm++', 25)
    close(sampler.timesteps, theirs.timesteps)
    assert sampler.timesteps[-1] == 40


# ---- exactness on Gaussian data

MEAN, STD = torch.tensor([[1.0, -0.5]]), 0.4


def perfect(sampler, x, i):
    "The optimal prediction for Gaussian data N(MEAN, STD^2), in the sampler's own words."
    if isinstance(sampler, RFlow):  # the line's point, scaled to the circle
        s = sampler.sigmas[i]
        norm = (s**2 + (1 - s) ** 2) ** 0.5
        a = ((1 - s) / norm) ** 2
        x0 = mixture_x0(x / norm, a, MEAN.to(x), STD)
        return (x - x0) / s
    a = a_from_sigma(sampler.sigmas[i]) if isinstance(sampler, Euler) else sampler.a[i]
    x = sampler.scale_input(x, i)
    x0 = mixture_x0(x, a, MEAN.to(x), STD)
    return prediction_target(x0, eps_from_x0(x, x0, a), a, sampler.prediction)


def run(sampler, x, noise=None):
    step = None
    for i in range(len(sampler)):
        step = sampler.step(
            i, x, perfect(sampler, x, i), None if noise is None else randn(x.shape, noise, dtype=x.dtype), step
        )
        x = step.x
    return x


def exact_map(sampler, x):
    "The probability-flow ODE of Gaussian data keeps (x - its mean) / (its standard deviation) fixed."
    if isinstance(sampler, Euler):
        a, b = (a_from_sigma(s) for s in (sampler.sigmas[0], sampler.sigmas[-1]))
        x = x * a**0.5
    elif isinstance(sampler, RFlow):
        return MEAN + STD * x  # from sigma = 1, pure noise, to 0, data
    else:
        a, b = sampler.a[0], sampler.a_prev[-1] if isinstance(sampler, DDIM) else sampler.a[-1]
    z = (x - a**0.5 * MEAN) / (a * STD**2 + 1 - a) ** 0.5
    x = b**0.5 * MEAN + (b * STD**2 + 1 - b) ** 0.5 * z
    return x / b**0.5 if isinstance(sampler, Euler) else x


def on_path(kind, steps):
    "Each solver on the same road, even steps in log sigma; rectified flow on its own line."
    t, sigmas = torch.zeros(steps), torch.logspace(1, -2, steps + 1, dtype=torch.float64).tolist()
    a = [a_from_sigma(s) for s in sigmas]
    if kind == 'ddim':
        return DDIM(t, a[:-1], a[1:])
    if kind == 'dpm++':
        return DPMpp(t, a, first_order_end=False)
    return (
        Euler(t, sigmas, init_sigma=sigmas[0])
        if kind == 'euler'
        else RFlow(t, torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist())
    )


@pytest.mark.parametrize('kind,order', [('ddim', 1), ('dpm++', 2), ('euler', 1), ('rflow', 1)])
def test_ode_converges_with_its_order(kind, order):
    errors = []
    for steps in (40, 80, 160):
        sampler = on_path(kind, steps)
        x = randn((64, 2), make_generator(0), dtype=torch.float64) * sampler.init_sigma
        errors.append((run(sampler, x) - exact_map(sampler, x)).abs().max().item())
    assert errors[-1] < (0.03 if order == 1 else 1e-3)
    measured = math.log2(errors[0] / errors[2]) / 2
    assert abs(measured - order) < 0.2, (errors, measured)


@pytest.mark.parametrize('kind,eta', [('ddpm', 0.0), ('ddim', 1.0), ('ddim', 0.5), ('ddim', 0.0)])
@pytest.mark.parametrize('steps', [10, 200])
def test_distribution_follows_the_chain(kind, eta, steps):
    """Each step is affine in x on Gaussian data, so mean and variance of the samples follow a recursion; with many
    steps they reach the data's.
    """
    sampler = sampler_from_config(dict(SD, timestep_spacing='trailing'), kind, steps, eta)
    x = run(sampler, randn((40000, 2), make_generator(0), dtype=torch.float64), make_generator(1))
    mean, var = torch.zeros(1, 2, dtype=torch.float64), 1.0
    for i in range(steps):
        at = lambda v: sampler.step(i, v, perfect(sampler, v, i), torch.zeros_like(v))
        zero, one = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
        slope = (at(one).mean - at(zero).mean)[0, 0].item()
        mean, var = at(mean).mean, slope**2 * var + at(zero).sigma ** 2
    close(x.mean(0), mean[0], atol=0.015, rtol=0.0)
    close(x.var(0), torch.full((2,), var, dtype=torch.float64), rtol=0.03, atol=0.0)
    if steps == 200:
        close(mean, MEAN.double(), atol=0.03, rtol=0.0)
        assert abs(var**0.5 - STD) < 0.03


def test_ddim_with_eta_one_is_ddpm():
    x, e = randn(shape, make_generator(0)), randn(shape, make_generator(1))
    x0 = (x - 0.5**0.5 * e) / 0.5**0.5
    u, w = ddim_step(x0, e, 0.5, 0.8, 1.0, torch.ones(shape)), ddpm_step(x, x0, e, 0.5, 0.8, torch.ones(shape))
    close(u.x, w.x)
    close(u.mean, w.mean)
    assert math.isclose(u.sigma, w.sigma)


def test_ddim_is_euler_and_first_order_dpmpp():
    x, e = randn(shape, make_generator(0)), randn(shape, make_generator(1))
    a, b = 0.3, 0.6
    x0 = (x - (1 - a) ** 0.5 * e) / a**0.5
    close(ddim_step(x0, e, a, b).x, dpmpp_2m_step(x, x0, a, b).x)
    close(ddim_step(x0, e, a, b).x, euler_step(x / a**0.5, x0, sigma_from_a(a), sigma_from_a(b)).x * b**0.5)


# ---- log-probabilities


def test_log_prob_is_the_normal_density():
    x, mean = randn(shape, make_generator(0)), randn(shape, make_generator(1))
    for sigma in (0.01, 0.3, 2.0):
        want = torch.distributions.Normal(mean.double(), sigma).log_prob(x.double()).flatten(1).sum(1)
        close(log_prob(x, mean, sigma), want)


@pytest.mark.parametrize('kind,eta', [('ddpm', 0.0), ('ddim', 1.0), ('ddim', 0.3), ('euler', 1.0)])
def test_log_prob_of_each_step(kind, eta):
    sampler, g = sampler_from_config(dict(SD, set_alpha_to_one=False, steps_offset=1), kind, 10, eta), make_generator(0)
    for i in range(10 - (kind != 'ddim')):
        x, pred, z = (randn(shape, g) for _ in range(3))
        s = sampler.step(i, x, pred, z)
        want = (-0.5 * z.double() ** 2 - math.log(s.sigma * math.sqrt(2 * math.pi))).flatten(1).sum(1)
        close(log_prob(s.x, s.mean, s.sigma), want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize('kind', ['ddpm', 'ddim', 'dpm++', 'euler', 'rflow'])
@predictions
def test_a_perfect_answer_to_the_training_pair_is_the_clean_sample(kind, prediction):
    "The step that gets the target as its prediction estimates the clean data, at each sample's own noise level."
    config = SD if kind == 'rflow' else dict(SD, prediction_type=prediction)
    sampler, g = sampler_from_config(config, kind, 10), make_generator(0)
    x0, eps = (randn((3, *shape[1:]), g, dtype=torch.float64) for _ in range(2))
    level = torch.tensor([0, 4, 9])
    seen, target = sampler.training_pair(level, x0, eps)
    for k, i in enumerate(level.tolist()):
        scale = sampler.a[i] ** 0.5 if kind == 'euler' else 1.0
        x = seen[k : k + 1] / scale
        close(sampler.scale_input(x, i), seen[k : k + 1])
        before = Step(x, x0[k : k + 1], x, 0.0)
        step = sampler.step(i, x, target[k : k + 1], torch.zeros_like(x), before)
        close(step.x0, x0[k : k + 1], atol=1e-4, rtol=1e-4)


def test_log_prob_gradient():
    "The policy gradient's core: d log p / d mean = (x - mean) / sigma^2, for each sample alone."
    x, mean = randn(shape, make_generator(0)), randn(shape, make_generator(1)).requires_grad_()
    log_prob(x, mean, 0.5)[0].backward()
    close(mean.grad[0], ((x - mean) / 0.25)[0].detach())
    assert mean.grad[1].abs().max() == 0


@pytest.mark.parametrize('sigma', [0.0, float('inf'), float('nan'), -1.0])
def test_log_prob_refuses(sigma):
    with pytest.raises(VaderError, match='log-probability'):
        log_prob(torch.zeros(shape), torch.zeros(shape), sigma)


def test_log_prob_refuses_the_step_that_ends_at_clean_data():
    sampler = sampler_from_config(dict(SD, set_alpha_to_one=True), 'ddim', 10, 1.0)
    s = sampler.step(9, torch.zeros(shape), torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(VaderError, match='clean data'):
        log_prob(s.x, s.mean, s.sigma)


# ---- gradient factors


@pytest.mark.parametrize(
    'kw,kind,steps,low,high',
    [
        (dict(steps_offset=1, set_alpha_to_one=False), 'ddim', 25, 0.0115, 0.0125),
        (dict(steps_offset=1, set_alpha_to_one=True), 'ddim', 25, 0.0410, 0.0415),
        (dict(steps_offset=0, set_alpha_to_one=False, timestep_spacing='leading'), 'ddim', 25, 0.0, 0.0),
        (dict(), 'dpm++', 25, 0.19, 0.205),
        (dict(final_sigmas_type='sigma_min', euler_at_final=True), 'dpm++', 25, 0.165, 0.175),
        (SVD, 'euler', 25, 0.0019, 0.0021),
    ],
)
def test_known_gradient_factors(kw, kind, steps, low, high):
    assert low <= gradient_factor(sampler_from_config({**SD, **kw}, kind, steps), steps - 1) <= high


@pytest.mark.parametrize('kind,kw', [('ddpm', {}), ('ddim', {}), ('dpm++', {}), ('euler', SVD), ('rflow', {})])
@predictions
def test_gradient_factor_is_autograds(kind, kw, prediction):
    if kind == 'rflow' and prediction != 'epsilon':
        pytest.skip('one prediction only')
    config = {**SD, **kw} if kind in ('euler', 'rflow') else {**SD, **kw, 'prediction_type': prediction}
    sampler, prev = sampler_from_config(config, kind, 20), None
    for i in range(20):
        x, pred, z = (randn((1, 3), make_generator(i + k), dtype=torch.float64) for k in range(3))
        jac = torch.autograd.functional.jacobian(lambda p: sampler.step(i, x, p, z, prev).x, pred).view(3, 3)
        close(jac.abs(), gradient_factor(sampler, i) * torch.eye(3, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        prev = sampler.step(i, x, pred, z, prev)


# ---- bad input


def test_bad_input():
    x = torch.zeros(shape)
    ok = sampler_from_config(SD, 'ddim', 10)
    noisy = sampler_from_config(SD, 'ddim', 10, 1.0)
    for call, match in [
        (lambda: sampler_from_config(SD, 'plms', 10), 'unknown sampler'),
        (lambda: sampler_from_config(DDIMScheduler(**SD).config, 'rflow', 10), 'networks that predict a flow'),
        (lambda: sampler_from_config(SD, 'ddim', 0), 'steps'),
        (lambda: sampler_from_config(SD, 'ddim', -3), 'steps'),
        (lambda: sampler_from_config(SD, 'ddim', 1001), 'steps'),
        (lambda: sampler_from_config(SD, 'ddim', 2.5), 'steps'),
        (lambda: sampler_from_config(dict(SD, steps_offset=1), 'ddim', 1000), 'fewer steps'),
        (lambda: sampler_from_config(SD, 'dpm++', 1000), 'fewer steps'),
        (lambda: sampler_from_config(SD, 'ddim', 10, -1.0), 'eta'),
        (lambda: sampler_from_config(SD, 'ddpm', 10, 1.0), 'eta'),
        (lambda: sampler_from_config(SD, 'ddim', 10, 2.0), 'eta'),
        (lambda: sampler_from_config(dict(SD, thresholding=True), 'ddim', 10), 'thresholding'),
        (lambda: sampler_from_config(dict(beta_schedule='squaredcos_cap_v2'), 'ddim', 10), 'beta schedule'),
        (lambda: sampler_from_config(dict(SD, timestep_spacing='log'), 'ddim', 10), 'spacing'),
        (lambda: sampler_from_config(dict(SD, solver_order=3), 'dpm++', 10), 'solver_order'),
        (lambda: sampler_from_config(dict(SD, use_karras_sigmas=True), 'dpm++', 10), 'Karras'),
        (lambda: ok.step(10, x, x), 'does not exist'),
        (lambda: ok.step(-1, x, x), 'does not exist'),
        (lambda: ok.step(0, x, x[:, :2]), 'prediction has shape'),
        (lambda: noisy.step(0, x, x), 'noise'),
        (lambda: noisy.step(0, x, x, x[:1]), 'noise has shape'),
        (lambda: sampler_from_config(SD, 'dpm++', 10).step(3, x, x), 'prev'),
        (lambda: ddim_step(x, x, 0.5, 0.8, 3.0, x), 'eta'),
    ]:
        with pytest.raises(VaderError, match=match) as e:
            call()
        assert '\n' not in str(e.value)


def test_half_precision_stays():
    for kind in ('ddpm', 'ddim', 'dpm++', 'euler', 'rflow'):
        s = sampler_from_config(SD, kind, 5)
        x = torch.zeros(shape, dtype=torch.bfloat16)
        assert s.step(0, x, x, x).x.dtype == torch.bfloat16 and s.scale_input(x, 0).dtype == torch.bfloat16

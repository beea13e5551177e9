"Equations 1 and 2 against diffusers, algebra and Monte Carlo."

import pytest, torch
from diffusers import DDIMScheduler
from vader_nb.core import VaderError, make_generator, randn
from vader_nb.diffusion.schedules import (
    a_from_sigma,
    add_noise,
    alpha_bars,
    denoising_loss,
    eps_from_v,
    eps_from_x0,
    flow_mix,
    flow_target,
    linear_betas,
    mixture_x0,
    per_sample,
    prediction_target,
    scaled_linear_betas,
    sigma_from_a,
    to_x0_eps,
    v_target,
    x0_from_eps,
    x0_from_flow,
    x0_from_v,
)

close = torch.testing.assert_close
ab = alpha_bars(scaled_linear_betas())
x0, eps = randn((3, 4, 2, 5, 5), make_generator(0)), randn((3, 4, 2, 5, 5), make_generator(1))
t = torch.tensor([0, 400, 999])
a = per_sample(ab, t, x0)


@pytest.mark.parametrize(
    'name,betas', [('linear', linear_betas(0.0001, 0.02)), ('scaled_linear', scaled_linear_betas())]
)
def test_tables_equal_diffusers(name, betas):
    ends = dict(beta_start=0.0001, beta_end=0.02) if name == 'linear' else dict(beta_start=0.00085, beta_end=0.012)
    s = DDIMScheduler(beta_schedule=name, **ends)
    close(betas, s.betas)
    close(alpha_bars(betas), s.alphas_cumprod)


def test_noising_and_velocity_equal_diffusers():
    s = DDIMScheduler(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012)
    close(add_noise(x0, eps, a), s.add_noise(x0, eps, t))
    close(v_target(x0, eps, a), s.get_velocity(x0, eps, t))


def test_conversions_invert():
    x = add_noise(x0.double(), eps.double(), a.double())
    v = v_target(x0.double(), eps.double(), a.double())
    close(x0_from_eps(x, eps, a.double()), x0.double())
    close(eps_from_x0(x, x0, a.double()), eps.double())
    close(x0_from_v(x, v, a.double()), x0.double())
    close(eps_from_v(x, v, a.double()), eps.double())
    for p in ('epsilon', 'v_prediction', 'sample'):
        b, e = to_x0_eps(x, prediction_target(x0.double(), eps.double(), a.double(), p), a.double(), p)
        close(b, x0.double())
        close(e, eps.double())


def test_other_roads():
    close(a_from_sigma(sigma_from_a(ab.double())), ab.double())
    assert sigma_from_a(1.0) == 0 and a_from_sigma(0.0) == 1
    s = torch.tensor([0.0, 0.3, 1.0]).view(-1, 1, 1, 1, 1)
    close(x0_from_flow(flow_mix(x0, eps, s), flow_target(x0, eps), s), x0)


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
def test_loss(prediction):
    target = prediction_target(x0, eps, a, prediction)
    assert denoising_loss(lambda x: target, x0, a, eps, prediction) == 0
    close(denoising_loss(lambda x: target + 0.5, x0, a, eps, prediction), torch.tensor(0.25))
    assert denoising_loss(lambda x: target.half(), x0, a, eps, prediction).dtype == torch.float32


def test_wrong_word():
    with pytest.raises(VaderError, match='prediction'):
        to_x0_eps(x0, x0, 0.5, 'eps')
    with pytest.raises(VaderError, match='prediction'):
        prediction_target(x0, x0, 0.5, 'velocity')


def test_perfect_denoiser_of_one_gaussian():
    "The posterior mean of a Gaussian, from the textbook's formula for jointly normal variables."
    m, s, b = torch.tensor([[0.7, -0.2]]), 0.3, 0.4
    x = randn((50, 2), make_generator(0))
    gain = b**0.5 * s**2 / (b * s**2 + 1 - b)
    close(mixture_x0(x, b, m, s), m + gain * (x - b**0.5 * m))


def test_perfect_denoiser_beats_its_neighbours():
    "The conditional mean minimises the squared error: no shift and no scaling of it does better on a large sample."
    centers, g = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), make_generator(0)
    data = centers[torch.randint(2, (20000,), generator=g)] + 0.2 * randn((20000, 2), g)
    x = add_noise(data, randn(data.shape, g), 0.5)
    best = mixture_x0(x, 0.5, centers, 0.2)
    error = lambda guess: (guess - data).square().mean()
    assert all(error(best) < error(other) for other in (best + 0.05, best - 0.05, best * 1.05, best * 0.95))

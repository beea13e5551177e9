"VideoCrafter and its UNet: equal to the original code, on the reference arrays of tests/data."

import gzip, json, zlib
from functools import cache
from pathlib import Path
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from open_clip.transformer import TextTransformer
from vader_nb.core import VaderError, make_generator
from vader_nb.memory.lora import add_lora, load_lora, save_lora
from vader_nb.memory.checkpointing import checkpoint_activations
from vader_nb.models import videocrafter
from vader_nb.models.videocrafter import (
    SCHEDULE,
    UNUSED,
    VideoCrafter,
    add_scaled_noise,
    full_parts,
    layout,
    load_videocrafter,
    open_small,
    open_videocrafter,
    scale_table,
    scaled_ddim,
)
from vader_nb.nets.lvdm import LVDM, TemporalTransformer, from_unet3d, sinusoid
from vader_nb.pretrain.videocrafter import change_speed, lvdm_loss, make_lvdm, publish
from vader_nb.diffusion.rollout import differentiable_latents, rollout, sample
from vader_nb.diffusion.samplers import gradient_factor, sampler_from_config, schedule

here = Path(__file__).parent / 'data'
NAMES = json.loads(gzip.decompress((here / 'videocrafter2_names.json.gz').read_bytes()))
REF = {k: torch.from_numpy(v) for k, v in np.load(here / 'videocrafter2.npz').items()}
THIN = 8  # of the larger reference arrays only every eighth number is kept


def weight(name, shape):
    "The weight that the reference model has under this name."
    z = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return torch.from_numpy(z * np.float32(np.prod(shape[1:]) ** -0.5))
    return torch.from_numpy((1 if name.endswith('weight') else 0) + np.float32(0.1) * z)


def small_parts():
    "The three networks of the reference, with weights of their own."
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=['DownEncoderBlock2D'] * 3,
        up_block_types=['UpDecoderBlock2D'] * 3,
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.18215,
    )
    text = TextTransformer(width=24, heads=3, layers=3, output_dim=16)
    return LVDM(32, (1, 2, 2), blocks=1, attend=2, head_width=16, context=24), vae, text


@cache
def small_state():
    "What the reference's `model.ckpt` holds."
    return {k: weight(k, s) if k not in UNUSED else torch.zeros(s) for k, s in NAMES['small'].items()}


def same(ours, reference, tolerance=1e-4):
    "Equal to `tolerance` of the largest value; a reference may be every eighth number of the whole."
    ours = ours.detach()
    if ours.numel() != reference.numel():
        ours = ours.flatten()[::THIN]
    assert ours.numel() == reference.numel()
    assert (ours.flatten() - reference.flatten()).abs().max() <= tolerance * reference.abs().max()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp('videocrafter') / 'model.ckpt'
    torch.save(dict(state_dict=small_state(), epoch=3), file)
    return file


@pytest.fixture(scope='module')
def model(checkpoint):
    return open_videocrafter(checkpoint, *small_parts(), native_size=(5, 32, 32))


def test_names_and_shapes_of_the_published_checkpoint():
    parts = full_parts()
    have = {k: list(shape) for k, (_, _, shape) in layout(*parts).items()}
    assert have == {k: s for k, s in NAMES['full'].items() if k not in UNUSED}
    assert set(UNUSED) <= NAMES['full'].keys() and len(NAMES['full']) == 2039
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [1413284420, 83653863, 354032640]


def test_full_size_tower_can_run_after_loading():
    tower = full_parts()[2]
    assert not tower.attn_mask.is_meta and torch.equal(
        tower.attn_mask, TextTransformer(width=24, heads=3, layers=1).attn_mask
    )


def test_lora_goes_where_the_authors_put_it():
    with torch.device('meta'):
        unet = LVDM()
    ours = {
        f'base_model.model.model.diffusion_model.{n}.lora_{ab}.weight': [16, m.in_features]
        if ab == 'A'
        else [m.out_features, 16]
        for n, m in unet.named_modules()
        if n.endswith(tuple(VideoCrafter.lora_targets))
        for ab in 'AB'
    }
    assert ours == NAMES['lora'] and len(ours) == 2 * 198


def test_every_layer_equals_the_original(model):
    net, seen = model.denoiser, {}
    first, down = net.input_blocks[1], net.input_blocks[2]
    watched = {
        'time_embed': net.time_embed,
        'fps_embedding': net.fps_embedding,
        'input_blocks_0': net.input_blocks[0],
        'init_attn': net.init_attn,
        'input_blocks_1_0_resblock': first[0],
        'input_blocks_1_1_spatial': first[1],
        'input_blocks_1_2_temporal': first[2],
        'input_blocks_2_down': down,
        'middle_block': net.middle_block,
        'output_blocks_0': net.output_blocks[0],
    }
    hooks = [m.register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(n, o)) for n, m in watched.items()]
    hooks += [
        first[0].temopral_conv.register_forward_hook(lambda m, i, o: seen.update(tempconv_in=i[0], tempconv_out=o))
    ]
    net(*[REF[f'unet_{k}'] for k in ('x', 't', 'context', 'fps')])
    for h in hooks:
        h.remove()
    for name in ('input_blocks_1_2_temporal', 'tempconv_in', 'tempconv_out'):
        seen[name] = seen[name].transpose(1, 2)
    for name, ours in seen.items():
        same(ours.contiguous(), REF['unet_' + ('' if 'tempconv' in name else 'act_') + name])


def test_the_whole_network_and_its_gradient_equal_the_original(model):
    x = REF['unet_x'].clone().requires_grad_()
    t, context, fps = [REF[f'unet_{k}'] for k in ('t', 'context', 'fps')]
    out = model.denoiser(x, t, context, fps)
    loss = out.square().mean()
    same(out, REF['unet_out'])
    same(loss, REF['unet_loss_meansq'])
    same(torch.autograd.grad(loss, x)[0], REF['unet_grad_x'])
    same(model.denoiser(x, t, context), REF['unet_out_fps16'])
    same(sinusoid(t, 32), REF['unet_temb_17_901_dim32'])


def test_the_vae_equals_the_original(model):
    vae, scale = model.vae, REF['vae_scale_factor']
    dist = vae.encode(REF['vae_img']).latent_dist
    same(dist.parameters, REF['vae_moments'])
    same(dist.mean, REF['vae_mean'])
    same(dist.logvar, REF['vae_logvar'])
    same(scale * (dist.mean + dist.std * REF['vae_sample_noise']), REF['vae_z_scaled'])
    same(vae.decode(dist.mean).sample, REF['vae_decoded_mode'])
    assert vae.config.scaling_factor == pytest.approx(scale.item())
    video = model.decode(REF['vae_latent_video'])
    same((2 * video - 1).transpose(1, 2).contiguous(), REF['vae_decoded_video'])


def test_the_text_tower_equals_the_original(model):
    assert torch.equal(model.read.tokens(NAMES['prompts']), REF['text_tokens'].long())
    with torch.no_grad():
        same(model.read(NAMES['prompts']), REF['text_penultimate'])


def test_the_schedule_equals_the_original():
    same(schedule(SCHEDULE)[::THIN], REF['schedule_alphas_cumprod'])
    same(scale_table()[::THIN], REF['schedule_scale_arr'])
    for steps in (4, 5, 10, 20, 25, 30, 50):
        assert scaled_ddim(steps).timesteps.flip(0).tolist() == REF[f'schedule_ddim_timesteps_S{steps}'].tolist()
    same(add_scaled_noise(REF['qsample_x0'], REF['qsample_noise'], REF['qsample_t']), REF['qsample_out'])
    s = scaled_ddim(5)
    for ours, name in [
        (s.a, 'alphas'),
        (s.a_prev, 'alphas_prev'),
        (s.scale, 'scale_arr'),
        (s.scale_prev, 'scale_arr_prev'),
    ]:
        same(torch.tensor(ours[::-1]), REF[f'ddim_ddim_{name}'])


def test_every_number_of_steps_samples_or_says_why_not():
    bad = []
    for steps in range(2, 501):
        try:
            assert scaled_ddim(steps).timesteps.max() < 1000
        except VaderError as e:
            bad.append(steps)
            assert 'use a number that divides 1000' in str(e)
    assert bad == [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334)]


@pytest.mark.parametrize('eta', [0, 1])
def test_a_sampling_run_equals_the_original(model, monkeypatch, eta):
    cond = model.encode(['a'], 5, 32, 32)
    cond = type(cond)(REF['ddim_cond'], REF['ddim_uncond'], dict(fps=REF['ddim_fps']))
    noises = iter(REF['ddim_noises'])
    monkeypatch.setattr('vader_nb.diffusion.rollout.randn', lambda *a: next(noises))
    with torch.no_grad():
        states = list(rollout(model, cond, REF['ddim_x_T'], model.sampler(5, eta=eta), REF['ddim_guidance'].item()))
    assert [s.t.item() for s in states] == REF[f'ddim_eta{eta}_model_timesteps'].tolist()
    same(torch.stack([states[0].x_t, *[s.step.x for s in states]]), REF[f'ddim_eta{eta}_x_inter'])
    same(torch.stack([s.step.x0 for s in states]), REF[f'ddim_eta{eta}_pred_x0'])
    same(states[-1].step.x, REF[f'ddim_eta{eta}_out'])
    same(torch.tensor([s.step.sigma for s in states]).flip(0), REF[f'ddim_eta{eta}_sigmas'], 1e-4 if eta else 0)
    for s, cond_ref, uncond_ref in zip(states, REF[f'ddim_eta{eta}_e_cond'], REF[f'ddim_eta{eta}_e_uncond']):
        same(s.pred, uncond_ref + 3 * (cond_ref - uncond_ref))


def test_a_perfect_denoiser_is_led_back_to_the_clip():
    abar, scale, x0 = schedule(SCHEDULE).double(), scale_table().double(), randn_(7)
    sampler, x = scaled_ddim(20), randn_(8)
    for i, t in enumerate(sampler.timesteps):
        step = sampler.step(i, x, (x - abar[t] ** 0.5 * scale[t] * x0) / (1 - abar[t]) ** 0.5)
        assert torch.allclose(step.x0, x0, atol=1e-5)
        x = step.x
    eps = (x - abar[0] ** 0.5 * x0) / (1 - abar[0]) ** 0.5
    assert eps.std() < 3  # what is left is the noise of alpha-bar 0, and no shrunken clip


def randn_(seed):
    return torch.randn(1, 4, 3, 8, 8, generator=make_generator(seed), dtype=torch.float64)


def test_without_rescaling_it_is_diffusers_ddim():
    plain, ours = sampler_from_config(SCHEDULE, 'ddim', 25), scaled_ddim(25, scale=torch.ones(1000))
    assert torch.equal(plain.timesteps, ours.timesteps)
    x, eps = randn_(0), randn_(1)
    for i in (0, 12, 24):
        assert torch.allclose(plain.step(i, x, eps).x, ours.step(i, x, eps).x, atol=1e-6)


def test_gradient_factor_is_the_slope_of_the_last_step():
    sampler, h = scaled_ddim(25), 1e-3
    x, eps = randn_(0), randn_(1)
    slope = (sampler.step(24, x, eps + h).x - sampler.step(24, x, eps - h).x) / (2 * h)
    assert torch.allclose(
        slope.abs().mean(), torch.tensor(gradient_factor(sampler, 24), dtype=torch.float64), rtol=1e-6
    )


def modelscope_like(**sizes):
    "A random ModelScope UNet and an LVDM of the same sizes."
    torch.manual_seed(0)
    theirs = UNet3DConditionModel(
        block_out_channels=(16, 32, 32),
        down_block_types=('CrossAttnDownBlock3D', 'CrossAttnDownBlock3D', 'DownBlock3D'),
        up_block_types=('UpBlock3D', 'CrossAttnUpBlock3D', 'CrossAttnUpBlock3D'),
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()
    for p in theirs.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return theirs, LVDM(
        **{**dict(channels=16, mults=(1, 2, 2), blocks=2, attend=2, head_width=8, context=24, groups=4), **sizes}
    ).eval()


def test_modelscopes_weights_give_modelscopes_output():
    theirs, ours = modelscope_like()
    from_unet3d(theirs.state_dict(), ours)
    x, t, text = (
        torch.randn(2, 4, 3, 8, 12, generator=make_generator(0)),
        torch.tensor([3, 800]),
        torch.randn(2, 7, 24, generator=make_generator(1)),
    )
    with torch.no_grad():
        same(ours(x, t, text), theirs(x, t, text).sample)


@pytest.mark.parametrize(
    'sizes', [dict(blocks=1), dict(attend=3), dict(channels=32), dict(context=32), dict(mults=(1, 2))]
)
def test_modelscopes_weights_fit_no_other_sizes(sizes):
    theirs, ours = modelscope_like(**sizes)
    with pytest.raises(VaderError):
        from_unet3d(theirs.state_dict(), ours)


def test_a_fresh_network_predicts_nothing_and_ignores_fps():
    torch.manual_seed(0)
    net = small_parts()[0].eval()
    x, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 7, 24)
    assert net(x, torch.tensor([5]), text).abs().max() == 0
    torch.nn.init.normal_(net.out[-1].weight)
    assert torch.equal(net(x, torch.tensor([5]), text, 8), net(x, torch.tensor([5]), text, 24))


def test_the_temporal_transformer_knows_no_order():
    torch.manual_seed(0)
    layer, x, order = TemporalTransformer(32, 4, 8).eval(), torch.randn(1, 5, 32, 4, 4), torch.tensor([4, 2, 0, 3, 1])
    torch.nn.init.normal_(layer.proj_out.weight)
    assert torch.allclose(layer(x[:, order], None, None), layer(x, None, None)[:, order], atol=1e-5)


def test_fps_reaches_the_network_under_guidance_too(model):
    x, cond = model.noise(2, generator=make_generator(0)), model.encode(['a panda', 'a fox'])
    assert cond.extra['fps'].tolist() == [24, 24]
    by_hand = [
        model.denoiser(x, torch.tensor([300, 300]), e, torch.tensor([24, 24])) for e in (cond.uncond, cond.embeds)
    ]
    same(model.predict(x, 300, cond, 5.0), by_hand[0] + 5 * (by_hand[1] - by_hand[0]))
    cond.extra['fps'] = torch.tensor([24, 4])
    a, b = model.predict(x, 300, model.encode(['a panda', 'a fox']), 5.0), model.predict(x, 300, cond, 5.0)
    assert (a[0] - b[0]).abs().max() < 1e-5 < (a[1] - b[1]).abs().max()


def test_gradient_and_lora(model, checkpoint, tmp_path):
    other = open_videocrafter(checkpoint, *small_parts(), native_size=(3, 32, 32))
    params = add_lora(other, rank=2)
    checkpoint_activations(other)
    cond, x = other.encode(['a panda']), other.noise(1, generator=make_generator(0))
    z = differentiable_latents(
        other, cond, x, other.sampler(2), guidance=3.0, K=2, where='x0', generator=make_generator(0)
    )
    grads = torch.autograd.grad(other.decode(z, [1]).mean(), params)
    assert all(g.isfinite().all() for g in grads) and sum(g.abs().sum() for g in grads) > 0
    with torch.no_grad():
        for p in params:
            p.add_(0.1)
        tuned = other.predict(x, 500, cond)
    save_lora(other, tmp_path / 'lora')
    again = open_videocrafter(checkpoint, *small_parts(), native_size=(3, 32, 32))
    load_lora(again, tmp_path / 'lora')
    with torch.no_grad():
        assert torch.allclose(again.predict(x, 500, cond), tuned, atol=1e-5)


def test_half_precision_inside_float32_outside(checkpoint):
    half = open_videocrafter(checkpoint, *small_parts(), dtype=torch.bfloat16, native_size=(2, 32, 32))
    x, cond = half.noise(1, generator=make_generator(0)), half.encode(['a panda'])
    assert half.dtype == cond.embeds.dtype == torch.bfloat16
    pred = half.predict(x, 500, cond, 3.0)
    assert pred.dtype == half.decode(pred).dtype == torch.float32 and pred.isfinite().all()


def test_all_parts_are_frozen(model):
    for net in (model.denoiser, model.vae, model.read):
        assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_loads_through_the_meta_device(checkpoint, model):
    with torch.device('meta'):
        unet, vae, _ = small_parts()
    other = open_videocrafter(checkpoint, unet, vae, small_parts()[2], native_size=(2, 32, 32))
    for a, b in ((other.denoiser, model.denoiser), (other.vae, model.vae)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize('size', [(5, 30, 32), (5, 40, 32), (5, 32, 24), (0, 32, 32)])
def test_sizes_that_the_network_cannot_take(model, size):
    with pytest.raises(VaderError) as e:
        model.encode(['a panda'], *size)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'call',
    [
        lambda m: m.sampler(25, 'dpm++'),
        lambda m: m.sampler(1),
        lambda m: m.sampler(501),
        lambda m: m.sampler(2.5),
        lambda m: m.sampler(25, eta=2.0),
        lambda m: m.encode(['a panda riding a bike ' * 20]),
        lambda m: m.encode(['']),
    ],
)
def test_requests_it_cannot_meet(model, call):
    with pytest.raises(VaderError) as e:
        call(model)
    assert '\n' not in str(e.value)


def test_no_frame_rate(checkpoint):
    other = open_videocrafter(checkpoint, *small_parts(), fps=0)
    with pytest.raises(VaderError):
        other.encode(['a panda'], 2, 32, 32)


def without(state, *keys):
    return {k: v for k, v in state.items() if k not in keys}


BROKEN = {
    'a missing weight': (
        lambda s: without(s, 'model.diffusion_model.out.2.bias'),
        ['1 missing', 'model.diffusion_model.out.2.bias', 'VideoCrafter'],
    ),
    'an extra weight': (
        lambda s: s | {'model.diffusion_model.framestride_embed.0.weight': torch.ones(1)},
        ['1 unknown', 'DynamiCrafter'],
    ),
    'another shape': (
        lambda s: s | {'model.diffusion_model.out.2.bias': torch.ones(8)},
        ['1 of another shape', '(8,)'],
    ),
    'Stable Diffusion': (lambda s: {k: v for k, v in s.items() if 'temopral' not in k}, ['missing', 'for pictures']),
    'ModelScope': (lambda s: {'transformer_in.norm.weight': torch.ones(4)}, ['missing', '1 unknown', 'ModelScope']),
    'nothing': (lambda s: {}, ['missing', 'no model that we know']),
}


@pytest.mark.parametrize('case', BROKEN)
def test_a_checkpoint_of_something_else(tmp_path, case):
    change, words = BROKEN[case]
    torch.save(dict(state_dict=change(small_state())), tmp_path / 'model.ckpt')
    with pytest.raises(VaderError) as e:
        open_videocrafter(tmp_path / 'model.ckpt', *small_parts())
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


class Code:
    pass


@pytest.mark.parametrize(
    'write',
    [
        lambda f: None,
        lambda f: f.write_bytes(b'not a checkpoint'),
        lambda f: torch.save([1], f),
        lambda f: torch.save(dict(model=1), f),
        lambda f: torch.save(dict(state_dict={'a': Code()}), f),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, write):
    write(tmp_path / 'model.ckpt')
    with pytest.raises(VaderError) as e:
        open_videocrafter(tmp_path / 'model.ckpt', *small_parts())
    assert '\n' not in str(e.value)


def test_a_pickle_that_was_cut_off(tmp_path, checkpoint):
    (tmp_path / 'model.ckpt').write_bytes(checkpoint.read_bytes()[:10_000])
    with pytest.raises(VaderError):
        open_videocrafter(tmp_path / 'model.ckpt', *small_parts())


def test_the_full_scale_reads_the_published_file(monkeypatch, checkpoint):
    monkeypatch.setattr(videocrafter, 'model_path', lambda name, scale: checkpoint.parent)
    monkeypatch.setattr(videocrafter, 'full_parts', small_parts)
    model = load_videocrafter('full', 'cpu')
    assert (model.native_size, model.fps, model.dtype) == ((16, 320, 512), 24, torch.float32)


def test_the_small_one_samples():
    model = load_videocrafter('small', 'cpu')
    video = sample(model, ['a panda riding a bike'], T=2)
    assert video.shape == (1, 8, 3, 64, 64) and video.std() > 0.02


def test_a_published_training_opens(tmp_path):
    torch.manual_seed(0)
    state = {k: torch.randn_like(v) for k, v in make_lvdm().state_dict().items()}
    publish(state, dict(steps=1), tmp_path)
    model = open_small(tmp_path)
    assert all(torch.equal(v, state[k].half().float()) for k, v in model.denoiser.state_dict().items())
    assert (model.native_size, model.fps, model.grain) == ((8, 64, 64), 8, 16) and (tmp_path / 'README.md').exists()


def test_clips_of_two_speeds():
    x0 = torch.arange(8.0).view(1, 1, 8, 1, 1)
    seen = {
        (tuple(x.flatten().int().tolist()), fps) for x, fps in (change_speed(x0, make_generator(i)) for i in range(60))
    }
    assert seen == {(tuple(range(8)), 8), ((0, 2, 4, 6), 4), ((2, 3, 4, 5), 8)}


def test_the_training_loss_is_zero_for_a_perfect_network():
    x0, abar, scale = (
        torch.randn(3, 4, 1, 4, 4, generator=make_generator(0)).expand(3, 4, 8, 4, 4),
        schedule(SCHEDULE),
        scale_table(),
    )

    def perfect(x, t, text, fps):
        a, s = (v[t].view(-1, 1, 1, 1, 1) for v in (abar, scale))
        return (x - a**0.5 * s * x0[:, :, : x.shape[2]]) / (1 - a) ** 0.5

    class Known:
        chunks = range(1)

        def __call__(self, g, available):
            return x0, None

    loss = [lvdm_loss(net, Known(), make_generator(1))[0].item() for net in (perfect, lambda *a: perfect(*a) + 0.1)]
    assert loss[0] < 1e-8 < loss[1]


def test_the_small_one_damaged(tmp_path, monkeypatch):
    found = videocrafter.model_path
    monkeypatch.setattr(
        videocrafter,
        'model_path',
        lambda name, scale='small': tmp_path if name == 'videocrafter' else found(name, scale),
    )
    with pytest.raises(VaderError) as e:
        load_videocrafter('small', 'cpu')
    assert '\n' not in str(e.value)

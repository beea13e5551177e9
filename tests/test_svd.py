"""The adapter of Stable Video Diffusion equals diffusers' pipeline; start images, guidance ramp, decoding in chunks;
loading at both scales.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from vader_nb.core import VaderError, make_generator
from vader_nb.memory.lora import add_lora
from vader_nb.models import svd
from vader_nb.models.svd import SVD, get_image, guidance_ramp, load_svd, open_image, open_svd
from vader_nb.world.captions import start_image
from vader_nb.rewards.base import reward_from
from vader_nb.diffusion.rollout import differentiable_latents, last, rollout, sample
from vader_nb.config import Config
from vader_nb.training.vader import vader_step
from vader_nb.world.scenes import ANIMALS

SCHEDULE = dict(
    beta_schedule='scaled_linear',
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type='v_prediction',
    timestep_spacing='leading',
    timestep_type='continuous',
    use_karras_sigmas=True,
    sigma_min=0.002,
    sigma_max=700.0,
    steps_offset=1,
)
CROSS, PLAIN, SIZE = 'CrossAttn{}BlockSpatioTemporal', '{}BlockSpatioTemporal', (4, 32, 40)
CAPTIONS = ['a labrador riding a bike', 'a maltese playing chess (3)']


def tiny_pipeline(seed=0):
    "A `StableVideoDiffusionPipeline` with random weights; its layers are those of the published one."
    torch.manual_seed(seed)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        num_attention_heads=2,
        num_frames=SIZE[0],
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        down_block_types=(CROSS.format('Down'), PLAIN.format('Down')),
        up_block_types=(PLAIN.format('Up'), CROSS.format('Up')),
    )
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=['DownEncoderBlock2D'] * 4, block_out_channels=(32,) * 4, latent_channels=4, sample_size=32
    )
    eye = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        patch_size=56,
        projection_dim=32,
    )
    return StableVideoDiffusionPipeline(
        vae.eval(),
        CLIPVisionModelWithProjection(eye).eval(),
        unet.eval(),
        EulerDiscreteScheduler(**SCHEDULE),
        CLIPImageProcessor(),
    )


def adapter(p, **how):
    model = SVD(p.unet, p.vae, p.image_encoder, p.scheduler, p.feature_extractor, **{'native_size': SIZE, **how})
    model.draw = start_image
    return model


@pytest.fixture(scope='module')
def pipe():
    p = tiny_pipeline()
    p.set_progress_bar_config(disable=True)
    return p


@pytest.fixture(scope='module')
def model(pipe):
    return adapter(pipe)


def photo(name, *size):
    return Image.fromarray((start_image(name, *size).movedim(0, 2) * 255).byte().numpy())


def compare(pipe, model, images, steps, top, low=1.0, chunk=None, **how):
    "Our sample and the pipeline's, from the same noise."
    f, h, w = model.native_size
    g, latents = make_generator(1), model.noise(len(images), generator=make_generator(0))
    cond, model.chunk = model.encode(images, generator=g, **how), chunk
    guidance = guidance_ramp(top, f, low) if top > 1 else 1.0
    with torch.no_grad():
        z = last(rollout(model, cond, latents, model.sampler(steps), guidance)).step.x
        video = model.decode(z)
    names = dict(fps='fps', motion='motion_bucket_id', noise='noise_aug_strength')
    common = dict(
        height=h,
        width=w,
        num_frames=f,
        num_inference_steps=steps,
        min_guidance_scale=low,
        max_guidance_scale=top,
        **{names[k]: v for k, v in how.items()},
    )
    theirs = [
        pipe(
            images,
            latents=latents.transpose(1, 2),
            generator=make_generator(1),
            output_type=kind,
            decode_chunk_size=chunk,
            **common,
        ).frames
        for kind in ('latent', 'pt')
    ]
    assert (z.transpose(1, 2) - theirs[0]).abs().max() < 1e-4 * theirs[0].abs().max()
    assert (video.clamp(0, 1) - theirs[1]).abs().max() < 1e-4
    model.chunk = None


@pytest.mark.parametrize(
    'how',
    [
        dict(steps=6, top=3.0),
        dict(steps=5, top=1.0),
        dict(steps=5, top=4.0, low=2.0, fps=12, motion=30, noise=0.1),
        dict(steps=4, top=3.0, chunk=2),
    ],
)
def test_equals_the_pipeline(pipe, model, how):
    compare(pipe, model, [photo(c, 32, 40) for c in CAPTIONS], **how)


def test_equals_the_pipeline_on_a_picture_of_another_shape(pipe, model):
    compare(pipe, model, [photo(CAPTIONS[0], 48, 96)], 4, 3.0)


def test_a_number_is_the_ramp_to_it_and_a_tensor_is_taken_as_it_is(model):
    x, cond = model.noise(2, generator=make_generator(0)), model.encode(CAPTIONS)
    at = lambda g: model.predict(x, torch.tensor(0.3), cond, g)
    with torch.no_grad():
        plain, ramp, given, flat = at(1.0), at(3.0), at(guidance_ramp(3.0, 4)), at(torch.full((1, 1, 1, 1, 1), 3.0))
    assert torch.equal(ramp, given) and not torch.allclose(ramp, flat)
    assert torch.allclose(ramp[:, :, 0], plain[:, :, 0], atol=1e-5) and torch.allclose(ramp[:, :, -1], flat[:, :, -1])


def test_the_unconditional_half_sees_no_image(model):
    cond = model.encode(CAPTIONS)
    both = cond.paired()
    assert len(both) == 4 and both.embeds[:2].abs().max() == both.extra['image'][:2].abs().max() == 0
    assert torch.equal(both.extra['image'][2:], cond.extra['image']) and torch.equal(
        both.extra['ids'], cond.extra['ids'].repeat(2, 1)
    )
    for c in (cond[[1]], cond.to('cpu')[1], cond.repeat(2)[2:3]):
        assert torch.equal(c.paired().extra['image'][1], cond.extra['image'][1])


def test_names_are_looked_up_once_and_noise_comes_from_the_generator(pipe, monkeypatch):
    m, calls = adapter(pipe), []
    embed = m.embed
    monkeypatch.setattr(m, 'embed', lambda x: calls.append(len(x)) or embed(x))
    a, b = m.encode(CAPTIONS), m.encode(CAPTIONS)
    assert len(calls) == 2 and torch.equal(a.extra['image'], b.extra['image'])
    first, again, other = (m.encode(CAPTIONS, generator=make_generator(s)).extra['image'] for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other) and len(calls) == 2
    quiet, loud = (m.encode(CAPTIONS, noise=n).extra['image'] for n in (0.0, 0.5))
    assert (loud - quiet).abs().mean() > (a.extra['image'] - quiet).abs().mean() > 0


def test_kinds_of_images_are_the_same_image(model, tmp_path):
    picture = photo(CAPTIONS[0], 32, 40)
    picture.save(tmp_path / 'dog.png')
    pixels = torch.from_numpy(np.array(picture)).movedim(2, 0) / 255
    conds = [
        model.encode(i).extra['image']
        for i in (picture, [picture], pixels, pixels[None], str(tmp_path / 'dog.png'), [tmp_path / 'dog.png'])
    ]
    assert all(torch.allclose(c, conds[0], atol=1e-5) for c in conds)


def saved(picture, file, **how):
    "The picture, written to a file and read again."
    picture.save(file, **how)
    return np.asarray(open_image(file)).astype(int)


def test_pictures_of_every_mode(tmp_path):
    """Each looks as a viewer shows it: upright, 16 bits as 8, white where it is transparent, the first of several
    frames.
    """
    colours = np.zeros((6, 8, 3), np.uint8)
    colours[:3], colours[3:] = (200, 40, 90), (10, 220, 60)
    rgb = Image.fromarray(colours)
    grey = np.asarray(rgb.convert('L')).astype(int)[..., None]
    hole = np.dstack([colours, np.full((6, 8), 255, np.uint8)])
    hole[3:, :, 3] = 0
    white = colours.astype(int)
    white[3:] = 255
    deep = Image.fromarray((np.asarray(rgb.convert('L')).astype(np.uint16) * 257))
    tilted = Image.Exif()
    tilted[274] = 6  # turned by a quarter
    half = Image.fromarray(hole).convert('P')
    half.info['transparency'] = half.getpixel((0, 5))
    got = {
        'rgb': (saved(rgb, tmp_path / 'rgb.png'), colours),
        'grey': (saved(rgb.convert('L'), tmp_path / 'l.png'), grey),
        '16 bit': (saved(deep, tmp_path / 'deep.png'), grey),
        'transparent': (saved(Image.fromarray(hole), tmp_path / 'rgba.png'), white),
        'grey, transparent': (saved(Image.fromarray(hole).convert('LA'), tmp_path / 'la.png')[3:], white[3:]),
        'palette': (saved(rgb.quantize(8), tmp_path / 'p.png'), colours),
        'black and white': (saved(rgb.convert('1'), tmp_path / '1.png'), np.asarray(rgb.convert('1'))[..., None] * 255),
        'CMYK': (saved(rgb.convert('CMYK'), tmp_path / 'cmyk.tif'), colours),
        'animated': (saved(rgb, tmp_path / 'a.gif', save_all=True, append_images=[Image.new('RGB', (8, 6))]), colours),
        'turned': (saved(rgb, tmp_path / 't.png', exif=tilted), np.rot90(colours, -1)),
        'turned, not a file': (
            np.asarray(get_image(Image.open(tmp_path / 't.png'), 8, 8)).astype(int),
            np.rot90(colours, -1),
        ),
    }
    for name, (seen, right) in got.items():
        assert np.abs(seen - right).max() < 4, name


def test_a_file_that_is_written_again_is_read_again(model, tmp_path):
    latents = []
    for colour in ('red', 'blue', 'blue'):
        Image.new('RGB', (40, 32), colour).save(tmp_path / 'dog.png')
        latents.append(model.encode(str(tmp_path / 'dog.png'), noise=0.0).extra['image'])
    assert not torch.allclose(latents[0], latents[1]) and torch.equal(latents[1], latents[2])


@pytest.mark.parametrize('size', [(1, 1), (1, 40), (40, 1)])
def test_a_start_image_of_one_pixel(model, size, tmp_path):
    Image.new('RGB', size).save(tmp_path / 'a.png')
    for image in (Image.new('RGB', size), tmp_path / 'a.png'):
        with pytest.raises(VaderError, match='needs 2x2 pixels or more'):
            model.encode(image)


def test_damaged_files(model, tmp_path):
    photo(CAPTIONS[0], 32, 40).save(tmp_path / 'whole.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:-200])
    (tmp_path / 'empty.jpg').write_bytes(b'')
    Image.new('F', (40, 32)).save(tmp_path / 'float.tif')
    for name, words in [
        ('cut.png', 'can be read'),
        ('empty.jpg', 'can be read'),
        ('float.tif', 'floating-point'),
        ('', 'no image file'),
        ('\x00.png', 'no image file'),
        ('n' * 300 + '.png', 'no image file'),
    ]:
        with pytest.raises(VaderError, match=words) as e:
            model.encode(str(tmp_path / name))
        assert '\n' not in str(e.value)


def test_start_images_show_what_the_caption_says():
    a, b, c = (start_image(f'a maltese playing chess{n}', 64, 64) for n in ('', ' (0)', ' (1)'))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (3, 64, 64) and 0 <= a.min() and a.max() <= 1
    from vader_nb.world.judge import judge_clips

    captions = [f'a {name} riding a bike (7)' for name in ANIMALS]
    seen = judge_clips(torch.stack([start_image(p, 64, 64) for p in captions])[:, None].repeat(1, 2, 1, 1, 1), captions)
    assert seen['animal'].mean() > 0.9


@pytest.mark.parametrize(
    'bad, words',
    [
        (['a unicorn riding a bike'], 'unicorn'),
        (['no/such/dog.png'], 'no image file'),
        ('dog.jpg', 'no image file'),
        ([7], 'got 7'),
        ([np.zeros((4, 4, 3))], r'got array\(\[\[\['),
        (3, 'give a list'),
        ([], 'no start image'),
        (torch.rand(3, 32, 32), '32x32 pixels, the clip 32x40'),
        (torch.rand(1, 32, 40), 'got a tensor'),
        ([2 * torch.ones(3, 32, 40)], 'must lie in'),
        ([torch.zeros(3, 32, 40, dtype=torch.uint8)], 'torch.uint8'),
        (torch.zeros(3, 32, 40, dtype=torch.uint8), r'\(3, 32, 40\) of torch.uint8'),
        (torch.rand(1, 64, 64), r'\(1, 64, 64\)'),
    ],
)
def test_no_image(model, bad, words):
    with pytest.raises(VaderError, match=words) as e:
        model.encode(bad)
    assert '\n' not in str(e.value)


def test_a_file_that_is_no_image(model, tmp_path):
    (tmp_path / 'dog.png').write_text('woof')
    with pytest.raises(VaderError, match='no image that can be read'):
        model.encode(tmp_path / 'dog.png')


@pytest.mark.parametrize(
    'how, words',
    [
        (dict(height=36), 'multiples of 8'),
        (dict(frames=0), '1 frame'),
        (dict(fps=0), 'fps is 0'),
        (dict(fps=float('inf')), 'fps is inf'),
        (dict(fps=float('nan')), 'fps is nan'),
        (dict(noise=float('inf')), 'noise inf'),
        (dict(motion=float('nan')), 'motion nan'),
        (dict(motion=300), 'motion 300'),
        (dict(noise=-1.0), 'noise -1'),
    ],
)
def test_bad_sizes_and_numbers(model, how, words):
    with pytest.raises(VaderError, match=words):
        model.encode(CAPTIONS, **how)


def test_only_euler(model):
    for bad in (dict(kind='ddim'), dict(eta=1.5), dict(steps=0)):
        with pytest.raises(VaderError):
            model.sampler(**{'steps': 4, **bad})


def test_asked_frames_are_those_of_the_whole_clip(pipe):
    z = adapter(pipe).noise(2, 5, 32, 40, make_generator(0))
    for chunk in (None, 2, 5, 9):
        m = adapter(pipe, chunk=chunk)
        with torch.no_grad():
            whole, some = m.decode(z), m.decode(z, [4, 0, 1])
        assert torch.equal(some, whole[:, [4, 0, 1]]) and whole.shape == (2, 5, 3, 32, 40)
    with pytest.raises(VaderError, match='whole numbers from 0 to 4'):
        m.decode(z, [5])


def test_no_window_of_latents_gives_a_frame_exactly(pipe):
    z = adapter(pipe).noise(1, 6, 32, 40, make_generator(0)).requires_grad_()
    whole, chunked = (
        torch.autograd.grad(adapter(pipe, chunk=n).decode(z, [0]).sum(), z)[0].abs().amax((0, 1, 3, 4))
        for n in (None, 2)
    )
    assert whole.min() > 0 and chunked[:2].min() > 0 and chunked[2:].max() == 0


def test_gradients_reach_every_lora_but_the_queries_and_keys_of_a_single_vector():
    m = adapter(tiny_pipeline(2))
    add_lora(m, 2, 2)
    for n, p in m.denoiser.named_parameters():
        if 'lora_B' in n:
            p.data.normal_(std=0.1)
    cond, x = m.encode(CAPTIONS[0]), m.noise(1, generator=make_generator(0))
    z = differentiable_latents(m, cond, x, m.sampler(3), 2.0, 1, 'x0', make_generator(0))
    m.decode(z, [2]).square().mean().backward()
    for n, p in m.denoiser.named_parameters():
        if not p.requires_grad:
            continue
        idle = 'attn2.to_q' in n or 'attn2.to_k' in n
        assert p.grad.isfinite().all() and (p.grad.abs().max() < 1e-12 if idle else p.grad.abs().max() > 0), n


def test_a_training_step_improves_a_reward():
    m = adapter(tiny_pipeline(3))
    learn = add_lora(m, 4, 4)
    config = Config(
        batch_size=2, T=3, K=2, where='x0', sampler='euler', guidance=2.0, frames=4, height=32, width=40, lr=1e-2
    )
    reward = reward_from(lambda v, p: v.mean((1, 2, 3, 4)), 'bright')
    opt, scores = torch.optim.Adam(learn, 1e-2), []
    for _ in range(4):
        loss, record = vader_step(m, reward, CAPTIONS, config, make_generator(0))
        opt.zero_grad()
        loss.backward()
        opt.step()
        scores.append(record['reward'].mean().item())
    assert scores[-1] > scores[0] and m.denoiser.training is False


def test_half_precision_inside_float32_outside():
    p = tiny_pipeline()
    m = adapter(
        StableVideoDiffusionPipeline(
            p.vae.bfloat16(), p.image_encoder.bfloat16(), p.unet.bfloat16(), p.scheduler, p.feature_extractor
        )
    )
    assert (
        m.vae.encoder.conv_in.weight.dtype == torch.float32 and m.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    )  # force_upcast
    x, cond = m.noise(1, generator=make_generator(0)), m.encode(CAPTIONS[0])
    pred = m.predict(x, torch.tensor(0.3), cond, 3.0)
    assert m.dtype == cond.embeds.dtype == torch.bfloat16 and pred.dtype == m.decode(pred).dtype == torch.float32


def test_the_networks_are_frozen_and_evaluate(model):
    for net in (model.denoiser, model.vae, model.image_encoder):
        assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_full_size_is_the_published_one():
    with torch.device('meta'):
        unet = UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20), num_frames=14, sample_size=96)
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=['DownEncoderBlock2D'] * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2
        )
        eye = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=16,
                patch_size=14,
                projection_dim=1024,
                hidden_act='gelu',
            )
        )
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert (count(unet), count(vae), count(eye)) == (1524623082, 97742847, 632076800)
    full = SVD(unet, vae, eye, EulerDiscreteScheduler(**SCHEDULE), CLIPImageProcessor())
    assert (
        full.size(None, None, None) == [14, 576, 1024]
        and full.vae_scale == 8
        and full.latent_channels == 4
        and unet.config.in_channels == 8
    )
    names = [n for n, _ in unet.named_modules()]
    assert all(any(n.endswith(f'.{t}') for n in names) for t in full.lora_targets)


def test_loads_the_published_layout(tmp_path, monkeypatch):
    p = tiny_pipeline()
    p.save_pretrained(tmp_path, variant='fp16')
    asked = []
    monkeypatch.setattr(svd, 'model_path', lambda name, scale: asked.append((name, scale)) or tmp_path)
    full, xt = load_svd('full', 'cpu'), load_svd('full', 'cpu', 'bf16', xt=True)
    assert (
        asked == [('svd', 'full'), ('svd_xt', 'full')]
        and full.native_size == (14, 576, 1024)
        and xt.native_size == (25, 576, 1024)
    )
    assert full.dtype == torch.float32 and xt.dtype == torch.bfloat16
    for net, made in ((full.denoiser, p.unet), (full.vae, p.vae), (full.image_encoder, p.image_encoder)):
        assert all(torch.equal(v, made.state_dict()[k]) for k, v in net.state_dict().items())
    with pytest.raises(VaderError, match='no small XT'):
        load_svd('small', xt=True)


def _drop(folder, part):
    from safetensors.torch import load_file, save_file

    (f,) = (folder / part).glob('*.safetensors')
    state = load_file(f)
    state.pop(sorted(state)[0])
    save_file(state, f, metadata={'format': 'pt'})


@pytest.mark.parametrize('part', ['unet', 'vae', 'image_encoder', 'scheduler', 'feature_extractor'])
def test_damaged_folders(tmp_path, part):
    import shutil

    tiny_pipeline().save_pretrained(tmp_path)
    if weights := list((tmp_path / part).glob('*.safetensors')):
        _drop(tmp_path, part)
        with pytest.raises(VaderError, match='weights are missing'):
            open_svd(tmp_path)
        weights[0].write_bytes(b'nothing')
        with pytest.raises(VaderError, match='no usable'):
            open_svd(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(VaderError) as e:
        open_svd(tmp_path)
    assert '\n' not in str(e.value)


# The small model


def test_stretched_patches_answer_as_before():
    from vader_nb.pretrain.svd import resample, stretch_patches

    w, patch, up = (
        torch.randn(5, 3, 8, 8, generator=make_generator(0)),
        torch.rand(2, 3, 8, 8, generator=make_generator(1)),
        resample(8, 28),
    )
    before, after = (
        torch.nn.functional.conv2d(patch, w),
        torch.nn.functional.conv2d(up @ patch @ up.T, stretch_patches(w, 28)),
    )
    assert torch.allclose(before, after, atol=1e-4)


@pytest.fixture(scope='module')
def small():
    return load_svd('small')


def test_small_folder_is_a_plain_pipeline(small):
    from vader_nb.zoo import model_path

    p = StableVideoDiffusionPipeline.from_pretrained(model_path('svd'))
    p.set_progress_bar_config(disable=True)
    compare(p, small, [photo(CAPTIONS[0], 64, 64)], 3, 3.0)


def test_small_keeps_the_animal_and_moves_it(small):
    from vader_nb.world.judge import judge_clips

    prompts = [f'{name} riding a bike (11)' for name in ('a labrador', 'a maltese', 'a fox', 'a frog')]
    video = sample(small, prompts, 12, 3.0, kind='euler')
    last_frames = video[:, -1:].repeat(1, 2, 1, 1, 1)
    assert judge_clips(last_frames, prompts)['animal'].mean() >= 0.75
    first = torch.stack([start_image(p, 64, 64) for p in prompts])
    assert (video[:, 0] - first).abs().mean() < 0.06 < (video[:, -1] - first).abs().mean() + 0.04

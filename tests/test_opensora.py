"09a to 09c: our STDiT3, spatio-temporal VAE and sampler equal the authors' numbers; loading, sizes, one frame alone."

import json
import random
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from tiny_models import tiny_tokenizer
from vader_nb.core import VaderError, make_generator
from vader_nb.diffusion.schedules import flow_mix, flow_target
from vader_nb.memory.lora import add_lora
from vader_nb.memory.checkpointing import checkpoint_activations
from vader_nb.models import opensora
from vader_nb.models.opensora import (
    check_cleaned,
    OpenSora,
    clean_text,
    flow_ratio,
    flow_sampler,
    load_opensora,
    open_opensora,
    open_stdit3,
    open_vae,
)
from vader_nb.nets.text import drop_text_encoder, open_text, read_embeddings
from vader_nb.nets.opensora_vae import OpenSoraVAE, latent_frames
from vader_nb.nets.stdit3 import STDiT3, frequencies, places, turn
from vader_nb.rewards.base import reward_from
from vader_nb.diffusion.rollout import differentiable_latents, last, rollout, sample
from vader_nb.config import Config
from vader_nb.training.vader import vader_step
from vader_nb.zoo import model_path

reference = Path(__file__).parent / 'data'
golden = lambda name: {
    k: torch.from_numpy(v) if v.ndim else torch.tensor(v)
    for k, v in np.load(reference / f'opensora12_{name}_golden.npz').items()
}
MANIFESTS = json.loads((reference / 'opensora12_manifests.json').read_text())
PROMPTS = ['a panda riding a bike', 'a fox with a hat']


def close(ours, theirs, tol=1e-4):
    assert (ours - theirs).abs().max() <= tol * theirs.abs().max()


def shapes(manifest):
    "Name -> shape; 'blocks.0-27.' stands for 28 names."
    for k, s in MANIFESTS[manifest]['shapes'].items():
        m = re.search(r'\.(\d+)-(\d+)\.', k)
        for i in range(int(m[1]), int(m[2]) + 1) if m else [None]:
            yield (f'{k[: m.start()]}.{i}.{k[m.end() :]}' if m else k), tuple(s)


def filled(net, kept=()):
    "`net` with the reference weights, which follow from the names."
    for k, v in net.state_dict().items():
        if k in kept:
            continue
        z = np.random.Generator(np.random.PCG64(zlib.crc32(k.encode()))).standard_normal(
            tuple(v.shape), dtype=np.float32
        )
        if v.ndim > 1:
            z = z * np.float32(1 / np.sqrt(np.prod(v.shape[1:])))
        else:
            z = 1 + np.float32(0.1) * z if k.endswith('weight') else np.float32(0.1) * z
        v.copy_(torch.from_numpy(z))
    return net.eval()


def reference_stdit3():
    names = 'hidden_size depth num_heads in_channels patch_size caption_channels model_max_length input_sq_size'.split()
    return filled(
        STDiT3(**{k: MANIFESTS['stdit3_small']['config'][k] for k in names}),
        MANIFESTS['stdit3_small']['kept_as_constructed'],
    )


def reference_vae():
    m = MANIFESTS['vae_small']
    return filled(OpenSoraVAE(m['vae_2d'], m['vae_temporal']), m['kept_as_constructed'])


@pytest.fixture(scope='module')
def net():
    return reference_stdit3()


@pytest.fixture(scope='module')
def vae():
    return reference_vae()


def tiny(words=12, channels=32, seed=0):
    "A random Open-Sora with a text encoder that knows a few words."
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(words)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=channels,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=words,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    net = STDiT3(
        hidden_size=32, depth=2, num_heads=4, caption_channels=channels, model_max_length=words, input_sq_size=64
    )
    vae_2d = dict(MANIFESTS['vae_small']['vae_2d'], block_out_channels=[8] * 4)
    vae = OpenSoraVAE(vae_2d, dict(filters=8, num_res_blocks=1, num_groups=4), image_scale=1.0)
    return OpenSora(net.eval(), vae.eval(), CLIPTextModel(text).eval(), tokenizer, (17, 32, 32), ending='')


@pytest.fixture(scope='module')
def model():
    return tiny()


# The transformer


def record(net):
    "Hooks that keep what each named part returned first."
    seen = {}
    names = {
        't_embedder': 'act_t_embedder',
        'fps_embedder': 'act_fps_embedder',
        't_block': 'act_t_block',
        'y_embedder': 'act_y_embedder',
        'x_embedder': 'act_x_embedder',
        'spatial_blocks.0.attn': 'act_spatial_block_0_attn',
        'spatial_blocks.0.cross_attn': 'act_spatial_block_0_cross_attn',
        'spatial_blocks.0': 'act_spatial_block_0',
        'temporal_blocks.0.attn': 'act_temporal_block_0_attn',
        'temporal_blocks.0': 'act_temporal_block_0',
        'temporal_blocks.1': 'act_temporal_block_1',
    }

    def keep(name):
        return lambda m, args, out: seen.update({name: seen.get(name, out)})

    for n, m in net.named_modules():
        if n in names:
            m.register_forward_hook(keep(names[n]))
    return seen


def test_stdit3_equals_the_reference():
    g, net = golden('stdit3'), reference_stdit3()
    x, seen, sizes = g['x'].requires_grad_(), record(net), {k: g[k] for k in ('fps', 'height', 'width')}
    out = net(x, g['timestep'], g['y'][:, 0], g['mask'], **sizes)
    loss = out.chunk(2, 1)[0].square().mean()
    close(out, g['out'])
    close(loss, g['loss_meansq_v'])
    close(torch.autograd.grad(loss, x)[0], g['grad_x'], 5e-4)
    with torch.no_grad():
        close(net(x, g['timestep'], g['y'][:, 0], None, **sizes), g['out_nomask'])
        close(net(x, g['timestep'], g['y'][:, 0], g['mask'], x_mask=g['x_mask'], **sizes), g['out_xmask'])
    expected = {k: v for k, v in g.items() if k.startswith('act_') and k != 'act_pos_embed'}
    assert seen.keys() == expected.keys()
    for k, v in expected.items():
        close(seen[k].reshape(v.shape), v)


def test_embeddings_equal_the_reference(net):
    g = golden('stdit3')
    fine = (g['height'] * g['width']) ** 0.5 / 512
    close(places(3, 3, 64, fine[:1]), g['act_pos_embed'])
    close(frequencies(32), g['inv_freq'])
    close(net.rope.freqs, g['rope_freqs'])
    close(turn(g['rope_in'], net.rope(7)), g['rope_out'])
    norm = torch.nn.RMSNorm(16, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(net.spatial_blocks[0].attn.q_norm.weight)
    close(norm(g['rope_in']), g['rms_out'])
    close(places(3, 5, 16, torch.tensor([0.75])), g['pe_dim16_h3_w5_scale0p75_base4'])


@pytest.mark.parametrize('cls, manifest', [(STDiT3, 'stdit3_xl2'), (OpenSoraVAE, 'vae')])
def test_full_size_has_the_published_names_and_shapes(cls, manifest):
    with torch.device('meta'):
        full = cls()
    assert {k: tuple(v.shape) for k, v in full.state_dict().items()} == dict(shapes(manifest))
    assert sum(p.numel() for p in full.parameters()) == MANIFESTS[manifest]['counts']['params']


def test_t5_is_the_published_one():
    m = MANIFESTS['t5xxl']
    with torch.device('meta'):
        full = T5EncoderModel(T5Config(**m['config']))
    assert {k: tuple(v.shape) for k, v in full.state_dict().items()} == dict(shapes('t5xxl'))
    g, small = golden('t5'), T5EncoderModel(T5Config(**MANIFESTS['t5_small']['config']))
    filled(small, ['encoder.embed_tokens.weight'])  # the same tensor as shared.weight
    with torch.no_grad():
        close(small(g['input_ids'], attention_mask=g['attention_mask'])[0], g['last_hidden_state'])


# The autoencoder


def test_vae_equals_the_reference(vae):
    g = golden('vae')
    with torch.no_grad():
        x = vae.encode_frames(g['video'])
        close(x, g['spatial_latent'])
        for n, part in zip((17, 3), x.split(17, 2)):
            close(vae.temporal_vae.encode(part), g[f'temporal_moments_{n}'])
        close(vae.encode(g['video']), g['z'])
        close(vae.encode(g['video'][:, :, :1]), g['z_image'])
        close(vae.decode(g['z_image'], 1), g['decoded_image'])
        for n, part in zip((17, 3), g['z'].split(5, 2)):
            close(vae.temporal_vae.decode(part, n), g[f'temporal_decode_unnormalised_{n}'])
    z = g['z'].requires_grad_()
    video = vae.decode(z, 20)
    close(video, g['decoded'])
    close(video.square().mean(), g['loss_meansq'])
    close(torch.autograd.grad(video.square().mean(), z)[0], g['grad_z'], 5e-4)


@pytest.mark.parametrize(
    'frames, latents', [(1, 1), (17, 5), (51, 15), (102, 30), (20, 6), (16, 4), (34, 10), (68, 20)]
)
def test_latent_frames(frames, latents):
    assert latent_frames(frames) == latents


@pytest.mark.parametrize('only', [[0], [16], [17], [20], [33], [30, 2], [5, 5]])
def test_asked_frames_are_those_of_the_whole(model, only):
    z = model.noise(2, 34, 32, 32, make_generator(0))
    with torch.no_grad():
        whole, some = model.decode(z), model.decode(z, only)
    assert whole.shape == (2, 34, 3, 32, 32) and some.shape == (2, len(only), 3, 32, 32)
    close(some, whole[:, only], 1e-5)


def test_the_window_is_the_smallest(model):
    z, calls = model.noise(1, 34, 32, 32, make_generator(0)).requires_grad_(), []
    hooks = [
        m.register_forward_hook(lambda m, args, out: calls.append(args[0].shape))
        for m in (model.vae.temporal_vae.decoder, model.vae.image_vae.decoder)
    ]
    (g,) = torch.autograd.grad(model.decode(z, [20]).square().sum(), z)
    for h in hooks:
        h.remove()
    assert calls == [(1, 4, 5, 4, 4), (1, 4, 4, 4)]  # one piece of 5 latents, one image
    moved = g.abs().amax((0, 1, 3, 4)) > 0
    assert moved.tolist() == [False] * 5 + [True] * 5  # less than the piece would not do: norms reach all of it


# The flow


@pytest.mark.parametrize('name', json.loads((reference / 'opensora12_rflow_timesteps.json').read_text()))
def test_timesteps(name):
    height, width = {'240p': (240, 426), '480p': (480, 854), '720p': (720, 1280), '256': (256, 256), '512': (512, 512)}[
        name.split('_')[0]
    ]
    frames, dtype = int(re.search(r'(\d+)f_', name)[1]), getattr(torch, name.split('_')[-1])
    if frames == 1:
        ratio = (height * width / 512**2) ** 0.5  # a picture, which the authors treat apart
    else:
        ratio = flow_ratio(*(torch.tensor(v, dtype=dtype) for v in (frames, height, width))).item()
    table = torch.tensor(json.loads((reference / 'opensora12_rflow_timesteps.json').read_text())[name])
    close(flow_sampler(30, ratio).timesteps, table, 1e-6)


@pytest.mark.parametrize('kind', ['transform', 'plain', 'masked'])
def test_trajectories(net, kind):
    g = golden('rflow')
    model = OpenSora(net, reference_vae(), None, None, (51, 240, 426), fps=g['arg_fps'][0].item())
    args = {k: g[f'arg_{k}'] for k in ('fps', 'height', 'width')}
    sampler = flow_sampler(
        5, 1.0 if kind == 'plain' else flow_ratio(*(g[f'arg_{k}'][0].item() for k in ('num_frames', 'height', 'width')))
    )
    cond = opensora.Condition(g['y'][:, 0], model.empty.expand(2, -1, -1), dict(mask=g['mask'], **args))
    keep = 1.0
    if kind == 'masked':
        cond.extra['x_mask'] = g['masked_mask'].bool()
        keep = g['masked_mask'][:, None, :, None, None]  # given frames stay where they are
        assert (cond.paired().extra['x_mask'] == g['masked_x_mask'][0]).all()
    x = g['z_T']
    close(x, g[f'{kind}_z'][0])
    with torch.no_grad():
        for i, t in enumerate(sampler.timesteps):
            close(t, g[f'{kind}_t'][i, 0], 1e-6)
            if kind == 'transform':
                close(
                    net(
                        torch.cat([x, x]),
                        t.expand(4),
                        torch.cat([cond.embeds, cond.uncond]),
                        **{k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in cond.extra.items()},
                    ),
                    g['transform_pred'][i],
                    5e-4,
                )
            x = sampler.step(i, x, keep * model.predict(x, t, cond, g['guidance'].item())).x
            close(x, g[f'{kind}_z'][i + 1], 5e-4)


def test_training_loss_equals_the_reference(net):
    g, s = golden('rflow_train'), golden('rflow')
    sigma = (g['t'] / 1000).view(-1, 1, 1, 1, 1)
    x_t = flow_mix(g['x_start'], g['noise'], sigma)
    close(x_t, g['x_t'])
    more = dict(mask=s['mask'], **{k: s[f'arg_{k}'] for k in ('fps', 'height', 'width')})
    model = OpenSora(net, reference_vae(), None, None)
    error = lambda x, **kw: (
        model.denoise(x, g['t'], s['y'][:, 0], **more, **kw) - flow_target(g['x_start'], g['noise'])
    ).square()
    with torch.no_grad():
        close(error(x_t).mean((1, 2, 3, 4)), g['loss'])
        seen = g['mask_frames'][:, None, :, None, None]
        e = error(torch.where(seen, x_t, g['x_start']), x_mask=g['mask_frames'])
        close((e * seen).sum((1, 2, 3, 4)) / seen.expand_as(e).sum((1, 2, 3, 4)), g['loss_masked'])


# Captions


def test_text_cleaning():
    t = json.loads((reference / 'opensora12_text_golden.json').read_text())
    assert [p + OpenSora.__init__.__defaults__[-1] for p in t['prompts']] == t['with_score_aes6.5']
    assert [clean_text(p) for p in t['with_score_aes6.5']] == t['cleaned']


def test_padding_does_not_matter(model):
    both, alone = model.encode(PROMPTS), model.encode(PROMPTS[0])
    assert (
        both.embeds.shape[1] == 7
        and both.extra['mask'].sum(1).tolist() == [7, 7]
        and both.extra['height'].tolist() == [32, 32]
    )
    short = model.encode(['a', PROMPTS[0]])
    assert short.extra['mask'].sum(1).tolist() == [3, 7] and torch.equal(short.embeds[1:], alone.embeds)
    x = model.noise(2, generator=make_generator(0))
    with torch.no_grad():
        pair, single = model.predict(x, 500, short, 3.0), model.predict(x[:1], 500, model.encode('a'), 3.0)
    close(pair[:1], single, 1e-5)


def test_the_empty_caption_is_the_learnt_table(model):
    cond = model.encode(PROMPTS)
    assert torch.equal(cond.uncond, model.denoiser.y_embedder.y_embedding[:7].expand(2, -1, -1))


def test_prompts_are_read_once_and_the_encoder_goes(tmp_path):
    model = tiny()
    before = model.encode(PROMPTS)
    drop_text_encoder(model, PROMPTS, tmp_path / 'words.safetensors')
    assert model.text_encoder is None and torch.equal(model.encode(PROMPTS).embeds, before.embeds)
    other = tiny(seed=1)
    other.text_encoder, other.cache = None, {}
    read_embeddings(other, tmp_path / 'words.safetensors')
    assert torch.equal(other.encode(PROMPTS).embeds, before.embeds)
    with pytest.raises(VaderError, match='text encoder is gone'):
        other.encode('a dog')
    with pytest.raises(VaderError, match='another text encoder'):
        read_embeddings(tiny(words=14), tmp_path / 'words.safetensors')
    (tmp_path / 'words.safetensors').write_bytes(b'no')
    with pytest.raises(VaderError, match='no usable embeddings'):
        read_embeddings(other, tmp_path / 'words.safetensors')


# The contract


def test_sizes(model):
    assert model.size() == (17, 32, 32) and model.size(34, None, 45) == (34, 32, 45)
    assert model.noise(1, 51, 240, 426).shape == (1, 4, 15, 30, 53)
    for frames in (1, 16):
        with pytest.raises(VaderError, match='timestep transform'):
            model.encode(PROMPTS, frames)
    with pytest.raises(VaderError, match='use 17 or 34'):
        model.noise(1, 20)
    for size in [(17, 8, 64), (17, 64, 0), (17, 64.5, 64)]:
        with pytest.raises(VaderError, match='too small'):
            model.size(*size)
    with pytest.raises(VaderError, match='no whole pieces'):
        model.decode(torch.zeros(1, 4, 6, 4, 4))
    with pytest.raises(VaderError):
        model.decode(torch.zeros(1, 4, 5, 4, 4), [17])


def test_sampler(model):
    assert model.sampler(4).sigmas == flow_sampler(4, flow_ratio(17, 32, 32, 64)).sigmas
    assert model.sampler(4, size=(34, 64, 64)).sigmas == flow_sampler(4, flow_ratio(34, 64, 64, 64)).sigmas
    for args in [(4, 'ddim'), (4, 'rflow', 0.5), (0,)]:
        with pytest.raises(VaderError):
            model.sampler(*args)


@pytest.mark.parametrize('where', ['last', 'x0'])
def test_lora_learns_through_flow_and_decoder(where):
    model = tiny()
    learn, cond = add_lora(model, rank=2, alpha=2), model.encode(PROMPTS)
    assert len(learn) == 2 * 5 * 4  # A and B beside five layers of two spatial and two temporal blocks
    assert all(torch.equal(p, torch.zeros_like(p)) for n, p in model.denoiser.named_parameters() if 'lora_B' in n)
    grads = {}
    for on in (False, True):
        checkpoint_activations(model, on)
        z = differentiable_latents(
            model, cond, model.noise(2, generator=make_generator(0)), model.sampler(3), 2.0, 2, where, make_generator(1)
        )
        grads[on] = torch.autograd.grad(
            model.decode(z, [3]).square().mean(), [p for n, p in model.denoiser.named_parameters() if 'lora_B' in n]
        )
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads[True])
    for a, b in zip(grads[True], grads[False]):
        close(a, b, 1e-5)


def test_a_training_step():
    model, config = (
        tiny(),
        Config(
            sampler='rflow',
            frames=34,
            height=32,
            width=48,
            batch_size=2,
            T=2,
            K=1,
            where='last',
            guidance=2.0,
            decoded_frames=2,
        ),
    )
    learn, bright = (
        add_lora(model, rank=2, alpha=2),
        reward_from(lambda video, prompts: video.mean((1, 2, 3, 4)), 'bright'),
    )
    seen = []
    model.sampler = lambda *args, **kw: seen.append(OpenSora.sampler(model, *args, **kw)) or seen[-1]
    loss, record = vader_step(model, bright, PROMPTS, config, make_generator(0))
    assert (
        record['reward'].shape == (2,) and seen[0].sigmas == flow_sampler(2, flow_ratio(34, 32, 48, 64)).sigmas
    )  # the clip's size, not the model's own
    grads = torch.autograd.grad(loss, learn, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in grads)


def test_half_precision_inside_float32_outside():
    model = tiny()
    for net in (model.denoiser, model.vae, model.text_encoder):
        net.bfloat16()
    model = OpenSora(model.denoiser, model.vae, model.text_encoder, model.tokenizer, (17, 32, 32), ending='')
    x, cond = model.noise(1, generator=make_generator(0)), model.encode(PROMPTS[0])
    pred = model.predict(x, 500, cond, 3.0)
    assert (
        cond.embeds.dtype == torch.bfloat16
        and x.dtype == pred.dtype == model.decode(pred).dtype == torch.float32
        and pred.isfinite().all()
    )


# Loading


@pytest.fixture
def folders(tmp_path, model):
    """Random weights in the published layout: denoiser and VAE of the reference sizes, a tiny T5 as a pickle with its
    sentence pieces.
    """
    from sentencepiece import SentencePieceTrainer

    parts = dict(stdit=reference_stdit3(), vae=reference_vae())
    for name, net in parts.items():
        (tmp_path / name).mkdir()
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / name / 'model.safetensors')
        (tmp_path / name / 'config.json').write_text(
            json.dumps(net.config | dict(model_type='x', enable_flash_attn=True))
        )
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(**MANIFESTS['t5_small']['config']))
    (tmp_path / 't5').mkdir()
    t5.config.save_pretrained(tmp_path / 't5')
    torch.save(t5.state_dict(), tmp_path / 't5/pytorch_model.bin')
    draw, words = random.Random(0), 'a panda fox dog bike hat with riding aesthetic score: 6.5.'.split()
    with open(tmp_path / 't5/spiece.model', 'wb') as f:
        SentencePieceTrainer.train(
            sentence_iterator=iter([' '.join(draw.choices(words, k=5)) for _ in range(300)]),
            model_writer=f,
            vocab_size=80,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return tmp_path


def test_loads_the_published_layout(folders, net):
    model = open_opensora(
        folders / 'stdit', folders / 'vae', folders / 't5', native_size=(17, 32, 32), ending=' aesthetic score: 6.5.'
    )
    assert all(torch.equal(a, b) for a, b in zip(model.denoiser.state_dict().values(), net.state_dict().values()))
    assert not any(
        p.requires_grad or p.is_meta for n in (model.denoiser, model.vae, model.text_encoder) for p in n.parameters()
    )
    cond, x = model.encode('a panda'), model.noise(1, generator=make_generator(0))
    ids = model.tokenizer('a panda aesthetic score: 6.5.').input_ids
    assert ids[-1] == model.tokenizer.eos_token_id and cond.embeds.shape == (1, len(ids), 32)
    with torch.no_grad():
        close(cond.embeds, model.text_encoder(torch.tensor([ids]))[0], 1e-5)
        video = model.decode(last(rollout(model, cond, x, model.sampler(2), 7.0)).step.x)
    assert video.shape == (1, 17, 3, 32, 32) and video.isfinite().all()


def test_the_small_vae_borrows_its_image_stage(folders):
    whole = open_vae(folders / 'vae')
    whole.image_vae.save_pretrained(folders / 'image')
    state = {k: v for k, v in load_file(folders / 'vae/model.safetensors').items() if not k.startswith('spatial_vae')}
    save_file(state, folders / 'vae/model.safetensors')
    parts = open_vae(folders / 'vae', folders / 'image')
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in parts.state_dict().items())
    with pytest.raises(VaderError, match='missing'):
        open_vae(folders / 'vae')


def test_full_scale_with_embeddings_needs_no_text_encoder(folders, monkeypatch):
    monkeypatch.setattr(
        opensora,
        'model_path',
        lambda name, scale='small': (
            folders / dict([('opensora', 'stdit'), ('opensora_vae', 'vae'), ('t5', 't5')])[name]
            if name != 't5'
            else pytest.fail('T5 was asked for')
        ),
    )
    model = open_opensora(folders / 'stdit', folders / 'vae', folders / 't5', native_size=(17, 32, 32))
    drop_text_encoder(model, ['a fox'], folders / 'words.safetensors')
    full = load_opensora('full', 'cpu', embeddings=folders / 'words.safetensors')
    assert (
        full.text_encoder is None
        and full.native_size == (51, 240, 426)
        and torch.equal(full.encode('a fox').embeds, model.encode('a fox').embeds)
    )


def damage(folder, case):
    file = folder / 'stdit/model.safetensors'
    state = load_file(file)
    if case == 'truncated':
        file.write_bytes(file.read_bytes()[:999])
    if case == 'no file':
        file.unlink()
    if case == 'no config':
        (folder / 'stdit/config.json').unlink()
    if case == 'missing':
        save_file({k: v for k, v in state.items() if 'final' not in k}, file)
    if case == 'unknown':
        save_file(state | {'more': torch.ones(1)}, file)
    if case == 'reshaped':
        save_file(state | {'final_layer.linear.bias': torch.ones(7)}, file)
    if case == 'another':
        save_file(load_file(folder / 'vae/model.safetensors'), file)


@pytest.mark.parametrize(
    'case, told',
    [
        ('truncated', 'damaged'),
        ('no file', 'no safetensors'),
        ('no config', 'config.json'),
        ('missing', '3 missing .final_layer.linear.bias, final_layer.linear.weight'),
        ('unknown', '1 unknown .more'),
        ('reshaped', '1 of another shape .final_layer.linear.bias'),
        ('another', "looks like Open-Sora's VAE"),
    ],
)
def test_damaged_checkpoints(folders, case, told):
    damage(folders, case)
    with pytest.raises(VaderError, match=told) as e:
        open_stdit3(folders / 'stdit')
    assert '\n' not in str(e.value)


def test_text_encoders_that_will_not_do(folders):
    state = torch.load(folders / 't5/pytorch_model.bin', weights_only=True)
    torch.save({k: v for k, v in state.items() if 'block.0' not in k}, folders / 't5/pytorch_model.bin')
    with pytest.raises(VaderError, match='not a whole T5EncoderModel'):
        open_text(folders / 't5', 20)
    (folders / 't5/config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(VaderError, match='bert'):
        open_text(folders / 't5', 20)


# The small one


def test_what_pretraining_publishes_can_be_loaded(tmp_path):
    from vader_nb.pretrain.opensora import _publish as publish_denoiser, make_stdit3
    from vader_nb.pretrain.opensora_vae import _publish as publish_vae, make_temporal

    torch.manual_seed(0)
    net, temporal, x = make_stdit3(), make_temporal().eval(), torch.randn(2, 4, 17, 4, 4)
    publish_denoiser(net.state_dict(), 1, SimpleNamespace(steps=2, to=tmp_path / 'denoiser'))
    publish_vae(temporal.state_dict(), 1, x, None, SimpleNamespace(steps=2, chunks=3, to=tmp_path / 'vae'))
    for part in ('denoiser', 'vae'):
        assert (tmp_path / part / 'model.safetensors').stat().st_size < 3.3e6 and (
            tmp_path / part / 'card.json'
        ).exists()
    model = open_opensora(
        tmp_path / 'denoiser', tmp_path / 'vae', model_path('clip'), image_vae=model_path('vae'), **opensora.SMALL
    )
    with torch.no_grad():
        z = (temporal.encode(x).chunk(2, 1)[0] - model.vae.shift) / model.vae.scale
        video = sample(model, ['a panda riding a bike'], 1, 4.0, kind='rflow')
    assert (z.transpose(0, 1).flatten(1).std(1) - 1).abs().max() < 0.01  # unit scale
    assert video.shape == (1, 17, 3, 64, 64) and model.vae.image_vae.config.scaling_factor == model.vae.image_scale == 1


def test_the_linear_start_takes_each_place_alone():
    from vader_nb.nets.opensora_vae import CausalConv3d, ResBlock3d
    from vader_nb.pretrain.opensora_vae import linear_start, make_temporal

    torch.manual_seed(0)
    vae = linear_start(make_temporal())
    for m in vae.modules():
        if not isinstance(m, CausalConv3d):
            continue
        w, k = m.conv.weight.clone(), m.conv.kernel_size[0]
        w[..., k // 2, k // 2] = 0
        assert not w.any()  # nothing but the middle
    block, x = (
        next(m for m in vae.modules() if isinstance(m, ResBlock3d) and not hasattr(m, 'conv3')),
        torch.randn(1, 16, 5, 4, 4),
    )
    assert torch.equal(block(x), x)
    assert vae.encode(torch.randn(2, 4, 17, 4, 4)).chunk(2, 1)[1].mean() < -5  # a narrow posterior


def test_the_shipped_one_samples():
    model = load_opensora('small', 'cpu')
    video = sample(model, ['a panda riding a bike'], 2, 4.0, kind='rflow')
    assert video.shape == (1, 17, 3, 64, 64) and video.std() > 0.02
    x = torch.randn(1, 4, 17, 4, 4, generator=make_generator(0))
    assert torch.isfinite(model.vae.temporal_vae.encode(x)).all() and (model.vae.scale > 0).all()


@pytest.mark.parametrize(
    'prompt, words',
    [
        ('\u718a\u732b', 'write it in English'),
        ('a \u718a\u732b riding a bike', 'write it in English'),
        ('<panda>', 'for markup'),
        ('http://www.x.com', 'for markup'),
    ],
)
def test_cleaning_takes_nothing_away_in_silence(prompt, words):
    with pytest.raises(VaderError, match=words) as e:
        check_cleaned(prompt)
    assert '\n' not in str(e.value)


def test_cleaning_leaves_what_people_write():
    for prompt in ['', 'a panda', 'A panda, riding a bike!', 'caf\u00e9 at night', 'see https://a.b/c a panda']:
        check_cleaned(prompt)

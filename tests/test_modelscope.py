"07_modelscope: the adapter equals diffusers' pipeline; loading at both scales."

import json
import os
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel
from tiny_models import SCHEDULE, published_layout, tiny_pipeline
from vader_nb.core import VaderError, make_generator
from vader_nb.models import modelscope
from vader_nb.models.modelscope import ModelScope, load_modelscope, open_modelscope

PROMPTS, SIZE = ['a panda riding a bike', 'a fox with a hat'], (3, 32, 40)


@pytest.fixture(scope='module')
def pipe():
    p = tiny_pipeline()
    p.set_progress_bar_config(disable=True)
    return p


@pytest.fixture(scope='module')
def model(pipe):
    return ModelScope(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, SIZE)


def theirs(pipe, model, steps, guidance, output_type='pt'):
    "What diffusers' pipeline makes of the same noise."
    return pipe(
        PROMPTS,
        latents=model.noise(2, *SIZE, make_generator(0)),
        num_frames=3,
        height=32,
        width=40,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type=output_type,
    ).frames


def ours(model, sampler, guidance):
    "The raw sampling loop of notebook 06."
    cond, x, prev = model.encode(PROMPTS, *SIZE), model.noise(2, *SIZE, make_generator(0)) * sampler.init_sigma, None
    with torch.no_grad():
        for i, t in enumerate(sampler.timesteps):
            prev = sampler.step(i, x, model.predict(sampler.scale_input(x, i), t, cond, guidance), prev=prev)
            x = prev.x
        return x, model.decode(x)


@pytest.mark.parametrize(
    'kind, steps, guidance, alpha_one',
    [
        ('ddim', 6, 4.0, True),
        ('ddim', 6, 4.0, False),
        ('ddim', 5, 1.0, False),
        ('dpm++', 6, 4.0, True),
        ('dpm++', 5, 1.0, False),
        ('dpm++', 16, 4.0, False),
    ],
)
def test_equals_the_pipeline(pipe, model, kind, steps, guidance, alpha_one):
    model.scheduler = DDIMScheduler(**{**SCHEDULE, 'set_alpha_to_one': alpha_one})
    pipe.scheduler = (
        model.scheduler if kind == 'ddim' else DPMSolverMultistepScheduler.from_config(model.scheduler.config)
    )
    latents, video = ours(model, model.sampler(steps, kind), guidance)
    want = theirs(pipe, model, steps, guidance, 'latent')
    assert (latents - want).abs().max() < 1e-4 * want.abs().max()
    assert (video.clamp(0, 1) - theirs(pipe, model, steps, guidance)).abs().max() < 1e-4


def test_the_networks_are_frozen_and_evaluate(pipe):
    pipe = tiny_pipeline(1)
    model = ModelScope(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)
    for net in (model.denoiser, model.vae, model.text_encoder):
        assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_gradients_reach_the_latents_and_the_denoiser(model):
    p = model.denoiser.conv_out.weight.requires_grad_()
    x = model.noise(1, *SIZE, make_generator(0)).requires_grad_()
    pred = model.predict(x, 500, model.encode(PROMPTS[0]), 3.0)
    grads = torch.autograd.grad(model.decode(pred, [1]).mean(), [p, x])
    p.requires_grad_(False)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)


def test_one_decoded_frame_moves_its_own_latent_only(model):
    z = model.noise(2, *SIZE, make_generator(0)).requires_grad_()
    (g,) = torch.autograd.grad(model.decode(z, [1])[0].sum(), z)
    assert g[0, :, 1].abs().max() > 0 and g[0, :, [0, 2]].abs().max() == 0 and g[1].abs().max() == 0


def test_half_precision_inside_float32_outside():
    pipe = tiny_pipeline()
    model = ModelScope(
        *(n.bfloat16() for n in (pipe.unet, pipe.vae, pipe.text_encoder)), pipe.tokenizer, pipe.scheduler, SIZE
    )
    x, cond = model.noise(1, *SIZE, make_generator(0)), model.encode(PROMPTS[0])
    assert model.dtype == cond.embeds.dtype == torch.bfloat16
    pred = model.predict(x, 500, cond, 3.0)
    assert x.dtype == pred.dtype == model.decode(pred).dtype == torch.float32


def test_loads_the_published_layout(tmp_path, monkeypatch):
    pipe = published_layout(tmp_path)
    assert (tmp_path / 'unet/diffusion_pytorch_model.fp16.safetensors').exists() and not (
        tmp_path / 'tokenizer/tokenizer.json'
    ).exists()
    monkeypatch.setattr(modelscope, 'model_path', lambda name, scale: tmp_path)
    model = load_modelscope('full', 'cpu')
    assert model.dtype == model.vae.dtype == torch.float32 and model.native_size == (16, 256, 256)
    assert (
        model.tokenizer(PROMPTS).input_ids == pipe.tokenizer(PROMPTS).input_ids
        and model.tokenizer.model_max_length == 12
    )
    for net, made in ((model.denoiser, pipe.unet), (model.vae, pipe.vae), (model.text_encoder, pipe.text_encoder)):
        a, b = net.state_dict(), made.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k].half().float()) for k in a)
    plain = TextToVideoSDPipeline.from_pretrained(tmp_path, variant='fp16', torch_dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    frames = theirs(plain, model, 5, 3.0)
    assert (ours(model, model.sampler(5), 3.0)[1].clamp(0, 1) - frames).abs().max() < 1e-4


def test_loads_plain_names_too_and_in_half(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    assert open_modelscope(tmp_path, dtype=torch.float16).denoiser.dtype == torch.float16


def test_full_size_layout():
    with torch.device('meta'):
        unet = UNet3DConditionModel()
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
                hidden_act='gelu',
            )
        )
    shapes = {k: tuple(v.shape) for k, v in unet.state_dict().items()}
    assert sum(p.numel() for p in unet.parameters()) == 1411233860
    assert shapes['conv_in.weight'] == (320, 4, 3, 3) and shapes['conv_out.weight'] == (4, 320, 3, 3)
    assert shapes['transformer_in.proj_in.weight'] == (512, 320)
    assert shapes['down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight'] == (320, 1024)
    assert shapes['mid_block.temp_convs.0.conv1.2.weight'] == (1280, 1280, 3, 1, 1)
    assert sum(p.numel() for p in text.parameters()) == 340387840
    targets = [n for n, m in unet.named_modules() if n.endswith(tuple(ModelScope.lora_targets))]
    assert all('attn' in n for n in targets) and len(targets) % 4 == 0 and len(targets) > 200


@pytest.mark.parametrize('prompt', ['a panda riding a bike ' * 4, 'a zebra riding a bike', ''])
def test_prompts_it_cannot_read(model, prompt):
    with pytest.raises(VaderError) as e:
        model.encode([prompt])
    assert '\n' not in str(e.value)


def damaged(folder):
    unet = folder / 'unet/diffusion_pytorch_model.safetensors'
    yield 'truncated', lambda: os.truncate(unet, 5000)
    yield 'incomplete', lambda: save_file({k: v for k, v in load_file(unet).items() if 'mid_block' not in k}, unet)
    yield 'foreign', lambda: save_file({'a': torch.ones(3)}, unet)
    yield (
        'other size',
        lambda: (folder / 'unet/config.json').write_text(
            json.dumps({**json.loads((folder / 'unet/config.json').read_text()), 'block_out_channels': [16, 64]})
        ),
    )
    yield 'no file', lambda: unet.unlink()
    yield (
        'text encoder incomplete',
        lambda: save_file({'a': torch.ones(3)}, folder / 'text_encoder/model.safetensors', metadata={'format': 'pt'}),
    )
    yield 'no tokenizer', lambda: [f.unlink() for f in (folder / 'tokenizer').iterdir()]
    yield 'scheduler not JSON', lambda: (folder / 'scheduler/scheduler_config.json').write_text('{')


@pytest.mark.parametrize('case', range(8))
def test_damaged_checkpoints(tmp_path, case):
    tiny_pipeline().save_pretrained(tmp_path)
    name, damage = list(damaged(tmp_path))[case]
    damage()
    with pytest.raises(VaderError) as e:
        open_modelscope(tmp_path)
    assert '\n' not in str(e.value), name


def test_unknown_device(monkeypatch, tmp_path):
    monkeypatch.setattr(modelscope, 'model_path', lambda name, scale: tmp_path)
    with pytest.raises(VaderError):
        load_modelscope('small', 'tpu')


def test_the_shipped_folder_is_a_plain_pipeline_too():
    from vader_nb.zoo import model_path

    model, pipe = (
        load_modelscope('small', 'cpu'),
        TextToVideoSDPipeline.from_pretrained(model_path('modelscope'), torch_dtype=torch.float32),
    )
    pipe.set_progress_bar_config(disable=True)
    model.check_words = None  # a word of PROMPTS is not of the small world
    assert model.native_size == (8, 64, 64) and not any(p.requires_grad for p in model.denoiser.parameters())
    frames = theirs(pipe, model, 5, 4.0)
    assert (ours(model, model.sampler(5), 4.0)[1].clamp(0, 1) - frames).abs().max() < 1e-4


def passes(nets, run):
    "Items that go through each network while `run` runs."
    seen = dict.fromkeys(nets, 0)

    def count(name):
        return lambda module, args, kwargs: seen.update({name: seen[name] + len([*args, *kwargs.values()][0])})

    hooks = [net.register_forward_pre_hook(count(name), with_kwargs=True) for name, net in nets.items()]
    run()
    for h in hooks:
        h.remove()
    return seen


def test_asks_no_more_of_any_network_than_the_plain_pipeline(pipe):
    model = ModelScope(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, SIZE)
    nets = dict(unet=pipe.unet, text=pipe.text_encoder, decoder=pipe.vae.decoder)
    theirs = passes(
        nets, lambda: pipe(PROMPTS, num_frames=3, height=32, width=40, num_inference_steps=5, guidance_scale=4.0)
    )
    mine = passes(nets, lambda: ours(model, model.sampler(5), 4.0))
    assert mine['unet'] == theirs['unet'] == 5 * 2 * 2 and mine['decoder'] == theirs['decoder'] == 2 * 3
    assert 0 < mine['text'] <= theirs['text']
    assert passes(nets, lambda: ours(model, model.sampler(5), 4.0))['text'] == 0  # read once, kept

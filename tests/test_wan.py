"""Wan: boxes of pixels equal diffusers' decoder with and without checkpointing; samples and LoRA equal `WanPipeline`'s;
training, loading.
"""

from functools import partial

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tiny_models import WORDS
from vader_nb.core import VaderError, make_generator
from vader_nb.memory.lora import add_lora, load_lora, lora_parameters
from vader_nb.memory.checkpointing import checkpoint_activations
from vader_nb.models import wan
from vader_nb.nets import wan_vae
from vader_nb.nets.text import drop_text_encoder, read_embeddings
from vader_nb.models.wan import Wan, clean_prompt, export_lora, load_wan, open_wan
from vader_nb.nets.wan_vae import draw_box, draw_boxes, draw_clip, middle, runs, spans
from vader_nb.rewards.aesthetic import load_aesthetic
from vader_nb.diffusion.rollout import differentiable_latents, sample
from vader_nb.config import Config
from vader_nb.training.trainer import fit
from vader_nb.memory.tricks import use_tricks

PROMPTS = ['a panda riding a bike', 'a fox with a hat']


def close(ours, theirs, tol=1e-5):
    assert (ours - theirs).abs().max() <= tol * theirs.abs().max()


def words():
    vocab = {w: i for i, w in enumerate(['<pad>', '</s>', '<unk>', *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    tokenizer.pre_tokenizer, tokenizer.post_processor = (
        pre_tokenizers.Whitespace(),
        processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)]),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token='<pad>', eos_token='</s>', unk_token='<unk>', model_max_length=8
    )


def pipeline(seed=0):
    "A `WanPipeline` with random weights and the layers of the published one."
    torch.manual_seed(seed)
    net = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.2, 1.0]
    )
    for p in vae.decoder.conv_out.parameters():
        p.data.mul_(3)  # a random decoder is grey: make it speak
    text = UMT5EncoderModel(UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    pipe = WanPipeline(words(), text.eval(), vae.eval(), FlowMatchEulerDiscreteScheduler(shift=3.0), net.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter(pipe):
    return Wan(pipe.transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, (9, 32, 32), words=8)


def tiny(seed=0):
    return adapter(pipeline(seed))


def trained(model, rank=2, alpha=4):
    for i, p in enumerate(add_lora(model, rank=rank, alpha=alpha)):
        p.data.add_(0.1 * torch.randn(p.shape, generator=make_generator(i)))
    return model


@pytest.fixture(scope='module')
def model():
    return tiny()


# The decoder


@pytest.fixture(scope='module')
def decoded(model):
    "Latents of 21 frames, what diffusers makes of them, and the gradient of frames 6 and 13 to 14."
    z = torch.randn(1, 4, 6, 4, 4, generator=make_generator(0)).requires_grad_()
    video = model.vae.decode(z).sample
    assert video.shape == (1, 3, 21, 32, 32) and 0.1 < video.std() and (video.abs() < 1).float().mean() > 0.5
    (g,) = torch.autograd.grad(video[:, :, [6, 13, 14]].square().mean(), z)
    return z, video.detach(), g


def test_recomputing_a_layer_that_keeps_notes_goes_wrong(decoded):
    z, net = decoded[0], pipeline().vae.requires_grad_(False)
    for m in net.decoder.modules():
        if isinstance(m, WanResidualBlock):
            m.forward = partial(checkpoint, m.forward, use_reentrant=False)
    with pytest.raises((IndexError, RuntimeError)):
        torch.autograd.grad(net.decode(z).sample.sum(), z)


@pytest.mark.parametrize(
    'box',
    [
        ((0, 20), (0, 31), (0, 31)),
        ((0, 0), (3, 9), (28, 31)),
        ((1, 2), (0, 31), (0, 0)),
        ((7, 9), (11, 11), (20, 25)),
        ((20, 20), (16, 31), (0, 31)),
    ],
)
def test_a_box_is_a_part_of_the_clip(model, decoded, box):
    z, video, _ = decoded
    (t0, t1), (y0, y1), (x0, x1) = box
    with torch.no_grad():
        mine = draw_box(model.vae.decoder, middle(model.vae.decoder, model.vae.post_quant_conv(z)), *box)
    assert mine.shape == (1, 3, t1 - t0 + 1, y1 - y0 + 1, x1 - x0 + 1)
    close(mine.clamp(-1, 1), video[:, :, t0 : t1 + 1, y0 : y1 + 1, x0 : x1 + 1])


@pytest.mark.parametrize('side, most, layers', [(240, 8, False), (240, 8, True), (17, 1, True)])
def test_boxes_have_the_values_and_gradients_of_the_whole(decoded, side, most, layers):
    z, video, true = decoded
    model = tiny()
    checkpoint_activations(model, layers)
    mine = draw_boxes(model.vae.decoder, model.vae.post_quant_conv(z), [6, 13, 14], side, most).clamp(-1, 1)
    close(mine, video[:, :, [6, 13, 14]])
    close(torch.autograd.grad(mine.square().mean(), z)[0], true)


def test_a_box_is_given_no_more_than_it_hangs_on(model):
    "What the stages of an inner box are given is smaller than the clip, and growing it further changes nothing."
    parts = list(wan_vae.stages(model.vae.decoder))
    last = wan_vae.way_back(parts, ((60, 60), (240, 247), (240, 247)), (60, 60))
    assert (
        all(n[1] - n[0] < 50 for _, *sides in last for n in sides) and last[-1][0] == (58, 60) and last[0][0][1] == 15
    )
    assert wan_vae.way_back(parts, ((0, 0), (0, 0), (0, 0)), (60, 60))[0][0] == (0, 0)


def test_without_gradients_the_notes_are_used(model, decoded):
    z, video, _ = decoded
    with torch.no_grad():
        close(draw_clip(model.vae.decoder, model.vae.post_quant_conv(z), [0, 7]).clamp(-1, 1), video[:, :, [0, 7]])


def test_asked_frames(model):
    x = torch.randn(1, 4, 3, 4, 4, generator=make_generator(0))
    with torch.no_grad():
        whole = model.decode(x)
    assert whole.shape == (1, 9, 3, 32, 32)
    for frames in ([0], [8], [1, 4, 5], [7, 2]):
        with torch.no_grad():
            close(model.decode(x, frames), whole[:, frames])
        close(model.decode(x.requires_grad_(), frames).detach(), whole[:, frames])
        x.requires_grad_(False)
    with pytest.raises(VaderError, match='from 0 to 8'):
        model.decode(x, [9])


def test_runs_and_spans():
    assert list(runs([0, 3, 4, 5, 12], 2)) == [(0, 0), (3, 3), (4, 5), (12, 12)] and list(runs(range(9), 4)) == [
        (0, 2),
        (3, 5),
        (6, 8),
    ]
    assert spans(832, 240) == [(0, 207), (208, 415), (416, 623), (624, 831)] and spans(5, 5) == [(0, 4)]


# The pipeline


@pytest.mark.parametrize('guidance', [5.0, 1.0])
def test_samples_equal_the_pipelines(guidance):
    pipe = pipeline()
    model, x = adapter(pipe), torch.randn(2, 4, 3, 4, 6, generator=make_generator(3))
    theirs = pipe(
        PROMPTS,
        num_frames=9,
        height=32,
        width=48,
        num_inference_steps=5,
        guidance_scale=guidance,
        latents=x,
        max_sequence_length=8,
        output_type='pt',
    ).frames
    model.noise = lambda *size, **kw: x
    close(sample(model, PROMPTS, 5, guidance, kind='rflow', size=(9, 32, 48)), theirs, 1e-4)


def test_prompts_are_read_as_the_pipeline_reads_them(model):
    cond = model.encode(['  a \n panda ', 'a fox'])
    theirs, empty = pipeline().encode_prompt(['  a \n panda ', 'a fox'], max_sequence_length=8, device='cpu')
    close(cond.embeds, theirs), close(cond.uncond, empty)
    assert clean_prompt('  A cafÃ©\n &amp;lt;3 ') == 'A café <3'


def test_prompts_are_read_once_and_the_encoder_goes(tmp_path):
    model, other = tiny(), tiny(1)
    before = model.encode(PROMPTS)
    drop_text_encoder(model, PROMPTS, tmp_path / 'words.safetensors')
    other.text_encoder = None
    read_embeddings(other, tmp_path / 'words.safetensors')
    for m in (model, other):
        assert (
            m.text_encoder is None
            and torch.equal(m.encode(PROMPTS).embeds, before.embeds)
            and torch.equal(m.encode(PROMPTS).uncond, before.uncond)
        )
    with pytest.raises(VaderError, match='text encoder is gone'):
        other.encode('a dog')
    other.caption = 9, 16
    with pytest.raises(VaderError, match='another text encoder'):
        read_embeddings(other, tmp_path / 'words.safetensors')


def test_bad_input(model):
    with pytest.raises(VaderError, match='use 5 or 9'):
        model.noise(1, 8)
    with pytest.raises(VaderError, match='multiples of 16'):
        model.encode('a fox', 9, 40, 32)
    with pytest.raises(VaderError, match='shorten'):
        model.encode('a fox ' * 5)
    for args in [('ddim',), ('rflow', 0.5)]:
        with pytest.raises(VaderError, match='rectified flow'):
            model.sampler(3, *args)
    with pytest.raises(VaderError, match='no LoRA'):
        export_lora(model, 'nowhere')
    with pytest.raises(VaderError, match='only at the full scale'):
        load_wan('small')
    with pytest.raises(VaderError, match='one by one'):
        use_tricks(tiny(), load_aesthetic('small', 'cpu'), 'vae_slicing')


def test_sizes(model):
    assert (
        model.size() == [9, 32, 32]
        and model.size(None, 48) == [9, 48, 32]
        and model.noise(2, 81, 480, 832).shape == (2, 4, 21, 60, 104)
    )


# Training


@pytest.mark.parametrize('where', ['last', 'x0'])
@pytest.mark.parametrize(
    'words',
    [
        'checkpointing',
        'checkpointing batch_slicing activation_offload model_offload encoder_offload',
        'batch_slicing activation_offload',
    ],
)
def test_the_gradient_is_the_same_with_every_trick(where, words):
    "With guidance and LoRA; under bfloat16 the tricks only repeat the same roundings."

    def gradient(words, dtype=torch.float32):
        model, reward = trained(tiny()), load_aesthetic('small', 'cpu')
        use_tricks(model, reward, words)
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            z = differentiable_latents(
                model,
                model.encode(PROMPTS),
                model.noise(2, generator=make_generator(0)),
                model.sampler(3),
                5.0,
                2,
                where,
                make_generator(1),
            )
            scores = reward(model.decode(z, [3]), PROMPTS)
        return torch.cat([g.flatten() for g in torch.autograd.grad(-scores.mean(), lora_parameters(model))])

    true = gradient('')
    assert true.isfinite().all() and (true != 0).float().mean() > 0.9
    assert (gradient(words) - true).norm() < 1e-4 * true.norm()
    half = gradient('', torch.bfloat16)
    assert (gradient(words, torch.bfloat16) - half).norm() < 2 * (half - true).norm() < 0.5 * true.norm()


def test_two_steps_of_training_and_the_lora_in_a_plain_pipeline(tmp_path):
    config = Config(
        sampler='rflow',
        where='last',
        T=2,
        K=1,
        frames=9,
        height=32,
        width=32,
        batch_size=2,
        decoded_frames=1,
        rank=2,
        alpha=4.0,
        guidance=5.0,
        train_steps=2,
        lr=0.01,
    )
    model = tiny()
    records = list(fit(model, load_aesthetic('small', 'cpu'), PROMPTS, config, tmp_path / 'run', PROMPTS[:1]))
    assert [r['step'] for r in records] == [1, 2] and all(r['gradient_norm'] > 0 for r in records)
    export_lora(model, tmp_path / 'run/lora')
    ours, fresh = sample(model, PROMPTS, 2, 5.0, kind='rflow'), tiny()
    load_lora(fresh, tmp_path / 'run/lora')  # peft's own layout is still there
    close(sample(fresh, PROMPTS, 2, 5.0, kind='rflow'), ours)
    pipe = pipeline()
    before, x = (
        sample(adapter(pipe), PROMPTS, 2, 5.0, kind='rflow'),
        torch.randn(2, 4, 3, 4, 4, generator=make_generator(0)),
    )
    pipe.load_lora_weights(tmp_path / 'run/lora')
    theirs = pipe(
        PROMPTS,
        num_frames=9,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=5.0,
        latents=x,
        max_sequence_length=8,
        output_type='pt',
    ).frames
    assert (before - ours).abs().max() > 1e-3
    close(theirs, ours, 1e-4)
    (config,) = pipe.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (2, 4)


# Loading


@pytest.fixture
def folder(tmp_path):
    "Random weights in the published layout, whose scheduler is UniPC."
    pipe = pipeline()
    pipe.scheduler = UniPCMultistepScheduler(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0)
    pipe.save_pretrained(tmp_path / 'wan')
    return tmp_path / 'wan'


def test_loads_the_published_layout(folder, model):
    again = open_wan(folder, folder, native_size=(9, 32, 32), words=8)
    assert again.sampler(4).sigmas == model.sampler(4).sigmas != again.sampler(5).sigmas
    assert not any(
        p.requires_grad or p.is_meta for n in (again.denoiser, again.vae, again.text_encoder) for p in n.parameters()
    )
    close(sample(again, PROMPTS, 2, 5.0, kind='rflow'), sample(model, PROMPTS, 2, 5.0, kind='rflow'))


def test_half_precision_inside_float32_outside(folder):
    model = open_wan(folder, folder, dtype=torch.bfloat16, native_size=(9, 32, 32), words=8)
    formats = {n: p.dtype for n, p in model.denoiser.named_parameters()}
    assert (
        model.dtype == formats['blocks.0.attn1.to_q.weight'] == torch.bfloat16
        and formats['scale_shift_table'] == torch.float32
    )  # as in the pipeline
    assert model.vae.dtype == torch.float32
    x, cond = model.noise(1, generator=make_generator(0)), model.encode(PROMPTS[0])
    pred = model.predict(x, 500, cond, 3.0)
    assert pred.dtype == model.decode(pred).dtype == torch.float32 and pred.isfinite().all()
    add_lora(model)
    assert model.dtype == torch.bfloat16


def test_with_embeddings_the_text_encoder_is_not_asked_for(folder, monkeypatch, tmp_path):
    model = open_wan(folder, folder, words=512)
    drop_text_encoder(model, PROMPTS, tmp_path / 'words.safetensors')
    monkeypatch.setattr(
        wan,
        'model_path',
        lambda name, scale: folder if name == 'wan' else pytest.fail('the text encoder was asked for'),
    )
    full = load_wan(device='cpu', embeddings=tmp_path / 'words.safetensors')
    assert (
        full.text_encoder is None
        and full.size() == [81, 480, 832]
        and torch.equal(full.encode(PROMPTS).embeds, model.encode(PROMPTS).embeds)
    )


@pytest.mark.parametrize(
    'case, told',
    [
        ('truncated', 'no usable WanTransformer3DModel'),
        ('missing', 'not a whole WanTransformer3DModel'),
        ('gone', 'scheduler_config.json'),
        ('another', 'no usable|not a whole'),
    ],
)
def test_damaged_folders(folder, case, told):
    file = folder / 'transformer/diffusion_pytorch_model.safetensors'
    if case == 'truncated':
        file.write_bytes(file.read_bytes()[:999])
    if case == 'missing':
        save_file({k: v for k, v in load_file(file).items() if 'proj_out' not in k}, file)
    if case == 'gone':
        (folder / 'scheduler/scheduler_config.json').unlink()
    if case == 'another':
        file.write_bytes((folder / 'vae/diffusion_pytorch_model.safetensors').read_bytes())
    with pytest.raises(VaderError, match=told) as e:
        open_wan(folder)
    assert '\n' not in str(e.value)

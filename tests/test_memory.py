"LoRA, checkpointing, frame subsets and mixed precision: exactness on a tiny random ModelScope."
import json
import pytest, torch
from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from peft import PeftModel

from vader_nb.core import VaderError, make_generator
from vader_nb.memory.lora import add_lora, load_lora, lora_off, lora_parameters, save_lora
from vader_nb.memory.checkpointing import autocast, checkpoint_activations, checkpoint_layers
from vader_nb.memory.lora import saved_bytes
from vader_nb.training.vader import pick_frames
from vader_nb.models.base import Condition, VideoModel

class Tiny(VideoModel):
    "Random networks of ModelScope's classes without a text encoder."
    name = 'tiny'
    def __init__(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet = UNet3DConditionModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
                                        layers_per_block=1, down_block_types=('CrossAttnDownBlock3D', 'DownBlock3D'),
                                        up_block_types=('UpBlock3D', 'CrossAttnUpBlock3D'))
            for p in unet.parameters():
                if p.abs().sum() == 0: p.data.normal_(0, .1)  # the zero-initialised last convolutions would hide the temporal layers
            self.vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, latent_channels=4,
                                     down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2).eval().requires_grad_(False)
        super().__init__(unet.eval(), DDIMScheduler(clip_sample=False))
        self.vae_scale = 2
    def denoise(self, x, t, embeds): return self.denoiser(x, t, embeds).sample
    def to_pixels(self, z): return self.vae.decode(z).sample / 2 + .5

@pytest.fixture
def model(): return Tiny()

@pytest.fixture
def x(): return torch.randn(2, 4, 3, 8, 8, generator=make_generator(0))

cond = Condition(torch.randn(2, 5, 12, generator=make_generator(1)), torch.randn(2, 5, 12, generator=make_generator(2)))

def pretend_training(model, seed=3):
    with torch.no_grad():
        for p in lora_parameters(model): p.add_(.2 * torch.randn(p.shape, generator=make_generator(seed)))

def gradient(model, x, frames=None):
    loss = model.decode(model.predict(x, 500, cond, 3.), frames).square().mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, lora_parameters(model))])

@torch.no_grad()
def test_lora_starts_at_the_base_and_switches_off(model, x):
    base = model.predict(x, 500, cond)
    learn = add_lora(model, rank=4, alpha=2)
    assert torch.allclose(model.predict(x, 500, cond), base, atol=1e-5) and not model.denoiser.training
    names = {n for n, p in model.denoiser.named_parameters() if p.requires_grad}
    assert len(names) == len(learn) and all('lora_' in n for n in names)
    pretend_training(model)
    assert not torch.allclose(model.predict(x, 500, cond), base, atol=1e-3)
    with lora_off(model): assert torch.allclose(model.predict(x, 500, cond), base, atol=1e-5)
    assert not torch.allclose(model.predict(x, 500, cond), base, atol=1e-3)
    assert all(p.requires_grad for p in learn)

def test_lora_update_is_alpha_over_rank(model):
    weight = dict(model.denoiser.named_parameters())['mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight'].clone()
    add_lora(model, rank=4, alpha=2)
    pretend_training(model)
    layer = model.denoiser.base_model.model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    A, B, v = layer.lora_A['default'].weight, layer.lora_B['default'].weight, torch.randn(3, weight.shape[1])
    assert torch.allclose(layer(v), v @ (weight + 2/4 * B @ A).T, atol=1e-5)

def test_lora_depends_on_its_seed_alone():
    def made(seed, noise):
        torch.manual_seed(noise)
        weights = add_lora(Tiny(), seed=seed)
        return torch.cat([p.flatten() for p in weights]), torch.rand(1)
    (a, next_a), (b, _), (c, _) = made(0, 1), made(0, 2), made(1, 1)
    torch.manual_seed(1)
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(next_a, torch.rand(1))

def test_half_precision_base_keeps_float32_adapters(model):
    model.denoiser.half()
    assert {p.dtype for p in add_lora(model)} == {torch.float32}
    assert model.denoiser.base_model.model.conv_in.weight.dtype == torch.float16

def test_saved_lora_gives_the_same_frames_in_plain_diffusers(model, x, tmp_path):
    add_lora(model, rank=4, alpha=2)
    pretend_training(model)
    save_lora(model, tmp_path/'lora')
    config = json.loads((tmp_path/'lora'/'adapter_config.json').read_text())
    assert (config['r'], config['lora_alpha']) == (4, 2) and {p.name for p in (tmp_path/'lora').iterdir()} == {'adapter_config.json', 'adapter_model.safetensors'}
    plain = Tiny()
    pipe = TextToVideoSDPipeline(plain.vae, None, None, plain.denoiser, plain.scheduler)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, tmp_path/'lora')
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(prompt_embeds=cond.embeds, negative_prompt_embeds=cond.uncond, latents=x, num_inference_steps=4, guidance_scale=3.,
                  height=16, width=16, num_frames=3, output_type='pt').frames
    sampler = model.sampler(4)
    with torch.no_grad():
        for i, t in enumerate(sampler.timesteps): x = sampler.step(i, x, model.predict(x, t, cond, 3.)).x
        ours = model.decode(x / plain.vae.config.scaling_factor).clamp(0, 1)
    assert (ours - frames).abs().max() < 1e-4 and frames.std() > .01

def test_load_replaces_and_trains_on(model, x, tmp_path):
    add_lora(model, rank=4, alpha=2)
    pretend_training(model)
    save_lora(model, tmp_path/'lora')
    tuned = model.predict(x, 500, cond)
    other = Tiny()
    add_lora(other, rank=2, alpha=8)
    pretend_training(other, seed=9)
    learn = load_lora(other, tmp_path/'lora')
    assert torch.equal(other.predict(x, 500, cond), tuned)
    assert len(learn) == len(lora_parameters(model)) and gradient(other, x).abs().sum() > 0

def test_bad_lora(model, tmp_path):
    with pytest.raises(VaderError, match='no whole LoRA'): load_lora(model, tmp_path)
    with pytest.raises(VaderError, match='no layer'): add_lora(model, targets=['to_nothing'])
    with pytest.raises(VaderError, match='positive'): add_lora(model, rank=0)
    add_lora(model)
    with pytest.raises(VaderError, match='already'): add_lora(model)

@pytest.mark.parametrize('file, text', [('adapter_model.safetensors', 'cut'), ('adapter_config.json', '{"peft_type": "LORA"'), ('adapter_config.json', '{}')])
def test_damaged_lora(file, text, model, x, tmp_path):
    "A file cut short is refused in one line, and the adapter that was there stays."
    add_lora(model, rank=4)
    pretend_training(model)
    save_lora(model, tmp_path/'lora')
    (tmp_path/'lora'/file).write_text(text)
    before = model.predict(x, 500, cond)
    with pytest.raises(VaderError, match='no whole LoRA') as e: load_lora(model, tmp_path/'lora')
    assert '\n' not in str(e.value) and torch.equal(model.predict(x, 500, cond), before)

def test_lora_of_another_network(model, tmp_path):
    add_lora(model, rank=4)
    save_lora(model, tmp_path/'lora')
    other = Tiny()
    other.denoiser = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(VaderError, match='another network'): load_lora(other, tmp_path/'lora')

def test_checkpointing_is_exact_and_saves(model, x):
    add_lora(model)
    pretend_training(model)
    whole = lambda: model.decode(model.predict(x, 500, cond, 3.))
    plain, g = saved_bytes(whole, model.denoiser, model.vae), gradient(model, x)
    checkpoint_activations(model)
    checkpoint_activations(model) # twice is once
    less, g2 = saved_bytes(whole, model.denoiser, model.vae), gradient(model, x)
    assert (g - g2).abs().max() <= 1e-6 * g.abs().max() and (g != 0).all() and less < plain / 3
    checkpoint_activations(model, on=False)
    assert saved_bytes(whole, model.denoiser, model.vae) == plain
    assert torch.equal(gradient(model, x), g)

def test_checkpointing_replays_dropout(model, x):
    "In training mode the recomputation must draw the same dropout mask."
    add_lora(model)
    pretend_training(model)
    model.denoiser.train()
    torch.manual_seed(0); g = gradient(model, x)
    checkpoint_activations(model)
    torch.manual_seed(0); g2 = gradient(model, x)
    assert (g - g2).abs().max() <= 1e-6 * g.abs().max()

def test_checkpointing_unknown_network():
    with pytest.raises(VaderError, match='LAYERS'): checkpoint_layers(torch.nn.Linear(2, 2))

def test_single_frames_are_unbiased(model, x):
    add_lora(model)
    pretend_training(model)
    ones = torch.stack([gradient(model, x, [k]) for k in range(3)]).mean(0)
    full = gradient(model, x)
    assert (ones - full).abs().max() < 1e-5 * full.abs().max()

def test_pick_frames():
    assert pick_frames(8, None, make_generator(0)) == pick_frames(8, 9, make_generator(0)) == list(range(8))
    rng, counts = make_generator(0), torch.zeros(8)
    for _ in range(2000):
        frames = pick_frames(8, 3, rng)
        assert len(set(frames)) == 3 and frames == sorted(frames)
        counts[frames] += 1
    assert (counts / 2000 - 3/8).abs().max() < .05
    with pytest.raises(VaderError, match='at least one'): pick_frames(8, 0, rng)

def test_autocast():
    layer, v = torch.nn.Linear(4, 4), torch.randn(2, 4)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast('cpu', dtype): assert layer(v).dtype == dtype
